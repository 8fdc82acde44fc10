"""Compile a function for a GPU or TPU that this machine does not have, and count what the program would run.

A kernel is one launch on a GPU, or one operation in the program of a TPU. Those in a loop count as often as the loop
runs. XLA's own estimate of cycles exists for TPUs only; it does not agree with measurements in each case, so only
compare programs by it. A GPU may run the kernels of a short loop as one graph, so the number of launches overstates
their cost.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax

from benchmarks.gpu_target import H200

# Several processes may load the compiler for TPUs, and none of them looks for a TPU.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

TARGETS = {"h200": "NVIDIA H200", "v5e": "TPU v5e", "v6e": "TPU v6e"}

# Instructions that run nothing.
_FREE = frozenset(
    (
        *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "partition-id"),
        *("copy-done", "async-done", "slice-done", "custom-call-done", "AllocateBuffer"),
    )
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
_SHAPE = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|\S+"
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?%?[\w.-]+ = ({_SHAPE}) ([\w-]+)\((.*)$", re.MULTILINE)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """One instruction of a program: the type of its result, its name, its operands and attributes."""

    shape: str
    name: str
    rest: str

    def attribute(self, pattern: str) -> str | None:
        """Return the group of the first match."""
        found = re.search(pattern, self.rest)
        return found and found[1]


class Loop(NamedTuple):
    """The instructions of one loop, or those outside of all loops at depth 0."""

    depth: int
    runs: int  # how often its body runs in all
    kernels: tuple[str, ...]  # their names
    cycles: int  # XLA's estimate for one run of the body; 0 on a GPU


class Counts(NamedTuple):
    """What the compiled program for one target runs and holds."""

    kernels: int
    cycles: int
    temp_bytes: int
    loops: tuple[Loop, ...]
    text: str  # of the program


@cache
def device(target: str) -> Any:
    """Return a device of a target, for which JAX can compile. Raises an ImportError if its compiler is missing."""
    from jax.experimental import topologies  # noqa: PLC0415

    try:
        if target == "h200":
            return topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices[0]
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:2x2").devices[0]
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise ImportError(f"no compiler for {TARGETS[target]}; install the extra `accelerators`: {error}") from error


def missing(target: str) -> str | None:
    """Return why there is no compiler for a target, or None."""
    try:
        device(target)
    except ImportError as error:
        return str(error).partition("\n")[0]
    return None


def count(f: Callable[..., Any], args: Any, target: str) -> Counts:
    """Compile `f(*args)` for a target, and count. Only the shapes of `args` matter."""
    sharding = jax.sharding.SingleDeviceSharding(device(target))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    fresh = partial(f)  # JAX may have traced f itself before, with other numbers of `jaxseq.tuning`
    program = jax.jit(fresh).lower(*shapes).compile()
    text = program.as_text() or ""
    loops = tuple(loops_of(text, scalars_are_free=target != "h200"))
    kernels = sum(loop.runs * len(loop.kernels) for loop in loops)
    cycles = sum(loop.runs * loop.cycles for loop in loops)
    memory = program.memory_analysis()
    return Counts(kernels, cycles, 0 if memory is None else memory.temp_size_in_bytes, loops, text)


def loops_of(text: str, *, scalars_are_free: bool) -> Iterator[Loop]:
    """Return the loops of a program. On a TPU, scalars are computed beside other work."""
    found = {m[2]: [Instruction(*i) for i in _INSTRUCTION.findall(m[3])] for m in _COMPUTATION.finditer(text)}
    entry = next(m[2] for m in _COMPUTATION.finditer(text) if m[1])

    def walk(name: str, runs: int, depth: int) -> Iterator[Loop]:
        kernels, cycles, inner = [], 0, []
        for instruction in found[name]:
            if instruction.name == "while":
                body = instruction.attribute(r"body=%?([\w.-]+)")
                inner += walk(str(body), runs * _trip_count(found, instruction), depth + 1)
            elif instruction.name in ("call", "conditional"):
                for called in re.findall(r"(?:to_apply|computation)=%?([\w.-]+)", instruction.rest):
                    same, *deeper = walk(called, runs, depth)
                    kernels, cycles, inner = [*kernels, *same.kernels], cycles + same.cycles, inner + deeper
            elif _runs(instruction, scalars_are_free):
                kernels.append(instruction.attribute(r'custom_call_target="([^"]+)"') or instruction.name)
                cycles += int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        yield Loop(depth, runs, tuple(kernels), cycles)
        yield from inner

    return walk(entry, 1, 0)


def _runs(instruction: Instruction, scalars_are_free: bool) -> bool:
    """Return whether an instruction is a kernel."""
    target = instruction.attribute(r'custom_call_target="([^"]+)"')
    scalar = "[]" in instruction.shape and not instruction.shape.startswith("(")
    return (target or instruction.name) not in _FREE and not (scalars_are_free and scalar)


def _trip_count(found: dict[str, list[Instruction]], loop: Instruction) -> int:
    """Return how often a loop runs: what XLA states, or else the bound in its condition."""
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = found[str(loop.attribute(r"condition=%?([\w.-]+)"))]
    bounds = [i.rest.partition(")")[0] for i in condition if i.name == "constant"]
    return max((int(bound) for bound in bounds if bound.isdigit()), default=1)
