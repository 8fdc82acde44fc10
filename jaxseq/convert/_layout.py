"""What every framework's layout is made of, and the one form that stands between any of them and our parameters.

A recurrence, in the orientation and order of gates that ours have (G gates of H units, of an input of D numbers):

    a = x w_x + b_x + h w_h + b_h        w_x (D, G H)    w_h (H, G H)    b_x, b_h (G H,) or None
    w_q                                  the product inside of a step, where there is one

Frameworks differ from it in four ways: a matrix is transposed; gates come in another order, or as arrays of their own;
there are two biases where one would do; and a forget gate adds one that is not in its bias. A framework's file says
which of these it is.

Two biases that are only ever added become one, b = b_x + b_h. The way back has b_x = b and b_h = 0. Where the bias of h
stands apart, inside of a reset (the n of GRU and MGU), both stay what they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxseq import _checks, cells
from jaxseq._conv import ConvParams
from jaxseq._recurrence import Cell

# What each recurrence is called: its cell knows the order of its gates and the class of its parameters.
RECURRENCES: dict[str, Cell] = {
    "rnn": cells.rnn,
    "gru": cells.gru,
    "lstm": cells.lstm,
    "conv_lstm": cells.lstm,
    "classic_gru": cells.classic_gru,
    "projected_lstm": cells.projected_lstm,
    "mgu": cells.mgu,
}
CONVOLUTIONS = ("conv", "conv_transpose")


class Maps(NamedTuple):
    """The arrays of a recurrence before anyone has put them into parameters."""

    w_x: Any
    w_h: Any
    b_x: Any
    b_h: Any
    w_q: Any = None


# --- Between this form and ours ---


def joined(op: str, maps: Maps) -> Any:
    """Our parameters, their sizes checked: those of another cell do not slip through."""
    cell, H = RECURRENCES[op], _check_maps("weights", op, maps)
    w_x, w_h, b_x, b_h, w_q = maps
    if op in ("gru", "mgu"):
        return cell.params(w_x, w_h, b_x, b_h)
    b = b_h if b_x is None else b_x if b_h is None else b_x + b_h
    if op == "classic_gru":
        return cell.params(w_x, w_h[:, : 2 * H], b, w_h[:, 2 * H :])
    return cell.params(w_x, w_h, b, *(() if w_q is None else (w_q,)))


def split_params(op: str, params: Any) -> Maps:
    """The way back, from parameters of the right class."""
    cell = RECURRENCES[op]
    params = _checks.container("params", params, cell.params)
    w: dict[str, Any] = {
        name: None if a is None else _checks.array(f"params.{name}", a) for name, a in params._asdict().items()
    }
    w_h: Any = w["w_h"]
    w_q: Any = w.get("w_q")
    if op == "classic_gru":
        H = w["w_x"].shape[-1] // 3
        _checks.shape("params.w_h", w_h, (H, 2 * H), "(H, 2 H)")
        _checks.shape("params.w_q", w_q, (H, H), "(H, H)")
        w_h, w_q = jnp.concatenate([w_h, w_q], -1), None
    maps = Maps(w["w_x"], w_h, w.get("b", w.get("b_x")), w.get("b_h"), w_q)
    _check_maps("params", op, maps)
    return maps


def _check_maps(name: str, op: str, maps: Maps) -> int:
    """Check ranks and sizes of the arrays of `op` against each other; return the number of units."""
    G, (w_x, w_h, b_x, b_h, w_q) = len(RECURRENCES[op].gates), maps
    for a in maps:
        if a is not None and not jnp.issubdtype(a.dtype, jnp.floating):
            _checks.bad_type(name, f"float arrays of `{op}`", _checks.describe(a))
    ranks = (3, 4, 5) if op == "conv_lstm" else (2,)
    if w_x.ndim not in ranks or w_h.ndim != w_x.ndim:
        kind = "kernels (*window, in, out) over 1 to 3 axes" if op == "conv_lstm" else "matrices (in, out)"
        _checks.bad_value(name, f"two {kind} of `{op}`", f"shapes {w_x.shape} and {w_h.shape}")
    H, rest = divmod(w_x.shape[-1], G)
    if rest:
        _checks.bad_value(name, f"{G} gates of `{op}` in an input map (D, {G} H)", f"shape {w_x.shape}")
    P = H if op != "projected_lstm" or w_q is None else w_q.shape[-1]
    if w_h.shape[-2:] != (P, G * H):
        expected = (
            f"a recurrent map of `{op}` whose last axes are {(P, G * H)}: {G} gates of {H} units, as the input map"
        )
        _checks.bad_value(name, expected, f"shape {w_h.shape}")
    if op == "projected_lstm" and w_q is not None and w_q.shape != (H, P):
        _checks.bad_value(name, f"a projection of `{op}` of shape {(H, P)}", f"shape {w_q.shape}")
    for place, b in (("bias of x", b_x), ("bias of h", b_h)):
        if b is not None and b.shape != (G * H,):
            _checks.bad_value(name, f"a {place} of shape {(G * H,)}", f"shape {b.shape}")
    return H


def kernel_and_bias(op: str, params: Any, *, groups: int | None = None) -> ConvParams:
    """Those of a convolution, checked; `groups` as in `check_kernel`."""
    params = _checks.container("params", params, ConvParams)
    kernel = _checks.array("params.kernel", params.kernel, complex_ok=True)
    bias = None if params.bias is None else _checks.array("params.bias", params.bias, complex_ok=True)
    return check_kernel("params", op, ConvParams(kernel, bias), groups=groups)


def check_kernel(name: str, op: str, params: ConvParams, *, groups: int | None = None) -> ConvParams:
    """Check the rank of a kernel in our layout, and that the bias has one entry for each output channel.

    The shape of a kernel does not show in how many groups a transposed convolution has its outputs. `groups` says it,
    where the library knows it; None accepts any number that divides the input channels.
    """
    kernel, bias = params
    if not 3 <= kernel.ndim <= 5:
        _checks.bad_value(name, "a weight of 3 to 5 axes (1 to 3 of space)", f"shape {kernel.shape}")
    if bias is None:
        return params
    if op == "conv":
        fits, expected = bias.shape == kernel.shape[-1:], f"shape {kernel.shape[-1:]}"
    elif groups is not None:
        fits, expected = bias.shape == (groups * kernel.shape[-2],), f"shape {(groups * kernel.shape[-2],)}"
    else:
        per_group, C_in = kernel.shape[-2:]
        sizes = [g * per_group for g in range(1, C_in + 1) if C_in % g == 0]
        fits = bias.ndim == 1 and bias.size in sizes
        expected = f"one of {per_group} entries for each group, where groups divide {C_in} input channels"
    if not fits:
        _checks.bad_value(name, f"a bias of {op!r}, {expected}", f"shape {bias.shape} beside kernel {kernel.shape}")
    return params


# --- What layouts are made of ---


def ordered(a: Any, given: str, wanted: str) -> Any:
    """The gates along the last axis in another order, each gate a letter: `ordered(b, "igfo", "ifgo")`."""
    if a.ndim == 0 or a.shape[-1] % len(given):
        _checks.bad_value("weights", f"{len(given)} gates of equal size along the last axis", f"shape {a.shape}")
    if given == wanted:
        return a
    parts = jnp.split(a, len(given), -1)
    return jnp.concatenate([parts[given.index(gate)] for gate in wanted], -1)


def scaled(a: jax.Array, factors: Sequence[int]) -> jax.Array:
    """The gates along the last axis, each times its factor."""
    return jnp.concatenate([s * part for s, part in zip(factors, jnp.split(a, len(factors), -1), strict=True)], -1)


def with_forget_bias(b: jax.Array | None, amount: int, like: jax.Array) -> jax.Array:
    """A bias (4 H,) of the gates i, f, g, o with so much more on f; no bias is one of zeros, as wide as `like`."""
    i, f, g, o = jnp.split(or_zeros(b, like), 4)
    return jnp.concatenate([i, f + amount, g, o])


def or_zeros(b: jax.Array | None, w: jax.Array) -> jax.Array:
    """A bias for what comes out of w, where frameworks always have one."""
    return jnp.zeros(w.shape[-1:], w.dtype) if b is None else b


def bias_of_the_candidate(maps: Maps) -> tuple[jax.Array, jax.Array]:
    """b_x with all that is only ever added to it, and of b_h the part inside of the reset, that of the last gate.

    For frameworks that have no second bias elsewhere. No bias is one of zeros.
    """
    H = maps.w_h.shape[-2]
    b_x, b_h = or_zeros(maps.b_x, maps.w_x), or_zeros(maps.b_h, maps.w_h)
    return b_x.at[:-H].add(b_h[:-H].astype(b_x.dtype)), b_h[-H:]


def beside_zeros(b_n: jax.Array, like: jax.Array) -> jax.Array:
    """b_h of which a framework has the part of the last gate alone."""
    return or_zeros(None, like).astype(b_n.dtype).at[-len(b_n) :].set(b_n)


def outer_first(kernel: jax.Array) -> jax.Array:
    """(*window, a, b) as (b, a, *window)."""
    return jnp.moveaxis(kernel, (-1, -2), (0, 1))


def outer_last(kernel: jax.Array) -> jax.Array:
    """(b, a, *window) as (*window, a, b)."""
    return jnp.moveaxis(kernel, (0, 1), (-1, -2))


def turned(kernel: jax.Array) -> jax.Array:
    """(*window, a, b) turned round in space."""
    return jnp.flip(kernel, range(kernel.ndim - 2))


# --- What comes in ---


def check_op(op: Any, framework: str, names: Sequence[str], elsewhere: Mapping[str, str]) -> str:
    """One of the layers that the framework has; `elsewhere` says of others why it is not."""
    if not isinstance(op, str):
        _checks.bad_type("op", "the name of a layer, such as 'lstm'", _checks.describe(op))
    if op in elsewhere:
        refused(op, f"{framework} {elsewhere[op]}")
    return _checks.choice("op", op, tuple(names))


def surely_zero(a: Any) -> bool:
    """Whether all of it is zero, which under `jit` nobody can see."""
    return not isinstance(a, Tracer) and not bool(jnp.any(a != 0))


def refused(op: str, why: str) -> NoReturn:
    raise ValueError(f"`op`: {op!r} does not fit: {why}")


def option_refused(op: str, layer: Any, option: str, value: Any, instead: str) -> NoReturn:
    """Refuse a layer for one of its options; `instead` says what the op computes and what the caller can do."""
    refused(op, f"this {type(layer).__name__} has {option}={value!r}; {instead}")


def check_class(
    op: str,
    layer: Any,
    *,
    home: str,
    kinds: Mapping[str, Sequence[str]],
    methods: Sequence[str],
    instead: str,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Check that a layer object of a library has a class whose equations are known to be those of `op`.

    Args:
        op: the layer that the caller asked for.
        layer: a layer object, or a container of its arrays. A container has no equations, and passes.
        home: the prefix of the names of the library's modules.
        kinds: for each op the names of the library's classes. A subclass passes unless it overrides `methods`.
        methods: the methods that hold the equations.
        instead: what the caller passes for a layer of another class that has the same equations.
        elsewhere: for names of other classes what to do with them.
    """
    classes = type(layer).__mro__
    if isinstance(layer, Mapping) or not any(cls.__module__.startswith(home) for cls in classes):
        return
    name = type(layer).__name__
    instead = f"if it has the equations of {op!r} all the same, pass {instead}"
    for cls in classes:
        if cls.__module__.startswith(home) and cls.__name__ in kinds[op]:
            return
        own = [method for method in methods if method in vars(cls)]
        if own and any(base.__module__.startswith(home) and base.__name__ in kinds[op] for base in classes):
            refused(op, f"the class {cls.__name__} overrides `{own[0]}`; {instead}")
    ancestors = {cls.__name__ for cls in classes}
    hints = [hint for other, hint in (elsewhere or {}).items() if other in ancestors]
    hints += [f"the op for a {name} is {other!r}" for other, names in kinds.items() if ancestors & {*names}]
    refused(op, f"a {name} is not one of {', '.join(kinds[op])}; {[*hints, instead][0]}")


def check_use_bias(op: str, layer: Any, bias: Any) -> None:
    """Check that a layer with a switch `use_bias` has a bias exactly if the switch is on."""
    use_bias = getattr(layer, "use_bias", None)
    if isinstance(use_bias, bool) and use_bias != (bias is not None):
        has = "no bias (was the layer partitioned?)" if use_bias else "a bias that it does not add"
        option_refused(op, layer, "use_bias", use_bias, f"but it holds {has}")


def all_or_none(biases: Mapping[str, Any]) -> None:
    """Check that of biases which a library has only together none is missing."""
    there = [name for name, b in biases.items() if b is not None]
    missing = [name for name, b in biases.items() if b is None]
    if there and missing:
        _checks.bad_value("weights", f"all of {', '.join(biases)}, or none", f"{there[0]} without {missing[0]}")


def array(name: str, leaf: Any) -> jax.Array:
    """A JAX array from one of JAX, or a copy of one of NumPy or torch or of the variable that holds it."""
    known = isinstance(leaf, jax.Array | np.ndarray) or hasattr(leaf, "detach")
    if not known and hasattr(leaf, "shape") and hasattr(leaf, "__getitem__"):
        leaf = leaf[...]  # a variable of nnx or of Keras
    if hasattr(leaf, "detach"):
        leaf = _from_tensor(name, leaf)
    elif not isinstance(leaf, jax.Array) and hasattr(leaf, "__array__"):
        leaf = np.array(leaf)
    return _checks.array(name, leaf, complex_ok=True)


def _from_tensor(name: str, tensor: Any) -> np.ndarray:
    """Copy a torch tensor, with the conjugation and the sign that torch applies lazily.

    The copy goes through host memory: JAX then places it on its own default device.
    """
    if type(tensor).__name__.startswith("Uninitialized") or tensor.is_meta:
        expected = f"{name!r} with data: run or materialize the layer first"
        _checks.bad_value("weights", expected, f"a {type(tensor).__name__} without data")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    try:
        return np.array(tensor.numpy())
    except TypeError:  # torch gives NumPy no bfloat16, and none of the smaller types
        return np.array(jnp.from_dlpack(tensor.contiguous()))


class Reader:
    """Reads arrays by path: `read("hn", "bias")` goes into dicts by key and into modules by attribute.

    Calling it returns None where there is nothing. `finish` refuses what a dict has beside that: an array that nobody
    read would be dropped without notice.
    """

    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self.paths: set[tuple[Any, ...]] = set()

    def __call__(self, *path: str) -> Any:
        self.paths.add(path)
        at = self.weights
        for name in path:
            at = at.get(name) if isinstance(at, Mapping) else getattr(at, name, None)
            if at is None:
                return None
        return array(".".join(path), at)

    def finish(self) -> None:
        if not isinstance(self.weights, Mapping):
            return
        left = [path for path in _leaves(self.weights) if path not in self.paths and path[0] != "rngs"]
        if left:
            had = ", ".join(sorted({".".join(map(str, path)) for path in self.paths}))
            _checks.bad_value("weights", f"only {had}", f"{'.'.join(map(str, left[0]))!r} beside them")


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all that stands in nested dicts and is not None."""
    if isinstance(tree, Mapping):
        for name, part in tree.items():
            yield from _leaves(part, (*path, name))
    elif tree is not None:
        yield path


def found(name: str, leaf: Any, weights: Any) -> jax.Array:
    """What must be there."""
    if leaf is None:
        had = ", ".join(map(str, weights)) if isinstance(weights, Mapping) else type(weights).__name__
        _checks.bad_value("weights", f"{name!r} in it", had or "nothing")
    return leaf
