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

from collections.abc import Callable, Mapping, Sequence
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
    cell = RECURRENCES[op]
    G, (w_x, w_h, b_x, b_h, w_q) = len(cell.gates), maps
    H, rest = divmod(w_x.shape[-1], G)
    if rest:
        _checks.bad_value("weights", f"{G} gates of `{op}` in an input map (D, {G} H)", f"shape {w_x.shape}")
    P = H if op != "projected_lstm" or w_q is None else w_q.shape[-1]
    if w_h.shape[-2:] != (P, G * H):
        expected = (
            f"a recurrent map of `{op}` whose last axes are {(P, G * H)}: {G} gates of {H} units, as the input map"
        )
        _checks.bad_value("weights", expected, f"shape {w_h.shape}")
    for name, b in (("bias of x", b_x), ("bias of h", b_h)):
        if b is not None and b.shape != (G * H,):
            _checks.bad_value("weights", f"a {name} of shape {(G * H,)}", f"shape {b.shape}")
    if op in ("gru", "mgu"):
        return cell.params(w_x, w_h, b_x, b_h)
    b = b_h if b_x is None else b_x if b_h is None else b_x + b_h
    if op == "classic_gru":
        return cell.params(w_x, w_h[:, : 2 * H], b, w_h[:, 2 * H :])
    return cell.params(w_x, w_h, b, *(() if w_q is None else (w_q,)))


def apart(op: str, params: Any) -> Maps:
    """The way back, from parameters of the right class."""
    cell = RECURRENCES[op]
    params = _checks.container("params", params, cell.params)
    w: dict[str, Any] = {
        name: None if a is None else _checks.array(f"params.{name}", a) for name, a in params._asdict().items()
    }
    w_h: Any = w["w_h"]
    w_q: Any = w.get("w_q")
    if op == "classic_gru":
        w_h, w_q = jnp.concatenate([w_h, w_q], -1), None
    return Maps(w["w_x"], w_h, w.get("b", w.get("b_x")), w.get("b_h"), w_q)


def kernel_and_bias(params: Any) -> ConvParams:
    """Those of a convolution, checked."""
    params = _checks.container("params", params, ConvParams)
    kernel = _checks.array("params.kernel", params.kernel, complex_ok=True)
    bias = None if params.bias is None else _checks.array("params.bias", params.bias, complex_ok=True)
    return ConvParams(kernel, bias)


# --- What layouts are made of ---


def ordered(a: Any, given: str, wanted: str) -> Any:
    """The gates along the last axis in another order, each gate a letter: `ordered(b, "igfo", "ifgo")`."""
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


def array(name: str, leaf: Any) -> jax.Array:
    """A JAX array from one of NumPy, JAX, torch (a copy: torch writes in place) or from what holds one."""
    torch: Any = leaf if hasattr(leaf, "detach") else None
    held = not isinstance(leaf, jax.Array | np.ndarray) and torch is None
    if held and hasattr(leaf, "shape") and hasattr(leaf, "__getitem__"):
        leaf = leaf[...]  # a variable of nnx or of Keras
    if torch is not None:
        leaf = jnp.array(jnp.from_dlpack(torch.detach().contiguous()), copy=True)
    elif not isinstance(leaf, jax.Array) and hasattr(leaf, "__array__"):
        leaf = np.asarray(leaf)
    return _checks.array(name, leaf, complex_ok=True)


def reader(weights: Any) -> Callable[..., Any]:
    """`read("hn", "bias")` goes into dicts by key and into modules by attribute; None where there is nothing."""

    def read(*path: str) -> Any:
        at = weights
        for name in path:
            at = at.get(name) if isinstance(at, Mapping) else getattr(at, name, None)
            if at is None:
                return None
        return at if isinstance(at, Mapping) else array(".".join(path), at)

    return read


def found(name: str, leaf: Any, weights: Any) -> jax.Array:
    """What must be there."""
    if leaf is None:
        had = ", ".join(map(str, weights)) if isinstance(weights, Mapping) else type(weights).__name__
        _checks.bad_value("weights", f"{name!r} in it", had or "nothing")
    return leaf
