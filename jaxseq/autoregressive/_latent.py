r"""Latent autoregressive models: a state that sums up what has been seen.

    h_t = f(h_{t-1}, x_{t-1}),      P(x_t | x_<t) = P(x_t | h_t)

For all t at once that is a recurrence over the series one step late, for any layer that reads a sequence.
"""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Num

from jaxseq import _checks
from jaxseq._time import select
from jaxseq._time_options import TimeOptions, with_defaults
from jaxseq._types import AnyArray


def shifted(
    xs: Num[AnyArray, "T *batch_and_features"],
    *,
    first: Any = None,
    start: Any = 0,
    resets: Bool[AnyArray, "T *batch"] | None = None,
    time_axis: int = 0,
) -> Num[Array, "T *batch_and_features"]:
    """The series one step late: x_{t-1} at t.

    Args:
        xs: the series, numbers or tokens.
        first: x_{-1}: of a stream, the last step of the chunk before; an array of the shape of one step, or a number.
            None is `start`.
        start: what stands before the first step of a sequence, likewise.
        resets: `(T, *batch)` booleans, `resets[t]` where x_t opens a new sequence.
        time_axis: where time is in `xs` and `resets`.

    Returns:
        of the shape and dtype of xs.

    Raises:
        TypeError: `xs` that is no array, resets that are no booleans.
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq import autoregressive
        >>> autoregressive.shifted(jnp.array([1, 2, 3])).tolist()
        [0, 1, 2]

    Reference:
        A. Zhang, Z. C. Lipton, M. Li and A. J. Smola, Dive into deep learning, section 9.1.
    """
    x = _checks.converted(xs)
    if not isinstance(x, jax.Array | np.ndarray) or x.ndim < 1:
        _checks.not_an_array("xs", "an array (T, ...)", xs)
    x = jnp.asarray(x)
    axis = _checks.axis("time_axis", time_axis, x.ndim, 0)
    x = jnp.moveaxis(x, axis, 0)

    def one_step(name: str, value: Any) -> jax.Array:
        value = _checks.converted(value)
        if jnp.shape(value) not in ((), x.shape[1:]):
            _checks.bad_value(name, f"shape {x.shape[1:]}, one step of `xs`", str(jnp.shape(value)), xs=xs)
        return jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape[1:])

    before = one_step("start", start)
    late = jnp.concatenate([(before if first is None else one_step("first", first))[None], x])[:-1]
    if resets is not None:
        opens = _checks.mask("resets", resets)
        if opens.ndim <= axis or opens.shape != xs.shape[: opens.ndim]:
            _checks.bad_value("resets", "shape (T, *batch), laid out as `xs`", str(opens.shape), xs=xs)
        late = select(jnp.moveaxis(opens, axis, 0), jnp.broadcast_to(before, late.shape), late)
    return jnp.moveaxis(late, 0, axis)


def latent(
    layer: Callable[..., tuple[Any, jax.Array]],
    params: Any,
    carry: Any,
    xs: Num[AnyArray, "T *batch_and_features"],
    *,
    first: Any = None,
    start: Any = 0,
    read: Callable[[jax.Array], jax.Array] | None = None,
    **time: Unpack[TimeOptions],
) -> tuple[Any, Array]:
    r"""A latent autoregressive model: $h_t = f(h_{t-1}, x_{t-1})$ for all t, by any recurrence.

    `ys[t]` has seen $x_{<t}$ and nothing of $x_t$: make of it the parameters of $P(x_t \mid h_t)$, and
    `log_probability`, `log_likelihood` say how well that foresees the series.

    Args:
        layer: `(params, carry, xs, **time) -> (carry, ys)`: `gru`, `partial(recurrence, cell)`, a `stack`; both
            directions would see what is to be foreseen.
        params: of the layer.
        carry: the state before; None is zero.
        xs: the series, numbers `(T, *batch, D)`, or tokens `(T, *batch)` with `read`.
        first: x_{-1}, what the first step reads: of a stream, the last step of the chunk before; None is `start`.
        start: what the first step of a sequence reads, and the one after each of `resets`.
        read: what makes the layer's input of the shifted series: an embedding, `lambda x: table[x]`.
        **time: time options, `jaxseq.TimeOptions`; not `reverse`.

    Returns:
        `(carry, ys)` of the layer. The carry has seen all of xs but the last step, which is `first` for the next chunk.

    Raises:
        TypeError: what the layer raises; a layer that is no function.
        ValueError: `reverse=True`; shapes that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> from jaxseq import autoregressive
        >>> params = jaxseq.gru_init(jax.random.key(0), 1, 8)
        >>> carry, ys = autoregressive.latent(jaxseq.gru, params, None, jnp.ones((20, 4, 1)))
        >>> ys.shape
        (20, 4, 8)

    Reference:
        A. Zhang, Z. C. Lipton, M. Li and A. J. Smola, Dive into deep learning, section 9.1.
    """
    if not callable(layer):
        _checks.bad_type("layer", "a function (params, carry, xs, **time) -> (carry, ys)", _checks.describe(layer))
    given = with_defaults(time)
    if given.reverse is not False:
        _checks.bad_value("reverse", "False, for what comes later is to be foreseen", _checks.describe(given.reverse))
    late = shifted(xs, first=first, start=start, resets=given.resets, time_axis=given.time_axis)
    return layer(params, carry, late if read is None else read(late), **time)
