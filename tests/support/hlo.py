"""Parse the HLO text of a compiled program, and count its collectives and floating-point operations.

    hlo = jax.jit(f).lower(*args).compile().as_text()

A program is a tree of computations: the entry calls fusions, branches and loop bodies, which call other computations.
`collectives` and `flops` traverse this tree from the entry. For every instruction they determine the number of
enclosing loops, and how often it runs in one call of the program: the product of the trip counts of these loops. XLA
annotates a loop with its trip count if it is known (`known_trip_count`), as it is for every `lax.scan`. A loop's
condition runs once more than its body. All branches of a conditional count, so the result is then an upper bound.

All shapes are per device: the text is the program that each device runs.
"""

import math
import re
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

# %name (parameters) -> result {
#   %instruction = ...
# }
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$", re.MULTILINE)
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Matrix products that the compiler delegates to a library, with their sizes in the library's configuration only.
LIBRARY_PRODUCT = re.compile(r'custom_call_target="([^"]*(?:gemm|matmul|conv)[^"]*)"', re.IGNORECASE)


class Collective(NamedTuple):
    """One collective of a program, synchronous or in its `-start` form.

    bytes: the size of its results on each device, summed over the results of a variadic collective. Relative to the
        operands, an all-reduce returns as many bytes, an all-gather n times as many, a reduce-scatter 1 / n.
    loops: the number of enclosing loops.
    times: how often it runs in one call; None if the trip count of an enclosing loop is unknown.
    """

    kind: str
    bytes: int
    loops: int
    times: int | None


class Instruction(NamedTuple):
    """`name = shape opcode(operands), attributes`."""

    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class Place(NamedTuple):
    """An instruction at one place in the call tree; `shapes` are those of its operands."""

    instruction: Instruction
    shapes: tuple[str, ...]
    loops: int
    times: int | None


def collectives(hlo: str) -> list[Collective]:
    """Return all collectives, in program order."""
    found = []
    for instruction, _, loops, times in places(hlo):
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            shape = instruction.shape
            if kind != instruction.opcode and kind in ("all-gather", "collective-permute"):
                shape = _parts(shape)[1]  # (operands, results, ...)
            found.append(Collective(kind, _bytes(shape), loops, times))
    return found


def flops(hlo: str, once: bool = False) -> int:
    """Count the multiplications and additions of all matrix products and convolutions, for one call and one device.

    A product y[N, g] = sum_k x[N, k] w[k, g], where N, g and k may be several axes, takes 2 |y| K operations; K is the
    total size of k. For a convolution, K is C_in / groups times the number of taps that fall on the input. As in
    XLA, taps on padding or between the elements of a dilated input do not count. With `once`, a loop body counts once,
    however often it runs, as in XLA's `cost_analysis()`.

    Raises:
        ValueError: if the trip count of a loop around a product is unknown, or if a product is a library call.
    """
    total = 0
    for instruction, shapes, _, times in places(hlo):
        own = 0
        if instruction.opcode == "dot":
            own = _dot(instruction, *shapes)
        elif instruction.opcode == "convolution":
            own = _convolution(instruction, *shapes)
        elif instruction.opcode == "custom-call" and (target := LIBRARY_PRODUCT.search(instruction.attributes)):
            raise ValueError(f"expected products whose sizes are in the HLO text, got a custom call, `{target[1]}`")
        if own and times is None and not once:
            raise ValueError(f"expected a known trip count of the loop around `{instruction.attributes}`")
        total += own * (1 if once or times is None else times)
    return total


def places(hlo: str) -> Iterator[Place]:
    """Yield every instruction reachable from the entry, once for each path of calls to it."""
    computations, entry = {}, ""
    for is_entry, name, body in COMPUTATION.findall(re.sub(r"/\*index=\d+\*/", "", hlo)):
        computations[name] = {name: _parsed(text) for name, text in INSTRUCTION.findall(body)}
        entry = name if is_entry else entry
    if not entry:
        raise ValueError("expected the HLO text of a module, with an ENTRY computation")

    def walk(name: str, loops: int, times: int | None) -> Iterator[Place]:
        own = computations[name]
        for instruction in own.values():
            shapes = tuple(own[operand].shape for operand in instruction.operands if operand in own)
            yield Place(instruction, shapes, loops, times)
            in_loop = instruction.opcode == "while"
            known = TRIP_COUNT.search(instruction.attributes)
            for role, called in _called(instruction):
                trips: int | None = 1
                if in_loop:
                    trips = int(known[1]) + (role == "condition") if known else None
                yield from walk(called, loops + in_loop, None if times is None or trips is None else times * trips)

    return walk(entry, 0, 1)


def _parsed(text: str) -> Instruction:
    """Parse the text after `name = `. A shape is that of an array, without spaces, or a tuple of shapes."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = len(opcode) + _closing(rest[len(opcode) :])
    operands = re.findall(r"%([\w.-]+)", rest[len(opcode) : end])
    return Instruction(shape, opcode, tuple(operands), rest[end:])


def _closing(text: str) -> int:
    """Return the index after the parenthesis that closes the one at the start of the text."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"expected balanced parentheses, got {text}")


def _called(instruction: Instruction) -> list[tuple[str, str]]:
    """Return (role, name) of each computation that the instruction calls."""
    found = CALLED.findall(instruction.attributes)
    for names in BRANCHES.findall(instruction.attributes):
        found += [("branch", name.strip().removeprefix("%")) for name in names.split(",")]
    return found


def _parts(shape: str) -> list[str]:
    """Split a tuple shape into its elements."""
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _bytes(shape: str) -> int:
    """Return the bytes of an array, or of all arrays of a tuple."""
    return sum(math.prod(_sizes(size)) * _width(dtype) // 8 for dtype, size in ARRAY.findall(shape))


def _width(dtype: str) -> int:
    """Return the bits of one element: the first number in the name of the dtype, as in f8e4m3fn, c64, u32."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) if bits else {"pred": 8}.get(dtype, 0)  # a token has no bits


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _axes(shape: str) -> list[int]:
    """Return the axis sizes of one array."""
    found = ARRAY.match(shape)
    if found is None:
        raise ValueError(f"expected the shape of an array, got {shape}")
    return _sizes(found[2])


def _dot(instruction: Instruction, lhs: str, _: str) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    K = math.prod(_axes(lhs)[axis] for axis in _sizes(contracted[1] if contracted else ""))
    return 2 * math.prod(_axes(instruction.shape)) * K


def _convolution(instruction: Instruction, lhs: str, rhs: str) -> int:
    """Return 2 B C_out (C_in / groups) times the number of pairs (output position, tap) that fall on an input element.

    With stride s, padding p before, kernel dilation d and input dilation e, tap k of output o reads the element i for
    which i e = o s - p + k d. Labels such as b0f_0io->b0f identify the axes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    shapes = lhs, rhs, instruction.shape
    x, w, y = (
        dict(zip(label, _axes(shape), strict=True)) for label, shape in zip(labels.groups(), shapes, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    options = dict(item.split("=") for item in window[1].split()) if window else {}

    def option(name: str, axis: int, default: int) -> int:
        return int(options[name].split("x")[axis].partition("_")[0]) if name in options else default

    meet = 1
    for axis, label in enumerate(sorted(label for label in y if label.isdigit())):
        s, d, e = (option(name, axis, 1) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        p = option("pad", axis, 0)
        reads = [o * s - p + k * d for o, k in product(range(y[label]), range(w[label]))]
        meet *= sum(0 <= i <= (x[label] - 1) * e and i % e == 0 for i in reads)
    return 2 * y["b"] * y["f"] * w["i"] * meet
