"""torch: `nn.RNN`, `nn.GRU`, `nn.LSTM` with layers, directions and projection, their cells, and convolutions.

    weight_ih_l0  (G H, D)     weight_hh_l0 (G H, H)     bias_ih_l0, bias_hh_l0 (G H,)     weight_hr_l0 (P, H)

Gates come in our order, i, f, g, o and r, z, n, and its GRU resets after the product, as ours. A name ends in the layer
and, for the second direction, in `_reverse`. A convolution has its weight as (C_out, C_in / groups, *window), a
transposed one as (C_in, C_out / groups, *window): in both the last two axes of ours come first, in reverse.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax

from jaxseq import _checks
from jaxseq._conv import ConvParams
from jaxseq.convert import _layout
from jaxseq.convert._layout import Maps

OPS = ("rnn", "gru", "lstm", "projected_lstm", *_layout.CONVOLUTIONS)
ELSEWHERE = {"classic_gru": "resets after the recurrent product; its GRU is 'gru'"}
NAME = re.compile(r"(weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)(?:_l(\d+)(_reverse)?)?")
PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\..*")
KINDS = {
    "rnn": ("RNN", "RNNCell"),
    "gru": ("GRU", "GRUCell"),
    "lstm": ("LSTM", "LSTMCell"),
    "projected_lstm": ("LSTM",),
    "conv": ("Conv1d", "Conv2d", "Conv3d"),
    "conv_transpose": ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
}
PADDING_MODES = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}  # and what `jnp.pad` calls them
HINT = "where a weight is computed from others (weight_norm, spectral_norm, pruning), pass the layer in eval mode or "
HINT += "remove the parametrization first"


def from_torch(op: str, weights: Any, *, prefix: str = "") -> Any:
    r"""Our parameters from those of a torch layer.

    With $W$ a matrix of torch, $w_x = W_{ih}^\top$, $w_h = W_{hh}^\top$, $w_q = W_{hr}^\top$; the two biases stay two
    in a GRU, and are $b = b_{ih} + b_{hh}$ elsewhere. Kernels have their axes in another order.

    Args:
        op: `"rnn"`, `"gru"`, `"lstm"`, `"projected_lstm"` (with `proj_size`), `"conv"` or `"conv_transpose"`. What is
            no parameter is yours to hand on: `nonlinearity="relu"` is `rnn(..., activation="relu")`.
        weights: the layer, or its `state_dict()`, of tensors or of NumPy arrays. Cells (`nn.LSTMCell`) serve as well. A
            layer has its class checked, and the options that change its equations; weights under
            `torch.nn.utils.parametrizations` are computed. A `state_dict()` has only names and shapes to check.
        prefix: what names of the layer begin with, in the `state_dict()` of a model: `"encoder.rnn."`.

    Returns:
        Parameters of `op`: of a recurrence with one layer and one direction what it takes, else a list over layers, as
        `jaxseq.stack` takes it, of parameters or, with two directions, of pairs (forwards, backwards), as
        `jaxseq.bidirectional` takes them. Of a convolution `ConvParams(kernel, bias)`. Tensors are copied.

    Raises:
        TypeError: no mapping of names to float arrays.
        ValueError: a layer that torch does not have or that has other equations (another class, `padding_mode`), a name
            that is missing or one too many, a size that does not fit, a lazy layer without weights.

    Example:
        >>> import numpy as np, jaxseq
        >>> state_dict = {"weight_ih_l0": np.ones((20, 3)), "weight_hh_l0": np.ones((20, 5))}  # without biases
        >>> params = jaxseq.convert.from_torch("lstm", state_dict)
        >>> params.w_x.shape, params.w_h.shape, params.b
        ((3, 20), (5, 20), None)

    Reference:
        torch documentation, `torch.nn.LSTM`, `torch.nn.GRU`, `torch.nn.ConvTranspose2d`: sections "Variables".
    """
    _layout.check_op(op, "torch", OPS, ELSEWHERE)
    state = _own(op, weights, prefix)
    if op in _layout.CONVOLUTIONS:
        return _kernel(op, state)
    layers: dict[tuple[int, int], dict[str, jax.Array]] = {}
    for name, leaf in state.items():
        parts = NAME.fullmatch(name)
        if parts is None:
            _checks.bad_value("weights", f"names of a torch recurrence after the prefix {prefix!r}; {HINT}", repr(name))
        kind, layer, reverse = parts.groups()
        layers.setdefault((int(layer or 0), reverse is not None), {})[kind] = _layout.array(name, leaf)
    depth, directions = (1 + max(places) for places in zip(*layers, strict=True))
    missing = [(i, j) for i in range(depth) for j in range(directions) if (i, j) not in layers]
    if missing:
        _checks.bad_value("weights", f"{depth} layers of {directions} directions", f"none of layer {missing[0][0]}")
    ends = {(i, j): f"_l{i}{'_reverse' * j}" for i in range(depth) for j in range(directions)}
    _layout.all_or_none({b + end: layers[at].get(b) for at, end in ends.items() for b in ("bias_ih", "bias_hh")})
    read = [[_layer(op, layers[i, j]) for j in range(directions)] for i in range(depth)]
    if directions == 2:
        return read
    return read[0][0] if depth == 1 else [one for (one,) in read]


def to_torch(op: str, params: Any, *, prefix: str = "", cell: bool = False) -> dict[str, jax.Array]:
    r"""A torch `state_dict` from our parameters: the way back of `from_torch`.

    $W_{ih} = w_x^\top$, $W_{hh} = w_h^\top$, and of two biases that torch has and we have not, $b_{ih} = b$, $b_{hh} =
    0$.

    Args:
        op: as in `from_torch`.
        params: what `from_torch` returns: parameters of one layer, or a list over layers of parameters or of pairs.
        prefix: what names begin with.
        cell: whether names are those of a cell (`nn.LSTMCell`), without a layer.

    Returns:
        Names and JAX arrays. Where every bias is None there are none; where some are, these become zeros. For torch:
        `layer.load_state_dict({name: torch.from_dlpack(a) for name, a in ....items()})`.

    Raises:
        TypeError: parameters of another op.
        ValueError: a layer that torch does not have or that has other equations, a size that does not fit.

    Example:
        >>> import jax, jaxseq
        >>> params = jaxseq.gru_init(jax.random.key(0), 3, 5)
        >>> {name: a.shape for name, a in jaxseq.convert.to_torch("gru", params).items()}
        {'weight_ih_l0': (15, 3), 'weight_hh_l0': (15, 5), 'bias_ih_l0': (15,), 'bias_hh_l0': (15,)}

    Reference:
        torch documentation, `torch.nn.LSTM`, `torch.nn.GRU`, `torch.nn.ConvTranspose2d`: sections "Variables".
    """
    _layout.check_op(op, "torch", OPS, ELSEWHERE)
    if op in _layout.CONVOLUTIONS:
        kernel, bias = _layout.kernel_and_bias(op, params)
        state = {"weight": _layout.outer_first(kernel)} | ({} if bias is None else {"bias": bias})
        return {prefix + name: a for name, a in state.items()}
    kind = _layout.RECURRENCES[op].params
    several = isinstance(params, list | tuple) and len(params) > 0 and not hasattr(params, "_fields")
    if cell and several:
        _checks.bad_value("params", "one layer of one direction, where `cell` is True", f"{len(params)} layers")
    layers: dict[str, Maps] = {}
    for i, layer in enumerate(params if several else [params]):
        pair = layer if several and isinstance(layer, list | tuple) and not hasattr(layer, "_fields") else [layer]
        if len(pair) > 2:
            _checks.bad_value("params", "one or two directions of a layer", f"{len(pair)} in layer {i}")
        for direction, own in zip(("", "_reverse"), pair, strict=False):
            _checks.container("params", own, kind)
            layers["" if cell else f"_l{i}{direction}"] = _layout.split_params(op, own)
    bias = any(maps.b_x is not None or maps.b_h is not None for maps in layers.values())
    return {prefix + name + end: a for end, maps in layers.items() for name, a in _names(maps, bias).items()}


def _own(op: str, weights: Any, prefix: str) -> dict[str, Any]:
    """What belongs to the layer, by its own names."""
    state = weights.state_dict() if hasattr(weights, "state_dict") else weights
    if not isinstance(state, Mapping):
        _checks.bad_type("weights", "a torch layer, or its state_dict", _checks.describe(state))
    own = {name.removeprefix(prefix): leaf for name, leaf in state.items() if name.startswith(prefix)}
    if not own:
        _checks.bad_value("weights", f"names that begin with {prefix!r}", ", ".join(state) or "none")
    return _of_module(op, weights, own, prefix) if hasattr(weights, "named_modules") else own


def _of_module(op: str, module: Any, own: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Check the class and the options of a layer, and compute what is parametrized."""
    layer = dict(module.named_modules(remove_duplicate=False)).get(prefix.removesuffix("."))
    if layer is None or (prefix and not prefix.endswith(".")):
        _checks.bad_value("prefix", "the path of a layer with a dot at its end, such as 'encoder.rnn.'", repr(prefix))
    instead = "its state_dict(); of a model, `prefix` says which layer is meant"
    methods = ("forward", "_conv_forward")
    _layout.check_class(op, layer, home="torch.nn.", kinds=KINDS, methods=methods, instead=instead)
    mode = getattr(layer, "padding_mode", "zeros")
    if mode != "zeros":
        instead = (
            f"{op!r} pads by zeros: pad the input by jnp.pad(..., mode={PADDING_MODES.get(mode, mode)!r}), convert "
        )
        _layout.option_refused(op, layer, "padding_mode", mode, instead + "the state_dict() and pass padding='VALID'")
    names = {PARAMETRIZED.sub(r"\1", name): name for name in own}
    if {*names} == {*own}:
        return own
    if layer.training:
        why = "this layer is in training mode, in which a parametrization may change its weights: call `eval()` first"
        _layout.refused(op, why)
    return {name: getattr(layer, name) for name in names}


def _kernel(op: str, state: Mapping[str, Any]) -> ConvParams:
    if not {"weight"} <= set(state) <= {"weight", "bias"}:
        _checks.bad_value("weights", f"'weight' and 'bias' of a torch convolution; {HINT}", ", ".join(state))
    weight = _layout.array("weight", state["weight"])
    bias = _layout.array("bias", state["bias"]) if "bias" in state else None
    if not 3 <= weight.ndim <= 5:
        _checks.bad_value("weights", "a weight of 3 to 5 axes (1 to 3 of space)", f"shape {weight.shape}")
    return _layout.check_kernel("weights", op, ConvParams(_layout.outer_last(weight), bias))


def _layer(op: str, own: Mapping[str, jax.Array]) -> Any:
    """One layer in one direction."""
    if (op == "projected_lstm") != ("weight_hr" in own):
        has, name = ("a", "projected_lstm") if "weight_hr" in own else ("no", "lstm")
        _layout.refused(op, f"this layer has {has} projection, weight_hr; as an LSTM it is {name!r}")
    w_x, w_h = (_layout.found(name, own.get(name), own).T for name in ("weight_ih", "weight_hh"))
    w_q = own["weight_hr"].T if "weight_hr" in own else None
    return _layout.joined(op, Maps(w_x, w_h, own.get("bias_ih"), own.get("bias_hh"), w_q))


def _names(maps: Maps, bias: bool) -> dict[str, jax.Array]:
    """The way back; torch has both biases in every layer, or none."""
    w_x, w_h, b_x, b_h, w_q = maps
    names = {"weight_ih": w_x.T, "weight_hh": w_h.T}
    if bias:
        names["bias_ih"] = _layout.or_zeros(b_x, w_x)
        names["bias_hh"] = _layout.or_zeros(b_h, w_h)
    return names if w_q is None else names | {"weight_hr": w_q.T}
