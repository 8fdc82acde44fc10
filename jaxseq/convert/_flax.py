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

from jaxseq import _checks
from jaxseq._conv import ConvParams
from jaxseq.convert import _layout
from jaxseq.convert._layout import Maps

GRU = {"classic_gru": "resets after the recurrent product; its GRU is 'gru'"}
LINEN = ("rnn", "gru", "lstm", "mgu", "conv_lstm", *_layout.CONVOLUTIONS)
NNX = ("rnn", "gru", "lstm", *_layout.CONVOLUTIONS)


def from_flax(op: str, weights: Any, *, transpose_kernel: bool = False) -> Any:
    r"""Our parameters from those of a layer of Flax linen.

    The arrays of the gates side by side: $w_x = [W_{ii}, W_{if}, W_{ig}, W_{io}]$ and so on. Where Flax has a bias in n
    alone (GRU, MGU), $b_h$ is zero in the other gates.

    Args:
        op: `"rnn"` (`SimpleCell`), `"gru"`, `"lstm"` (`LSTMCell` or `OptimizedLSTMCell`, whose parameters are alike),
            `"mgu"`, `"conv_lstm"` (`ConvLSTMCell`), `"conv"` or `"conv_transpose"`.
        weights: the dict of the layer: `variables["params"]["cell"]` of an `nn.RNN`, or what holds nothing else.
        transpose_kernel: the option of that name that an `nn.ConvTranspose` has.

    Returns:
        Parameters of `op`.

    Raises:
        TypeError: no dict of float arrays.
        ValueError: a layer that Flax does not have or that has other equations, a name that is missing, a size that
            does not fit.

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
    maps = _layout.apart(op, params)
    return _conv_lstm_out(maps) if op == "conv_lstm" else _gate_by_gate_out(op, maps)


def from_nnx(op: str, weights: Any, *, transpose_kernel: bool = False) -> Any:
    r"""Our parameters from those of a layer of Flax nnx.

    $w_x$ and $w_h$ are the kernels of `dense_i` and `dense_h`, gates in our order; an `nnx.LSTMCell` has them one by
    one. A `GRUCell` of nnx has no bias beside $h$: $b_h$ is None.

    Args:
        op: `"rnn"` (`SimpleCell`; with `activation_fn=nnx.relu`, `activation="relu"` is yours to hand on), `"gru"`,
            `"lstm"` (`LSTMCell` or `OptimizedLSTMCell`), `"conv"` or `"conv_transpose"`.
        weights: the module itself, the cell of an `nnx.RNN`, or its `nnx.state`, or that as a plain dict.
        transpose_kernel: the option of that name that an `nnx.ConvTranspose` has; of a module it is read.

    Returns:
        Parameters of `op`.

    Raises:
        TypeError: no float arrays.
        ValueError: a layer that nnx does not have or that has other equations (`residual=True`, another activation,
            seen where `weights` is the module), a name that is missing, a size that does not fit.

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
    read = _layout.reader(weights)
    near, far = read("dense_i", "kernel"), read("dense_h", "kernel")
    if near is None and op == "lstm":
        return _gate_by_gate_in(op, weights, if_="if_")
    near, far = _layout.found("dense_i", near, weights), _layout.found("dense_h", far, weights)
    return _layout.joined(op, Maps(near, far, read("dense_i", "bias"), read("dense_h", "bias")))


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
    maps = _layout.apart(op, params)
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
    if getattr(module, "residual", False):
        _layout.refused(op, "this cell adds its state to the pre-activation (residual=True), ours does not")
    for option, usual in (("gate_fn", (jax.nn.sigmoid,)), ("activation_fn", (jnp.tanh, jax.nn.tanh, jax.nn.relu))):
        own = getattr(module, option, None)
        if own is None or own in usual[: None if op == "rnn" else 2]:
            continue
        _layout.refused(op, f"this cell's {option} is {getattr(own, '__name__', own)}, ours is {usual[0].__name__}")


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


def _gate_by_gate_in(op: str, weights: Any, **names: str) -> Any:
    """`names` gives a map and gate another name: nnx cannot have an attribute `if`."""
    read, cell = _layout.reader(weights), _layout.RECURRENCES[op]
    gates = ("",) if op == "rnn" else tuple(cell.gates)

    def joined(letter: str, leaf: str) -> Any:
        parts = [read(names.get(f"{letter + gate}_", letter + gate), leaf) for gate in gates]
        if leaf == "bias" and parts[-1] is None:
            return None
        found = [_layout.found(letter + gate, part, weights) for gate, part in zip(gates, parts, strict=True)]
        return jnp.concatenate(found, -1)

    w_x, w_h, b_x = joined("i", "kernel"), joined("h", "kernel"), joined("i", "bias")
    if op not in ("gru", "mgu"):
        return _layout.joined(op, Maps(w_x, w_h, b_x, joined("h", "bias")))
    b_n = read("hn", "bias")
    if b_n is None:
        why = "this cell has no bias of h in n" + (": that is `reset_gate=False`, ours resets" if op == "mgu" else "")
        _layout.refused(op, why)
    return _layout.joined(op, Maps(w_x, w_h, b_x, _layout.beside_zeros(b_n, w_h)))


def _gate_by_gate_out(op: str, maps: Maps, **names: str) -> dict[str, Any]:
    gates = ("",) if op == "rnn" else tuple(_layout.RECURRENCES[op].gates)
    near, far = (
        {
            names.get(f"{letter + gate}_", letter + gate): {"kernel": w}
            for gate, w in zip(gates, jnp.split(all_, len(gates), -1), strict=True)
        }
        for letter, all_ in (("i", maps.w_x), ("h", maps.w_h))
    )
    if op in ("gru", "mgu"):
        b, far["hn"]["bias"] = _layout.bias_of_the_candidate(maps)
    else:
        b = _layout.or_zeros(maps.b_x, maps.w_x)
    for layer, part in zip((far if op == "lstm" else near).values(), jnp.split(b, len(gates)), strict=True):
        layer["bias"] = part
    return near | far


# --- ConvLSTMCell: two convolutions, each with a bias, gates i, g, f, o, one more on f ---


def _conv_lstm_in(weights: Any) -> Any:
    read = _layout.reader(weights)
    w_x, w_h = (_layout.found(name, read(name, "kernel"), weights) for name in ("ih", "hh"))
    maps = [
        None if a is None else _layout.ordered(a, "igfo", "ifgo")
        for a in (w_x, w_h, read("ih", "bias"), read("hh", "bias"))
    ]
    params = _layout.joined("conv_lstm", Maps(*maps))
    return params._replace(b=_layout.with_forget_bias(params.b, +1, params.w_x))


def _conv_lstm_out(maps: Maps) -> dict[str, Any]:
    b = _layout.with_forget_bias(maps.b_x, -1, maps.w_x)
    w_x, w_h, b = (_layout.ordered(a, "ifgo", "igfo") for a in (maps.w_x, maps.w_h, b))
    return {"ih": {"kernel": w_x, "bias": b}, "hh": {"kernel": w_h, "bias": jnp.zeros_like(b)}}


# --- Convolutions ---


def _kernel_in(op: str, weights: Any, transpose_kernel: bool) -> ConvParams:
    read = _layout.reader(weights)
    kernel = _layout.found("kernel", read("kernel"), weights)
    return ConvParams(_stored(op, kernel, transpose_kernel), read("bias"))


def _kernel_out(op: str, params: Any, transpose_kernel: bool) -> dict[str, Any]:
    kernel, bias = _layout.kernel_and_bias(params)
    return {"kernel": _stored(op, kernel, transpose_kernel)} | ({} if bias is None else {"bias": bias})


def _stored(op: str, kernel: jax.Array, transpose_kernel: bool) -> jax.Array:
    """As Flax stores ours, or the way back, which is the same."""
    return kernel if op == "conv" or transpose_kernel else _layout.turned(kernel.swapaxes(-1, -2))
