"""Keras 3: `SimpleRNN`, `GRU`, `LSTM`, `ConvLSTM1D` to `3D`, `Conv1D` to `3D` and `Conv1DTranspose` to `3DTranspose`.

    [kernel (D, G H), recurrent_kernel (H, G H), bias (G H,)]

The gates of an LSTM are in the order of jaxseq (Keras calls g c), those of a GRU in the order z, r, n. A GRU with
`reset_after=True`, the default, has two biases in one array (2, 3 H) and the equations of `gru`. A GRU with
`reset_after=False` has one bias and the equations of `classic_gru`. Kernels of convolutions have the layout of jaxseq.
"""

from collections.abc import Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxseq import _checks
from jaxseq._conv import ConvParams
from jaxseq._types import AnyArray
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
    "convert [kernel.reshape(*kernel_size, 1, channels * depth_multiplier), bias], where kernel is "
    "(*kernel_size, channels, depth_multiplier), and pass groups=channels"
)
SEPARABLE = f"it is two convolutions: for the depthwise one, {DEPTHWISE}; the pointwise one has kernel and bias"
ELSEWHERE = {
    "DepthwiseConv1D": DEPTHWISE,
    "DepthwiseConv2D": DEPTHWISE,
    "SeparableConv1D": SEPARABLE,
    "SeparableConv2D": SEPARABLE,
    "Bidirectional": "convert its `forward_layer` and its `backward_layer`, and pass both to `jaxseq.bidirectional`",
    "StackedRNNCells": "convert its `cells` one by one, and pass them to `jaxseq.stack`",
}
OPS = ("rnn", "gru", "classic_gru", "lstm", "conv_lstm", *_layout.CONVOLUTIONS)


@runtime_checkable
class Layer(Protocol):
    """What is used of a `keras.Layer`, besides options."""

    @property
    def weights(self) -> Sequence[object]: ...

    def get_weights(self) -> Sequence[object]: ...


def from_keras(op: str, weights: Sequence[object] | Layer) -> PyTree[Array]:
    r"""Convert the weights of a Keras layer to parameters of jaxseq.

    $w_x$ and $w_h$ are the kernel and the recurrent kernel with the gates reordered. For `"gru"`, the two rows of the
    bias are $b_x$ and $b_h$.

    Args:
        op: `"rnn"`, `"gru"` (with `reset_after=True`), `"classic_gru"` (with `reset_after=False`), `"lstm"`,
            `"conv_lstm"`, `"conv"` or `"conv_transpose"`.
        weights: the layer, or its `get_weights()`. For a `Bidirectional`, convert its two layers one at a time.

    Returns:
        Parameters of `op`.

    Raises:
        TypeError: `weights` is neither a layer nor a list of float arrays.
        ValueError: the layer has other equations (`reset_after`, or, checked only if `weights` is the layer, another
            class or activation), the number of arrays is wrong, the shapes do not match, or the layer is not built.

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
    w = weights.weights if _is_layer(weights) else weights
    if not isinstance(w, list | tuple):
        _checks.bad_type("weights", "a Keras layer, or its get_weights()", _checks.describe(w))
    if not w and _is_layer(weights):
        _checks.bad_value("weights", "a layer with weights: call or build it first", f"a {type(weights).__name__}")
    kernels = 1 if op in _layout.CONVOLUTIONS else 2
    if not kernels <= len(w) <= kernels + 1:
        _checks.bad_value("weights", f"{kernels} arrays and an optional bias for {op!r}", f"{len(w)} arrays")
    arrays = [_layout.array(f"weights[{i}]", a) for i, a in enumerate(w)]
    bias = arrays.pop() if len(arrays) > kernels else None
    if op in _layout.CONVOLUTIONS:
        return _layout.check_kernel("weights", op, ConvParams(arrays[0], bias), groups=1)
    if op not in ("gru", "classic_gru"):
        return _layout.join_params(op, Maps(arrays[0], arrays[1], bias, None))
    if bias is not None and bias.ndim != (2 if op == "gru" else 1):
        other, after = ("classic_gru", False) if op == "gru" else ("gru", True)
        why = f"a bias of shape {bias.shape} belongs to reset_after={after}, whose op is {other!r}"
        _layout.reject(op, why)
    w_x, w_h = (_layout.ordered(a, "zrn", "rzn") for a in arrays)
    b = None if bias is None else _layout.ordered(bias, "zrn", "rzn")
    b_x, b_h = (b, None) if b is None or op == "classic_gru" else (b[0], b[1])
    return _layout.join_params(op, Maps(w_x, w_h, b_x, b_h))


def to_keras(op: str, params: PyTree[AnyArray]) -> list[jax.Array]:
    """Convert parameters of jaxseq to the weights of a Keras layer, the inverse of `from_keras`.

    Args:
        op: as in `from_keras`.
        params: parameters of `op`.

    Returns:
        A list of arrays for `layer.set_weights`. Without a bias, it is for a layer with `use_bias=False`.

    Raises:
        TypeError: `params` are parameters of another op.
        ValueError: Keras has no such layer, or the shapes do not match.

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


def _is_layer(weights: object) -> TypeGuard[Layer]:
    return hasattr(weights, "get_weights")


def _check_equations(op: str, layer: object) -> None:
    """Check the class and the options of a layer, which its weights do not contain."""
    kinds = {op: (*KINDS[op], "RNN") for op in KINDS}  # for layers with a cell, which has the equations
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
        _layout.reject(op, f"this layer has reset_after={after}, whose op is {'gru' if after else 'classic_gru'!r}")
    if op in _layout.CONVOLUTIONS:
        own = _name(getattr(layer, "activation", None))
        if own not in (None, "linear"):
            instead = f"{op!r} has none: convert get_weights() and apply the activation to the output"
            _layout.reject_option(op, layer, "activation", own, instead)
        return
    usual = {"rnn": ("tanh", "relu")}.get(op, ("tanh",))
    for option, names in (("activation", usual), ("recurrent_activation", ("sigmoid",))):
        own = _name(getattr(layer, option, None))
        if own is not None and own not in names:
            _layout.reject(op, f"this layer's {option} is {own}, that of {op!r} is {names[0]}")


def _name(activation: object) -> str | None:
    """Return the name of an activation: of the function, or of the class of a layer or another object."""
    return None if activation is None else getattr(activation, "__name__", type(activation).__name__)
