"""The public function: check the arguments, make the masks, run the rule."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact, Integer

from jaxseq import _checks, _mesh, _precision, _sizes, _time, _time_options, tuning
from jaxseq._distributed._sharding import place_masks_like
from jaxseq._explain import RECORDED, Decision
from jaxseq._linear_recurrence._rule import Inputs, Options, run
from jaxseq._linear_recurrence._shards import over_devices, sharded_like_x, with_time_gathered
from jaxseq._linear_recurrence._solve import Algorithm
from jaxseq._linear_recurrence._truncation import run_truncated
from jaxseq._op import op
from jaxseq._types import AnyArray


@op
def linear_recurrence(
    a: Inexact[AnyArray, "..."],
    carry: Inexact[AnyArray, "*batch H"] | None,
    x: Inexact[AnyArray, "*time_and_batch H"],
    *,
    lengths: Integer[AnyArray, "*batch"] | None = None,
    resets: Bool[AnyArray, "*time_and_batch"] | None = None,
    reverse: bool = False,
    truncation: int | tuple[int, int] | None = None,
    checkpoint: int | str | None = None,
    time_axis: int = 0,
    unroll: int = 1,
) -> tuple[Inexact[Array, "*batch H"], Inexact[Array, "*time_and_batch H"]]:
    r"""Compute a recurrence that is linear in its state, elementwise, with a hand-derived gradient.

    $$h_t = a_t \odot h_{t-1} + x_t, \qquad y_t = h_t$$

    LRU, S5, minGRU, RG-LRU, SRU and selective state spaces are such recurrences between linear maps. Their backward
    pass is a linear recurrence in the opposite direction, so only `a` and the outputs are stored for it:

    $$\bar x_t = \bar y_t + a_{t+1} \odot \bar x_{t+1}, \qquad \bar a_t = \bar x_t \odot h_{t-1}$$

    Args:
        a: the factors, of any size, zero included: an array that broadcasts to the shape of `x`. `(T, *batch, H)`
            varies in time, `(H,)` is constant in time and over the batch.
        carry: the initial state `(*batch, H)`, or None for zeros.
        x: the inputs `(T, *batch, H)`, all three arrays real, or all complex.
        lengths: the length of each sequence, `(*batch,)` integers from 0 to T. Beyond its length, a sequence is
            padding: `ys` is zero there, the carry does not change, and the content of `x` and of `a` that varies in
            time, NaN included, affects no value and no gradient.
        resets: `(T, *batch)` booleans. `resets[t]` marks a boundary between steps t - 1 and t. Across it, the state is
            set to zero, in either direction, and no gradient flows.
        reverse: if True, process each sequence from its last step to its first. `ys[t]` still belongs to `x[t]`, and
            the returned carry is the state after step 0.
        truncation: truncated backpropagation through time. With an integer k, the gradient of the state is cut every k
            steps. With a pair (k1, k2), the loss in each window of k1 steps is backpropagated through k2 steps, which
            computes the windows once more, in parallel.
        checkpoint: store no states for the backward pass, which computes them again. The interval, or `"auto"`, is that
            of other functions. Here it has no effect, because the backward pass needs no states between its steps.
        time_axis: the axis of time in `x`, `resets`, `ys`, and in `a` if it has as many axes as `x`.
        unroll: the number of steps per iteration of the compiled loop, as in `jax.lax.scan`.

    The state is float32 or wider between steps (complex64 or wider).

    Returns:
        `(carry, ys)`: the final state `(*batch, H)` in the dtype of `carry` (at least float32 for None), and the states
        of all steps `(T, *batch, H)` in the dtype of `x`.

    Raises:
        TypeError: if an array is not a float or complex array, real and complex arrays are mixed, or an option has the
            wrong type.
        ValueError: if `a` does not broadcast to the shape of `x`, a rank or size does not match, or an option is out of
            range.

    Example:
        >>> import jax.numpy as jnp, jaxseq
        >>> x = jnp.ones((4, 2, 3))
        >>> carry, ys = jaxseq.linear_recurrence(jnp.full(3, 0.5), None, x)
        >>> ys[:, 0, 0]
        Array([1.   , 1.5  , 1.75 , 1.875], dtype=float32)

    Reference:
        E. Martin and C. Cundy, Parallelizing linear recurrent neural nets over sequence length (2018), section 2.
    """
    x = _checks.array("x", x, complex_ok=True)
    if x.ndim < 2:
        _checks.bad_value("x", "at least 2 axes (time, *batch, features)", str(x.ndim), x=x)
    reverse, window = _checks.boolean("reverse", reverse), _checks.truncation(truncation)
    checkpoint, unroll = _checks.checkpoint(checkpoint), _checks.integer("unroll", unroll, at_least=1)
    axis = _checks.axis("time_axis", time_axis, x.ndim - 1, 1, x=x)
    sizes, steps = x.shape[:-1], x.shape[axis]
    batch = (*sizes[:axis], *sizes[axis + 1 :])
    a = _check_factors(a, x, axis)
    first = _check_carry(carry, x, (*batch, x.shape[-1]))
    _check_same_field(a, carry, x)
    if lengths is not None:
        lengths = _checks.lengths("lengths", lengths, batch, steps)
    if resets is not None:
        resets = _checks.mask("resets", resets)
        _checks.shape("resets", resets, sizes, "the shape of `x` without features", x=x)
    if steps == 0:
        return first, x

    if window is not None and _sizes.is_concrete(steps) and window[0] >= steps:
        window = None
    dtype = _precision.accumulator(_precision.promote(a, first, x))
    options = Options(
        Algorithm(dtype, tuning.for_backend().linear.chunk_of(steps, first.size), unroll),
        reverse=reverse,
        stores_states=checkpoint is None,
    )
    _explain(options.algorithm, checkpoint)
    if _mesh.is_distributed(a, first, x, lengths, resets):
        lengths, resets = place_masks_like(x, axis, lengths, resets)
    resets = None if resets is None else jnp.moveaxis(resets, axis, 0)
    valid, reset, last = _time.masks(_time_options.Options(reverse=reverse), steps, lengths, resets)
    time_first = lambda a: jnp.moveaxis(a, axis, 0)  # noqa: E731
    with_feature = lambda m: None if m is None else jnp.expand_dims(m, -1)  # noqa: E731
    inputs = Inputs(time_first(a), first.astype(dtype), time_first(x), with_feature(valid), with_feature(reset))
    inputs = sharded_like_x(inputs)
    if window is None:
        on_device = lambda names, inputs: run(options._replace(shards=names), inputs)  # noqa: E731
        end, ys = over_devices(on_device, inputs, reverse=reverse)
    else:
        end, ys = with_time_gathered(partial(run_truncated, options, window), inputs, lengths)
    end = _time.replace_where(last, end)
    return end.astype(first.dtype), jnp.moveaxis(ys, 0, axis)


def _explain(algorithm: Algorithm, checkpoint: int | str | None) -> None:
    """Record the algorithm and what is stored, for `jaxseq.explain`."""
    recorded = RECORDED.get()
    if recorded is None:
        return
    chunk = algorithm.chunk
    how = "step by step" if chunk is None else f"in chunks of {chunk} steps, each by an associative scan"
    why = "the fastest on this backend" if chunk is None else "`LinearTuning.elements`: a step takes its latency"
    recorded.append(Decision("states", how, why))
    stored = "read back from the outputs" if checkpoint is None else "computed again in the backward pass"
    recorded.append(Decision("states of the gradient of a", stored, f"checkpoint={checkpoint!r}"))


# --- Arguments ---


def _check_factors(value: object, x: jax.Array, axis: int) -> jax.Array:
    """Return `a` with as many axes as x, of size one where it is constant."""
    a = _checks.array("a", value, complex_ok=True)
    shape = (*(1,) * (x.ndim - a.ndim), *a.shape)
    if len(shape) != x.ndim or any(n not in (1, size) for n, size in zip(shape, x.shape, strict=True)):
        hint = "; for factors that vary in time, pass (T, 1, H)" if a.ndim == 2 and axis == 0 else ""
        _checks.bad_value("a", f"a shape that broadcasts to {x.shape}, that of `x`{hint}", str(a.shape))
    return a.reshape(shape)


def _check_carry(value: object, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if value is None:
        return jnp.zeros(shape, _precision.accumulator(x.dtype))
    carry = _checks.array("carry", value, complex_ok=True)
    _checks.shape("carry", carry, shape, "(*batch, H)", x=x)
    return carry


def _check_same_field(a: jax.Array, carry: object, x: jax.Array) -> None:
    """Check that all arrays are real, or all complex."""
    of_x = jnp.iscomplexobj(x)
    for name, value in (("a", a), ("carry", carry)):
        if value is not None and jnp.iscomplexobj(value) != of_x:
            expected = "a complex array" if of_x else "a real array"
            got = _checks.describe(value)
            _checks.bad_type(name, f"{expected}, as `x` is; convert one of them with `.astype`", got)
