"""Flax, both of its module systems.

Linen has an array for each map and gate, `{"ii": {"kernel"}, "hi": {"kernel", "bias"}, ...}`, each kernel (in, H) as
ours: the bias of an LSTM stands with h, that of a simple cell and of r, z, f with x, and n has one of either. nnx has
the gates of its GRU and of its `OptimizedLSTMCell` together, in our order, and its GRU none beside h. `ConvLSTMCell`
has the gates in the order i, g, f, o and adds one to f. Kernels of convolutions are ours; those of transposed ones are
stored turned round in space with their last axes swapped, unless `transpose_kernel=True`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxseq import _checks
from jaxseq._conv import ConvParams
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


def from_flax(op: str, weights: Any, *, transpose_kernel: bool = False) -> Any:
    r"""Our parameters from those of a layer of Flax linen.

    The arrays of the gates side by side: $w_x = [W_{ii}, W_{if}, W_{ig}, W_{io}]$ and so on. Where Flax has a bias in n
    alone (GRU, MGU), $b_h$ is zero in the other gates.

    Args:
        op: `"rnn"` (`SimpleCell`), `"gru"`, `"lstm"` (`LSTMCell` or `OptimizedLSTMCell`, whose parameters are alike),
            `"mgu"`, `"conv_lstm"` (`ConvLSTMCell`), `"conv"` or `"conv_transpose"`.
        weights: the dict of the layer: `variables["params"]["cell"]` of an `nn.RNN`, or what holds nothing else. The
            options of the layer are not in it (`gate_fn`, `activation_fn`, `residual`, `mask`, `padding`): compare them
            yourself.
        transpose_kernel: the option of that name that an `nn.ConvTranspose` has.

    Returns:
        Parameters of `op`.

    Raises:
        TypeError: no dict of float arrays.
        ValueError: a layer that Flax does not have or that has other equations, a name that is missing or one too many,
            a bias of some gates only, a size that does not fit.

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
        _checks.bad_type("weights", "a dict of the layer's arrays", _checks.describe(weights))
    weights = _innermost(op, weights)
    if op in _layout.CONVOLUTIONS:
        return _kernel_in(op, weights, _checks.boolean("transpose_kernel", transpose_kernel))
    if op == "conv_lstm":
        return _conv_lstm_in(weights)
    return _gate_by_gate_in(op, weights)


def to_flax(op: str, params: Any, *, transpose_kernel: bool = False) -> dict[str, Any]:
    """The dict of a layer of Flax linen from our parameters: the way back of `from_flax`.

    Where Flax has one bias and we have two, $b_h$ of r, z and f is added to $b_x$. A bias that is None becomes zeros,
    where Flax always has one.

    Args:
        op: as in `from_flax`.
        params: parameters of `op`.
        transpose_kernel: the option of that name that an `nn.ConvTranspose` has.

    Returns:
        The dict of the cell or of the convolution: `{"params": {"cell": it}}` are the variables of an `nn.RNN`.

    Raises:
        TypeError: parameters of another op.
        ValueError: a layer that Flax does not have or that has other equations, a size that does not fit.

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


def from_nnx(op: str, weights: Any, *, transpose_kernel: bool = False) -> Any:
    r"""Our parameters from those of a layer of Flax nnx.

    $w_x$ and $w_h$ are the kernels of `dense_i` and `dense_h`, gates in our order; an `nnx.LSTMCell` has them one by
    one. A `GRUCell` of nnx has no bias beside $h$: $b_h$ is None.

    Args:
        op: `"rnn"` (`SimpleCell`; with `activation_fn=nnx.relu`, `activation="relu"` is yours to hand on), `"gru"`,
            `"lstm"` (`LSTMCell` or `OptimizedLSTMCell`), `"conv"` or `"conv_transpose"`.
        weights: the module itself, the cell of an `nnx.RNN`, or its `nnx.state`, or that as a plain dict. Options are
            checked where it is the module.
        transpose_kernel: the option of that name that an `nnx.ConvTranspose` has; of a module it is read.

    Returns:
        Parameters of `op`.

    Raises:
        TypeError: no float arrays.
        ValueError: a layer that nnx does not have or that has other equations (another class, `residual=True`, another
            activation, a `mask`, `input_dilation`, circular padding, seen where `weights` is the module), a name that
            is missing or one too many, a bias of some gates only, a size that does not fit.

    Example:
        >>> import jax.numpy as jnp, jaxseq
        >>> far = {"kernel": jnp.ones((5, 20)), "bias": jnp.ones(20)}
        >>> cell = {"dense_i": {"kernel": jnp.ones((3, 20))}, "dense_h": far}
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
    w_x, w_h = (_layout.found(name, read(name, "kernel"), weights) for name in ("dense_i", "dense_h"))
    maps = Maps(w_x, w_h, read("dense_i", "bias"), read("dense_h", "bias"))
    read.finish()
    return _layout.joined(op, maps)


def to_nnx(op: str, params: Any, *, optimized: bool = True, transpose_kernel: bool = False) -> dict[str, Any]:
    """The state of a layer of Flax nnx from our parameters: the way back of `from_nnx`.

    Args:
        op: as in `from_nnx`.
        params: parameters of `op`.
        optimized: of an LSTM, whether it is for an `nnx.OptimizedLSTMCell` or for an `nnx.LSTMCell`.
        transpose_kernel: the option of that name that an `nnx.ConvTranspose` has.

    Returns:
        A dict for `nnx.update(module, it)`. A bias that is None becomes zeros, where nnx always has one.

    Raises:
        TypeError: parameters of another op.
        ValueError: a layer that nnx does not have or that has other equations, and a GRU whose $b_h$ is not zero in n,
            for which nnx has no place; under `jit`, where nobody can look, one whose `b_h` is not None.

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
        if not _layout.surely_zero(b_n):
            why = "a GRU of nnx has no bias beside h, and `params.b_h` is not zero in n, inside of the reset"
            _layout.refused(op, why)
    place = "dense_h" if op == "lstm" else "dense_i"
    state: dict[str, Any] = {"dense_i": {"kernel": maps.w_x}, "dense_h": {"kernel": maps.w_h}}
    state[place]["bias"] = b
    return state


def _check_equations(op: str, module: Any) -> None:
    """Of a module, what its parameters do not tell."""
    how: Any = {"home": "flax.nnx.", "methods": ("__call__",), "instead": "its `nnx.state`", "elsewhere": ELSEWHERE}
    _layout.check_class(op, module, kinds=KINDS, **how)
    promote = getattr(module, "promote_dtype", None)
    if not isinstance(module, Mapping) and not getattr(promote, "__module__", "flax.").startswith("flax."):
        instead = "which may change the numbers: if it changes dtypes only, convert its `nnx.state`"
        _layout.option_refused(op, module, "promote_dtype", promote, instead)
    if op in _layout.CONVOLUTIONS:
        _check_convolution(op, module)
        return
    if getattr(module, "residual", False):
        _layout.refused(op, "this cell adds its state to the pre-activation (residual=True), ours does not")
    activations = (*TANHS, jax.nn.relu) if op == "rnn" else TANHS
    for option, usual in (("gate_fn", SIGMOIDS), ("activation_fn", activations)):
        own = getattr(module, option, None)
        if own is not None and own not in usual:
            _layout.refused(op, f"this cell's {option} is {getattr(own, '__name__', own)}, ours is {usual[0].__name__}")
    for name in () if isinstance(module, Mapping) else ("dense_i", "dense_h", *_gate_names(op, if_="if_")):
        part = getattr(module, name, None)
        _layout.check_class(op, part, kinds={op: ("Linear",)}, **how)


def _check_convolution(op: str, module: Any) -> None:
    mask = getattr(module, "mask", None)
    if mask is not None:
        instead = "multiply the kernel by it: convert {'kernel': layer.kernel * layer.mask, 'bias': layer.bias}"
        _layout.option_refused(op, module, "mask", _checks.describe(mask), instead)
    padding = getattr(module, "padding", None)
    if padding in ("CIRCULAR", "REFLECT"):
        how = "convert its `nnx.state`, pad `x` yourself" if op == "conv" else "no padding of ours does this"
        _layout.option_refused(op, module, "padding", padding, f"{op!r} pads by zeros: {how}")
    dilation = getattr(module, "input_dilation", None)
    if dilation is not None and np.any(np.asarray(dilation) != 1):
        instead = "'conv' has no such option: convert its `nnx.state` and put zeros between the inputs yourself"
        _layout.option_refused(op, module, "input_dilation", dilation, instead)
    function = getattr(module, "conv_general_dilated", lax.conv_general_dilated)
    if function is not lax.conv_general_dilated and not isinstance(module, Mapping):
        instead = "'conv' computes that of jax.lax: if yours computes the same, convert its `nnx.state`"
        _layout.option_refused(op, module, "conv_general_dilated", function, instead)


def _innermost(op: str, weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """The layer's own dict out of {"params": {"cell": it}}: of layers for a recurrence, of arrays for a convolution."""
    while len(weights) == 1:
        (inner,) = weights.values()
        if not isinstance(inner, Mapping):
            break
        if op not in _layout.CONVOLUTIONS and not all(isinstance(part, Mapping) for part in inner.values()):
            break
        weights = inner
    return weights


# --- An array for each map and gate ---


def _gate_names(op: str, **names: str) -> list[str]:
    """The layers of a cell, those of x before those of h.

    `names` gives a map and gate another name: nnx cannot have an attribute `if`.
    """
    gates = ("",) if op == "rnn" else tuple(_layout.RECURRENCES[op].gates)
    return [names.get(f"{letter + gate}_", letter + gate) for letter in "ih" for gate in gates]


def _gate_by_gate_in(op: str, weights: Any, **names: str) -> Any:
    """Read all kernels, and the biases that Flax has: beside x, but in an LSTM beside h; and beside h in n."""
    read, of_gate = _layout.Reader(weights), _gate_names(op, **names)
    of_x, of_h = of_gate[: len(of_gate) // 2], of_gate[len(of_gate) // 2 :]
    w_x, w_h = (
        _of_all_gates({f"{name}.kernel": _layout.found(name, read(name, "kernel"), weights) for name in own})
        for own in (of_x, of_h)
    )
    biases = {f"{name}.bias": read(name, "bias") for name in (of_h if op == "lstm" else of_x)}
    _layout.all_or_none(biases)
    b = None if next(iter(biases.values())) is None else _of_all_gates(biases)
    b_n = read("hn", "bias") if op in ("gru", "mgu") else None
    read.finish()
    if op not in ("gru", "mgu"):
        return _layout.joined(op, Maps(w_x, w_h, b, None))
    if b_n is None:
        why = "this cell has no bias of h in n" + (": that is `reset_gate=False`, ours resets" if op == "mgu" else "")
        _layout.refused(op, why)
    if b_n.shape != (w_h.shape[0],):
        _checks.bad_value("weights", f"'hn.bias' of shape {(w_h.shape[0],)}", f"shape {b_n.shape}")
    return _layout.joined(op, Maps(w_x, w_h, b, _layout.beside_zeros(b_n, w_h)))


def _of_all_gates(parts: dict[str, jax.Array]) -> jax.Array:
    """The arrays of the gates side by side, all of one shape."""
    (first, one), *_ = parts.items()
    for name, a in parts.items():
        if a.shape != one.shape or not a.ndim:
            _checks.bad_value("weights", f"{name!r} of shape {one.shape}, as {first!r}", f"shape {a.shape}")
    return jnp.concatenate([*parts.values()], -1)


def _gate_by_gate_out(op: str, maps: Maps, **names: str) -> dict[str, Any]:
    of_gate = _gate_names(op, **names)
    G = len(of_gate) // 2
    near, far = (
        {name: {"kernel": w} for name, w in zip(own, jnp.split(all_, G, -1), strict=True)}
        for own, all_ in ((of_gate[:G], maps.w_x), (of_gate[G:], maps.w_h))
    )
    if op in ("gru", "mgu"):
        b, far["hn"]["bias"] = _layout.bias_of_the_candidate(maps)
    else:
        b = _layout.or_zeros(maps.b_x, maps.w_x)
    for layer, part in zip((far if op == "lstm" else near).values(), jnp.split(b, G), strict=True):
        layer["bias"] = part
    return near | far


# --- ConvLSTMCell: two convolutions, each with a bias, gates i, g, f, o, one more on f ---


def _conv_lstm_in(weights: Any) -> Any:
    read = _layout.Reader(weights)
    w_x, w_h = (_layout.found(name, read(name, "kernel"), weights) for name in ("ih", "hh"))
    b_x, b_h = (read(name, "bias") for name in ("ih", "hh"))
    read.finish()
    _layout.all_or_none({"ih.bias": b_x, "hh.bias": b_h})
    maps = [None if a is None else _layout.ordered(a, "igfo", "ifgo") for a in (w_x, w_h, b_x, b_h)]
    params = _layout.joined("conv_lstm", Maps(*maps))
    return params._replace(b=_layout.with_forget_bias(params.b, +1, params.w_x))


def _conv_lstm_out(maps: Maps) -> dict[str, Any]:
    b = _layout.with_forget_bias(maps.b_x, -1, maps.w_x)
    w_x, w_h, b = (_layout.ordered(a, "ifgo", "igfo") for a in (maps.w_x, maps.w_h, b))
    return {"ih": {"kernel": w_x, "bias": b}, "hh": {"kernel": w_h, "bias": jnp.zeros_like(b)}}


# --- Convolutions ---


def _kernel_in(op: str, weights: Any, transpose_kernel: bool) -> ConvParams:
    read = _layout.Reader(weights)
    kernel, bias = _layout.found("kernel", read("kernel"), weights), read("bias")
    read.finish()
    _layout.check_use_bias(op, weights, bias)
    if kernel.ndim < 3:
        _checks.bad_value("weights", "a kernel of 3 to 5 axes (1 to 3 of space)", f"shape {kernel.shape}")
    return _layout.check_kernel("weights", op, ConvParams(_stored(op, kernel, transpose_kernel), bias), groups=1)


def _kernel_out(op: str, params: Any, transpose_kernel: bool) -> dict[str, Any]:
    kernel, bias = _layout.kernel_and_bias(op, params, groups=1)
    return {"kernel": _stored(op, kernel, transpose_kernel)} | ({} if bias is None else {"bias": bias})


def _stored(op: str, kernel: jax.Array, transpose_kernel: bool) -> jax.Array:
    """As Flax stores ours, or the way back, which is the same."""
    return kernel if op == "conv" or transpose_kernel else _layout.turned(kernel.swapaxes(-1, -2))
