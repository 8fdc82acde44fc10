"""Recurrences: jaxseq's gradient by hand, against autodiff of its plain twin and against other libraries.

    python -m benchmarks.recurrence [--rounds N] [--json FILE] [--picture FILE] [--quick]

The gradient is that of all parameters, the first state and the input, with the outputs beside it. Ratios say how many
times as long as `hand`. Temporary bytes with a gradient hold all that its backward sweep keeps of the forward one.
How the other libraries differ is said in `benchmarks/recurrent_peers.py`.
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
    """What all candidates of a problem get, in our layout."""

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
    """Every library at one size, forward and with the gradient."""
    case = data(kind, size)
    libraries = {"hand": ours(kind), "twin": Library(getattr(reference, kind))}
    libraries |= {name: make(kind, size.D, size.H) for name, (make, kinds) in LIBRARIES.items() if kind in kinds}
    yield Problem(f"{kind} forward, {size}", "hand", [forward(*named, case) for named in libraries.items()])
    yield gradients(f"{kind} forward + gradient, {size}", case, libraries)


def with_lengths(size: Size) -> Iterator[Problem]:
    """Padded batches. In Flax, ys of the padding isn't zero, and is left out: of its gradients by zero cotangents."""
    case = data("lstm", size)
    lengths = jax.random.randint(jax.random.key(1), (size.B,), size.T // 2, size.T + 1)
    live = (jnp.arange(size.T)[:, None] < lengths)[..., None]
    case = case._replace(cotangents=(case.cotangents[0], jnp.where(live, case.cotangents[1], 0)))
    flax = in_flax("lstm", size.D, size.H)
    if flax is not None:
        flax = flax._replace(xs=(flax.xs[0], lambda xs: jnp.where(live, xs, 0)))
    yield gradients(f"lstm with lengths, {size}", case, {"hand": ours("lstm"), "flax": flax}, lengths=lengths)
    yield in_time_only("lengths", size, case, lengths=lengths)


def with_resets(size: Size) -> Iterator[Problem]:
    """Episodes, about four in each sequence, against what one writes without `resets`."""
    case = data("lstm", size)
    resets = jax.random.bernoulli(jax.random.key(1), 4 / size.T, (size.T, size.B))
    libraries = {"hand": ours("lstm"), "where in a scan": Library(where_in_a_scan)}
    yield gradients(f"lstm with resets, {size}", case, libraries, resets=resets)
    yield in_time_only("resets", size, case, resets=resets)


def in_time_only(feature: str, size: Size, case: Case, **options: jax.Array) -> Problem:
    """What a feature costs. Without it the same is not computed, so that nothing is compared."""
    found = [gradient("hand", ours("lstm"), case, **options), gradient("hand, whole", ours("lstm"), case)]
    silent = [candidate._replace(common=lambda _: ()) for candidate in found]
    return Problem(f"lstm with {feature} or whole, in time only, {size}", "hand", silent)


def batch_major(size: Size) -> Problem:
    """xs and ys (B, T, ·), against a swap of axes around the op."""

    def around(params: LSTMParams, carry: LSTMState, xs: jax.Array) -> tuple[LSTMState, jax.Array]:
        carry, ys = jaxseq.lstm(params, carry, swapped(xs))
        return carry, swapped(ys)

    runs = {"hand": partial(jaxseq.lstm, time_axis=1), "hand, swapped": around}
    libraries = {name: Library(run, xs=(swapped, swapped)) for name, run in runs.items()}
    return gradients(f"lstm batch major, {size}", data("lstm", size), libraries)


def truncated(size: Size, k: int) -> Problem:
    """Backpropagation through k steps, against a scan that stops the gradient of its state: the twin."""
    libraries = {
        "hand": ours("lstm", truncation=k),
        "stop_gradient": Library(partial(reference.lstm, truncation=k)),
    }
    return gradients(f"lstm truncated, {size} truncation={k}", data("lstm", size), libraries)


def checkpointed(size: Size) -> Problem:
    """A long sequence: its temporary bytes are the point."""
    libraries = {
        "hand": ours("lstm"),
        "hand, checkpoint": ours("lstm", checkpoint="auto"),
        "flax": in_flax("lstm", size.D, size.H),
    }
    return gradients(f"lstm long, {size}", data("lstm", size), libraries)


def gradients(title: str, case: Case, libraries: Mapping[str, Library | None], **options: jax.Array) -> Problem:
    """Outputs and gradients of all of them."""
    found = [gradient(name, library, case, **options) for name, library in libraries.items()]
    return Problem(title, "hand", found)


def forward(name: str, library: Library | None, case: Case) -> Candidate:
    """One library's outputs."""
    if library is None:
        return Candidate(name, None)
    args = library.params[0](case.params), library.carry[0](case.carry), library.xs[0](case.xs)
    return Candidate(name, library.run, args, lambda out: outputs(library, out), library.jit)


def gradient(name: str, library: Library | None, case: Case, **options: jax.Array) -> Candidate:
    """One library's outputs and gradients. Options are arguments too: XLA would fold constants."""
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
    """A state and a sequence in our layout."""
    carry, ys = out
    return library.carry[1](carry), library.xs[1](ys)


def ours(kind: str, **options: Any) -> Library:
    return Library(partial(getattr(jaxseq, kind), **options))


def where_in_a_scan(
    params: LSTMParams, carry: LSTMState, xs: jax.Array, resets: jax.Array
) -> tuple[LSTMState, jax.Array]:
    """As one would write it with JAX alone."""

    def body(state: LSTMState, at: tuple[jax.Array, jax.Array]) -> tuple[LSTMState, jax.Array]:
        x, reset = at
        state = jax.tree.map(lambda s: jnp.where(reset[:, None], 0, s), state)
        return reference.lstm_cell(params, state, x)

    return lax.scan(body, carry, (xs, resets))


def data(kind: str, size: Size) -> Case:
    """Random, all of it."""
    B, T, D, H = size
    key_params, *keys = jax.random.split(jax.random.key(0), 6)
    w_x, w_h, *biases = getattr(jaxseq, f"{kind}_init")(key_params, D, H)
    h, y = jnp.zeros((B, H)), jnp.zeros((T, B, H))
    state = LSTMState(h, h) if kind == "lstm" else h
    params = PARAMS[kind](w_x, w_h, *like(keys[0], biases))
    xs = normal(keys[1], (T, B, D), jnp.float32)
    return Case(params, like(keys[2], state), xs, like(keys[3], (state, y)))


def like(key: jax.Array, tree: Any) -> Any:
    """Random arrays of these shapes."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([normal(k, a.shape, jnp.float32) for k, a in zip(keys, leaves, strict=True)])


def main(argv: Any = None) -> None:
    about = "Recurrences by hand, against autodiff of their twins and against other libraries."
    harness.main(problems, about, ["flax", "equinox", "keras", "torch"], argv)


if __name__ == "__main__":
    main()
