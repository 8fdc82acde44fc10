"""Operations on layouts of parameters, and the intermediate form `Maps` between other libraries and jaxseq.

The intermediate form of a recurrence has the orientation and gate order of jaxseq (G gates, hidden size H, input size
D):

    a = x w_x + b_x + h w_h + b_h        w_x (D, G H)    w_h (H, G H)    b_x, b_h (G H,) or None
    w_q                                  the matrix of a second product inside the step, if the cell has one

Layouts of other libraries differ in four ways: matrices are transposed; gates are in another order or in separate
arrays; there are two biases where one suffices; and a forget gate adds 1 to its bias. The file of each library applies
those that it needs.

Two biases that are only added become one, b = b_x + b_h. The inverse has b_x = b and b_h = 0. If the bias of h is
inside a reset (n of GRU and MGU), both biases are separate parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import EllipsisType
from typing import NamedTuple, NoReturn, Protocol, TypeGuard, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from jaxseq import _checks, cells
from jaxseq._conv import ConvParams
from jaxseq._recurrence import Cell
from jaxseq._types import AnyArray

# The cell of each recurrence, with the order of the gates and the class of the parameters.
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
    """The arrays of a recurrence in the intermediate form."""

    w_x: jax.Array
    w_h: jax.Array
    b_x: jax.Array | None
    b_h: jax.Array | None
    w_q: jax.Array | None = None


@runtime_checkable
class Tensor(Protocol):
    """What is used of a `torch.Tensor`."""

    is_meta: bool

    def detach(self) -> "Tensor": ...
    def cpu(self) -> "Tensor": ...
    def resolve_conj(self) -> "Tensor": ...
    def resolve_neg(self) -> "Tensor": ...
    def contiguous(self) -> "Tensor": ...
    def numpy(self) -> np.ndarray: ...


class Variable(Protocol):
    """What is used of a variable of nnx or of Keras."""

    shape: tuple[int, ...]

    def __getitem__(self, index: EllipsisType) -> object: ...


# --- Between `Maps` and parameters of jaxseq ---


def join_params(op: str, maps: Maps) -> PyTree[Array]:
    """Return parameters of `op` from `maps`, after checking their shapes."""
    cell, H = RECURRENCES[op], _check_maps("weights", op, maps)
    w_x, w_h, b_x, b_h, w_q = maps
    if op in ("gru", "mgu"):
        return cell.params(w_x, w_h, b_x, b_h)
    b = b_h if b_x is None else b_x if b_h is None else b_x + b_h
    if op == "classic_gru":
        return cell.params(w_x, w_h[:, : 2 * H], b, w_h[:, 2 * H :])
    return cell.params(w_x, w_h, b, *(() if w_q is None else (w_q,)))


def split_params(op: str, params: PyTree[AnyArray]) -> Maps:
    """Invert `join_params`, after checking the class of the parameters."""
    cell = RECURRENCES[op]
    params = _checks.container("params", params, cell.params)
    w = {name: None if a is None else _checks.array(f"params.{name}", a) for name, a in params._asdict().items()}
    w_x, w_h, w_q = (cast("jax.Array", w.get(name)) for name in ("w_x", "w_h", "w_q"))  # w_q is None in most cells
    maps = Maps(w_x, w_h, w.get("b", w.get("b_x")), w.get("b_h"), w_q)
    if op == "classic_gru":
        H = w_x.shape[-1] // 3
        _checks.shape("params.w_h", w_h, (H, 2 * H), "(H, 2 H)")
        _checks.shape("params.w_q", w_q, (H, H), "(H, H)")
        maps = maps._replace(w_h=jnp.concatenate([w_h, w_q], -1), w_q=None)
    _check_maps("params", op, maps)
    return maps


def _check_maps(name: str, op: str, maps: Maps) -> int:
    """Check that the ranks and sizes of the arrays of `op` match; return the hidden size."""
    G, (w_x, w_h, b_x, b_h, w_q) = len(RECURRENCES[op].gates), maps
    for a in maps:
        if a is not None and not jnp.issubdtype(a.dtype, jnp.floating):
            _checks.bad_type(name, f"float arrays of `{op}`", _checks.describe(a))
    ranks = (3, 4, 5) if op == "conv_lstm" else (2,)
    if w_x.ndim not in ranks or w_h.ndim != w_x.ndim:
        kind = "kernels (*kernel_size, in, out) with 1 to 3 spatial axes" if op == "conv_lstm" else "matrices (in, out)"
        _checks.bad_value(name, f"two {kind} of `{op}`", f"shapes {w_x.shape} and {w_h.shape}")
    H, rest = divmod(w_x.shape[-1], G)
    if rest:
        _checks.bad_value(name, f"{G} gates of `{op}` in an input map (D, {G} H)", f"shape {w_x.shape}")
    P = H if op != "projected_lstm" or w_q is None else w_q.shape[-1]
    if w_h.shape[-2:] != (P, G * H):
        expected = f"a recurrent map of `{op}` with last axes {(P, G * H)}: {G} gates of size {H}, as in the input map"
        _checks.bad_value(name, expected, f"shape {w_h.shape}")
    if op == "projected_lstm" and w_q is not None and w_q.shape != (H, P):
        _checks.bad_value(name, f"a projection of `{op}` of shape {(H, P)}", f"shape {w_q.shape}")
    for place, b in (("bias of x", b_x), ("bias of h", b_h)):
        if b is not None and b.shape != (G * H,):
            _checks.bad_value(name, f"a {place} of shape {(G * H,)}", f"shape {b.shape}")
    return H


def kernel_and_bias(op: str, params: PyTree[AnyArray], *, groups: int | None = None) -> ConvParams:
    """Return the kernel and bias of a convolution after checking them; `groups` as in `check_kernel`."""
    params = _checks.container("params", params, ConvParams)
    kernel = _checks.array("params.kernel", params.kernel, complex_ok=True)
    bias = None if params.bias is None else _checks.array("params.bias", params.bias, complex_ok=True)
    return check_kernel("params", op, ConvParams(kernel, bias), groups=groups)


def check_kernel(name: str, op: str, params: ConvParams, *, groups: int | None = None) -> ConvParams:
    """Check the rank of a kernel in the layout of jaxseq, and that the bias has one entry for each output channel.

    The shape of the kernel of a transposed convolution does not determine the number of groups. `groups` is this number
    if the library knows it; None accepts any number that divides the number of input channels.
    """
    kernel, bias = params
    if not 3 <= kernel.ndim <= 5:
        _checks.bad_value(name, "a weight with 3 to 5 axes (1 to 3 spatial)", f"shape {kernel.shape}")
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
        expected = f"{per_group} entries for each group, where groups divide {C_in} input channels"
    if not fits:
        _checks.bad_value(name, f"a bias of {op!r} with {expected}", f"shape {bias.shape} for kernel {kernel.shape}")
    return params


# --- Operations on layouts ---


def ordered(a: jax.Array, given: str, wanted: str) -> jax.Array:
    """Reorder the gates along the last axis, one letter for each gate: `ordered(b, "igfo", "ifgo")`."""
    if a.ndim == 0 or a.shape[-1] % len(given):
        _checks.bad_value("weights", f"{len(given)} gates of equal size along the last axis", f"shape {a.shape}")
    if given == wanted:
        return a
    parts = jnp.split(a, len(given), -1)
    return jnp.concatenate([parts[given.index(gate)] for gate in wanted], -1)


def ordered_maps(maps: Maps, given: str, wanted: str) -> Maps:
    """Reorder the gates of all arrays of a recurrence that has no w_q."""
    w_x, w_h = (ordered(w, given, wanted) for w in (maps.w_x, maps.w_h))
    b_x, b_h = (None if b is None else ordered(b, given, wanted) for b in (maps.b_x, maps.b_h))
    return Maps(w_x, w_h, b_x, b_h)


def scaled(a: jax.Array, factors: Sequence[int]) -> jax.Array:
    """Multiply each gate along the last axis by its factor."""
    return jnp.concatenate([s * part for s, part in zip(factors, jnp.split(a, len(factors), -1), strict=True)], -1)


def with_forget_bias(b: jax.Array | None, amount: int, like: jax.Array) -> jax.Array:
    """Add `amount` to gate f of a bias (4 H,) of the gates i, f, g, o; None is a bias of zeros for the map `like`."""
    i, f, g, o = jnp.split(or_zeros(b, like), 4)
    return jnp.concatenate([i, f + amount, g, o])


def or_zeros(b: jax.Array | None, w: jax.Array) -> jax.Array:
    """Return the bias b, or zeros for the output of w if b is None."""
    return jnp.zeros(w.shape[-1:], w.dtype) if b is None else b


def bias_of_the_candidate(maps: Maps) -> tuple[jax.Array, jax.Array]:
    """Return b_x plus b_h of all gates but the last, and b_h of the last gate, which is inside the reset.

    For libraries that have a second bias only in the last gate. None is a bias of zeros.
    """
    H = maps.w_h.shape[-2]
    b_x, b_h = or_zeros(maps.b_x, maps.w_x), or_zeros(maps.b_h, maps.w_h)
    return b_x.at[:-H].add(b_h[:-H].astype(b_x.dtype)), b_h[-H:]


def beside_zeros(b_n: jax.Array, like: jax.Array) -> jax.Array:
    """Return b_h with b_n in the last gate and zeros in the others."""
    return or_zeros(None, like).astype(b_n.dtype).at[-len(b_n) :].set(b_n)


def outer_first(kernel: jax.Array) -> jax.Array:
    """Transpose (*kernel_size, a, b) to (b, a, *kernel_size)."""
    return jnp.moveaxis(kernel, (-1, -2), (0, 1))


def outer_last(kernel: jax.Array) -> jax.Array:
    """Transpose (b, a, *kernel_size) to (*kernel_size, a, b)."""
    return jnp.moveaxis(kernel, (0, 1), (-1, -2))


def flipped(kernel: jax.Array) -> jax.Array:
    """Flip (*kernel_size, a, b) along its spatial axes."""
    return jnp.flip(kernel, range(kernel.ndim - 2))


# --- Validation and reading ---


def check_op(op: object, framework: str, names: Sequence[str], elsewhere: Mapping[str, str]) -> str:
    """Check that the framework has the layer `op`; `elsewhere` gives the reasons for other ops."""
    if not isinstance(op, str):
        _checks.bad_type("op", "the name of a layer, such as 'lstm'", _checks.describe(op))
    if op in elsewhere:
        reject(op, f"{framework} {elsewhere[op]}")
    return _checks.choice("op", op, tuple(names))


def is_known_zero(a: jax.Array) -> bool:
    """Return True if `a` is known to be zero; False for a traced array, whose values are unknown."""
    return not isinstance(a, Tracer) and not bool(jnp.any(a != 0))


def reject(op: str, why: str) -> NoReturn:
    raise ValueError(f"`op`: {op!r} does not match: {why}")


def reject_option(op: str, layer: object, option: str, value: object, instead: str) -> NoReturn:
    """Reject a layer for one of its options; `instead` states what the op computes and what the caller can do."""
    reject(op, f"this {type(layer).__name__} has {option}={value!r}; {instead}")


def check_class(
    op: str,
    layer: object,
    *,
    home: str,
    kinds: Mapping[str, Sequence[str]],
    methods: Sequence[str],
    instead: str,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Check that the class of a layer object is known to have the equations of `op`.

    Args:
        op: the layer that the caller requested.
        layer: a layer object, or a container of its arrays. A container always passes.
        home: the prefix of the module names of the library.
        kinds: for each op, the class names of the library. A subclass passes unless it overrides one of `methods`.
        methods: the methods that implement the equations.
        instead: what to pass for a layer of another class with the same equations.
        elsewhere: for the names of other classes, what to do with them.
    """
    classes = type(layer).__mro__
    if isinstance(layer, Mapping) or not any(cls.__module__.startswith(home) for cls in classes):
        return
    name = type(layer).__name__
    instead = f"if it nevertheless has the equations of {op!r}, pass {instead}"
    for cls in classes:
        if cls.__module__.startswith(home) and cls.__name__ in kinds[op]:
            return
        own = [method for method in methods if method in vars(cls)]
        if own and any(base.__module__.startswith(home) and base.__name__ in kinds[op] for base in classes):
            reject(op, f"the class {cls.__name__} overrides `{own[0]}`; {instead}")
    ancestors = {cls.__name__ for cls in classes}
    hints = [hint for other, hint in (elsewhere or {}).items() if other in ancestors]
    hints += [f"the op for a {name} is {other!r}" for other, names in kinds.items() if ancestors & {*names}]
    reject(op, f"a {name} is not one of {', '.join(kinds[op])}; {[*hints, instead][0]}")


def check_use_bias(op: str, layer: object, bias: jax.Array | None) -> None:
    """Check that a layer with an option `use_bias` has a bias if and only if the option is True."""
    use_bias = getattr(layer, "use_bias", None)
    if isinstance(use_bias, bool) and use_bias != (bias is not None):
        has = "no bias (was the layer partitioned?)" if use_bias else "a bias that it does not add"
        reject_option(op, layer, "use_bias", use_bias, f"but it has {has}")


def all_or_none(biases: Mapping[str, jax.Array | None]) -> None:
    """Check that the biases are all present or all None."""
    there = [name for name, b in biases.items() if b is not None]
    missing = [name for name, b in biases.items() if b is None]
    if there and missing:
        _checks.bad_value("weights", f"all of {', '.join(biases)} or none of them", f"{there[0]} without {missing[0]}")


def _is_tensor(leaf: object) -> TypeGuard[Tensor]:
    return hasattr(leaf, "detach")


def _is_variable(leaf: object) -> TypeGuard[Variable]:
    return hasattr(leaf, "shape") and hasattr(leaf, "__getitem__")


def array(name: str, leaf: object) -> jax.Array:
    """Return a JAX array unchanged, or a copy of a NumPy array, a torch tensor, or a variable of nnx or Keras."""
    if not isinstance(leaf, jax.Array | np.ndarray) and not _is_tensor(leaf) and _is_variable(leaf):
        leaf = leaf[...]
    if _is_tensor(leaf):
        leaf = _from_tensor(name, leaf)
    elif not isinstance(leaf, jax.Array) and hasattr(leaf, "__array__"):
        leaf = np.array(leaf)
    return _checks.array(name, leaf, complex_ok=True)


def _from_tensor(name: str, tensor: Tensor) -> np.ndarray:
    """Copy a torch tensor to host memory, resolving the conjugation and negation that torch applies lazily.

    JAX then places the array on its default device.
    """
    if type(tensor).__name__.startswith("Uninitialized") or tensor.is_meta:
        expected = f"{name!r} with data (run or materialize the layer first)"
        _checks.bad_value("weights", expected, f"a {type(tensor).__name__} without data")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    try:
        return np.array(tensor.numpy())
    except TypeError:  # NumPy has no bfloat16 or smaller floating-point types
        return np.array(jnp.from_dlpack(tensor.contiguous()))


class Reader:
    """Reads arrays by path: `read("hn", "bias")` looks up keys of dicts and attributes of modules.

    A call returns None if the path does not exist. `finish` raises if a dict has arrays that were not read, which would
    otherwise be dropped silently.
    """

    def __init__(self, weights: object) -> None:
        self.weights = weights
        self.paths: set[tuple[str, ...]] = set()

    def __call__(self, *path: str) -> jax.Array | None:
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
        unread = [path for path in _leaves(self.weights) if path not in self.paths and path[0] != "rngs"]
        if unread:
            read = ", ".join(sorted({".".join(map(str, path)) for path in self.paths}))
            _checks.bad_value("weights", f"only {read}", f"also {'.'.join(map(str, unread[0]))!r}")


def _leaves(tree: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Yield the paths of the leaves of nested dicts that are not None."""
    if isinstance(tree, Mapping):
        for name, part in tree.items():
            yield from _leaves(part, (*path, name))
    elif tree is not None:
        yield path


def required(name: str, leaf: jax.Array | None, weights: object) -> jax.Array:
    """Return `leaf`, or raise if it is None."""
    if leaf is None:
        had = ", ".join(map(str, weights)) if isinstance(weights, Mapping) else type(weights).__name__
        _checks.bad_value("weights", f"{name!r} in it", had or "nothing")
    return leaf
