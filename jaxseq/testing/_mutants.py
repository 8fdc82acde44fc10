"""`mutate`: clones of a function, each with one common mistake in its gradient.

A mutant computes the same values as f, except for the mutant with a wrong fwd. Its custom rule computes the correct
gradient of f and introduces the mistake. This works for any differentiable function, with or without a custom rule.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike
from jaxtyping import PyTree

from jaxseq import _checks
from jaxseq.testing import _surgery
from jaxseq.testing._point import Args, Leaf, Shaped, TreeFunction, inexact, title

# The gradient of a function: a tree for each argument. The correct one is the result of the pullback.
Gradient = tuple[PyTree, ...]
Pullback = Callable[[PyTree], Gradient]
# `(args, outputs) -> bool`, True if a mistake can be made there. Outputs are shapes.
Fits = Callable[[Args, PyTree[Shaped]], bool]
# A change of one cotangent.
Change = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Mutant:
    """A clone of a function with one mistake in its gradient. It has the signature of the function.

    Attributes:
        name: the name of the mistake.
        check: the check of `check_vjp` that must find the mistake.
        description: a description of the mistake.
        original: the function.
        clone: the function with the mistake.
        fits: `(args, outputs) -> bool`, True if the mistake can be made there.
    """

    name: str
    check: str
    description: str
    original: Callable[..., PyTree]
    clone: Callable[..., PyTree]
    fits: Fits

    def __call__(self, *args: PyTree) -> PyTree:
        """Return the value of the function."""
        return self.clone(*args)

    def applies(self, *args: PyTree) -> bool:
        """Return True if the mistake has an effect for these arguments: a transpose, for example, needs a matrix."""
        return self.fits(args, jax.eval_shape(self.original, *args))

    @property
    def __name__(self) -> str:
        return f"{title(self.original)} with {self.description}"

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)


def mutate(f: Callable[..., PyTree]) -> dict[str, Mutant]:
    """Return clones of a function, each with one mistake in its gradient, to test that a gradient check finds it.

    Args:
        f: any differentiable function of arrays and trees of arrays, with or without a custom rule.

    Returns:
        The mutants by name. `mutant.applies(*args)` tells if the mistake has an effect for these arguments, and
        `mutant.check` names the check of `check_vjp` that finds it.

    Raises:
        TypeError: `f` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq.testing import check_vjp, mutate
        >>> mutant = mutate(jnp.sin)["sign"]
        >>> report = check_vjp(mutant, (jnp.array([1.0, 2.0, 3.0]),), level="quick")
        >>> mutant.check, report.of(mutant.check).name
        ('value', 'FAIL')

    Reference:
        R. A. DeMillo, R. J. Lipton and F. G. Sayward, Hints on test data selection: help for the practicing programmer
        (1978), for mutation testing.
    """
    if not callable(f):
        _checks.bad_type("f", "a function", _checks.describe(f))
    return {m.name: Mutant(m.name, m.check, m.description, f, m.how.make(f), m.how.fits) for m in MISTAKES}


class How(NamedTuple):
    """How to make a mistake: a function that clones f, and a predicate of `(args, outputs)` for its applicability."""

    make: Callable[[TreeFunction], TreeFunction]
    fits: Fits = lambda args, outputs: True


class Mistake(NamedTuple):
    """A mistake: its name, the check that finds it, a description, and how to make it."""

    name: str
    check: str
    description: str
    how: How


# --- Constructors of mistakes ---


def _rule(
    f: TreeFunction,
    bwd: Callable[[Pullback, Args, PyTree], Gradient],
    primal: Callable[[PyTree], PyTree] = lambda out: out,
) -> TreeFunction:
    """Return f with a custom rule: `bwd(pull, args, c)` returns the gradient; `pull` is the correct pullback of f."""

    @jax.custom_vjp
    def clone(*args: PyTree) -> PyTree:
        return f(*args)

    clone.defvjp(
        lambda *args: (primal(f(*args)), args),
        lambda args, c: bwd(jax.vjp(f, *args)[1], args, c),
    )
    return clone


def gradient(change: Callable[[Gradient, Args], Gradient], fits: Fits = lambda args, out: True) -> How:
    """Change the correct gradient by `change(gradient, args)`, both tuples of trees."""
    return How(lambda f: _rule(f, lambda pull, args, c: change(pull(c), args)), fits)


def leaf(change: Change, takes: Callable[[Leaf], bool] = lambda a: True) -> How:
    """Change the cotangent of one leaf: the largest floating-point leaf that satisfies `takes`."""

    def target(tree: PyTree[Leaf]) -> int | None:
        leaves = jax.tree.leaves(tree)
        places = [n for n, a in enumerate(leaves) if inexact(a) and a.size and takes(a)]
        return max(places, key=lambda n: leaves[n].size, default=None)

    def one(gradient: Gradient, args: Args) -> Gradient:
        leaves, tree = jax.tree.flatten(gradient)
        n = target(args)
        return tree.unflatten([change(a) if m == n else a for m, a in enumerate(leaves)])

    return gradient(one, lambda args, out: target(args) is not None)


def cotangent(change: Callable[[PyTree], PyTree], fits: Fits = lambda args, out: True) -> How:
    """Return the correct gradient for a changed cotangent of the output."""
    return How(lambda f: _rule(f, lambda pull, args, c: pull(change(c))), fits)


def _map(change: Change, tree: PyTree) -> PyTree:
    """Apply `change` to the floating-point leaves."""
    return jax.tree.map(lambda a: change(a) if inexact(a) else a, tree)


def _floats(tree: PyTree[Shaped]) -> list[int]:
    """Return the indices of the floating-point leaves."""
    return [n for n, a in enumerate(jax.tree.leaves(tree)) if inexact(a)]


def _several(tree: PyTree[Shaped]) -> bool:
    return len(_floats(tree)) > 1


# --- Mistakes in what bwd returns ---


def _first_container(args: Args) -> int | None:
    """Return the position of the first argument with several floating-point leaves, or None."""
    return next((n for n, arg in enumerate(args) if _several(arg)), None)


def _none(gradient: Gradient, args: Args) -> Gradient:
    n = next(n for n, arg in enumerate(args) if _floats(arg))
    return (*gradient[:n], None, *gradient[n + 1 :])


def _spread(gradient: Gradient, args: Args) -> Gradient:
    n = _first_container(args)
    return tuple(jax.tree.leaves(g)[0] if m == n else g for m, g in enumerate(gradient))


# --- Mistakes in the numbers ---


def _has_steps(a: Shaped) -> bool:
    return a.ndim > 0 and a.shape[0] > 1


def _is_square(a: Shaped) -> bool:
    return a.ndim > 1 and a.shape[-1] == a.shape[-2] > 1


def _is_real(a: Shaped) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def _in_first(a: jax.Array, value: ArrayLike) -> jax.Array:
    """Add `value` to the first element."""
    return a.reshape(-1).at[0].add(value).reshape(a.shape)


def _without_last_output(c: PyTree) -> PyTree:
    leaves, tree = jax.tree.flatten(c)
    last = _floats(leaves)[-1]
    return tree.unflatten([jnp.zeros_like(a) if n == last else a for n, a in enumerate(leaves)])


def _has_examples(a: Shaped) -> bool:
    """Return True if the second-to-last axis, taken as the axis of examples, has more than one entry."""
    return inexact(a) and a.ndim > 1 and a.shape[-2] > 1


def _one_example(c: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a.at[..., 1:, :].set(0) if _has_examples(a) else a, c)


def _crossed(c: PyTree) -> PyTree:
    """Multiply each cotangent by one plus the sum of all cotangents."""
    total = jnp.stack([jnp.sum(a).real for a in jax.tree.leaves(c) if inexact(a)]).sum()
    return _map(lambda a: a * (1 + total.astype(a.dtype)), c)


def _over_norm(c: PyTree) -> PyTree:
    """Return c / |c| times |c|, which equals c except at zero."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.abs(a) ** 2).astype(jnp.float32) for a in jax.tree.leaves(c) if inexact(a)))
    return _map(lambda a: a / norm.astype(a.dtype) * norm.astype(a.dtype), c)


# --- Mistakes that show only in some situations ---

_CALLS = itertools.count()
_LEAKED: list[jax.Array] = []


def _noisy(g: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    drawn = jax.pure_callback(lambda: np.float32(next(_CALLS) % 7), shape, vmap_method="sequential")
    return g * (1 + 1e-7 * drawn.astype(g.dtype))


def _stale(f: TreeFunction) -> TreeFunction:
    """Use the residuals of the most recent call of fwd."""
    last: list[Args] = []

    @jax.custom_vjp
    def clone(*args: PyTree) -> PyTree:
        return f(*args)

    def fwd(*args: PyTree) -> tuple[PyTree, None]:
        last[:] = [args]
        return f(*args), None

    clone.defvjp(fwd, lambda _, c: jax.vjp(f, *last[0])[1](c))
    return clone


def _bypass(f: TreeFunction) -> TreeFunction:
    """Take the value from the rule and the gradient from JAX without the rule."""
    ruled, plain = _rule(f, lambda pull, args, c: pull(c)), _surgery.plain(f)

    def clone(*args: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: b + lax.stop_gradient(a - b) if inexact(a) else a, ruled(*args), plain(*args))

    return clone


def _bypass_in_vmap(f: TreeFunction) -> TreeFunction:
    ruled, plain = _rule(f, lambda pull, args, c: pull(c)), _surgery.plain(f)

    def clone(*args: PyTree) -> PyTree:
        vmapped = any(type(a).__name__ == "BatchTracer" for a in jax.tree.leaves(args))
        return plain(*args) if vmapped else ruled(*args)

    return clone


def _leaking(g: jax.Array) -> jax.Array:
    _LEAKED[:] = [g]
    return g


def _mean_in_vmap(g: jax.Array) -> jax.Array:
    """Return g; under vmap, the mean over the mapped axis for every example."""

    @custom_vmap
    def identity(g: jax.Array) -> jax.Array:
        return g

    @identity.def_vmap
    def _(size: int, batched: list[bool], g: jax.Array) -> tuple[jax.Array, bool]:
        return jnp.broadcast_to(jnp.mean(g, 0), g.shape) if batched[0] else g, batched[0]

    return identity(g)


def _stopped(f: TreeFunction) -> TreeFunction:
    """Treat the residuals as constants in bwd."""
    return _rule(f, lambda pull, args, c: jax.vjp(f, *_map(lax.stop_gradient, args))[1](c))


def _decorated(f: TreeFunction) -> TreeFunction:
    """Call the decorated function in fwd: a custom_vjp has no forward mode, so forward over reverse raises."""

    @jax.custom_vjp
    def clone(*args: PyTree) -> PyTree:
        return f(*args)

    clone.defvjp(lambda *args: (clone(*args), args), lambda args, c: jax.vjp(f, *args)[1](c))
    return clone


def _symbolic(f: TreeFunction) -> TreeFunction:
    """Double the gradient if an argument is not differentiated."""

    @jax.custom_vjp
    def clone(*args: PyTree) -> PyTree:
        return f(*args)

    def fwd(*primals: PyTree) -> tuple[PyTree, tuple[Args, Leaf]]:
        args = jax.custom_derivatives.custom_vjp_primal_tree_values(primals)
        partly = not all(p.perturbed for p in jax.tree.leaves(primals) if inexact(p.value))
        return f(*args), (args, jnp.float32(1 + partly))

    def bwd(residuals: tuple[Args, Leaf], c: PyTree) -> Gradient:
        args, factor = residuals
        zero = lambda a: isinstance(a, jax.custom_derivatives.SymbolicZero)  # noqa: E731
        c = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) if zero(a) else a, c, is_leaf=zero)
        return _map(lambda g: g * factor.astype(g.dtype), jax.vjp(f, *args)[1](c))

    clone.defvjp(fwd, bwd, symbolic_zeros=True)
    return clone


def _for_one(gradient: Gradient, args: Args) -> Gradient:
    single = any(1 in np.shape(a) for a in jax.tree.leaves(args))
    return _map(lambda g: 2 * g, gradient) if single else gradient


def _for_none(gradient: Gradient, args: Args) -> Gradient:
    empty = any(0 in np.shape(a) for a in jax.tree.leaves(args))
    return _map(lambda g: g * jnp.nan, gradient) if empty else gradient


def _longest(args: Args) -> int:
    return max((n for a in jax.tree.leaves(args) for n in np.shape(a)), default=0)


def _for_even(gradient: Gradient, args: Args) -> Gradient:
    return _map(lambda g: 2 * g, gradient) if _longest(args) % 2 == 0 else gradient


def _repeats(a: jax.Array) -> jax.Array:
    """Return True if an integer occurs twice in the array."""
    ordered = jnp.sort(jnp.ravel(a))
    return jnp.any(ordered[1:] == ordered[:-1])


def _integers(args: Args) -> list[jax.Array]:
    return [a for a in map(jnp.asarray, jax.tree.leaves(args)) if jnp.issubdtype(a.dtype, jnp.integer) and a.size > 1]


def _for_repeated(gradient: Gradient, args: Args) -> Gradient:
    twice = jnp.any(jnp.stack([_repeats(a) for a in _integers(args)]))
    return _map(lambda g: jnp.where(twice, 2 * g, g), gradient)


def _has_no_repeats(args: Args, out: PyTree[Shaped]) -> bool:
    return bool(_integers(args)) and not any(map(_repeats, _integers(args)))


def _has_no_one(args: Args, out: PyTree[Shaped]) -> bool:
    return not any(1 in np.shape(a) for a in jax.tree.leaves(args))


def _is_low(a: Shaped) -> bool:
    return a.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)


MISTAKES: Sequence[Mistake] = (
    Mistake("none", "contract", "None for a floating-point argument", gradient(_none)),
    Mistake("short", "contract", "no cotangent for the last argument", gradient(lambda g, args: g[:-1])),
    Mistake(
        "spread",
        "contract",
        "one array for all leaves of an argument",
        gradient(_spread, lambda args, out: _first_container(args) is not None),
    ),
    Mistake("float32", "contract", "a cotangent in float32", leaf(lambda g: g.astype(jnp.float32))),
    Mistake("integer", "contract", "an integer cotangent", leaf(lambda g: (100 * g.real).astype(jnp.int32))),
    Mistake("axis", "contract", "a cotangent with an extra axis", leaf(lambda g: g[None])),
    Mistake("nan", "contract", "a NaN in a cotangent", leaf(lambda g: _in_first(g, jnp.nan))),
    Mistake(
        "primal",
        "primal",
        "a fwd that is off by 1e-7",
        How(lambda f: _rule(f, lambda pull, args, c: pull(c), lambda out: _map(lambda a: a * (1 + 1e-7), out))),
    ),
    Mistake("bypass", "engagement", "a gradient that does not use the rule", How(_bypass)),
    Mistake("bypass in vmap", "engagement", "a rule that vmap bypasses", How(_bypass_in_vmap)),
    Mistake("sign", "value", "a cotangent of the wrong sign", leaf(lambda g: -g)),
    Mistake("zero", "value", "a cotangent of zero", leaf(jnp.zeros_like)),
    Mistake("scale", "value", "a cotangent off by 1e-4", leaf(lambda g: g * (1 + 1e-4))),
    Mistake("transposed", "value", "a cotangent transposed", leaf(lambda g: g.swapaxes(-1, -2), _is_square)),
    Mistake("shifted", "value", "a cotangent delayed by one step", leaf(lambda g: jnp.roll(g, 1, 0), _has_steps)),
    Mistake("first step", "value", "the first step missing", leaf(lambda g: g.at[0].set(0), _has_steps)),
    Mistake("last step", "value", "the last step missing", leaf(lambda g: g.at[-1].set(0), _has_steps)),
    Mistake("mean", "value", "a mean instead of a sum", leaf(lambda g: g / g.shape[0], _has_steps)),
    Mistake(
        "rounded",
        "value",
        "a cotangent rounded to bfloat16",
        leaf(lambda g: g.astype(jnp.bfloat16).astype(g.dtype), _is_real),
    ),
    Mistake(
        "output",
        "value",
        "the cotangent of the last output ignored",
        cotangent(_without_last_output, lambda args, out: _several(out)),
    ),
    Mistake(
        "one example",
        "value",
        "a missing sum over examples",
        cotangent(_one_example, lambda args, out: any(map(_has_examples, jax.tree.leaves(out)))),
    ),
    Mistake(
        "one element", "elements", "an element off by 1e-7", leaf(lambda g: _in_first(g, 1e-7 * jnp.max(jnp.abs(g))))
    ),
    Mistake("g |g|", "linearity", "g |g| for a cotangent g", cotangent(lambda c: _map(lambda a: a * jnp.abs(a), c))),
    Mistake("product", "linearity", "a product of cotangents", cotangent(_crossed)),
    Mistake("constant", "linearity", "a constant added", leaf(lambda g: g + 1e-3)),
    Mistake("0 / 0", "linearity", "0 / 0 for a cotangent of zero", cotangent(_over_norm)),
    Mistake("clipped", "linearity", "a gradient clipped at 1000", leaf(lambda g: jnp.clip(g, -1000, 1000), _is_real)),
    Mistake(
        "flushed",
        "linearity",
        "cotangents below 1e-8 treated as zero",
        cotangent(lambda c: _map(lambda a: jnp.where(jnp.abs(a) < 1e-8, jnp.zeros_like(a), a), c)),
    ),
    Mistake("noise", "determinism", "noise of 1e-7", leaf(_noisy)),
    Mistake("stale", "determinism", "the residuals of the most recent call", How(_stale)),
    Mistake("jit", "jit", "a different gradient under jit", leaf(lambda g: g * (1 + 1e-6 * isinstance(g, Tracer)))),
    Mistake("leak", "jit", "a leaked tracer", leaf(_leaking)),
    Mistake(
        "dtypes promoted",
        "jit",
        "an implicit promotion of dtypes",
        leaf(lambda g: (g * jnp.ones((), jnp.bfloat16)).astype(g.dtype)),
    ),
    Mistake(
        "ranks promoted",
        "jit",
        "an implicit promotion of ranks",
        leaf(lambda g: g + jnp.zeros(g.shape[-1:], g.dtype), lambda a: a.ndim > 1),
    ),
    Mistake(
        "masked nan",
        "jit",
        "a NaN masked by where",
        leaf(lambda g: jnp.where(jnp.isfinite(g), g, jnp.sqrt(-1 - jnp.abs(g)).astype(g.dtype)), _is_real),
    ),
    Mistake("vmap", "vmap", "a mean over the axis that vmap adds", leaf(_mean_in_vmap)),
    Mistake("outside", "composition", "residuals stored outside the rule", How(_stale)),
    Mistake("stopped", "order 2", "residuals cut off by stop_gradient", How(_stopped)),
    Mistake("decorated", "order 2", "a fwd that calls the decorated function", How(_decorated)),
    Mistake(
        "alone",
        "alone",
        "twice the gradient if an argument is not differentiated",
        How(_symbolic, lambda args, out: sum(bool(_floats(arg)) for arg in args) > 1),
    ),
    Mistake("low", "dtypes", "1.5 times the gradient below float64", leaf(lambda g: g * (1.5 if _is_low(g) else 1))),
    Mistake(
        "widened",
        "dtypes",
        "a float32 cotangent for a lower dtype",
        leaf(lambda g: g.astype(jnp.float32) if _is_low(g) else g, _is_real),
    ),
    Mistake("axis of one", "sizes", "twice the gradient if an axis has one element", gradient(_for_one, _has_no_one)),
    Mistake(
        "even size",
        "sizes",
        "twice the gradient if the longest axis is even",
        gradient(_for_even, lambda args, out: _longest(args) % 2 == 1),
    ),
    Mistake(
        "repeated", "integers", "twice the gradient if an integer repeats", gradient(_for_repeated, _has_no_repeats)
    ),
    Mistake("empty axis", "sizes", "0 / 0 if an axis is empty", gradient(_for_none)),
)
