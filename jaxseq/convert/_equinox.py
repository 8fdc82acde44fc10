"""Equinox: `eqx.nn.GRUCell`, `LSTMCell`, `Conv` and `ConvTranspose`.

    weight_ih (G H, D)     weight_hh (G H, H)     bias (G H,)     GRU: bias_n (H,), the bias of h in n, inside the reset

The order of the gates is that of jaxseq. A convolution has the layout of torch, except for its bias (C_out, 1, ..., 1).
A transposed convolution correlates its weight (C_out, C_in / groups, *kernel_size) with the input dilated by the
stride. Its kernel is that of jaxseq, flipped in space in each group.
"""

from typing import Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxseq import _checks
from jaxseq._conv import ConvParams
from jaxseq._types import AnyArray
from jaxseq.convert import _layout
from jaxseq.convert._layout import Maps

Layer = TypeVar("Layer")

OPS = ("gru", "lstm", *_layout.CONVOLUTIONS)
KINDS = {
    "gru": ("GRUCell",),
    "lstm": ("LSTMCell",),
    "conv": ("Conv", "Conv1d", "Conv2d", "Conv3d"),
    "conv_transpose": ("ConvTranspose", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
}
ELSEWHERE = {
    "rnn": "has no cell without gates",
    "classic_gru": "resets after the recurrent product; its GRU is 'gru'",
}


def from_equinox(op: str, layer: object) -> PyTree[Array]:
    r"""Convert an Equinox layer to parameters of jaxseq.

    $w_x = W_{ih}^\top$, $w_h = W_{hh}^\top$; for a GRU, $b_h = (0, 0, b_n)$.

    Args:
        op: `"gru"`, `"lstm"`, `"conv"` or `"conv_transpose"`.
        layer: the module, `eqx.nn.GRUCell`, `LSTMCell`, `Conv1d` and so on, or another object with the same attributes.

    Returns:
        Parameters of `op`.

    Raises:
        TypeError: the arrays are not float arrays.
        ValueError: Equinox has no such layer, the layer has other equations (another class, `padding_mode`), an
            attribute is missing, the bias is None although `use_bias` is True, or the shapes do not match.

    Example:
        >>> import collections, jax.numpy as jnp, jaxseq
        >>> LSTMCell = collections.namedtuple("LSTMCell", "weight_ih weight_hh bias")  # stands for eqx.nn.LSTMCell
        >>> cell = LSTMCell(jnp.ones((20, 3)), jnp.ones((20, 5)), jnp.ones(20))
        >>> params = jaxseq.convert.from_equinox("lstm", cell)
        >>> params.w_x.shape, params.w_h.shape, params.b.shape
        ((3, 20), (5, 20), (20,))

    Reference:
        Equinox documentation, `equinox.nn.GRUCell`, `LSTMCell`, `Conv`, `ConvTranspose`.
    """
    _layout.check_op(op, "Equinox", OPS, ELSEWHERE)
    instead = "an object with its arrays as attributes (a types.SimpleNamespace)"
    _layout.check_class(op, layer, home="equinox.", kinds=KINDS, methods=("__call__",), instead=instead)
    read = _layout.Reader(layer)
    _layout.check_use_bias(op, layer, read("bias"))
    if op in _layout.CONVOLUTIONS:
        mode = getattr(layer, "padding_mode", "ZEROS")
        if mode != "ZEROS":
            pad = "" if op == "conv_transpose" else f": pad `x` first, then pass {instead} and padding='VALID'"
            _layout.reject_option(op, layer, "padding_mode", mode, f"{op!r} pads with zeros{pad}")
        weight, bias = _layout.required("weight", read("weight"), layer), read("bias")
        if not 3 <= weight.ndim <= 5:
            _checks.bad_value("weights", "a weight with 3 to 5 axes (1 to 3 spatial)", f"shape {weight.shape}")
        if bias is not None and bias.shape[1:] == (1,) * (weight.ndim - 2):
            bias = bias.reshape(-1)
        kernel = _layout.outer_last(weight) if op == "conv" else _ungrouped(weight, _groups(layer))
        groups = None if op == "conv" else _groups(layer)
        return _layout.check_kernel("weights", op, ConvParams(kernel, bias), groups=groups)
    w_x, w_h = (_layout.required(name, read(name), layer).T for name in ("weight_ih", "weight_hh"))
    b, b_n = read("bias"), read("bias_n") if op == "gru" else None
    if op == "gru":
        _layout.all_or_none({"bias": b, "bias_n": b_n})
    if b_n is not None and b_n.shape != w_h.shape[:1]:
        _checks.bad_value("weights", f"`bias_n` of shape {w_h.shape[:1]}", f"shape {b_n.shape}")
    return _layout.join_params(op, Maps(w_x, w_h, b, None if b_n is None else _layout.beside_zeros(b_n, w_h)))


def to_equinox(op: str, params: PyTree[AnyArray], layer: Layer) -> Layer:
    r"""Return an Equinox layer with parameters of jaxseq, the inverse of `from_equinox`.

    For a GRU, $b_h$ of r and z is added to $b_x$. If a bias is None and the layer has one, it becomes zeros.

    Args:
        op: as in `from_equinox`.
        params: parameters of `op`.
        layer: a module with the sizes of `params`. Its other fields do not change.

    Returns:
        A copy of `layer` with the new arrays.

    Raises:
        TypeError: `params` are parameters of another op.
        ValueError: Equinox has no such layer, `layer` has other equations or other sizes than `params`, or a bias is
            nonzero and `layer` has none.

    Example:
        >>> import collections, jax, jax.numpy as jnp, jaxseq
        >>> LSTMCell = collections.namedtuple("LSTMCell", "weight_ih weight_hh bias")  # stands for eqx.nn.LSTMCell
        >>> cell = LSTMCell(jnp.ones((20, 3)), jnp.ones((20, 5)), jnp.ones(20))
        >>> params = jaxseq.lstm_init(jax.random.key(0), 3, 5)
        >>> jaxseq.convert.to_equinox("lstm", params, cell).bias.sum()
        Array(5., dtype=float32)

    Reference:
        Equinox documentation, `equinox.nn.GRUCell`, `LSTMCell`, `Conv`, `ConvTranspose`.
    """
    from_equinox(op, layer)  # validates `layer`
    if op in _layout.CONVOLUTIONS:
        kernel, bias = _layout.kernel_and_bias(op, params, groups=None if op == "conv" else _groups(layer))
        weight = _layout.outer_first(kernel) if op == "conv" else _grouped(kernel, _groups(layer))
        fields = {"weight": weight, "bias": bias}
    else:
        maps = _layout.split_params(op, params)
        fields = {"weight_ih": maps.w_x.T, "weight_hh": maps.w_h.T, "bias": maps.b_x}
        if op == "gru" and (maps.b_x is not None or maps.b_h is not None):
            fields["bias"], fields["bias_n"] = _layout.bias_of_the_candidate(maps)
    return _replaced(layer, fields)


class _Convolution(Protocol):
    groups: int


def _groups(layer: object) -> int:
    return cast("_Convolution", layer).groups


def _ungrouped(weight: jax.Array, groups: int) -> jax.Array:
    """Convert a transposed kernel from (C_out, C_in / groups, *kernel_size) to (*kernel_size, C_out / groups, C_in).

    Output o of group γ depends on input i of group γ: (γ, o, i, *K) -> (*K, o, γ, i).
    """
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    kernel = jnp.moveaxis(grouped, (1, 0, 2), (-3, -2, -1))
    return _layout.flipped(kernel.reshape(*kernel.shape[:-2], -1))


def _grouped(kernel: jax.Array, groups: int) -> jax.Array:
    """Invert `_ungrouped`: (*K, o, γ i) -> (γ o, i, *K)."""
    grouped = _layout.flipped(kernel).reshape(*kernel.shape[:-1], groups, -1)
    weight = jnp.moveaxis(grouped, (-3, -2, -1), (1, 0, 2))
    return weight.reshape(-1, *weight.shape[2:])


def _replaced(layer: Layer, fields: dict[str, jax.Array | None]) -> Layer:
    """Return the layer with its arrays replaced by those in `fields`, by name."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(layer)
    names = [getattr(path[0], "name", None) for path, _ in leaves]
    for name, a in fields.items():
        if name not in names and a is not None and not _layout.is_known_zero(a):
            _checks.bad_value("params", f"{name} to be None or zeros, because `layer` has none", _checks.describe(a))
    new = []
    for name, (_, old) in zip(names, leaves, strict=True):
        a = fields.get(name, old) if isinstance(name, str) else old
        a = jnp.zeros_like(old) if a is None else a
        if a.size != old.size or (a.ndim > 1 and a.shape != old.shape):
            _checks.bad_value("layer", f"{name} of shape {a.shape}, as in `params`", f"shape {old.shape}")
        new.append(a.reshape(old.shape))
    return structure.unflatten(new)
