"""Every cell of `jaxseq.cells` and a user-defined cell against autodiff of a scan over the same cell. Convolutional
recurrences are also compared with Keras and Haiku.

    python -m benchmarks.cells [--rounds N] [--json FILE] [--picture FILE] [--quick]

Each candidate computes the outputs and the gradient of all parameters, the initial state and the input.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxseq
from benchmarks import harness
from benchmarks.harness import Candidate, Problem, with_gradient
from benchmarks.recurrence import Size, like
from benchmarks.recurrent_peers import Library, same, swapped
from jaxseq import Cell, LSTMParams, LSTMState, cells, convert, reference
from jaxseq._init import normal

SIZES = (Size(32, 128, 64, 64), Size(4, 1024, 64, 64), Size(16, 64, 256, 256))
TINY = Size(2, 5, 3, 4)


class LeakyParams(NamedTuple):
    """Parameters of a user-defined cell, with a rate for each unit."""

    w_x: Any
    w_h: Any
    b: Any
    rate: Any


def leaky_step(a: Any, h: jax.Array, p: LeakyParams) -> jax.Array:
    """Step without a hand-derived pullback."""
    rate = jax.nn.sigmoid(p.rate)
    return (1 - rate) * h + rate * jnp.tanh(a[0])


LEAKY = Cell("leaky", gates="h", step=leaky_step, params=LeakyParams)


def leaky_init(key: Any, D: int, H: int) -> LeakyParams:
    return LeakyParams(*jaxseq.rnn_init(key, D, H), jnp.zeros(H))


def projected_init(key: Any, D: int, H: int) -> Any:
    """Initialize with half as many outputs as units."""
    return cells.projected_lstm_init(key, D, H, H // 2)


CELLS = {
    "leaky, JAX's pullback": (LEAKY, leaky_init),
    "peephole_lstm": (cells.peephole_lstm, cells.peephole_lstm_init),
    "projected_lstm": (cells.projected_lstm, projected_init),
    "layer_norm_lstm": (cells.layer_norm_lstm, cells.layer_norm_lstm_init),
    "layer_norm_gru": (cells.layer_norm_gru, cells.layer_norm_gru_init),
    "classic_gru": (cells.classic_gru, cells.classic_gru_init),
    "mgu": (cells.mgu, cells.mgu_init),
    "indrnn": (cells.indrnn, partial(cells.indrnn_init, steps=100)),
    "slstm": (cells.slstm, partial(cells.slstm_init, heads=4)),
}


def problems(quick: bool) -> Iterator[Problem]:
    for name, (cell, init) in CELLS.items():
        for size in (TINY,) if quick else SIZES:
            yield any_cell(name, cell, init, size)
    small = (((6,), (3,)), ((5, 4), (3, 2)), ((4, 3, 4), (2, 2, 2)))
    large = (((512,), (5,)), ((32, 32), (3, 3)), ((12, 12, 12), (3, 3, 3)))
    for space, kernel_size in small if quick else large:
        T, B, C, F = (3, 2, 2, 3) if quick else (10, 4, 8, 16)
        yield convolutional(T, B, C, F, space, kernel_size)


def any_cell(name: str, cell: Cell, init: Any, size: Size) -> Problem:
    """Compare `jaxseq.recurrence` with autodiff of a scan over the same step."""
    B, T, D, H = size
    params, xs = init(jax.random.key(0), D, H), normal(jax.random.key(1), (T, B, D), jnp.float32)
    run, reference_op = (partial(f, cell) for f in (jaxseq.recurrence, reference.recurrence))
    carry = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run, params, None, xs)[0])
    cotangents = like(jax.random.key(2), jax.eval_shape(run, params, carry, xs))
    found = [
        Candidate(label, with_gradient(f), (cotangents, params, carry, xs))
        for label, f in (("jaxseq", run), ("jax", reference_op))
    ]
    return Problem(f"{name}, {size}", "jaxseq", found, tolerance=1e-3)


def convolutional(T: int, B: int, C: int, F: int, space: tuple[int, ...], kernel_size: tuple[int, ...]) -> Problem:
    """Compare ConvLSTMs with `len(space)` spatial axes."""
    params = jaxseq.conv_lstm_init(jax.random.key(0), kernel_size, C, F)
    xs = normal(jax.random.key(1), (T, B, *space, C), jnp.float32)
    zeros = jnp.zeros((B, *space, F))
    carry = LSTMState(zeros, zeros)
    cotangents = like(jax.random.key(2), jax.eval_shape(jaxseq.conv_lstm, params, carry, xs))
    libraries = {
        "jaxseq": Library(jaxseq.conv_lstm),
        "jax": Library(reference.conv_lstm),
        "keras": in_keras(params, xs),
        "haiku": in_haiku(params, xs),
    }
    found = []
    for name, library in libraries.items():
        if library is None:
            found.append(Candidate(name, None))
            continue
        args = library.params[0](params), library.carry[0](carry), library.xs[0](xs)
        seeds = library.carry[0](cotangents[0]), library.xs[0](cotangents[1])

        def common(result: Any, library: Library = library) -> Any:
            (end, ys), (p_bar, c_bar, xs_bar) = result
            ends = library.carry[1](end), library.carry[1](c_bar)
            return ends, library.xs[1](ys), library.params[1](p_bar), library.xs[1](xs_bar)

        found.append(Candidate(name, with_gradient(library.run), (seeds, *args), common))
    sizes = "x".join(map(str, space))
    return Problem(f"conv_lstm, B={B} T={T} {sizes}x{C} to {F}, kernel {kernel_size}", "jaxseq", found, tolerance=1e-3)


def in_keras(params: LSTMParams, xs: jax.Array) -> Library | None:
    """ConvLSTM of Keras, which is batch major."""
    keras = harness.peer("keras")
    if keras is None:
        return None
    kernel_size, filters = params.w_h.shape[:-2], params.w_h.shape[-2]
    kind = getattr(keras.layers, f"ConvLSTM{len(kernel_size)}D")
    layer = kind(filters, kernel_size, padding="same", return_sequences=True, return_state=True)
    layer.build((xs.shape[1], xs.shape[0], *xs.shape[2:]))
    others = [variable.value for variable in layer.non_trainable_variables]

    def run(weights: Any, carry: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
        (ys, *carry), _ = layer.stateless_call(weights, others, xs, initial_state=carry)
        return carry, ys

    return Library(
        run,
        (partial(convert.to_keras, "conv_lstm"), lambda ws: LSTMParams(*ws)),
        (list, LSTMState._make),
        (swapped, swapped),
    )


def in_haiku(params: LSTMParams, xs: jax.Array) -> Library | None:
    """ConvLSTM of Haiku, with its second bias set to zero."""
    hk = harness.peer("haiku")
    if hk is None:
        return None
    kernel_size, F = params.w_h.shape[:-2], params.w_h.shape[-2]
    cell = getattr(hk, f"Conv{len(kernel_size)}DLSTM")

    def unroll(carry: Any, xs: jax.Array) -> Any:
        return hk.dynamic_unroll(cell(xs.shape[2:-1], F, kernel_size), xs, carry)

    transformed = hk.without_apply_rng(hk.transform(unroll))

    def run(params: Any, carry: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
        return transformed.apply(params, carry, xs)[::-1]

    convert_params = partial(convert.to_haiku, "conv_lstm")
    back = lambda gradient: jax.vjp(convert_params, params)[1](gradient)[0]  # noqa: E731
    return Library(run, (convert_params, back), (lambda s: hk.LSTMState(*s), LSTMState._make), (same, same))


def main(argv: Any = None) -> None:
    about = "Cells of jaxseq against autodiff of the same cells and other libraries."
    harness.main(problems, about, ["keras"], argv)


if __name__ == "__main__":
    main()
