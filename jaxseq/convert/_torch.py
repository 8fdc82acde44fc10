"""torch: `nn.RNN`, `nn.GRU`, `nn.LSTM` (layers, directions, projection), their cells, and convolutions.

    weight_ih_l0  (G H, D)     weight_hh_l0 (G H, H)     bias_ih_l0, bias_hh_l0 (G H,)     weight_hr_l0 (P, H)

The order of the gates is that of jaxseq: i, f, g, o and r, z, n. The GRU resets after the product, as in jaxseq. The
suffix of a name is the number of the layer and, for the second direction, `_reverse`. The weight of a convolution is
(C_out, C_in / groups, *kernel_size), that of a transposed one (C_in, C_out / groups, *kernel_size). In both, the last
two axes of the kernel of jaxseq come first, in reverse order.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeGuard, runtime_checkable

import jax
from jaxtyping import Array, PyTree

from jaxseq import _checks
from jaxseq._conv import ConvParams
from jaxseq._types import AnyArray
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
PADDING_MODES = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}  # torch -> `jnp.pad`
HINT = "if a weight is computed from others (weight_norm, spectral_norm, pruning), pass the layer in eval mode or "
HINT += "remove the parametrization first"


@runtime_checkable
class HasState(Protocol):
    """What is used of an object with tensors, such as a `torch.nn.Module`."""

    def state_dict(self) -> Mapping[str, object]: ...


@runtime_checkable
class Module(HasState, Protocol):
    """What is used of a `torch.nn.Module`, besides options and weights."""

    training: bool

    def named_modules(self, *, remove_duplicate: bool) -> Iterable[tuple[str, "Module"]]: ...


def from_torch(op: str, weights: Mapping[str, object] | HasState, *, prefix: str = "") -> PyTree[Array]:
    r"""Convert the weights of a torch layer to parameters of jaxseq.

    With $W$ a matrix of torch, $w_x = W_{ih}^\top$, $w_h = W_{hh}^\top$, $w_q = W_{hr}^\top$. A GRU has both biases in
    jaxseq too; in other cells, $b = b_{ih} + b_{hh}$. The axes of kernels are permuted.

    Args:
        op: `"rnn"`, `"gru"`, `"lstm"`, `"projected_lstm"` (with `proj_size`), `"conv"` or `"conv_transpose"`. Pass
            options that are not parameters to the op: `nonlinearity="relu"` is `rnn(..., activation="relu")`.
        weights: the layer or cell (`nn.LSTMCell`), or its `state_dict()` of tensors or NumPy arrays. For a layer, the
            class and the options that change its equations are checked, and weights under
            `torch.nn.utils.parametrizations` are computed. For a `state_dict()`, only names and shapes are checked.
        prefix: the prefix of the names of the layer in the `state_dict()` of a model, such as `"encoder.rnn."`.

    Returns:
        For a convolution, `ConvParams(kernel, bias)`. For a recurrence with one layer and one direction, the parameters
        of `op`. Otherwise, a list over layers for `jaxseq.stack`: of parameters, or with two directions, of pairs
        (forwards, backwards) for `jaxseq.bidirectional`. Tensors are copied.

    Raises:
        TypeError: `weights` is neither a layer nor a mapping from names to float arrays.
        ValueError: torch has no such layer, the layer has other equations (another class, `padding_mode`), a name is
            missing or unexpected, the shapes do not match, or a lazy layer has no weights yet.

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
    state = _select(op, weights, prefix)
    if op in _layout.CONVOLUTIONS:
        return _kernel(op, state)
    layers: dict[tuple[int, int], dict[str, jax.Array]] = {}
    for name, leaf in state.items():
        parts = NAME.fullmatch(name)
        if parts is None:
            _checks.bad_value(
                "weights", f"names of a torch recurrence after the prefix {prefix!r} ({HINT})", repr(name)
            )
        kind, layer, reverse = parts.groups()
        layers.setdefault((int(layer or 0), reverse is not None), {})[kind] = _layout.array(name, leaf)
    depth, directions = (1 + max(places) for places in zip(*layers, strict=True))
    missing = [(i, j) for i in range(depth) for j in range(directions) if (i, j) not in layers]
    if missing:
        _checks.bad_value(
            "weights",
            f"{depth} layers of {directions} directions",
            f"no weights of layer {missing[0][0]}, direction {missing[0][1]}",
        )
    ends = {(i, j): f"_l{i}{'_reverse' * j}" for i in range(depth) for j in range(directions)}
    _layout.all_or_none({b + end: layers[at].get(b) for at, end in ends.items() for b in ("bias_ih", "bias_hh")})
    read = [[_layer(op, layers[i, j]) for j in range(directions)] for i in range(depth)]
    if directions == 2:
        return read
    return read[0][0] if depth == 1 else [one for (one,) in read]


def to_torch(op: str, params: PyTree[AnyArray], *, prefix: str = "", cell: bool = False) -> dict[str, jax.Array]:
    r"""Convert parameters of jaxseq to a torch `state_dict`, the inverse of `from_torch`.

    $W_{ih} = w_x^\top$, $W_{hh} = w_h^\top$. Where jaxseq has one bias and torch two, $b_{ih} = b$ and $b_{hh} = 0$.

    Args:
        op: as in `from_torch`.
        params: parameters as `from_torch` returns them: of one layer, or a list over layers of parameters or pairs.
        prefix: the prefix of all names.
        cell: True for the names of a cell (`nn.LSTMCell`), without the number of a layer.

    Returns:
        A dict from names to JAX arrays. If all biases are None, it has none; if only some are None, those become zeros.
        To load it: `layer.load_state_dict({name: torch.from_dlpack(a) for name, a in ....items()})`.

    Raises:
        TypeError: `params` are parameters of another op.
        ValueError: torch has no such layer, or the shapes do not match.

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
        _checks.bad_value("params", "one layer with one direction, because `cell` is True", f"{len(params)} layers")
    layers: dict[str, Maps] = {}
    for i, layer in enumerate(params if several else [params]):
        pair = layer if several and isinstance(layer, list | tuple) and not hasattr(layer, "_fields") else [layer]
        if len(pair) > 2:
            _checks.bad_value("params", "one or two directions for each layer", f"{len(pair)} in layer {i}")
        for direction, own in zip(("", "_reverse"), pair, strict=False):
            _checks.container("params", own, kind)
            layers["" if cell else f"_l{i}{direction}"] = _layout.split_params(op, own)
    bias = any(maps.b_x is not None or maps.b_h is not None for maps in layers.values())
    return {prefix + name + end: a for end, maps in layers.items() for name, a in _names(maps, bias).items()}


def _has_state(weights: object) -> TypeGuard[HasState]:
    return hasattr(weights, "state_dict")


def _is_module(weights: object) -> TypeGuard[Module]:
    return hasattr(weights, "named_modules")


def _select(op: str, weights: Mapping[str, object] | HasState, prefix: str) -> dict[str, object]:
    """Return the entries of the layer, with names without the prefix."""
    state = weights.state_dict() if _has_state(weights) else weights
    if not isinstance(state, Mapping):
        _checks.bad_type("weights", "a torch layer, or its state_dict", _checks.describe(state))
    own = {name.removeprefix(prefix): leaf for name, leaf in state.items() if name.startswith(prefix)}
    if not own:
        _checks.bad_value("weights", f"names with the prefix {prefix!r}", ", ".join(state) or "none")
    return _of_module(op, weights, own, prefix) if _is_module(weights) else own


def _of_module(op: str, module: Module, own: dict[str, object], prefix: str) -> dict[str, object]:
    """Check the class and the options of a layer, and compute parametrized weights."""
    layer = dict(module.named_modules(remove_duplicate=False)).get(prefix.removesuffix("."))
    if layer is None or (prefix and not prefix.endswith(".")):
        _checks.bad_value("prefix", "the path of a layer with a trailing dot, such as 'encoder.rnn.'", repr(prefix))
    instead = "its state_dict(); for a model, select the layer by `prefix`"
    methods = ("forward", "_conv_forward")
    _layout.check_class(op, layer, home="torch.nn.", kinds=KINDS, methods=methods, instead=instead)
    mode = getattr(layer, "padding_mode", "zeros")
    if mode != "zeros":
        instead = (
            f"{op!r} pads with zeros: pad the input with jnp.pad(..., mode={PADDING_MODES.get(mode, mode)!r}), convert "
        )
        _layout.reject_option(op, layer, "padding_mode", mode, instead + "the state_dict(), and pass padding='VALID'")
    names = {PARAMETRIZED.sub(r"\1", name): name for name in own}
    if {*names} == {*own}:
        return own
    if layer.training:
        why = "this layer is in training mode, where a parametrization may change its weights: call `eval()` first"
        _layout.reject(op, why)
    return {name: getattr(layer, name) for name in names}


def _kernel(op: str, state: Mapping[str, object]) -> ConvParams:
    if not {"weight"} <= set(state) <= {"weight", "bias"}:
        _checks.bad_value("weights", f"'weight' and 'bias' of a torch convolution ({HINT})", ", ".join(state))
    weight = _layout.array("weight", state["weight"])
    bias = _layout.array("bias", state["bias"]) if "bias" in state else None
    if not 3 <= weight.ndim <= 5:
        _checks.bad_value("weights", "a weight with 3 to 5 axes (1 to 3 spatial)", f"shape {weight.shape}")
    return _layout.check_kernel("weights", op, ConvParams(_layout.outer_last(weight), bias))


def _layer(op: str, own: Mapping[str, jax.Array]) -> PyTree[Array]:
    """Convert one layer in one direction."""
    if (op == "projected_lstm") != ("weight_hr" in own):
        has, name = ("a", "projected_lstm") if "weight_hr" in own else ("no", "lstm")
        _layout.reject(op, f"this layer has {has} projection (weight_hr); if it is an LSTM, pass {name!r}")
    w_x, w_h = (_layout.required(name, own.get(name), own).T for name in ("weight_ih", "weight_hh"))
    w_q = own["weight_hr"].T if "weight_hr" in own else None
    return _layout.join_params(op, Maps(w_x, w_h, own.get("bias_ih"), own.get("bias_hh"), w_q))


def _names(maps: Maps, bias: bool) -> dict[str, jax.Array]:
    """Convert one layer to torch, with both biases or none; torch has biases in all layers or in none."""
    w_x, w_h, b_x, b_h, w_q = maps
    names = {"weight_ih": w_x.T, "weight_hh": w_h.T}
    if bias:
        names["bias_ih"] = _layout.or_zeros(b_x, w_x)
        names["bias_hh"] = _layout.or_zeros(b_h, w_h)
    return names if w_q is None else names | {"weight_hr": w_q.T}
