"""Flax nnx modules with the layers of jaxseq. Arguments have the names of `nnx.RNN`, its cells and `nnx.Conv`.

A recurrent module maps `(*batch, T, D)` to `(*batch, T, hidden_features)`, as `nnx.RNN(cell)`, with all time options.
Unlike in Flax, padding is zero and `reverse` keeps the order. Arrays are `nnx.Param`s with their names in jaxseq.

>>> import jax.numpy as jnp, jaxseq.integrations.nnx as layers
>>> from flax import nnx
>>> lstm = layers.LSTM(3, 5, rngs=nnx.Rngs(0))
>>> (c, h), ys = lstm(jnp.ones((2, 7, 3)), return_carry=True, truncation=3)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array

import jaxseq
from jaxseq.integrations import _flax

INIT = {"use_bias": "use_bias", "kernel_init": "w_x_init", "recurrent_kernel_init": "w_h_init", "param_dtype": "dtype"}
CONV_INIT = {**INIT, "kernel_init": "kernel_init", "feature_group_count": "groups"}
NAMES = {"strides": "stride", "kernel_dilation": "dilation", "feature_group_count": "groups"}


class _Sequence(nnx.Module):
    _params: Any
    _apply: Any
    _functions: Any

    def __call__(
        self, xs: Array, *, initial_carry: Any = None, seq_lengths: Any = None, return_carry: bool = False, **time: Any
    ) -> Any:
        time = {"lengths": seq_lengths, **dict(getattr(self, "_options", ())), **time}
        return _flax.call(self, self._params(), xs, carry=initial_carry, return_carry=return_carry, **time)


class _Layer(_Sequence):
    _names = INIT  # names in Flax: names in jaxseq

    def __init__(
        self, in_features: int, hidden_features: int, *kernel: Any, rngs: nnx.Rngs, dtype: Any = None, **options: Any
    ):
        init = {self._names[name]: value for name, value in options.items() if name in self._names}
        params = self._functions[0](rngs.params(), *kernel, in_features, hidden_features, **init)
        self._type, self.dtype = type(params), dtype
        for name, a in params._asdict().items():
            setattr(self, name, None if a is None else nnx.Param(a))
        self._options = nnx.static(tuple((NAMES.get(n, n), v) for n, v in options.items() if n not in INIT))

    def _params(self) -> Any:
        return self._type(*(a if a is None else a[...] for a in map(partial(getattr, self), self._type._fields)))

    def _apply(self, params: Any, carry: Any, xs: Array, **options: Any) -> Any:
        params, xs = _flax.cast(params, xs, self.dtype)
        return self._functions[1](params, carry, xs, **{**dict(self._options), **options})


class RNN(_Layer):
    """Elman network, as `nnx.RNN(nnx.SimpleCell(in_features, hidden_features))`. It takes `activation_fn` too."""

    _functions = jaxseq.rnn_init, lambda *a, activation_fn="tanh", **kw: jaxseq.rnn(*a, activation=activation_fn, **kw)


class GRU(_Layer):
    """GRU, as `nnx.RNN(nnx.GRUCell(in_features, hidden_features))`: without recurrent bias, `b_h` is None."""

    _functions = lambda *args, **kw: jaxseq.gru_init(*args, **kw)._replace(b_h=None), jaxseq.gru


class LSTM(_Layer):
    """LSTM, as `nnx.RNN(nnx.OptimizedLSTMCell(...))`, with the carry `(c, h)`. The initial forget bias is one."""

    _functions = jaxseq.lstm_init, jaxseq.lstm


class Recurrence(_Layer):
    """Any `jaxseq.Cell`: `Recurrence(jaxseq.cells.mgu, jaxseq.cells.mgu_init, D, H, rngs=rngs)`."""

    _functions = property(lambda self: (self.cell_init, partial(jaxseq.recurrence, self.cell)))

    def __init__(
        self, cell: jaxseq.Cell | jaxseq.LinearCell, cell_init: Callable[..., Any], *sizes: int, **options: Any
    ):
        self.cell, self.cell_init = nnx.static(cell), cell_init
        super().__init__(*sizes, **options)


class Bidirectional(_Sequence):
    """Both directions, as `nnx.Bidirectional`: outputs are concatenated. The carry is a pair of states of jaxseq."""

    def __init__(self, forward_rnn: _Sequence, backward_rnn: _Sequence):
        self.forward_rnn, self.backward_rnn = forward_rnn, backward_rnn

    def _params(self) -> Any:
        return self.forward_rnn._params(), self.backward_rnn._params()

    def _apply(self, *args: Any, **time: Any) -> Any:
        return jaxseq.bidirectional([self.forward_rnn._apply, self.backward_rnn._apply], *args, **time)


class Stack(_Sequence):
    """`jaxseq.stack`, whose options the call takes. Dropout draws from `rngs.dropout`, and is off after `eval()`."""

    def __init__(self, layers: Sequence[_Sequence], *, rngs: nnx.Rngs | None = None):
        self.layers, self.rngs, self.deterministic = nnx.List(layers), nnx.data(rngs and rngs.dropout.fork()), False

    def _params(self) -> Any:
        return tuple(layer._params() for layer in self.layers)

    def _apply(self, *args: Any, **options: Any) -> Any:
        options |= {"dropout": 0, "recurrent_dropout": 0} if self.deterministic else {}
        random = any(map(options.get, ("dropout", "recurrent_dropout", "zoneout")))
        key = self.rngs() if self.rngs and random and not self.deterministic else None
        return jaxseq.stack([layer._apply for layer in self.layers], *args, **{"key": key, **options})


class CausalConv(_Layer):
    """`jaxseq.causal_conv` of `(*batch, T, C)`."""

    _functions, _names = (jaxseq.conv_init, jaxseq.causal_conv), CONV_INIT

    def __init__(self, in_features: int, out_features: int, kernel_size: Any, **options: Any):
        super().__init__(in_features, out_features, kernel_size, **options)


class ConvLSTM(CausalConv):
    """Convolutional LSTM: `(*batch, T, *space, C)` to `(*batch, T, *outputs, F)`, with the carry `(c, h)`."""

    _functions, _names = (jaxseq.conv_lstm_init, jaxseq.conv_lstm), INIT


class Conv(_Layer):
    """Convolution, as `nnx.Conv`, with the padding of `jaxseq.conv`. The call takes its other options."""

    _names, _functions = CONV_INIT, (jaxseq.conv_init, lambda params, _, x, **kw: jaxseq.conv(x, *params, **kw))

    def __init__(self, in_features: int, out_features: int, kernel_size: Any, strides: Any = 1, **options: Any):
        super().__init__(in_features, out_features, kernel_size, **{"strides": strides, "padding": "SAME", **options})

    def __call__(self, inputs: Array, **options: Any) -> Array:  # noqa: D102
        return self._apply(self._params(), None, inputs, **options)


class ConvTranspose(Conv):
    """Transposed convolution, as `nnx.ConvTranspose`, with the kernel and the padding of `jaxseq.conv_transpose`."""

    _functions = jaxseq.conv_transpose_init, lambda params, _, x, **kw: jaxseq.conv_transpose(x, *params, **kw)
