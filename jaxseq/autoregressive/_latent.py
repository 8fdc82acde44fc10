r"""Latent autoregressive models: a state summarizes the past values.

    h_t = f(h_{t-1}, x_{t-1}),      P(x_t | x_<t) = P(x_t | h_t)

For all t, this is a recurrence over the series delayed by one step. Any sequence layer can compute it.
"""

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Num, PyTree

from jaxseq import _checks
from jaxseq._time import select
from jaxseq._time_options import TimeOptions, with_defaults
from jaxseq._types import AnyArray


def shifted(
    xs: Num[AnyArray, "T *batch_and_features"],
    *,
    first: ArrayLike | None = None,
    start: ArrayLike = 0,
    resets: Bool[AnyArray, "T *batch"] | None = None,
    time_axis: int = 0,
) -> Num[Array, "T *batch_and_features"]:
    """Delay a series by one step: return x_{t-1} at t.

    Args:
        xs: the series, numbers or tokens.
        first: x_{-1}, an array with the shape of one step, or a number. For a chunk of a stream, it is the last step of
            the previous chunk. None is `start`.
        start: the value before the first step of a sequence, an array with the shape of one step, or a number.
        resets: `(T, *batch)` booleans, True at the first step of each new sequence.
        time_axis: the axis of time in `xs` and `resets`.

    Returns:
        An array with the shape and dtype of `xs`.

    Raises:
        TypeError: if `xs` is not an array, or `resets` is not boolean.
        ValueError: if shapes do not match.

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

    def one_step(name: str, value: ArrayLike) -> jax.Array:
        value = _checks.converted(value)
        if jnp.shape(value) not in ((), x.shape[1:]):
            _checks.bad_value(name, f"shape {x.shape[1:]}, one step of `xs`", str(jnp.shape(value)), xs=xs)
        return jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape[1:])

    before = one_step("start", start)
    delayed = jnp.concatenate([(before if first is None else one_step("first", first))[None], x])[:-1]
    if resets is not None:
        is_first = _checks.mask("resets", resets)
        if is_first.ndim <= axis or is_first.shape != xs.shape[: is_first.ndim]:
            expected = "shape (T, *batch), equal to the leading axes of `xs`"
            _checks.bad_value("resets", expected, str(is_first.shape), xs=xs)
        delayed = select(jnp.moveaxis(is_first, axis, 0), jnp.broadcast_to(before, delayed.shape), delayed)
    return jnp.moveaxis(delayed, 0, axis)


def latent(
    layer: Callable[..., tuple[PyTree, jax.Array]],
    params: PyTree,
    carry: PyTree,
    xs: Num[AnyArray, "T *batch_and_features"],
    *,
    first: ArrayLike | None = None,
    start: ArrayLike = 0,
    read: Callable[[jax.Array], jax.Array] | None = None,
    **time: Unpack[TimeOptions],
) -> tuple[PyTree, Array]:
    r"""Apply a latent autoregressive model, $h_t = f(h_{t-1}, x_{t-1})$ for all t, with any recurrence.

    `ys[t]` depends only on $x_{<t}$. Compute from it the parameters of $P(x_t \mid h_t)$, and from these the
    log-likelihood of the series with `log_probability` or `log_normal`, and `log_likelihood`.

    Args:
        layer: `(params, carry, xs, **time) -> (carry, ys)`, such as `gru`, `partial(recurrence, cell)` or a `stack`. It
            must be causal, so not `bidirectional`.
        params: the parameters of the layer.
        carry: the initial state, or None for zeros.
        xs: the series, numbers `(T, *batch, D)`, or tokens `(T, *batch)` with `read`.
        first: x_{-1}, the input of the first step. For a chunk of a stream, it is the last step of the previous chunk.
            None is `start`.
        start: the input of the first step of a sequence, which includes the steps marked by `resets`.
        read: maps the delayed series to the input of the layer, for example an embedding, `lambda x: table[x]`.
        **time: time options, `jaxseq.TimeOptions`, except `reverse`.

    Returns:
        `(carry, ys)` of the layer. The carry depends on all of `xs` except the last step, which is `first` for the next
        chunk.

    Raises:
        TypeError: if `layer` is not a function, or raises a TypeError.
        ValueError: if `reverse` is True, or shapes do not match.

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
    options = with_defaults(time)
    if options.reverse is not False:
        expected = "False, because an autoregressive model predicts later values from earlier ones"
        _checks.bad_value("reverse", expected, _checks.describe(options.reverse))
    delayed = shifted(xs, first=first, start=start, resets=options.resets, time_axis=options.time_axis)
    return layer(params, carry, delayed if read is None else read(delayed), **time)
