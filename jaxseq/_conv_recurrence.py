"""Convolutional recurrence: the cells of `_lstm.py` and `_gru.py` with convolutions as input and recurrent map.

    u_t = C(x_t, w_x) + b      with the given options, (*B, *S, C) -> (*B, *S', G F)
    r_t = C(h_{t-1}, w_h)      with stride 1 and padding SAME, (*B, *S', F) -> (*B, *S', G F)

Source: X. Shi et al., Convolutional LSTM network: a machine learning approach for precipitation nowcasting (2015),
section 3.1, without peepholes, as is common today.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxseq import _checks, _gru, _init, _lstm, _recurrence
from jaxseq._gru import GRUParams
from jaxseq._lstm import LSTMParams, LSTMState
from jaxseq._op import op, with_hints
from jaxseq._recurrence import Cell
from jaxseq._time_options import TimeOptions
from jaxseq._types import AnyArray
from jaxseq.linear_maps import Conv

Padding = str | int | Sequence[tuple[int, int]]


def _conv_cell(cell: Cell, stride: Any, padding: Any, dilation: Any) -> Cell:
    """Return `cell` with convolutions as its maps. The options are those of the input convolution."""

    def static(value: object) -> PyTree:
        return tuple(map(static, value)) if isinstance(value, tuple | list) else value

    into = Conv(static(stride), static(padding), static(dilation))
    return cell._replace(name=f"conv_{cell.name}", input=into, recurrent=Conv())


@op
def conv_lstm(
    params: LSTMParams,
    carry: LSTMState | None,
    xs: Float[AnyArray, "*time_batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    **time: Unpack[TimeOptions],
) -> tuple[LSTMState, Float[Array, "*time_batch_and_outputs F"]]:
    r"""Apply a convolutional LSTM to a sequence of signals, images or volumes, with a hand-derived gradient.

    $$\begin{aligned}
    (i_t, f_t, g_t, o_t) &= (\sigma, \sigma, \tanh, \sigma)(w_x \ast x_t + w_h \ast h_{t-1} + b) \\
    c_t &= f_t \odot c_{t-1} + i_t \odot g_t, \qquad h_t = o_t \odot \tanh(c_t), \qquad y_t = h_t
    \end{aligned}$$

    Args:
        params: `LSTMParams(w_x (*kernel_size, C, 4F), w_h (*kernel_size, F, 4F), b (4F,) or None)`: kernels with 1 to 3
            spatial axes, gates in the order i, f, g, o. The two kernel sizes may differ.
        carry: the initial state `LSTMState(h, c)`, each `(*batch, *outputs, F)`, or None for zeros.
        xs: the sequence `(T, *batch, *space, C)`.
        stride: of the input convolution, as in `jaxseq.conv`. The recurrent convolution has stride 1.
        padding: of the input convolution, as in `jaxseq.conv`. The recurrent convolution has padding "SAME".
        dilation: of the input convolution, as in `jaxseq.conv`. The recurrent convolution has dilation 1.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carry, ys)`: the final state, and h of all steps `(T, *batch, *outputs, F)` in the dtype of `xs`.

    Raises:
        TypeError: if `params` belongs to another cell, an array is not a float array, or an option has the wrong type.
        ValueError: if a rank or size does not match, or an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.conv_lstm_init(jax.random.key(0), (3, 3), 1, 8)
        >>> state, ys = jaxseq.conv_lstm(params, None, jnp.ones((5, 2, 16, 16, 1)))
        >>> ys.shape
        (5, 2, 16, 16, 8)

    Reference:
        X. Shi et al., Convolutional LSTM network: a machine learning approach for precipitation nowcasting (2015).
    """
    return _recurrence.sequence(_conv_cell(_lstm.CELL, stride, padding, dilation), params, carry, xs, **time)


@op
def conv_lstm_cell(
    params: LSTMParams,
    carry: LSTMState | None,
    x: Float[AnyArray, "*batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    precision: PrecisionLike = None,
) -> tuple[LSTMState, Float[Array, "*batch_and_outputs F"]]:
    """Apply one step of `conv_lstm`. `partial(conv_lstm_cell, params)` is a body for `jax.lax.scan`.

    Args:
        params: `LSTMParams(w_x (*kernel_size, C, 4F), w_h (*kernel_size, F, 4F), b (4F,) or None)`.
        carry: the previous state `LSTMState(h, c)`, each `(*batch, *outputs, F)`, or None for zeros.
            The new state has the dtype of `carry` (at least float32 for None). In bfloat16 it is rounded at every step.
        x: one input `(*batch, *space, C)`.
        stride: of the input convolution, as in `jaxseq.conv`.
        padding: of the input convolution, as in `jaxseq.conv`.
        dilation: of the input convolution, as in `jaxseq.conv`.
        precision: the precision of the convolutions, as in `jax.lax.conv_general_dilated`.

    Returns:
        `(carry, y)`: the new state, and its h.

    Raises:
        TypeError: if `params` belongs to another cell, an array is not a float array, or an option has the wrong type.
        ValueError: if a rank or size does not match.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.conv_lstm_init(jax.random.key(0), 3, 1, 8)
        >>> state, y = jaxseq.conv_lstm_cell(params, None, jnp.ones((2, 16, 1)))
        >>> y.shape
        (2, 16, 8)

    Reference:
        X. Shi et al., Convolutional LSTM network: a machine learning approach for precipitation nowcasting (2015).
    """
    return _recurrence.one_step(
        _conv_cell(_lstm.CELL, stride, padding, dilation), params, carry, x, precision=precision
    )


@op
def conv_gru(
    params: GRUParams,
    carry: Float[AnyArray, "*batch_and_outputs F"] | None,
    xs: Float[AnyArray, "*time_batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    **time: Unpack[TimeOptions],
) -> tuple[Float[Array, "*batch_and_outputs F"], Float[Array, "*time_batch_and_outputs F"]]:
    r"""Apply a convolutional GRU to a sequence of signals, images or volumes, with a hand-derived gradient.

    $$\begin{aligned}
    (r_t, z_t) &= \sigma(w_x \ast x_t + b_x + w_h \ast h_{t-1} + b_h) \quad \text{(their channels)} \\
    n_t &= \tanh(w_{xn} \ast x_t + b_{xn} + r_t \odot (w_{hn} \ast h_{t-1} + b_{hn})) \\
    h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}, \qquad y_t = h_t
    \end{aligned}$$

    The reset gate multiplies the result of the recurrent convolution, as in `jaxseq.gru`.

    Args:
        params: `GRUParams(w_x (*kernel_size, C, 3F), w_h (*kernel_size, F, 3F), b_x, b_h)`: kernels with 1 to 3
            spatial axes, gates in the order r, z, n. Each bias is `(3F,)` or None. The two kernel sizes may differ.
        carry: the initial state `(*batch, *outputs, F)`, or None for zeros.
        xs: the sequence `(T, *batch, *space, C)`.
        stride: of the input convolution, as in `jaxseq.conv`. The recurrent convolution has stride 1.
        padding: of the input convolution, as in `jaxseq.conv`. The recurrent convolution has padding "SAME".
        dilation: of the input convolution, as in `jaxseq.conv`. The recurrent convolution has dilation 1.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carry, ys)`: the final state, and the states of all steps `(T, *batch, *outputs, F)` in the dtype of `xs`.

    Raises:
        TypeError: if `params` belongs to another cell, an array is not a float array, or an option has the wrong type.
        ValueError: if a rank or size does not match, or an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.conv_gru_init(jax.random.key(0), 3, 2, 8)
        >>> h, ys = jaxseq.conv_gru(params, None, jnp.ones((5, 2, 16, 2)), stride=2)
        >>> ys.shape
        (5, 2, 8, 8)

    Reference:
        N. Ballas, L. Yao, C. Pal and A. Courville, Delving deeper into convolutional networks for learning video
        representations (2016), section 3.
    """
    return _recurrence.sequence(_conv_cell(_gru.CELL, stride, padding, dilation), params, carry, xs, **time)


@op
def conv_gru_cell(
    params: GRUParams,
    carry: Float[AnyArray, "*batch_and_outputs F"] | None,
    x: Float[AnyArray, "*batch_and_space C"],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    precision: PrecisionLike = None,
) -> tuple[Float[Array, "*batch_and_outputs F"], Float[Array, "*batch_and_outputs F"]]:
    """Apply one step of `conv_gru`. `partial(conv_gru_cell, params)` is a body for `jax.lax.scan`.

    Args:
        params: `GRUParams(w_x (*kernel_size, C, 3F), w_h (*kernel_size, F, 3F), b_x, b_h)`. Each bias is `(3F,)` or
            None.
        carry: the previous state `(*batch, *outputs, F)`, or None for zeros.
            The new state has the dtype of `carry` (at least float32 for None). In bfloat16 it is rounded at every step.
        x: one input `(*batch, *space, C)`.
        stride: of the input convolution, as in `jaxseq.conv`.
        padding: of the input convolution, as in `jaxseq.conv`.
        dilation: of the input convolution, as in `jaxseq.conv`.
        precision: the precision of the convolutions, as in `jax.lax.conv_general_dilated`.

    Returns:
        `(carry, y)`, both the new state.

    Raises:
        TypeError: if `params` belongs to another cell, an array is not a float array, or an option has the wrong type.
        ValueError: if a rank or size does not match.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.conv_gru_init(jax.random.key(0), 3, 2, 8)
        >>> h, y = jaxseq.conv_gru_cell(params, None, jnp.ones((2, 16, 2)))
        >>> y.shape
        (2, 16, 8)

    Reference:
        N. Ballas, L. Yao, C. Pal and A. Courville, Delving deeper into convolutional networks for learning video
        representations (2016), section 3.
    """
    return _recurrence.one_step(_conv_cell(_gru.CELL, stride, padding, dilation), params, carry, x, precision=precision)


@with_hints
def conv_lstm_init(
    key: PRNGKeyArray,
    kernel_size: int | Sequence[int],
    c_in: int,
    c_out: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LSTMParams:
    """Initialize `conv_lstm`: kernels that are normal with variance 1 / fan_in, and a forget bias of one.

    Args:
        key: a JAX random key.
        kernel_size: kernel size of both kernels, an integer for 1-D or one for each of 1 to 3 spatial axes.
        c_in: C, the number of input channels.
        c_out: F, the number of state channels.
        use_bias: if False, `b` is None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (*kernel_size, C, F).
        w_h_init: the same for `w_h`, with the shape (*kernel_size, F, F).
        dtype: floating dtype of the parameters.

    Returns:
        `LSTMParams(w_x, w_h, b)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1, or there are more than three axes.

    Example:
        >>> import jax, jaxseq
        >>> jaxseq.conv_lstm_init(jax.random.key(0), (3, 3), 1, 8).w_h.shape
        (3, 3, 8, 32)

    Reference:
        Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, Efficient BackProp (1998), section 4.6; for the forget bias,
        R. Jozefowicz, W. Zaremba and I. Sutskever, An empirical exploration of recurrent network architectures (2015).
    """
    w_x, w_h, b = _init.kernels(key, kernel_size, c_in, c_out, 4, dtype, w_x_init=w_x_init, w_h_init=w_h_init)
    b = b.at[c_out : 2 * c_out].set(1)
    return LSTMParams(w_x, w_h, b if _checks.boolean("use_bias", use_bias) else None)


@with_hints
def conv_gru_init(
    key: PRNGKeyArray,
    kernel_size: int | Sequence[int],
    c_in: int,
    c_out: int,
    *,
    use_bias: bool = True,
    w_x_init: _init.Initializer | None = None,
    w_h_init: _init.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> GRUParams:
    """Initialize `conv_gru`: kernels that are normal with variance 1 / fan_in, and zero biases.

    Args:
        key: a JAX random key.
        kernel_size: kernel size of both kernels, an integer for 1-D or one for each of 1 to 3 spatial axes.
        c_in: C, the number of input channels.
        c_out: F, the number of state channels.
        use_bias: if False, `b_x` and `b_h` are None.
        w_x_init: replaces the initializer of `w_x`: a function `(key, shape, dtype) -> array`, as in
            `jax.nn.initializers`, called for each gate with the shape (*kernel_size, C, F).
        w_h_init: the same for `w_h`, with the shape (*kernel_size, F, F).
        dtype: floating dtype of the parameters.

    Returns:
        `GRUParams(w_x, w_h, b_x, b_h)`.

    Raises:
        TypeError: if a size is not an integer, `dtype` is not a floating dtype, or an initializer is not a function.
        ValueError: if a size is less than 1, or there are more than three axes.

    Example:
        >>> import jax, jaxseq
        >>> jaxseq.conv_gru_init(jax.random.key(0), 3, 2, 8).w_x.shape
        (3, 2, 24)

    Reference:
        Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, Efficient BackProp (1998), section 4.6.
    """
    w_x, w_h, b = _init.kernels(key, kernel_size, c_in, c_out, 3, dtype, w_x_init=w_x_init, w_h_init=w_h_init)
    return GRUParams(w_x, w_h, *((b, jnp.zeros_like(b)) if _checks.boolean("use_bias", use_bias) else (None, None)))
