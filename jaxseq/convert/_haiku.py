"""Haiku: `hk.VanillaRNN`, `hk.GRU`, `hk.LSTM`, convolutional LSTMs and convolutions.

    LSTM          one matrix for both x and h, w (D + H, 4 H), gates i, g, f, o; the step adds 1 to the f part of b
    GRU           w_i (D, 3 H), w_h (H, 3 H), b, gates z, r, n; it resets before the recurrent product, and
                  h' = (1 - z) h + z n. Since σ(-a) = 1 - σ(a), z of jaxseq has the negated weights.
    VanillaRNN    two linear layers, each with a bias; the activation is relu
    ConvNDLSTM    two convolutions, each with a bias; gates and forget bias as in the LSTM

Kernels of convolutions have the layout of jaxseq; those of transposed ones are flipped in space. Parameters are a dict
from names of modules to dicts of arrays.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxseq import _checks
from jaxseq._conv import ConvParams
from jaxseq._types import AnyArray
from jaxseq.convert import _layout
from jaxseq.convert._layout import Maps

Leaves = Mapping[str, object]  # the arrays of a module, by name

OPS = ("rnn", "lstm", "classic_gru", "conv_lstm", *_layout.CONVOLUTIONS)
ELSEWHERE = {
    "gru": "resets before the recurrent product, 'gru' after it; the op with the equations of its GRU is "
    "'classic_gru' (jaxseq.cells.classic_gru)"
}


def from_haiku(op: str, weights: Mapping[str, Leaves], *, name: str | None = None) -> PyTree[Array]:
    r"""Convert the parameters of a Haiku module to parameters of jaxseq.

    For an LSTM, $[w_x; w_h] = W$ with the gates reordered, and $b_f = b_f^{\mathrm{hk}} + 1$: the bias of jaxseq
    includes the 1 that Haiku adds in every step. For a GRU, the weights and the bias of $z$ are negated.

    Args:
        op: `"rnn"` (`VanillaRNN`; pass `activation="relu"` to the op), `"lstm"`, `"classic_gru"` (`GRU`), `"conv_lstm"`
            (`Conv1DLSTM` to `Conv3DLSTM`), `"conv"` or `"conv_transpose"`.
        weights: the parameters of a transform, a dict from names of modules to dicts of arrays. They do not contain the
            options of the module (`mask`, `padding`, `output_shape`), which the caller has to check.
        name: the name of the module, such as `"policy/~/lstm"`, if `weights` has other modules too.

    Returns:
        Parameters of `op`.

    Raises:
        TypeError: `weights` is not a dict of dicts of float arrays.
        ValueError: Haiku has no such layer or one with other equations (`"gru"`), a name is missing or unexpected, or
            the shapes do not match.

    Example:
        >>> import jax.numpy as jnp, jaxseq
        >>> weights = {"lstm/linear": {"w": jnp.ones((3 + 5, 20)), "b": jnp.zeros(20)}}
        >>> params = jaxseq.convert.from_haiku("lstm", weights)
        >>> params.w_x.shape, params.w_h.shape, params.b.sum()
        ((3, 20), (5, 20), Array(5., dtype=float32))

    Reference:
        Haiku documentation, `haiku.LSTM`, `haiku.GRU`, `haiku.VanillaRNN`, `haiku.Conv2DLSTM`.
    """
    _layout.check_op(op, "Haiku", OPS, ELSEWHERE)
    own = _select(weights, name)
    if op in _layout.CONVOLUTIONS:
        leaves = _only(own)
        read = _layout.Reader(leaves)
        kernel, bias = _layout.required("w", read("w"), leaves), read("b")
        read.finish()
        if bias is not None and bias.ndim > 1 and bias.shape[1:] == (1,) * (kernel.ndim - 2):
            bias = bias[(slice(None), *(0,) * (kernel.ndim - 2))]  # (C_out, 1, ..., 1), of a module with channels first
        kernel = kernel if op == "conv" else _layout.flipped(kernel)
        return _layout.check_kernel("weights", op, ConvParams(kernel, bias), groups=1)
    if op == "classic_gru":
        arrays = _arrays(_only(own), "w_i", "w_h", "b")
        w_x, w_h, b = (_layout.scaled(_layout.ordered(a, "zrn", "rzn"), (1, -1, 1)) for a in arrays)
        return _layout.join_params(op, Maps(w_x, w_h, b, None))
    if op == "lstm":
        w, b = (_layout.ordered(a, "igfo", "ifgo") for a in _arrays(_only(own), "w", "b"))
        if w.ndim != 2 or w.shape[0] <= w.shape[1] // 4:
            _checks.bad_value("weights", "'w' of an LSTM, (D + H, 4 H)", f"shape {w.shape}")
        D = w.shape[0] - w.shape[1] // 4
        maps = Maps(w[:D], w[D:], b, None)
    else:
        of_x, of_h = ("linear", "linear_1") if op == "rnn" else ("input_to_hidden", "hidden_to_hidden")
        if len({path.rpartition("/")[0] for path in own}) > 1:
            _checks.bad_value("weights", f"one module with {of_x} and {of_h} (select it by `name`)", ", ".join(own))
        read = _layout.Reader({path.rpartition("/")[2]: leaves for path, leaves in own.items()})
        w_x, w_h = (_layout.required(f"{end}: w", read(end, "w"), own) for end in (of_x, of_h))
        maps = Maps(w_x, w_h, read(of_x, "b"), read(of_h, "b"))
        read.finish()
        if maps.b_x is None or op != "rnn":  # a VanillaRNN with `double_bias=False` has only the first bias
            _layout.all_or_none({f"{of_x}: b": maps.b_x, f"{of_h}: b": maps.b_h})
        if op == "rnn":
            return _layout.join_params(op, maps)
        maps = _layout.ordered_maps(maps, "igfo", "ifgo")
    params = _layout.join_params(op, maps)
    return params._replace(b=_layout.with_forget_bias(params.b, +1, params.w_x))


def to_haiku(op: str, params: PyTree[AnyArray], *, name: str | None = None) -> dict[str, dict[str, jax.Array]]:
    r"""Convert parameters of jaxseq to those of a Haiku module, the inverse of `from_haiku`.

    $b_f^{\mathrm{hk}} = b_f - 1$, which rounds if $b_f$ is not near 1. If a bias is None and Haiku always has one, it
    becomes zeros.

    Args:
        op: as in `from_haiku`.
        params: parameters of `op`.
        name: the name of the module. None is the name of the first module of its class (`"lstm"`, `"conv2_d"`).

    Returns:
        A dict from names of modules to dicts of arrays.

    Raises:
        TypeError: `params` are parameters of another op.
        ValueError: Haiku has no such layer or one with other equations, or the shapes do not match.

    Example:
        >>> import jax, jaxseq
        >>> params = jaxseq.lstm_init(jax.random.key(0), 3, 5)
        >>> jax.tree.map(lambda a: a.shape, jaxseq.convert.to_haiku("lstm", params, name="policy/lstm"))
        {'policy/lstm/linear': {'b': (20,), 'w': (8, 20)}}

    Reference:
        Haiku documentation, `haiku.LSTM`, `haiku.GRU`, `haiku.VanillaRNN`, `haiku.Conv2DLSTM`.
    """
    _layout.check_op(op, "Haiku", OPS, ELSEWHERE)
    if op in _layout.CONVOLUTIONS:
        kernel, bias = _layout.kernel_and_bias(op, params, groups=1)
        ending = "" if op == "conv" else "_transpose"
        own = {"w": kernel if op == "conv" else _layout.flipped(kernel)} | ({} if bias is None else {"b": bias})
        return {name or f"conv{kernel.ndim - 2}_d{ending}": own}
    maps = _layout.split_params(op, params)
    w_x, w_h, b = maps.w_x, maps.w_h, _layout.or_zeros(maps.b_x, maps.w_x)
    if op == "classic_gru":
        w_x, w_h, b = (_layout.ordered(_layout.scaled(a, (1, -1, 1)), "rzn", "zrn") for a in (w_x, w_h, b))
        return {name or "gru": {"w_i": w_x, "w_h": w_h, "b": b}}
    if op == "rnn":
        name = name or "vanilla_rnn"
        return {f"{name}/linear": {"w": w_x, "b": b}, f"{name}/linear_1": {"w": w_h, "b": jnp.zeros_like(b)}}
    b = _layout.with_forget_bias(b, -1, w_x)
    w_x, w_h, b = (_layout.ordered(a, "ifgo", "igfo") for a in (w_x, w_h, b))
    if op == "lstm":
        return {f"{name or 'lstm'}/linear": {"w": jnp.concatenate([w_x, w_h]), "b": b}}
    name = name or f"conv{w_x.ndim - 2}_dlstm"
    recurrent = {"w": w_h, "b": jnp.zeros_like(b)}
    return {f"{name}/input_to_hidden": {"w": w_x, "b": b}, f"{name}/hidden_to_hidden": recurrent}


def _select(weights: Mapping[str, Leaves], name: str | None) -> dict[str, Leaves]:
    """Return the modules that belong to the layer."""
    if not isinstance(weights, Mapping) or not all(isinstance(leaves, Mapping) for leaves in weights.values()):
        _checks.bad_type("weights", "a dict from names of modules to dicts of arrays", _checks.describe(weights))
    own = {path: own for path, own in weights.items() if name is None or path == name or path.startswith(f"{name}/")}
    if not own:
        _checks.bad_value(
            "weights", f"a module {name!r} in it" if name else "at least one module", ", ".join(weights) or "nothing"
        )
    return own


def _only(own: dict[str, Leaves]) -> Leaves:
    """Return the arrays of a layer that consists of one module."""
    if len(own) > 1:
        _checks.bad_value("weights", "one module (select it by `name`)", ", ".join(own))
    return next(iter(own.values()))


def _arrays(leaves: Leaves, *names: str) -> list[jax.Array]:
    """Return the arrays of a module that has exactly these names."""
    read = _layout.Reader(leaves)
    arrays = [_layout.required(name, read(name), leaves) for name in names]
    read.finish()
    return arrays
