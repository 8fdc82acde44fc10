"""Haiku modules of jaxseq, with the arguments of the modules of Haiku.

Layers of sequences take `(T, *batch, D)`, as `hk.dynamic_unroll` does. `layer(inputs, initial_state=None, **time)`
returns `(outputs, state)`; `time` are options of `jaxseq.TimeOptions`. The state of an LSTM is an `hk.LSTMState`.

Constructors take `name`, `with_bias`, initializers of Haiku (`w_i_init`, `w_h_init`, `b_init`; `w_init` in `Conv`), and
options of the function of jaxseq. Parameters have the dtype of the inputs, and the names in `convert.from_haiku`.

    >>> import haiku as hk, jax.numpy as jnp, jaxseq, jaxseq.integrations.haiku as layers
    >>> def model(xs, images):
    ...     ys, h = layers.Recurrence(jaxseq.cells.mgu, jaxseq.cells.mgu_init, 5)(xs, lengths=jnp.array([7, 4]))
    ...     ys, ((h, c), carry) = layers.Stack([layers.LSTM(5), layers.CausalConv(8, 4)])(xs, dropout=0.1)
    ...     ys, (forward, backward) = layers.Bidirectional(layers.GRU(5), layers.RNN(5))(xs, truncation=4)
    ...     ys, (h, c) = layers.ConvLSTM(2, 8, 3)(images)
    ...     return layers.ConvTranspose(2, 3, 4, stride=2)(layers.Conv(2, 8, 3, stride=2)(images))
    >>> y = hk.testing.transform_and_run(model)(jnp.ones((7, 2, 3)), jnp.ones((5, 16, 12, 3)))
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import signature
from typing import Any

import haiku as hk
import jax
from jaxtyping import Array, PyTree

import jaxseq
from jaxseq._geometry import per_axis

OPTIONS = {"with_bias": "use_bias", "rate": "dilation", "feature_group_count": "groups"}  # of Haiku and of jaxseq
OPTIONS |= {"w_i_init": "w_x_init", "w_init": "kernel_init"}
INITS = {"b_x": "b_init", "b_h": "b_init", "bias": "b_init", "w_q": "w_h_init"}  # of parameters, else f"{name}_init"


def _states(kind: type, tree: PyTree) -> PyTree:
    is_state = lambda a: isinstance(a, hk.LSTMState | jaxseq.LSTMState)  # noqa: E731
    return jax.tree.map(lambda a: kind(*a) if is_state(a) else a, tree, is_leaf=is_state)


class _Layer(hk.Module):
    functions: tuple[Any, ...]  # the initializer, the function, and its arguments before `params`

    @classmethod
    def of(cls, *functions: Any) -> Any:
        return type(cls)(cls.__name__, (cls,), {"functions": functions, "__module__": __name__})

    def __init__(self, hidden_size: int, *kernel_size: Any, name: str | None = None, **options: Any):
        super().__init__(name)
        options = {OPTIONS.get(option, option): value for option, value in options.items()}
        of_init, of_function = ({*signature(f).parameters} for f in self.functions[:2])
        inits = {"w_x_init", "w_h_init", "kernel_init"} & of_init | {"b_init"}
        self.inits = {option: options.pop(option) for option in inits & {*options}}
        self.function = partial(*self.functions[1:], **{o: value for o, value in options.items() if o in of_function})
        drawn = {o: value for o, value in options.items() if o in of_init or o not in of_function}
        self.init = lambda key, size, **dtype: self.functions[0](key, *kernel_size, size, hidden_size, **dtype, **drawn)

    def _declare(self, xs: Any) -> PyTree:
        xs = xs[0] if isinstance(xs, tuple) else xs  # without side inputs
        init = partial(self.init, size=xs.shape[-1], dtype=xs.dtype)
        paths, tree = jax.tree_util.tree_flatten_with_path(jax.eval_shape(init, jax.random.key(0)))
        draw = cache(lambda: jax.tree.leaves(init(hk.next_rng_key())))  # not called in `apply`
        params = []
        for i, (path, a) in enumerate(paths):
            name = jax.tree_util.keystr(path, simple=True, separator="_")
            of_name = self.inits.get(INITS.get(name, f"{name}_init")) or (lambda *_, i=i: draw()[i])
            params.append(hk.get_parameter(name, a.shape, a.dtype, init=of_name))
        return tree.unflatten(params)

    def __call__(self, inputs: Array, initial_state: PyTree = None, **time: Any) -> tuple[Array, PyTree]:
        if "key" in signature(self.function).parameters:  # for dropout
            time = {"key": hk.maybe_next_rng_key(), **time}
        initial_state, time = _states(jaxseq.LSTMState, (initial_state, time))
        state, outputs = self.function(self._declare(inputs), initial_state, inputs, **time)
        return outputs, _states(hk.LSTMState, state)


class RNN(_Layer.of(jaxseq.rnn_init, partial(jaxseq.rnn, activation="relu"))):
    """`hk.VanillaRNN(H, double_bias=False)` for sequences, by `jaxseq.rnn`; `activation` is "relu" by default."""


class GRU(_Layer.of(jaxseq.cells.classic_gru_init, jaxseq.recurrence, jaxseq.cells.classic_gru)):
    """`hk.GRU` for sequences, by `jaxseq.cells.classic_gru`. See `Recurrence` for `jaxseq.gru`."""


class LSTM(_Layer.of(jaxseq.lstm_init, jaxseq.lstm)):
    """`hk.LSTM` for sequences, by `jaxseq.lstm`. The bias includes the 1 that Haiku adds to the forget gate."""


class Recurrence(_Layer):
    """A `jaxseq.Cell` for sequences: `Recurrence(cell, init, hidden_size)`, drawn by `init`."""

    def __init__(
        self, cell: jaxseq.Cell | jaxseq.LinearCell, init: Callable[..., PyTree], hidden_size: int, **options: Any
    ):
        self.functions = init, jaxseq.recurrence, cell
        super().__init__(hidden_size, **options)


class Stack(_Layer):
    """`jaxseq.stack` of layers of this module, as `hk.DeepRNN`. The default of `key` is the next key of Haiku."""

    def __init__(self, layers: Sequence[_Layer], name: str | None = None, **options: Any):
        hk.Module.__init__(self, name)
        self.layers, self.function = layers, partial(jaxseq.stack, [layer.function for layer in layers], **options)

    def _declare(self, xs: Any) -> list[PyTree]:
        params = []
        for layer in self.layers:
            params.append(layer._declare(xs))
            _, xs = jax.eval_shape(layer.function, params[-1], None, xs)
        return params


class Bidirectional(_Layer):
    """`jaxseq.bidirectional` of two layers of this module; the state is the pair of their states."""

    def __init__(self, forward: _Layer, backward: _Layer, name: str | None = None):
        hk.Module.__init__(self, name)
        self.layers = forward, backward
        self.function = partial(jaxseq.bidirectional, [forward.function, backward.function])

    def _declare(self, xs: Any) -> list[PyTree]:
        return [layer._declare(xs) for layer in self.layers]


class Conv(_Layer.of(jaxseq.conv_init, partial(jaxseq.conv, padding="SAME"))):
    """`hk.ConvND` by `jaxseq.conv`: `(*batch, *space, C)` to `(*batch, *outputs, C')`, with the padding of jaxseq."""

    def __init__(self, num_spatial_dims: int, output_channels: int, kernel_shape: Any, **options: Any):
        super().__init__(output_channels, per_axis("kernel_shape", kernel_shape, num_spatial_dims), **options)

    def __call__(self, inputs: Array, **options: Any) -> Array:  # noqa: D102
        return self.function(inputs, *self._declare(inputs), **options)


class ConvTranspose(Conv.of(jaxseq.conv_transpose_init, partial(jaxseq.conv_transpose, padding="SAME"))):
    """`hk.ConvNDTranspose` by `jaxseq.conv_transpose`; numbers in `padding` crop the outputs."""


class CausalConv(_Layer.of(jaxseq.conv_init, jaxseq.causal_conv)):
    """`jaxseq.causal_conv`: `(T, *batch, C)` to `((T, *batch, C'), state)`, created as `hk.Conv1D`."""

    def __init__(self, output_channels: int, kernel_shape: int, **options: Any):
        super().__init__(output_channels, kernel_shape, **options)


class ConvLSTM(Conv.of(jaxseq.conv_lstm_init, jaxseq.conv_lstm)):
    """`hk.ConvNDLSTM` for sequences, by `jaxseq.conv_lstm`: `(T, *batch, *space, C)`, without `input_shape`."""

    __call__ = _Layer.__call__
