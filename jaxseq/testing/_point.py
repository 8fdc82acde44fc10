"""The point at which a function is checked: its arguments as lists of leaves, cast to float64, and random directions.

The internal functions work on flat lists: the leaves of all differentiated arguments, and the differentiable leaves of
the output. `Leaves` records which leaves these are, and their names.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from jaxseq import _checks
from jaxseq._types import ArrayOrScalar

# A leaf of arguments, outputs or derivatives: an array, a tracer, or the result of a NumPy function.
Leaf = jax.Array | ArrayOrScalar
# A leaf, or only its shape and dtype.
Shaped = Leaf | jax.ShapeDtypeStruct
# Flat lists, of leaves and of shapes.
Arrays = Sequence[Leaf]
Shapes = Sequence[Shaped]
# A function of arrays and trees of arrays, and its positional arguments.
TreeFunction = Callable[..., PyTree]
Args = tuple[PyTree, ...]

T = TypeVar("T")


@runtime_checkable
class Structure(Protocol):
    """The structure of a tree: the methods of `jax.tree_util.PyTreeDef`, which type checkers do not know."""

    def flatten_up_to(self, tree: PyTree, /) -> list[PyTree]:
        """Return the subtrees at the leaves of the structure."""
        ...

    def unflatten(self, leaves: Iterable[PyTree], /) -> PyTree:
        """Return the tree with these leaves."""
        ...


class Leaves(NamedTuple):
    """The leaves of the arguments or of the output of a function.

    Attributes:
        tree: the structure of all arguments, or of the output.
        differentiated: for each leaf, True if it is differentiated.
        names: readable names of the differentiated leaves, such as `params.w_x`.
        places: Python expressions for the differentiated leaves, such as `[0].w_x`.
        groups: for each differentiated leaf, the position of its argument.
        arguments: for each differentiated leaf, the name of its argument.
    """

    tree: Structure
    differentiated: tuple[bool, ...]
    names: tuple[str, ...]
    places: tuple[str, ...]
    groups: tuple[int, ...]
    arguments: tuple[str, ...]

    def split(self, side: PyTree[T]) -> tuple[list[T], list[T]]:
        """Return the differentiated leaves and the others."""
        leaves = self.tree.flatten_up_to(side)
        parts: tuple[list[T], list[T]] = ([], [])
        for leaf, is_differentiated in zip(leaves, self.differentiated, strict=True):
            parts[not is_differentiated].append(leaf)
        return parts

    def join(self, differentiated: Sequence[T], others: Sequence[T]) -> PyTree[T]:
        """Invert `split`."""
        sources = iter(differentiated), iter(others)
        return self.tree.unflatten([next(sources[not c]) for c in self.differentiated])


def inexact(leaf: Shaped) -> bool:
    """Return True for real and complex floating-point dtypes, which have derivatives."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def wide_dtype(leaf: Shaped) -> type[np.inexact]:
    """Return complex128 for a complex leaf, else float64."""
    return np.complex128 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else np.float64


def wide(arrays: Arrays) -> list[ArrayOrScalar]:
    """Return NumPy arrays in float64 or complex128."""
    return [np.asarray(a).astype(wide_dtype(a)) for a in arrays]


def zeros(arrays: Shapes) -> list[ArrayOrScalar]:
    """Return zeros with the shapes of the arrays, in float64 or complex128."""
    return [np.zeros(a.shape, wide_dtype(a)) for a in arrays]


def input_leaves(f: TreeFunction, args: Args, argnums: tuple[int, ...]) -> Leaves:
    """Return the leaves of the arguments; those differentiated are the floating-point leaves of `argnums`."""
    return _leaves(args, _argument_names(f, len(args)), lambda group, leaf: group in argnums and inexact(leaf))


def leaf_names(f: TreeFunction, args: Args) -> tuple[str, ...]:
    """Return the names of all leaves of the arguments, differentiated or not."""
    return _leaves(args, _argument_names(f, len(args)), lambda group, leaf: True).names


def output_leaves(shapes: PyTree[Shaped]) -> Leaves:
    """Return the leaves of an output (any tree with shapes and dtypes); floating-point leaves are differentiated."""
    leaves = _leaves((shapes,), ["output"], lambda _, leaf: inexact(leaf))
    return leaves._replace(tree=jax.tree.structure(shapes), places=tuple(p.removeprefix("[0]") for p in leaves.places))


def _leaves(sides: Args, called: Sequence[str], is_differentiated: Callable[[int, Shaped], bool]) -> Leaves:
    flat, tree = jax.tree.flatten_with_path(sides)
    groups: list[int] = [path[0].idx for path, _ in flat]
    selected = [is_differentiated(group, leaf) for group, (_, leaf) in zip(groups, flat, strict=True)]
    names = [str(called[group]) + jax.tree_util.keystr(path[1:]) for group, (path, _) in zip(groups, flat, strict=True)]
    places = [jax.tree_util.keystr(path) for path, _ in flat]

    def select(items: Sequence[T]) -> tuple[T, ...]:
        return tuple(itertools.compress(items, selected))

    owners = [called[group] for group in groups]
    return Leaves(tree, tuple(selected), select(names), select(places), select(groups), select(owners))


def _argument_names(f: TreeFunction, count: int) -> list[str]:
    """Return the names of the positional arguments in the signature, or `args[0]`, `args[1]` where it has none."""
    names: list[str] = []
    try:
        for parameter in inspect.signature(f).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
    except (TypeError, ValueError):
        pass
    return [names[n] if n < len(names) else f"args[{n}]" for n in range(count)]


def title(f: TreeFunction) -> str:
    """Return a readable name of f; for a partial, with the bound arguments: `lstm(reverse=True)`."""
    if isinstance(f, partial):
        bound = [repr(a) for a in f.args] + [f"{k}={v!r}" for k, v in f.keywords.items()]
        return title(f.func) + (f"({', '.join(b if len(b) <= 40 else '…' for b in bound)})" if bound else "")
    return getattr(f, "__name__", type(f).__name__)


# --- Arguments ---


def lifted(args: PyTree, *, seed: int = 0, argnums: int | Sequence[int] | None = None) -> PyTree:
    """Return the point at which `check_vjp` checks a function that is called with `args`.

    Floating-point leaves are cast to float64 (complex128), and their zeros are replaced by random numbers: at a zero
    state or bias, some wrong gradients equal the correct ones, and functions such as relu have kinks at zero. The
    random numbers are half the size (RMS) of the nonzero elements of the leaf, or 0.5 if the leaf is all zeros. They
    are positive in a leaf without negative numbers, since f may not be defined elsewhere. Call this function under
    `jax.enable_x64(True)`.

    Args:
        args: a tree of arrays.
        seed: the seed of the random numbers.
        argnums: the arguments, entries of the tuple `args`, whose zeros are replaced; None for all.

    Returns:
        A tree with the structure of `args`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxseq.testing import lifted
        >>> with jax.enable_x64(True):
        ...     x, h = lifted((jnp.ones(2), jnp.zeros(2)))
        >>> x.dtype, bool(h.all())
        (dtype('float64'), True)
    """
    rng = np.random.default_rng([seed, 1])
    chosen = {argnums} if isinstance(argnums, int) else argnums

    def lift(path: KeyPath, leaf: Leaf) -> Leaf:
        if not inexact(leaf):
            return leaf
        (array,) = wide([leaf])
        drawn = 0.5 * normal(rng, array)
        if chosen is not None and path[0].idx not in chosen:
            return jnp.asarray(array)
        if array.any():
            drawn *= np.sqrt(np.mean(np.abs(array[array != 0]) ** 2))
            drawn = np.abs(drawn) if np.isrealobj(array) and (array >= 0).all() else drawn
        return jnp.asarray(np.where(array == 0, drawn, array))

    return jax.tree.map_with_path(lift, args)


def zeros_in(args: Args, argnums: Sequence[int]) -> dict[int, int]:
    """Return the number of zeros that `lifted` replaces in each leaf, by the index of the leaf."""
    leaves = jax.tree.leaves_with_path(args)
    counts = {
        n: int(np.sum(np.asarray(a) == 0))
        for n, (path, a) in enumerate(leaves)
        if inexact(a) and path[0].idx in argnums
    }
    return {n: count for n, count in counts.items() if count}


def as_arrays(args: Sequence[PyTree]) -> Args:
    """Return `args` as a tuple of trees of arrays, or raise an error."""
    if not isinstance(args, tuple | list):
        _checks.bad_type("args", "a tuple of the arguments of `f`", _checks.describe(args))

    def array(path: KeyPath, leaf: object) -> jax.Array | np.ndarray:
        name = f"args{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            expected = "an array (bind other arguments with functools.partial)"
            _checks.bad_type(name, expected, _checks.describe(leaf))
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        if leaf.dtype == object:
            _checks.bad_type(name, "an array of numbers", "an array of objects")
        if inexact(leaf) and not np.isfinite(np.asarray(leaf).astype(np.complex128)).all():
            _checks.bad_value(name, "finite values", "NaN or infinity", **{name: leaf})
        return leaf

    return jax.tree.map_with_path(array, tuple(args))


# --- Random numbers, drawn by NumPy so that they do not depend on the device ---


def normal(rng: np.random.Generator, like: Shaped) -> ArrayOrScalar:
    """Draw standard normal numbers with the shape of `like`, in float64 or complex128."""
    draw = rng.standard_normal(like.shape)
    return draw + 1j * rng.standard_normal(like.shape) if wide_dtype(like) == np.complex128 else draw


def varied(rng: np.random.Generator, x: Arrays, by: float = 0.01) -> list[ArrayOrScalar]:
    """Return a nearby point: each number times a random factor between 1 - `by` and 1 + `by`."""
    return [np.asarray(a) * (1 + by * rng.uniform(-1, 1, a.shape)) for a in x]


def patterns(like: Shapes, names: Sequence[str], seed: int) -> dict[str, list[ArrayOrScalar]]:
    """Return the seeds of the derivative by name: cotangents like the outputs, or tangents like the inputs.

    The seeds are random on all leaves jointly, random on one leaf and zero on the others, one-hot in the first or last
    element of a leaf, all ones, and all zeros.
    """
    rng = np.random.default_rng([seed, 2])

    def only(n: int, value: ArrayOrScalar) -> list[ArrayOrScalar]:
        return [value if m == n else zero for m, zero in enumerate(zeros(like))]

    made = {"joint": [normal(rng, a) for a in like]}
    for n, (a, name) in enumerate(zip(like, names, strict=True)):
        if len(like) > 1:
            made[f"{name} alone"] = only(n, normal(rng, a))
        for place, index in (("first", 0), ("last", -1)) if a.size > 1 else ():
            one = zeros(like)[n]
            one.flat[index] = 1
            made[f"{place} of {name}"] = only(n, one)
    made["ones"] = [zero + 1 for zero in zeros(like)]
    made["zero"] = zeros(like)
    return made


def cotangents(outputs: PyTree, pattern: str, *, seed: int = 0) -> PyTree:
    """Return the cotangent that a report names.

    Args:
        outputs: the outputs of the function, a tree of arrays.
        pattern: the cotangent named in the report, such as `"joint"`.
        seed: the seed named in the report.

    Returns:
        A tree like `outputs`, to pass to the pullback that `jax.vjp` returned.

    Raises:
        ValueError: no cotangent has that name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxseq.testing import cotangents
        >>> y, pull = jax.vjp(jnp.sin, jnp.zeros(3))
        >>> pull(cotangents(y, "first of output"))[0]
        Array([1., 0., 0.], dtype=float32)
    """
    leaves = output_leaves(outputs)
    chosen, rest = leaves.split(outputs)
    made = patterns(chosen, leaves.names, seed)
    if pattern not in made:
        _checks.bad_value("pattern", f"one of {', '.join(map(repr, made))}", repr(pattern))
    typed = [jnp.asarray(c).astype(y.dtype) for c, y in zip(made[pattern], chosen, strict=True)]
    return leaves.join(typed, [np.zeros(y.shape, jax.dtypes.float0) for y in rest])
