"""Flax linen modules with the layers of jaxseq. Fields have the names of `nn.RNN`, its cells and `nn.Conv`.

A recurrent module replaces `nn.RNN(cell)`: it maps `(*batch, T, D)` to `(*batch, T, features)`, or with `return_carry`
to `(carry, outputs)`. The call takes all options of `jaxseq.TimeOptions`. Unlike in Flax, outputs are zero in the
padding and keep their order with `reverse`. Parameters are one entry "weights", as in `jaxseq.convert.from_flax`.

>>> import jax, jax.numpy as jnp, jaxseq.integrations.linen as layers
>>> lstm = layers.LSTM(5)
>>> ((c, h), ys), variables = lstm.init_with_output(jax.random.key(0), jnp.ones((2, 7, 3)), return_carry=True)
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax.typing import Array, Dtype, Initializer

import jaxseq
from jaxseq.integrations import _flax

INIT = {"use_bias": "use_bias", "kernel_init": "w_x_init", "recurrent_kernel_init": "w_h_init", "param_dtype": "dtype"}
CONV_INIT = {**INIT, "kernel_init": "kernel_init", "feature_group_count": "groups"}
OPTIONS = {"strides": "stride", "padding": "padding", "kernel_dilation": "dilation", "feature_group_count": "groups"}


class _Sequence(nn.Module):
    @nn.compact
    def __call__(
        self, xs: Array, *, initial_carry: Any = None, seq_lengths: Any = None, return_carry: bool = False, **time: Any
    ) -> Any:
        params = self.param("weights", self._init, _flax.main_input(xs).shape[-1], self.features)
        time = {"lengths": seq_lengths, **time}
        return _flax.call(self, params, xs, carry=initial_carry, return_carry=return_carry, **time)


class _Layer(_Sequence):
    features: int
    _: KW_ONLY
    use_bias: bool | None = None
    kernel_init: Initializer | None = None
    recurrent_kernel_init: Initializer | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = "float32"
    _names = INIT  # names in Flax: names in jaxseq

    def _init(self, key: Array, size: int, _: Any) -> Any:
        sizes = [self.kernel_size] if hasattr(self, "kernel_size") else []
        return self._functions[0](key, *sizes, size, self.features, **self._options(self._names))

    def _apply(self, params: Any, carry: Any, xs: Array, **options: Any) -> Any:
        params, xs = _flax.cast(params, xs, self.dtype)
        return self._functions[1](params, carry, xs, **self._options(OPTIONS), **options)

    def _options(self, names: dict[str, str]) -> dict[str, Any]:
        return {name: value for field, name in names.items() if (value := getattr(self, field, None)) is not None}


class RNN(_Layer):
    """Elman network, as `nn.RNN(nn.SimpleCell(features))`."""

    activation_fn: Callable[[Array], Array] = nn.tanh
    _functions = property(lambda self: (jaxseq.rnn_init, partial(jaxseq.rnn, activation=self.activation_fn)))


class GRU(_Layer):
    """GRU, as `nn.RNN(nn.GRUCell(features))`: of `b_h` only the part of the candidate is trained."""

    _functions = jaxseq.gru_init, jaxseq.gru

    def _apply(self, params: jaxseq.GRUParams, *args: Any, **time: Any) -> Any:
        b_h = jax.tree.map(lambda b: jax.lax.stop_gradient(b).at[-self.features :].set(b[-self.features :]), params.b_h)
        return super()._apply(params._replace(b_h=b_h), *args, **time)


class LSTM(_Layer):
    """LSTM, as `nn.RNN(nn.OptimizedLSTMCell(features))`, with the carry `(c, h)`. The initial forget bias is one."""

    _functions = jaxseq.lstm_init, jaxseq.lstm


class Recurrence(_Layer):
    """Any `jaxseq.Cell` with its initializer: `Recurrence(5, jaxseq.cells.mgu, jaxseq.cells.mgu_init)`."""

    cell: jaxseq.Cell | jaxseq.LinearCell
    cell_init: Callable[..., Any]
    _functions = property(lambda self: (self.cell_init, partial(jaxseq.recurrence, self.cell)))


class Bidirectional(_Sequence):
    """Both directions, as `nn.Bidirectional`: outputs are concatenated. The carry is a pair of states of jaxseq."""

    forward_rnn: _Sequence
    backward_rnn: _Sequence
    features = property(lambda self: self.forward_rnn.features)
    _init = property(lambda self: partial(jaxseq.bidirectional_init, [self.forward_rnn._init, self.backward_rnn._init]))
    _apply = property(lambda self: partial(jaxseq.bidirectional, [self.forward_rnn._apply, self.backward_rnn._apply]))


class Stack(_Sequence):
    """Layers in sequence. The call takes all options of `jaxseq.stack`. Its `key` is the rng "dropout", if given."""

    layers: Sequence[_Sequence]
    features = property(lambda self: [layer.features for layer in self.layers])
    _init = property(lambda self: partial(jaxseq.stack_init, [layer._init for layer in self.layers]))

    def _apply(self, *args: Any, **options: Any) -> Any:
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return jaxseq.stack([layer._apply for layer in self.layers], *args, **{"key": key, **options})


class CausalConv(_Layer):
    """Causal convolution, `jaxseq.causal_conv`: `(*batch, T, C)` to `(*batch, T, features)`, in chunks."""

    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = None
    padding: str | int | Sequence[tuple[int, int]] | None = None
    kernel_dilation: int | Sequence[int] | None = None
    feature_group_count: int | None = None
    _functions, _names = (jaxseq.conv_init, jaxseq.causal_conv), CONV_INIT


class ConvLSTM(CausalConv):
    """Convolutional LSTM: `(*batch, T, *space, C)` to `(*batch, T, *outputs, features)`, with the carry `(c, h)`."""

    _functions, _names = (jaxseq.conv_lstm_init, jaxseq.conv_lstm), INIT


class Conv(CausalConv):
    """Convolution, as `nn.Conv`, with the padding of `jaxseq.conv`. The call takes its other options."""

    padding: str | int | Sequence[tuple[int, int]] | None = "SAME"
    _functions = jaxseq.conv_init, lambda params, _, x, **kw: jaxseq.conv(x, *params, **kw)

    @nn.compact
    def __call__(self, inputs: Array, **options: Any) -> Array:  # noqa: D102
        params = self.param("weights", self._init, inputs.shape[-1], self.features)
        return self._apply(params, None, inputs, **options)


class ConvTranspose(Conv):
    """Transposed convolution, as `nn.ConvTranspose`, with the kernel and the padding of `jaxseq.conv_transpose`."""

    _functions = jaxseq.conv_transpose_init, lambda params, _, x, **kw: jaxseq.conv_transpose(x, *params, **kw)
