"""Keras 3: `SimpleRNN`, `GRU`, `LSTM`, `ConvLSTM1D` to `3D`, `Conv1D` to `3D` and `Conv1DTranspose` to `3DTranspose`.

    [kernel (D, G H), recurrent_kernel (H, G H), bias (G H,)]

An LSTM has its gates in our order (Keras calls g c), a GRU in the order z, r, n. A GRU with `reset_after=True`, which
is what it has unless told otherwise, has two biases as one array (2, 3 H), and is our `gru`; one with
`reset_after=False` has one bias, and is our `classic_gru`. Kernels of convolutions are ours.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxseq import _checks
from jaxseq._conv import ConvParams
from jaxseq.convert import _layout
from jaxseq.convert._layout import Maps

KINDS = {
    "rnn": ("SimpleRNN", "SimpleRNNCell"),
    "gru": ("GRU", "GRUCell"),
    "classic_gru": ("GRU", "GRUCell"),
    "lstm": ("LSTM", "LSTMCell"),
    "conv_lstm": ("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "ConvLSTMCell"),
    "conv": ("Conv1D", "Conv2D", "Conv3D"),
    "conv_transpose": ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
}
DEPTHWISE = (
    "convert [kernel.reshape(*window, 1, channels * depth_multiplier), bias], its kernel being (*window, channels, "
    "depth_multiplier), and pass groups=channels"
)
SEPARABLE = f"it is two convolutions: of the depthwise one {DEPTHWISE}; the pointwise one has kernel and bias"
ELSEWHERE = {
    "DepthwiseConv1D": DEPTHWISE,
    "DepthwiseConv2D": DEPTHWISE,
    "SeparableConv1D": SEPARABLE,
    "SeparableConv2D": SEPARABLE,
    "Bidirectional": "convert its `forward_layer` and its `backward_layer`, and pass both to `jaxseq.bidirectional`",
    "StackedRNNCells": "convert its `cells` one by one, and pass them to `jaxseq.stack`",
}
OPS = ("rnn", "gru", "classic_gru", "lstm", "conv_lstm", *_layout.CONVOLUTIONS)


def from_keras(op: str, weights: Any) -> Any:
    r"""Our parameters from those of a Keras layer.

    $w_x$ and $w_h$ are kernel and recurrent kernel, gates in our order; of a GRU the two rows of its bias are $b_x,
    b_h$.

    Args:
        op: `"rnn"`, `"gru"` (with `reset_after=True`), `"classic_gru"` (with `reset_after=False`), `"lstm"`,
            `"conv_lstm"`, `"conv"` or `"conv_transpose"`.
        weights: the layer, or its `get_weights()`. Of a `Bidirectional` the two layers, one at a time.

    Returns:
        Parameters of `op`.

    Raises:
        TypeError: no layer and no list of float arrays.
        ValueError: a layer of other equations: the wrong `reset_after` (seen by the bias, or where `weights` is the
            layer), another class, or another activation (seen where it is the layer); the wrong number of arrays, a
            size that does not fit, a layer that is not built.

    Example:
        >>> import numpy as np, jaxseq
        >>> weights = [np.ones((3, 15)), np.ones((5, 15)), np.ones((2, 15))]  # GRU(5) on three features
        >>> params = jaxseq.convert.from_keras("gru", weights)
        >>> params.w_x.shape, params.b_h.shape
        ((3, 15), (15,))

    Reference:
        Keras documentation, `keras.layers.GRU`, `LSTM`, `SimpleRNN`, `ConvLSTM2D`, `Conv2DTranspose`.
    """
    _layout.check_op(op, "Keras", OPS, {})
    _check_equations(op, weights)
    w = weights.weights if hasattr(weights, "get_weights") else weights
    if not isinstance(w, list | tuple):
        _checks.bad_type("weights", "a Keras layer, or its get_weights()", _checks.describe(w))
    if not w and hasattr(weights, "get_weights"):
        _checks.bad_value("weights", "a layer with weights: call or build it first", f"a {type(weights).__name__}")
    kernels = 1 if op in _layout.CONVOLUTIONS else 2
    if not kernels <= len(w) <= kernels + 1:
        _checks.bad_value("weights", f"{kernels} arrays, and a bias or none, of one {op!r}", f"{len(w)} arrays")
    arrays: list[Any] = [_layout.array(f"weights[{i}]", a) for i, a in enumerate(w)]
    bias = arrays.pop() if len(arrays) > kernels else None
    if op in _layout.CONVOLUTIONS:
        return _layout.check_kernel("weights", op, ConvParams(arrays[0], bias), groups=1)
    if op not in ("gru", "classic_gru"):
        return _layout.joined(op, Maps(arrays[0], arrays[1], bias, None))
    if bias is not None and bias.ndim != (2 if op == "gru" else 1):
        other, after = ("classic_gru", False) if op == "gru" else ("gru", True)
        why = f"a bias of shape {bias.shape} is that of reset_after={after}, whose equations are {other!r}"
        _layout.refused(op, why)
    w_x, w_h, b = (None if a is None else _layout.ordered(a, "zrn", "rzn") for a in (*arrays, bias))
    b_x, b_h = (b, None) if b is None or op == "classic_gru" else (b[0], b[1])
    return _layout.joined(op, Maps(w_x, w_h, b_x, b_h))


def to_keras(op: str, params: Any) -> list[jax.Array]:
    """The weights of a Keras layer from our parameters: the way back of `from_keras`.

    Args:
        op: as in `from_keras`.
        params: parameters of `op`.

    Returns:
        What `layer.set_weights` takes. Where there is no bias the layer is one with `use_bias=False`.

    Raises:
        TypeError: parameters of another op.
        ValueError: a layer that Keras does not have, a size that does not fit.

    Example:
        >>> import jax, jaxseq
        >>> params = jaxseq.gru_init(jax.random.key(0), 3, 5)
        >>> [w.shape for w in jaxseq.convert.to_keras("gru", params)]
        [(3, 15), (5, 15), (2, 15)]

    Reference:
        Keras documentation, `keras.layers.GRU`, `LSTM`, `SimpleRNN`, `ConvLSTM2D`, `Conv2DTranspose`.
    """
    _layout.check_op(op, "Keras", OPS, {})
    if op in _layout.CONVOLUTIONS:
        return [a for a in _layout.kernel_and_bias(op, params, groups=1) if a is not None]
    w_x, w_h, b_x, b_h, _ = _layout.split_params(op, params)
    b = b_x
    if op == "gru" and (b_x is not None or b_h is not None):
        b = jnp.stack([_layout.or_zeros(b_x, w_x), _layout.or_zeros(b_h, w_h)])
    arrays = [a for a in (w_x, w_h, b) if a is not None]
    return [_layout.ordered(a, "rzn", "zrn") for a in arrays] if op in ("gru", "classic_gru") else arrays


def _check_equations(op: str, layer: Any) -> None:
    """Of a layer, what its weights do not tell."""
    kinds = {op: (*KINDS[op], "RNN") for op in KINDS}  # of layers with a cell, which has the equations
    cell = getattr(layer, "cell", None)
    for part, names in ((layer, KINDS),) if cell is None else ((cell, KINDS), (layer, kinds)):
        _layout.check_class(
            op,
            part,
            home="keras.",
            kinds=names,
            methods=("call",),
            instead="its get_weights()",
            elsewhere=ELSEWHERE,
        )
    layer = layer if cell is None else cell
    after = getattr(layer, "reset_after", None)
    if after is not None and op in ("gru", "classic_gru") and after != (op == "gru"):
        _layout.refused(
            op, f"this layer has reset_after={after}, whose equations are {'gru' if after else 'classic_gru'!r}"
        )
    if op in _layout.CONVOLUTIONS:
        own = _name(getattr(layer, "activation", None))
        if own not in (None, "linear"):
            instead = f"{op!r} has none: convert get_weights() and apply it to the output yourself"
            _layout.option_refused(op, layer, "activation", own, instead)
        return
    usual = {"rnn": ("tanh", "relu")}.get(op, ("tanh",))
    for option, names in (("activation", usual), ("recurrent_activation", ("sigmoid",))):
        own = _name(getattr(layer, option, None))
        if own is not None and own not in names:
            _layout.refused(op, f"this layer's {option} is {own}, ours is {names[0]}")


def _name(activation: Any) -> str | None:
    """What a function is called; a layer or an object in its place has its class for a name."""
    return None if activation is None else getattr(activation, "__name__", type(activation).__name__)
