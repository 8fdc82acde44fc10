"""Flax linen and Flax nnx.

linen has one array for each map and gate, `{"ii": {"kernel"}, "hi": {"kernel", "bias"}, ...}`, with kernels (in, H) as
in jaxseq. The biases of an LSTM belong to the maps of h; those of a simple cell and of the gates r, z, f to the maps of
x; n of a GRU or MGU has both. nnx concatenates the gates of its GRU and of its `OptimizedLSTMCell` in the order of
jaxseq, and its GRU has no bias of h. `ConvLSTMCell` has the gates in the order i, g, f, o and adds 1 to f. Kernels of
convolutions have the layout of jaxseq; those of transposed ones are flipped in space and have their last two axes
swapped, unless `transpose_kernel=True`.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxseq import _checks
from jaxseq._conv import ConvParams
from jaxseq._types import AnyArray
from jaxseq.convert import _layout
from jaxseq.convert._layout import Maps

GRU = {"classic_gru": "resets after the recurrent product; its GRU is 'gru'"}
LINEN = ("rnn", "gru", "lstm", "mgu", "conv_lstm", *_layout.CONVOLUTIONS)
NNX = ("rnn", "gru", "lstm", *_layout.CONVOLUTIONS)
KINDS = {
    "rnn": ("SimpleCell",),
    "gru": ("GRUCell",),
    "lstm": ("LSTMCell", "OptimizedLSTMCell"),
    "conv": ("Conv",),
    "conv_transpose": ("ConvTranspose",),
}
ELSEWHERE = {
    "RNN": "pass its `cell`",
    "Bidirectional": "convert `forward_rnn.cell` and `backward_rnn.cell`, and pass both to `jaxseq.bidirectional`",
}
SIGMOIDS = (jax.nn.sigmoid, lax.logistic)
TANHS = (jnp.tanh, jax.nn.tanh, lax.tanh)


def from_flax(op: str, weights: Mapping[str, object], *, transpose_kernel: bool = False) -> PyTree[Array]:
    r"""Convert the parameters of a Flax linen layer to parameters of jaxseq.

    The arrays of the gates are concatenated: $w_x = [W_{ii}, W_{if}, W_{ig}, W_{io}]$ and so on. For GRU and MGU, where
    Flax has a bias of h only in n, $b_h$ is zero in the other gates.

    Args:
        op: `"rnn"` (`SimpleCell`), `"gru"`, `"lstm"` (`LSTMCell` or `OptimizedLSTMCell`, whose parameters are alike),
            `"mgu"`, `"conv_lstm"` (`ConvLSTMCell`), `"conv"` or `"conv_transpose"`.
        weights: the dict of the layer, such as `variables["params"]["cell"]` of an `nn.RNN`, or a dict that contains
            only this dict. It does not contain the options of the layer (`gate_fn`, `activation_fn`, `residual`,
            `mask`, `padding`), which the caller has to check.
        transpose_kernel: the option `transpose_kernel` of an `nn.ConvTranspose`.

    Returns:
        Parameters of `op`.

    Raises:
        TypeError: `weights` is not a dict of float arrays.
        ValueError: Flax has no such layer or one with other equations, a name is missing or unexpected, only some gates
            have a bias, or the shapes do not match.

    Example:
        >>> import jax.numpy as jnp, jaxseq
        >>> cell = {"i": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}, "h": {"kernel": jnp.ones((5, 5))}}
        >>> params = jaxseq.convert.from_flax("rnn", {"params": {"cell": cell}})
        >>> params.w_x.shape, params.b.shape
        ((3, 5), (5,))

    Reference:
        Flax documentation, `flax.linen.LSTMCell`, `GRUCell`, `MGUCell`, `ConvLSTMCell`, `ConvTranspose`.
    """
    _layout.check_op(op, "Flax", LINEN, GRU)
    if not isinstance(weights, Mapping):
        _checks.bad_type("weights", "a dict of the arrays of a layer", _checks.describe(weights))
    weights = _innermost(op, weights)
    if op in _layout.CONVOLUTIONS:
        return _kernel_in(op, weights, _checks.boolean("transpose_kernel", transpose_kernel))
    if op == "conv_lstm":
        return _conv_lstm_in(weights)
    return _gate_by_gate_in(op, weights)


def to_flax(op: str, params: PyTree[AnyArray], *, transpose_kernel: bool = False) -> dict[str, PyTree[Array]]:
    """Convert parameters of jaxseq to those of a Flax linen layer, the inverse of `from_flax`.

    In the gates r, z and f of GRU and MGU, where Flax has one bias and jaxseq has two, $b_h$ is added to $b_x$. If a
    bias is None and Flax always has one, it becomes zeros.

    Args:
        op: as in `from_flax`.
        params: parameters of `op`.
        transpose_kernel: the option `transpose_kernel` of an `nn.ConvTranspose`.

    Returns:
        The dict of the cell or of the convolution. The variables of an `nn.RNN` are `{"params": {"cell": cell}}`.

    Raises:
        TypeError: `params` are parameters of another op.
        ValueError: Flax has no such layer or one with other equations, or the shapes do not match.

    Example:
        >>> import jax, jaxseq
        >>> params = jaxseq.rnn_init(jax.random.key(0), 3, 5)
        >>> jax.tree.map(lambda a: a.shape, jaxseq.convert.to_flax("rnn", params))
        {'h': {'kernel': (5, 5)}, 'i': {'bias': (5,), 'kernel': (3, 5)}}

    Reference:
        Flax documentation, `flax.linen.LSTMCell`, `GRUCell`, `MGUCell`, `ConvLSTMCell`, `ConvTranspose`.
    """
    _layout.check_op(op, "Flax", LINEN, GRU)
    if op in _layout.CONVOLUTIONS:
        return _kernel_out(op, params, _checks.boolean("transpose_kernel", transpose_kernel))
    maps = _layout.split_params(op, params)
    return _conv_lstm_out(maps) if op == "conv_lstm" else _gate_by_gate_out(op, maps)


def from_nnx(op: str, weights: object, *, transpose_kernel: bool = False) -> PyTree[Array]:
    r"""Convert the parameters of a Flax nnx layer to parameters of jaxseq.

    $w_x$ and $w_h$ are the kernels of `dense_i` and `dense_h`, with the gates in the same order; an `nnx.LSTMCell` has
    one layer for each gate. An `nnx.GRUCell` has no bias of $h$: $b_h$ is None.

    Args:
        op: `"rnn"` (`SimpleCell`; with `activation_fn=nnx.relu`, pass `activation="relu"` to the op), `"gru"`, `"lstm"`
            (`LSTMCell` or `OptimizedLSTMCell`), `"conv"` or `"conv_transpose"`.
        weights: the module (for an `nnx.RNN`, its cell), its `nnx.state`, or the state as a plain dict. The options are
            checked only if it is the module.
        transpose_kernel: the option `transpose_kernel` of an `nnx.ConvTranspose`; ignored if `weights` is the module,
            which has it.

    Returns:
        Parameters of `op`.

    Raises:
        TypeError: `weights` does not contain float arrays.
        ValueError: nnx has no such layer or one with other equations (checked only if `weights` is the module: another
            class, `residual=True`, another activation, a `mask`, `input_dilation`, circular padding), a name is missing
            or unexpected, only some gates have a bias, or the shapes do not match.

    Example:
        >>> import jax.numpy as jnp, jaxseq
        >>> dense_h = {"kernel": jnp.ones((5, 20)), "bias": jnp.ones(20)}
        >>> cell = {"dense_i": {"kernel": jnp.ones((3, 20))}, "dense_h": dense_h}
        >>> jaxseq.convert.from_nnx("lstm", cell).b.shape
        (20,)

    Reference:
        Flax documentation, `flax.nnx.LSTMCell`, `OptimizedLSTMCell`, `GRUCell`, `SimpleCell`, `ConvTranspose`.
    """
    _layout.check_op(op, "nnx", NNX, GRU)
    _check_equations(op, weights)
    if op in _layout.CONVOLUTIONS:
        swap = _checks.boolean("transpose_kernel", getattr(weights, "transpose_kernel", transpose_kernel))
        return _kernel_in(op, weights, swap)
    read = _layout.Reader(weights)
    if read("dense_i", "kernel") is None and op == "lstm":
        return _gate_by_gate_in(op, weights, if_="if_")
    w_x, w_h = (_layout.required(name, read(name, "kernel"), weights) for name in ("dense_i", "dense_h"))
    maps = Maps(w_x, w_h, read("dense_i", "bias"), read("dense_h", "bias"))
    read.finish()
    return _layout.join_params(op, maps)


def to_nnx(
    op: str, params: PyTree[AnyArray], *, optimized: bool = True, transpose_kernel: bool = False
) -> dict[str, PyTree[Array]]:
    """Convert parameters of jaxseq to the state of a Flax nnx layer, the inverse of `from_nnx`.

    Args:
        op: as in `from_nnx`.
        params: parameters of `op`.
        optimized: for an LSTM, True for an `nnx.OptimizedLSTMCell` and False for an `nnx.LSTMCell`.
        transpose_kernel: the option `transpose_kernel` of an `nnx.ConvTranspose`.

    Returns:
        A dict `state` for `nnx.update(module, state)`. If a bias is None and nnx always has one, it becomes zeros.

    Raises:
        TypeError: `params` are parameters of another op.
        ValueError: nnx has no such layer or one with other equations, or a GRU has a nonzero $b_h$ in n, which nnx
            can't represent. Under `jit`, where values are unknown, any `b_h` other than None raises.

    Example:
        >>> import jax, jaxseq
        >>> params = jaxseq.lstm_init(jax.random.key(0), 3, 5)
        >>> jax.tree.map(lambda a: a.shape, jaxseq.convert.to_nnx("lstm", params))
        {'dense_h': {'bias': (20,), 'kernel': (5, 20)}, 'dense_i': {'kernel': (3, 20)}}

    Reference:
        Flax documentation, `flax.nnx.LSTMCell`, `OptimizedLSTMCell`, `GRUCell`, `SimpleCell`, `ConvTranspose`.
    """
    _layout.check_op(op, "nnx", NNX, GRU)
    if op in _layout.CONVOLUTIONS:
        return _kernel_out(op, params, _checks.boolean("transpose_kernel", transpose_kernel))
    maps = _layout.split_params(op, params)
    if op == "lstm" and not _checks.boolean("optimized", optimized):
        return _gate_by_gate_out(op, maps, if_="if_")
    b = _layout.or_zeros(maps.b_x, maps.w_x)
    if op == "gru" and maps.b_h is not None:
        b, b_n = _layout.bias_of_the_candidate(maps)
        if not _layout.is_known_zero(b_n):
            why = "a GRU of nnx has no bias of h, and `params.b_h` is not known to be zero in n, inside the reset"
            _layout.reject(op, why)
    place = "dense_h" if op == "lstm" else "dense_i"
    state = {"dense_i": {"kernel": maps.w_x}, "dense_h": {"kernel": maps.w_h}}
    state[place]["bias"] = b
    return state


def _check_equations(op: str, module: object) -> None:
    """Check the class and the options of a module, which its parameters do not contain."""
    check_class = partial(
        _layout.check_class,
        op,
        home="flax.nnx.",
        methods=("__call__",),
        instead="its `nnx.state`",
        elsewhere=ELSEWHERE,
    )
    check_class(module, kinds=KINDS)
    promote = getattr(module, "promote_dtype", None)
    if not isinstance(module, Mapping) and not getattr(promote, "__module__", "flax.").startswith("flax."):
        instead = "which may change values: if it only changes dtypes, convert its `nnx.state`"
        _layout.reject_option(op, module, "promote_dtype", promote, instead)
    if op in _layout.CONVOLUTIONS:
        _check_convolution(op, module)
        return
    if getattr(module, "residual", False):
        _layout.reject(op, f"this cell adds its state to the pre-activation (residual=True), {op!r} does not")
    activations = (*TANHS, jax.nn.relu) if op == "rnn" else TANHS
    for option, usual in (("gate_fn", SIGMOIDS), ("activation_fn", activations)):
        own = getattr(module, option, None)
        if own is not None and own not in usual:
            name = getattr(own, "__name__", own)
            _layout.reject(op, f"this cell's {option} is {name}, that of {op!r} is {usual[0].__name__}")
    for name in () if isinstance(module, Mapping) else ("dense_i", "dense_h", *_gate_names(op, if_="if_")):
        part = getattr(module, name, None)
        check_class(part, kinds={op: ("Linear",)})


def _check_convolution(op: str, module: object) -> None:
    mask = getattr(module, "mask", None)
    if mask is not None:
        instead = "multiply the kernel by the mask: convert {'kernel': layer.kernel * layer.mask, 'bias': layer.bias}"
        _layout.reject_option(op, module, "mask", _checks.describe(mask), instead)
    padding = getattr(module, "padding", None)
    if padding in ("CIRCULAR", "REFLECT"):
        how = "convert its `nnx.state` and pad `x` first" if op == "conv" else "jaxseq has no such padding"
        _layout.reject_option(op, module, "padding", padding, f"{op!r} pads with zeros: {how}")
    dilation = getattr(module, "input_dilation", None)
    if dilation is not None and np.any(np.asarray(dilation) != 1):
        instead = "'conv' has no such option: convert its `nnx.state` and insert the zeros between the inputs first"
        _layout.reject_option(op, module, "input_dilation", dilation, instead)
    function = getattr(module, "conv_general_dilated", lax.conv_general_dilated)
    if function is not lax.conv_general_dilated and not isinstance(module, Mapping):
        instead = (
            "'conv' computes jax.lax.conv_general_dilated: if this function is equivalent, convert the `nnx.state`"
        )
        _layout.reject_option(op, module, "conv_general_dilated", function, instead)


def _innermost(op: str, weights: Mapping[str, object]) -> Mapping[str, object]:
    """Return the dict of the layer from nested dicts such as {"params": {"cell": dict}}."""
    while len(weights) == 1:
        (inner,) = weights.values()
        if not isinstance(inner, Mapping):
            break
        if op not in _layout.CONVOLUTIONS and not all(isinstance(part, Mapping) for part in inner.values()):
            break
        weights = inner
    return weights


# --- Cells with one array for each map and gate ---


def _gate_names(op: str, **names: str) -> list[str]:
    """Return the names of the layers of a cell, those of x before those of h.

    `names` overrides names: in nnx, the attribute of `if` is `if_`, since `if` is a keyword.
    """
    gates = ("",) if op == "rnn" else tuple(_layout.RECURRENCES[op].gates)
    return [names.get(f"{letter + gate}_", letter + gate) for letter in "ih" for gate in gates]


def _gate_by_gate_in(op: str, weights: object, **names: str) -> PyTree[Array]:
    """Read all kernels and biases. Flax has biases of x (LSTM: of h instead), and in n of GRU and MGU also of h."""
    read, of_gate = _layout.Reader(weights), _gate_names(op, **names)
    of_x, of_h = of_gate[: len(of_gate) // 2], of_gate[len(of_gate) // 2 :]
    w_x, w_h = (
        _of_all_gates({f"{name}.kernel": _layout.required(name, read(name, "kernel"), weights) for name in own})
        for own in (of_x, of_h)
    )
    biases = {f"{name}.bias": read(name, "bias") for name in (of_h if op == "lstm" else of_x)}
    _layout.all_or_none(biases)
    given = {name: b for name, b in biases.items() if b is not None}
    b = _of_all_gates(given) if given else None
    b_n = read("hn", "bias") if op in ("gru", "mgu") else None
    read.finish()
    if op not in ("gru", "mgu"):
        return _layout.join_params(op, Maps(w_x, w_h, b, None))
    if b_n is None:
        why = "this cell has no bias of h in n" + (": it has `reset_gate=False`, 'mgu' resets" if op == "mgu" else "")
        _layout.reject(op, why)
    if b_n.shape != (w_h.shape[0],):
        _checks.bad_value("weights", f"'hn.bias' of shape {(w_h.shape[0],)}", f"shape {b_n.shape}")
    return _layout.join_params(op, Maps(w_x, w_h, b, _layout.beside_zeros(b_n, w_h)))


def _of_all_gates(parts: dict[str, jax.Array]) -> jax.Array:
    """Concatenate the arrays of all gates, which must have equal shapes."""
    (first, one), *_ = parts.items()
    for name, a in parts.items():
        if a.shape != one.shape or not a.ndim:
            _checks.bad_value("weights", f"{name!r} of shape {one.shape}, like {first!r}", f"shape {a.shape}")
    return jnp.concatenate([*parts.values()], -1)


def _gate_by_gate_out(op: str, maps: Maps, **names: str) -> dict[str, dict[str, jax.Array]]:
    of_gate = _gate_names(op, **names)
    G = len(of_gate) // 2
    layers_of_x, layers_of_h = (
        {name: {"kernel": w} for name, w in zip(own, jnp.split(all_, G, -1), strict=True)}
        for own, all_ in ((of_gate[:G], maps.w_x), (of_gate[G:], maps.w_h))
    )
    if op in ("gru", "mgu"):
        b, layers_of_h["hn"]["bias"] = _layout.bias_of_the_candidate(maps)
    else:
        b = _layout.or_zeros(maps.b_x, maps.w_x)
    for layer, part in zip((layers_of_h if op == "lstm" else layers_of_x).values(), jnp.split(b, G), strict=True):
        layer["bias"] = part
    return layers_of_x | layers_of_h


# --- ConvLSTMCell: two convolutions, each with a bias; gates i, g, f, o; adds 1 to f ---


def _conv_lstm_in(weights: Mapping[str, object]) -> PyTree[Array]:
    read = _layout.Reader(weights)
    w_x, w_h = (_layout.required(name, read(name, "kernel"), weights) for name in ("ih", "hh"))
    b_x, b_h = (read(name, "bias") for name in ("ih", "hh"))
    read.finish()
    _layout.all_or_none({"ih.bias": b_x, "hh.bias": b_h})
    maps = _layout.ordered_maps(Maps(w_x, w_h, b_x, b_h), "igfo", "ifgo")
    params = _layout.join_params("conv_lstm", maps)
    return params._replace(b=_layout.with_forget_bias(params.b, +1, params.w_x))


def _conv_lstm_out(maps: Maps) -> dict[str, dict[str, jax.Array]]:
    b = _layout.with_forget_bias(maps.b_x, -1, maps.w_x)
    w_x, w_h, b = (_layout.ordered(a, "ifgo", "igfo") for a in (maps.w_x, maps.w_h, b))
    return {"ih": {"kernel": w_x, "bias": b}, "hh": {"kernel": w_h, "bias": jnp.zeros_like(b)}}


# --- Convolutions ---


def _kernel_in(op: str, weights: object, transpose_kernel: bool) -> ConvParams:
    read = _layout.Reader(weights)
    kernel, bias = _layout.required("kernel", read("kernel"), weights), read("bias")
    read.finish()
    _layout.check_use_bias(op, weights, bias)
    if kernel.ndim < 3:
        _checks.bad_value("weights", "a kernel with 3 to 5 axes (1 to 3 spatial)", f"shape {kernel.shape}")
    return _layout.check_kernel("weights", op, ConvParams(_stored(op, kernel, transpose_kernel), bias), groups=1)


def _kernel_out(op: str, params: PyTree[AnyArray], transpose_kernel: bool) -> dict[str, jax.Array]:
    kernel, bias = _layout.kernel_and_bias(op, params, groups=1)
    return {"kernel": _stored(op, kernel, transpose_kernel)} | ({} if bias is None else {"bias": bias})


def _stored(op: str, kernel: jax.Array, transpose_kernel: bool) -> jax.Array:
    """Convert a kernel between the layouts of jaxseq and Flax, in either direction."""
    return kernel if op == "conv" or transpose_kernel else _layout.flipped(kernel.swapaxes(-1, -2))
