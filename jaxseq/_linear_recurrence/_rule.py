r"""The linear recurrence and its gradient.

    h_t = a_t h_{t-1} + x_t,    y_t = h_t              t = 1 .. T, in processing order, elementwise

Let g_t be the cotangent of h_t, from y_t and from the steps after t. Then

    g_t = ȳ_t + a_{t+1} g_{t+1},    g_T = ȳ_T + h̄_T
    x̄_t = g_t,    ā_t = g_t h_{t-1},    h̄_0 = a_1 g_1

So the backward pass of a linear recurrence is a linear recurrence in the opposite direction. It reads no state. Only ā
does, from the states of the forward pass, which are its outputs: in one product over all of time, or if a is constant
in time, as a sum in the loop. There is nothing to store besides a and the outputs. The products are those of JAX's
cotangents, without conjugates, for complex numbers too.

    a constant in time or over the batch    ā is the sum over these axes
    padding    h_t = h_{t-1}, y_t = 0: g passes through, x̄_t = ā_t = 0
    reset before step t    h_{t-1} is replaced by zero: ā_t = 0, and g_{t-1} = ȳ_{t-1}
    truncation k    a_t g_t does not reach g_{t-1} at t = k, 2k, ...
    rounded outputs    where y is narrower than h, the states are stored too
    checkpoint    no state is stored. A second forward pass, from h_0, computes the states for ā. Every interval gives
                  this program: the backward pass does not need the states of one piece of time after those of another

    code            here
    steps.a         a
    before          h_{t-1}, zero after a reset
    g, h_bar        g, and h̄_T or h̄_0

Source: E. Martin and C. Cundy, Parallelizing linear recurrent neural nets over sequence length (2018), section 2.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _mesh, _precision, _time
from jaxseq._both_modes import Rule, call_in_both_modes
from jaxseq._linear_recurrence._shards import entering
from jaxseq._linear_recurrence._solve import Algorithm, Mask, Steps, backward, forward, step


class Inputs(NamedTuple):
    """The arrays of a recurrence, time first, with axes of size one where `a` is constant."""

    a: jax.Array
    carry: jax.Array  # in the dtype of the state between steps
    x: jax.Array
    valid: Mask
    reset: Mask
    start: Mask = None  # True where truncation cuts the gradient of the state before a step

    @property
    def steps(self) -> Steps:
        return Steps(self.a, self.valid, self.reset)


class Options(NamedTuple):
    """What is decided once per call. Static and hashable."""

    algorithm: Algorithm
    reverse: bool
    stores_states: bool  # else the backward pass computes them again
    shards: tuple[str, ...] = ()  # the mesh axes that shard time, where every device has its own steps


def run(options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Return (h_T, ys), ys zero in padding."""
    hand, forward, pull, plain = (partial(f, options) for f in (_recurrence, _forward, _pull, _plain))
    return call_in_both_modes(Rule(hand, forward, pull, plain), _mesh.align_varying(inputs))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    return _forward(options, inputs)[0]


def _forward(options: Options, inputs: Inputs) -> tuple[tuple[jax.Array, jax.Array], tuple[Inputs, jax.Array, Any]]:
    """Return (h_T, ys), and the inputs, the first state, and the states, or None if they are computed again."""
    dtype = inputs.x.dtype
    rounded = dtype != options.algorithm.dtype and options.stores_states

    def emit(h: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return h.astype(dtype), h if rounded else None

    first = _first_state(options, inputs)
    end, (ys, states) = forward(options.algorithm, inputs.steps, inputs.x, first, reverse=options.reverse, emit=emit)
    states = (states if rounded else ys) if options.stores_states else None
    return (end, ys), (inputs, first, states)


def _first_state(options: Options, inputs: Inputs) -> jax.Array:
    """Return the state before the first step of this device."""
    if not options.shards:
        return inputs.carry
    nothing = lambda h: None  # noqa: E731
    end, _ = forward(options.algorithm, inputs.steps, inputs.x, inputs.carry, reverse=options.reverse, emit=nothing)
    return inputs.carry + entering(options.shards, inputs.steps, inputs.x, end, reverse=options.reverse)


def _pull(
    options: Options, residuals: tuple[Inputs, jax.Array, Any], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Inputs]:
    inputs, first, states = residuals
    h_bar, y_bar = map(jnp.asarray, cotangents)
    algorithm, reverse = options.algorithm, options.reverse
    if states is None:
        states = forward(algorithm, inputs.steps, inputs.x, first, reverse=reverse, emit=lambda h: h)[1]
    before = _before(options, inputs, first, states.astype(algorithm.dtype))
    steps = inputs.steps._replace(cut=_cuts(inputs))
    if options.shards:
        end = backward(algorithm, steps, y_bar, h_bar, reverse=reverse, emits=False)[0]
        h_bar = h_bar + entering(options.shards, steps, y_bar, end, reverse=not reverse)
    of_sum = before if inputs.a.shape[0] == 1 else None
    first_bar, g, total = backward(algorithm, steps, y_bar, h_bar, of_sum, reverse=reverse)
    a_bar = _sum_to(inputs.a.shape, g * before if total is None else total[None])
    return (Inputs(*_precision.cast_like((a_bar, first_bar, g), inputs[:3]), None, None),)


_recurrence.defvjp(_forward, _pull)


def _cuts(inputs: Inputs) -> Mask:
    """Return where the gradient of the state before a step is zero."""
    if inputs.start is None or inputs.reset is None:
        return inputs.reset if inputs.start is None else inputs.start
    return inputs.start | inputs.reset


def _before(options: Options, inputs: Inputs, first: jax.Array, states: jax.Array) -> jax.Array:
    """Return the state that each step multiplies, zero in padding."""
    of_previous = partial(_time.previous_steps, reverse=options.reverse)
    before = of_previous(first, states)
    if (valid := inputs.valid) is not None:
        starts = ~of_previous(jnp.zeros_like(valid[0]), valid)  # of a sequence, after padding if in reverse
        before = _time.zero_padding(valid, _time.replace_where(starts, before, first))
    return _time.replace_where(inputs.reset, before)


def _sum_to(shape: tuple[int, ...], a: jax.Array) -> jax.Array:
    axes = [n for n, (size, kept) in enumerate(zip(a.shape, shape, strict=True)) if size != kept]
    return jnp.sum(a, axes, keepdims=True) if axes else a


def _plain(options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Return (h_T, ys), step by step, for JAX to differentiate."""
    a, _, x, valid, reset, starts = inputs
    dtype, constant = options.algorithm.dtype, a[0]

    def one(h: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        a, x, valid, reset, start = at
        if start is not None:
            start = start if valid is None else start & valid
            h = jnp.where(start, lax.stop_gradient(h), h)
        h = step(dtype, h, constant if a is None else a, x, valid, reset)
        return h, _time.zero_padding(valid, h).astype(x.dtype)

    at = (None if a.shape[0] == 1 else a), x, valid, reset, starts
    step_by_step = options._replace(algorithm=options.algorithm._replace(chunk=None))
    return lax.scan(
        one, _first_state(step_by_step, inputs), at, reverse=options.reverse, unroll=options.algorithm.unroll
    )
