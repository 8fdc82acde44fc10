"""Equinox modules of jaxseq, with the arguments of `equinox.nn`.

Layers of sequences take `(*batch, T, D)`; batch axes need no `jax.vmap`. `layer(xs, hidden=None, *, key=None, **time)`
returns `(hidden, ys)`, as `jax.lax.scan` does: `hidden` is the state, None for zeros, and `time` are the options of
`jaxseq.TimeOptions`. Images have channels first, as in `eqx.nn.Conv`, in `xs`, `hidden` and `ys`.

Constructors take sizes, `key`, `dtype`, and as keywords the options of the initializer and the function of jaxseq
(static: tuples, not lists). `params` has the parameters, as `jaxseq.convert.from_equinox` returns them.

    >>> import jax, jax.numpy as jnp, jaxseq, jaxseq.integrations.equinox as layers
    >>> key, xs, image = jax.random.key(0), jnp.ones((2, 7, 3)), jnp.ones((3, 16, 12))
    >>> h, ys = layers.RNN(3, 5, activation="relu", key=key)(xs)
    >>> h, ys = layers.Recurrence(jaxseq.cells.mgu, jaxseq.cells.mgu_init, 3, 5, key=key)(xs)
    >>> lstm, gru = layers.LSTM(3, 5, key=key), layers.GRU(5, 4, truncation=4, key=key)
    >>> ((h, c), h_gru), ys = layers.Stack([lstm, gru], dropout=0.1)(xs, key=key, lengths=jnp.array([7, 4]))
    >>> (state_forward, state_backward), ys = layers.Bidirectional(lstm, lstm)(xs)
    >>> carry, ys = layers.CausalConv(3, 8, 4, key=key)(xs)
    >>> (h, c), ys = layers.ConvLSTM(2, 3, 8, 3, key=key)(image[None])
    >>> y = layers.Conv(2, 3, 8, 3, stride=2, padding="SAME", key=key)(image)
    >>> image = layers.ConvTranspose(2, 8, 3, 4, stride=2, padding=1, key=key)(y)
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from inspect import signature
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

import jaxseq
from jaxseq._geometry import per_axis


def _move(tree: PyTree, source: int, target: int) -> PyTree:
    return jax.tree.map(lambda a: jnp.moveaxis(a, source, target) if jnp.ndim(a) else a, tree)


class _Layer(eqx.Module):
    functions: ClassVar[tuple[Any, ...]]  # the initializer, the function and its arguments before `params`
    params: PyTree
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)  # of the function
    channel_axis: int = eqx.field(static=True)  # of the arrays of the caller; the last one in jaxseq

    def __init_subclass__(cls, functions: tuple[Any, ...] = (), init: bool = True):  # `init` is for type checkers
        super().__init_subclass__()
        cls.functions = functions or cls.functions

    def __init__(self, *sizes: Any, key: Array, dtype: Any = None, channel_axis: int = -1, **options: Any):
        of_init, of_function = (signature(f).parameters for f in self.functions[:2])
        drawn = {name: value for name, value in options.items() if name in of_init or name not in of_function}
        self.params = self.functions[0](key, *sizes, dtype=jnp.result_type(float) if dtype is None else dtype, **drawn)
        self.options = tuple((name, value) for name, value in options.items() if name in of_function)
        self.channel_axis = channel_axis

    def _apply(self, *args: Any, key: Array | None = None, **options: Any) -> Any:
        return partial(*self.functions[1:], **dict(self.options))(*args, **options)

    def __call__(self, xs: Array, hidden: PyTree = None, *, key: Array | None = None, **time: Any) -> tuple[Any, Array]:
        lstm, states = isinstance(self.params, jaxseq.LSTMParams), {"hidden": hidden}
        states |= {n: time.pop(n) for n in ("reset_state", "zoneout", "recurrent_dropout_mask") if n in time}
        states = {n: jaxseq.LSTMState(*s) if lstm and type(s) is tuple else s for n, s in states.items()}
        xs, states = _move((xs, states), self.channel_axis, -1)
        time = {"time_axis": self.channel_axis - 1, **dict(self.options), **time, **states}
        return _move(self._apply(self.params, time.pop("hidden"), xs, key=key, **time), -1, self.channel_axis)


class RNN(_Layer, init=False, functions=(jaxseq.rnn_init, jaxseq.rnn)):
    """`jaxseq.rnn`: `(*batch, T, D)` to `(h, (*batch, T, H))`, created as `RNN(input_size, hidden_size)`."""


@wraps(jaxseq.gru)
def _gru(params: jaxseq.GRUParams, *args: Any, **time: Any) -> tuple[Array, Array]:
    n_only = lambda b: jnp.where(jnp.arange(b.size) < b.size // 3 * 2, jax.lax.stop_gradient(b), b)  # noqa: E731
    return jaxseq.gru(params._replace(b_h=jax.tree.map(n_only, params.b_h)), *args, **time)


class GRU(_Layer, init=False, functions=(jaxseq.gru_init, _gru)):
    """`eqx.nn.GRUCell` for sequences, by `jaxseq.gru`. As there, only the part of n is trained in `b_h`."""


class LSTM(_Layer, init=False, functions=(jaxseq.lstm_init, jaxseq.lstm)):
    """`eqx.nn.LSTMCell` for sequences, by `jaxseq.lstm`. `hidden` is (h, c); the result is a `jaxseq.LSTMState`."""


class Recurrence(_Layer):
    """A `jaxseq.Cell` for sequences: `Recurrence(cell, init, input_size, hidden_size)`, drawn by `init`."""

    functions: tuple[Any, ...] = eqx.field(static=True)

    def __init__(self, cell: jaxseq.Cell | jaxseq.LinearCell, init: Callable[..., PyTree], *sizes: int, **options: Any):
        self.functions = (init, jaxseq.recurrence, cell)  # type: ignore[misc]
        super().__init__(*sizes, **options)


def _call(layer: _Layer, *args: Any, **time: Any) -> tuple[PyTree, Array]:
    return layer._apply(layer.params, *args, **time)


class Stack(_Layer, functions=(None, jaxseq.stack, _call)):
    """`jaxseq.stack` of the layers in `params`, as `eqx.nn.Sequential`; `inference` is that of `eqx.nn.Dropout`."""

    inference: bool

    def __init__(self, layers: Sequence[_Layer], *, inference: bool = False, **options: Any):
        self.params, self.channel_axis = tuple(layers), layers[0].channel_axis
        self.options, self.inference = tuple(options.items()), inference

    def _apply(self, *args: Any, key: Array | None = None, **options: Any) -> Any:
        rates: dict[str, Any] = {"dropout": 0, "recurrent_dropout": 0} if self.inference else {"key": key}
        return partial(*self.functions[1:], **dict(self.options))(*args, **{**options, **rates})


class Bidirectional(_Layer, functions=(None, jaxseq.bidirectional, _call)):
    """`jaxseq.bidirectional` of the two layers in `params`. `hidden` is the pair of their states."""

    def __init__(self, forward: _Layer, backward: _Layer):
        self.params, self.channel_axis, self.options = (forward, backward), forward.channel_axis, ()


class Conv(_Layer, functions=(jaxseq.conv_init, jaxseq.conv)):
    """`eqx.nn.Conv` by `jaxseq.conv`: `(*batch, C, *space)` to `(*batch, C', *outputs)`."""

    def __init__(self, num_spatial_dims: int, in_channels: int, out_channels: int, kernel_size: Any, **options: Any):
        size = per_axis("kernel_size", kernel_size, num_spatial_dims)
        super().__init__(size, in_channels, out_channels, channel_axis=-1 - num_spatial_dims, **options)

    def __call__(self, x: Array, *, key: Array | None = None, **options: Any) -> Array:  # type: ignore[override]
        """Return the outputs. `key` is not used."""
        return _move(self._apply(_move(x, self.channel_axis, -1), *self.params, **options), -1, self.channel_axis)


class ConvTranspose(Conv, init=False, functions=(jaxseq.conv_transpose_init, jaxseq.conv_transpose)):
    """`eqx.nn.ConvTranspose` by `jaxseq.conv_transpose`: `(*batch, C, *space)` to `(*batch, C', *outputs)`."""


class CausalConv(_Layer, functions=(jaxseq.conv_init, jaxseq.causal_conv)):
    """`jaxseq.causal_conv`: `(*batch, T, C)` to `(carry, (*batch, T, C'))`, created as `eqx.nn.Conv1d`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options: Any):
        super().__init__(kernel_size, in_channels, out_channels, **options)


class ConvLSTM(Conv, init=False, functions=(jaxseq.conv_lstm_init, jaxseq.conv_lstm)):
    """`jaxseq.conv_lstm`: `(*batch, T, C, *space)` to `(LSTMState(h, c), (*batch, T, F, *outputs))`."""

    __call__ = _Layer.__call__  # type: ignore[assignment]
