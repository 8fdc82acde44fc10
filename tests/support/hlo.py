"""What a compiled program does, read from its HLO text, counted without a clock.

    hlo = jax.jit(f).lower(*args).compile().as_text()

A program is a tree of computations: the entry calls fusions, branches and the bodies of loops, and these call others.
`collectives` and `flops` walk it from the entry and know of every instruction in how many loops it stands and how often
it runs in one call of the program: the product of the trip counts of these loops, which XLA writes beside a loop where
it knows them (`known_trip_count`, which every `lax.scan` has). A loop's condition runs once more than its body. Of a
conditional every branch counts, so that numbers are upper bounds there.

All shapes are those of one device: the text is the program that each of them runs.
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
# What a compiler hands to a library of products, whose sizes only that library's own configuration tells.
LIBRARY_PRODUCT = re.compile(r'custom_call_target="([^"]*(?:gemm|matmul|conv)[^"]*)"', re.IGNORECASE)


class Collective(NamedTuple):
    """One collective of a program, its `-start` form included.

    bytes: what it leaves on each device, all results of a variadic one together. Of an all-reduce that is as much as it
        takes, of an all-gather n times, of a reduce-scatter an n-th.
    loops: in how many loops it stands.
    times: how often it runs in one call; None where the trip count of a loop around it isn't known.
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
    """An instruction as the program meets it; `shapes` are those of its operands."""

    instruction: Instruction
    shapes: tuple[str, ...]
    loops: int
    times: int | None


def collectives(hlo: str) -> list[Collective]:
    """All collectives, in the order in which the program meets them."""
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
    """Multiplications and additions of all matrix products and convolutions, of one call and one device.

    A product y[N, g] = sum_k x[N, k] w[k, g], with any number of axes each, takes 2 |y| K, K being the size of all k
    together. In a convolution K is C_in / groups times the taps that fall on the input: what falls on padding, or
    between the elements of a dilated input, is not counted, nor is it by XLA. With `once` a loop's body counts once,
    however often it runs, as in XLA's own `cost_analysis()`.

    Raises:
        ValueError: where the trip count of a loop around a product isn't known, or a library is called for a product.
    """
    total = 0
    for instruction, shapes, _, times in places(hlo):
        own = 0
        if instruction.opcode == "dot":
            own = _dot(instruction, *shapes)
        elif instruction.opcode == "convolution":
            own = _convolution(instruction, *shapes)
        elif instruction.opcode == "custom-call" and (target := LIBRARY_PRODUCT.search(instruction.attributes)):
            raise ValueError(f"a product is a custom call, `{target[1]}`, of which HLO doesn't tell the sizes")
        if own and times is None and not once:
            raise ValueError(f"the trip count of the loop around `{instruction.attributes}` isn't known")
        total += own * (1 if once or times is None else times)
    return total


def places(hlo: str) -> Iterator[Place]:
    """Every instruction that the entry reaches, as often as it is called from different places."""
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
    """The text behind `name = `. A shape is an array's, without spaces, or a tuple of shapes."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = len(opcode) + _closing(rest[len(opcode) :])
    operands = re.findall(r"%([\w.-]+)", rest[len(opcode) : end])
    return Instruction(shape, opcode, tuple(operands), rest[end:])


def _closing(text: str) -> int:
    """Where the parenthesis that opens the text is closed: the index behind it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"a parenthesis is not closed: {text}")


def _called(instruction: Instruction) -> list[tuple[str, str]]:
    """(role, name) of the computations it calls."""
    found = CALLED.findall(instruction.attributes)
    for names in BRANCHES.findall(instruction.attributes):
        found += [("branch", name.strip().removeprefix("%")) for name in names.split(",")]
    return found


def _parts(shape: str) -> list[str]:
    """The shapes that a tuple consists of."""
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    return sum(math.prod(_sizes(size)) * _width(dtype) // 8 for dtype, size in ARRAY.findall(shape))


def _width(dtype: str) -> int:
    """Bits of one element: the first number in the name of a dtype, as in f8e4m3fn, c64, u32."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) if bits else {"pred": 8}.get(dtype, 0)  # a token has none


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _axes(shape: str) -> list[int]:
    """The sizes of one array."""
    found = ARRAY.match(shape)
    if found is None:
        raise ValueError(f"expected the shape of an array, got {shape}")
    return _sizes(found[2])


def _dot(instruction: Instruction, lhs: str, _: str) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    K = math.prod(_axes(lhs)[axis] for axis in _sizes(contracted[1] if contracted else ""))
    return 2 * math.prod(_axes(instruction.shape)) * K


def _convolution(instruction: Instruction, lhs: str, rhs: str) -> int:
    """2 B C_out (C_in / groups) times the pairs of an output position and a tap that meet on an input element.

    With stride s, padding p before, dilation d of the window and e of the input, tap k of output o reads the element i
    for which i e = o s - p + k d. Axes are told apart by labels: b0f_0io->b0f.
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
