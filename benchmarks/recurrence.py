"""Recurrences of jaxseq against autodiff of the reference implementation and against other libraries.

    python -m benchmarks.recurrence [--rounds N] [--json FILE] [--picture FILE] [--quick]

Each candidate computes the outputs and the gradient of all parameters, the initial state and the input. Ratios are
times relative to `jaxseq`. With a gradient, temporary bytes include the residuals of the forward pass.
`benchmarks/recurrent_peers.py` lists the differences between the libraries.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import jaxseq
from benchmarks import harness
from benchmarks.harness import Candidate, Problem
from benchmarks.recurrent_peers import LIBRARIES, PARAMS, Library, in_flax, swapped
from jaxseq import LSTMParams, LSTMState, reference
from jaxseq._init import normal

Function = Callable[..., Any]


class Size(NamedTuple):
    """xs (T, B, D), states (B, H)."""

    B: int
    T: int
    D: int
    H: int

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} D={self.D} H={self.H}"


class Case(NamedTuple):
    """Inputs of all candidates of a problem, in the layout of jaxseq."""

    params: Any
    carry: Any
    xs: jax.Array
    cotangents: tuple[Any, jax.Array]


KINDS = ("rnn", "gru", "lstm")
SIZES = (
    Size(32, 128, 128, 128),
    Size(16, 512, 64, 64),
    Size(1, 1024, 64, 64),
    Size(128, 64, 32, 32),
    Size(64, 128, 256, 256),
    Size(8, 2048, 64, 64),
)
FEATURES = (SIZES[0], SIZES[2], SIZES[-1])
TRUNCATED = (Size(1, 1024, 64, 64), Size(4, 1024, 64, 64))
LONG = Size(8, 4096, 64, 64)
TINY = Size(2, 5, 3, 4)


def problems(quick: bool) -> Iterator[Problem]:
    for kind in KINDS:
        for size in (TINY,) if quick else SIZES:
            yield from plain(kind, size)
    for size in (TINY,) if quick else FEATURES:
        yield from with_lengths(size)
        yield from with_resets(size)
        yield batch_major(size)
    for size in (TINY,) if quick else TRUNCATED:
        yield truncated(size, 2 if quick else 64)
    yield checkpointed(TINY if quick else LONG)


def plain(kind: str, size: Size) -> Iterator[Problem]:
    """Compare all libraries at one size, forward and with the gradient."""
    case = data(kind, size)
    libraries = {"jaxseq": ours(kind), "reference": Library(getattr(reference, kind))}
    libraries |= {name: make(kind, size.D, size.H) for name, (make, kinds) in LIBRARIES.items() if kind in kinds}
    yield Problem(f"{kind} forward, {size}", "jaxseq", [forward(*named, case) for named in libraries.items()])
    yield gradients(f"{kind} forward + gradient, {size}", case, libraries)


def with_lengths(size: Size) -> Iterator[Problem]:
    """Padded batches. Flax does not set `ys` to zero in the padding, so padding is masked, with zero cotangents."""
    case = data("lstm", size)
    lengths = jax.random.randint(jax.random.key(1), (size.B,), size.T // 2, size.T + 1)
    valid = (jnp.arange(size.T)[:, None] < lengths)[..., None]
    case = case._replace(cotangents=(case.cotangents[0], jnp.where(valid, case.cotangents[1], 0)))
    flax = in_flax("lstm", size.D, size.H)
    if flax is not None:
        flax = flax._replace(xs=(flax.xs[0], lambda xs: jnp.where(valid, xs, 0)))
    yield gradients(f"lstm with lengths, {size}", case, {"jaxseq": ours("lstm"), "flax": flax}, lengths=lengths)
    yield in_time_only("lengths", size, case, lengths=lengths)


def with_resets(size: Size) -> Iterator[Problem]:
    """Compare `resets`, about four per sequence, with the same in plain JAX."""
    case = data("lstm", size)
    resets = jax.random.bernoulli(jax.random.key(1), 4 / size.T, (size.T, size.B))
    libraries = {"jaxseq": ours("lstm"), "where in a scan": Library(where_in_a_scan)}
    yield gradients(f"lstm with resets, {size}", case, libraries, resets=resets)
    yield in_time_only("resets", size, case, resets=resets)


def in_time_only(feature: str, size: Size, case: Case, **options: jax.Array) -> Problem:
    """Measure the cost of a feature. The result without it differs, so the outputs are not compared."""
    candidates = [gradient("jaxseq", ours("lstm"), case, **options), gradient("jaxseq, without", ours("lstm"), case)]
    without_outputs = [candidate._replace(common=lambda _: ()) for candidate in candidates]
    return Problem(f"lstm with {feature} or without, time only, {size}", "jaxseq", without_outputs)


def batch_major(size: Size) -> Problem:
    """Compare `time_axis=1` with a transposition before and after the op."""

    def around(params: LSTMParams, carry: LSTMState, xs: jax.Array) -> tuple[LSTMState, jax.Array]:
        carry, ys = jaxseq.lstm(params, carry, swapped(xs))
        return carry, swapped(ys)

    runs = {"jaxseq": partial(jaxseq.lstm, time_axis=1), "jaxseq, swapped": around}
    libraries = {name: Library(run, xs=(swapped, swapped)) for name, run in runs.items()}
    return gradients(f"lstm batch major, {size}", data("lstm", size), libraries)


def truncated(size: Size, k: int) -> Problem:
    """Compare truncation with the reference implementation, a scan with `stop_gradient` on its state."""
    libraries = {
        "jaxseq": ours("lstm", truncation=k),
        "stop_gradient": Library(partial(reference.lstm, truncation=k)),
    }
    return gradients(f"lstm truncated, {size} truncation={k}", data("lstm", size), libraries)


def checkpointed(size: Size) -> Problem:
    """Compare temporary bytes for a long sequence."""
    libraries = {
        "jaxseq": ours("lstm"),
        "jaxseq, checkpoint": ours("lstm", checkpoint="auto"),
        "flax": in_flax("lstm", size.D, size.H),
    }
    return gradients(f"lstm long, {size}", data("lstm", size), libraries)


def gradients(title: str, case: Case, libraries: Mapping[str, Library | None], **options: jax.Array) -> Problem:
    """Compare outputs and gradients of all libraries."""
    found = [gradient(name, library, case, **options) for name, library in libraries.items()]
    return Problem(title, "jaxseq", found)


def forward(name: str, library: Library | None, case: Case) -> Candidate:
    """Return the candidate that computes the outputs of one library."""
    if library is None:
        return Candidate(name, None)
    args = library.params[0](case.params), library.carry[0](case.carry), library.xs[0](case.xs)
    return Candidate(name, library.run, args, lambda out: outputs(library, out), library.jit)


def gradient(name: str, library: Library | None, case: Case, **options: jax.Array) -> Candidate:
    """Return the candidate that computes outputs and gradients. Options are arguments, because XLA folds constants."""
    if library is None:
        return Candidate(name, None)

    def run(options: dict[str, jax.Array], *args: Any) -> Any:
        return library.with_gradient(partial(library.run, **options))(*args)

    def common(result: Any) -> Any:
        out, (params, *others) = result
        return outputs(library, out), (library.params[1](params), outputs(library, others))

    (_, carry, xs), (c_bar, ys_bar) = case[:3], case.cotangents
    cotangents = library.carry[0](c_bar), library.xs[0](ys_bar)
    args = options, cotangents, library.params[0](case.params), library.carry[0](carry), library.xs[0](xs)
    return Candidate(name, run, args, common, library.jit)


def outputs(library: Library, out: Any) -> tuple[Any, Any]:
    """Convert a state and a sequence to the layout of jaxseq."""
    carry, ys = out
    return library.carry[1](carry), library.xs[1](ys)


def ours(kind: str, **options: Any) -> Library:
    return Library(partial(getattr(jaxseq, kind), **options))


def where_in_a_scan(
    params: LSTMParams, carry: LSTMState, xs: jax.Array, resets: jax.Array
) -> tuple[LSTMState, jax.Array]:
    """LSTM with resets in plain JAX."""

    def body(state: LSTMState, at: tuple[jax.Array, jax.Array]) -> tuple[LSTMState, jax.Array]:
        x, reset = at
        state = jax.tree.map(lambda s: jnp.where(reset[:, None], 0, s), state)
        return reference.lstm_cell(params, state, x)

    return lax.scan(body, carry, (xs, resets))


def data(kind: str, size: Size) -> Case:
    """Return random parameters, inputs and cotangents."""
    B, T, D, H = size
    key_params, *keys = jax.random.split(jax.random.key(0), 6)
    w_x, w_h, *biases = getattr(jaxseq, f"{kind}_init")(key_params, D, H)
    h, y = jnp.zeros((B, H)), jnp.zeros((T, B, H))
    state = LSTMState(h, h) if kind == "lstm" else h
    params = PARAMS[kind](w_x, w_h, *like(keys[0], biases))
    xs = normal(keys[1], (T, B, D), jnp.float32)
    return Case(params, like(keys[2], state), xs, like(keys[3], (state, y)))


def like(key: jax.Array, tree: Any) -> Any:
    """Return a tree of random arrays with the shapes of `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([normal(k, a.shape, jnp.float32) for k, a in zip(keys, leaves, strict=True)])


def main(argv: Any = None) -> None:
    about = "Recurrences of jaxseq against autodiff of the reference implementation and other libraries."
    harness.main(problems, about, ["flax", "equinox", "keras", "torch"], argv)


if __name__ == "__main__":
    main()
