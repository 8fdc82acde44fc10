"""Recurrences with the batch sharded over two devices: communication, and time of a gradient.

    python -m benchmarks.sharding [--rounds N] [--json FILE] [--picture FILE] [--quick]

Each device has half of the batch and all parameters, so the gradient of a parameter is a sum over devices. Autodiff of
a scan computes this sum at every step, the hand-derived rule only once. Above the times of each problem, the benchmark
prints the communication in the compiled program (`tests/support/hlo.py`): the number of collectives executed in one
gradient, how many of them are in a loop over time, and the total size of their results per device.

The mesh is automatic. For `jaxseq, explicit` it is explicit, and each device runs the rule on its part of the batch.

Each candidate computes the outputs and the gradient of all parameters. The two devices are threads of one CPU, which
communicate through memory. `docs/scale.md` predicts the times on accelerators.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import harness
from benchmarks.harness import Candidate, Problem
from benchmarks.recurrence import KINDS, TINY, Size, data, ours, outputs
from benchmarks.recurrent_peers import LIBRARIES, Library
from tests.support import hlo

PEERS = ("flax", "equinox", "haiku", "keras")  # libraries on JAX
SIZES = (Size(32, 128, 128, 128), Size(16, 512, 64, 64), Size(8, 2048, 64, 64))
DEVICES = 2


def problems(quick: bool) -> Iterator[Problem]:
    for kind in KINDS:
        for size in (TINY,) if quick else SIZES:
            problem = over_devices(kind, size)
            print(f"{problem.title}: communication", *map(line, problem.candidates), sep="\n", flush=True)
            yield problem


def over_devices(kind: str, size: Size) -> Problem:
    """Compare all libraries on JAX. Arrays are sharded in the layout of jaxseq, then converted."""
    peers = {name: LIBRARIES[name] for name in PEERS}
    libraries = {"jaxseq": ours(kind)}
    libraries |= {name: make(kind, size.D, size.H) for name, (make, kinds) in peers.items() if kind in kinds}
    params, carry, xs, (c_bar, ys_bar) = data(kind, size)

    def placed(axis: AxisType) -> Any:
        mesh = jax.make_mesh((DEVICES,), ("d",), devices=jax.devices()[:DEVICES], axis_types=(axis,))
        place = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
        return (place(c_bar, "d"), place(ys_bar, None, "d")), place(params), place(carry, "d"), place(xs, None, "d")

    found = [candidate(name, library, placed(AxisType.Auto)) for name, library in libraries.items()]
    found.insert(1, candidate("jaxseq, explicit", ours(kind), placed(AxisType.Explicit)))
    return Problem(f"{kind}, {size}, {DEVICES} devices", "jaxseq", found)


def candidate(name: str, library: Library | None, args: tuple[Any, ...]) -> Candidate:
    """Return the candidate that computes the outputs and the gradient of all parameters."""
    if library is None:
        return Candidate(name, None)

    def run(cotangents: Any, params: Any, carry: Any, xs: Any) -> Any:
        out, pull = jax.vjp(lambda params: library.run(params, carry, xs), params)
        return out, pull(cotangents)[0]

    def common(result: Any) -> Any:
        out, gradient = result
        return outputs(library, out), library.params[1](gradient)

    (c_bar, ys_bar), params, carry, xs = args
    cotangents = library.carry[0](c_bar), library.xs[0](ys_bar)
    return Candidate(
        name, run, (cotangents, library.params[0](params), library.carry[0](carry), library.xs[0](xs)), common
    )


def collectives(candidate: Candidate) -> list[hlo.Collective]:
    """Return the collectives of the timed program. It is compiled separately, so that `measure` compiles it again."""
    run = candidate.run
    assert run is not None
    compiled = jax.jit(partial(run)).lower(*candidate.args).compile().as_text()
    assert compiled is not None
    return hlo.collectives(compiled)


def line(candidate: Candidate) -> str:
    """Format the communication of one candidate."""
    if candidate.run is None:
        return f"  {candidate.name:<18}{'not installed':>21}"
    found = collectives(candidate)
    if any(c.times is None for c in found):
        return f"  {candidate.name:<18}in a loop of unknown length"
    runs = [(c.times or 0, c) for c in found]
    count, in_loop = sum(n for n, _ in runs), sum(n for n, c in runs if c.loops)
    megabytes = sum(n * c.bytes for n, c in runs) / 1e6
    return f"  {candidate.name:<18}{count:>6} collectives,{in_loop:>6} of them in a loop,{megabytes:>9.2f} MB"


def main(argv: Any = None) -> None:
    about = "Recurrences with the batch sharded over two devices: communication and time."
    harness.main(problems, about, ["flax", "equinox", "keras"], argv)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
