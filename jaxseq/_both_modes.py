r"""Forward mode for a function with a `jax.custom_vjp`, which JAX otherwise refuses.

Let f be a function whose pullback ȳ -> L^T ȳ is hand-derived, by `jax.custom_vjp`, and whose value JAX can also compute
by a plain function, with the derivative t -> L t. The two linear maps are transposes of each other, but JAX knows only
one of them for each function: a rule for reverse mode, or a map that it transposes itself, without the hand-derived
pullback.

`jax.lax.custom_linear_solve` is the one public function of JAX that takes a linear map and its transpose separately.
For the matrix

    A = [ I  0 ]         A^-1 = [ I  0 ]         A^-T = [ I  L^T ]
        [-L  I ]                [ L  I ]                [ 0   I  ]

the solution of A (u, y) = (t, 0) is (t, L t), and that of A^T (u, y) = (0, ȳ) is (L^T ȳ, ȳ). So

    matvec            (u, y) -> (u, y - L u)           by the derivative of the plain function
    solve             (u, y) -> (u, y + L u)           the same
    transpose_solve   (u, y) -> (u + L^T y, y)         by the hand-derived pullback

and f is a `jax.custom_jvp` whose tangent is the second part of the solution. `vmap`, `jit`, `scan` and `remat` go
through `custom_linear_solve`, and so do further derivatives, for which JAX differentiates `matvec`.

Reverse mode is linearization followed by transposition, with values that are known and tangents that are not. All
tangents have to be unknown together: if some were known, partial evaluation would split the solve and run the plain
function. `_tied` makes each leaf depend on all others. L in `matvec` is only evaluated to be differentiated, and
`jax.checkpoint` keeps its residuals from being stored.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxseq import _checks, _sizes


def both_modes(
    hand: Callable[..., PyTree], plain: Callable[..., PyTree], *, static_argnums: int | Sequence[int] = ()
) -> Callable[..., PyTree]:
    r"""Return a function with the gradient of `hand` in reverse mode, and the derivative of `plain` in forward mode.

    $$f(x) = \mathrm{hand}(x), \qquad \mathrm{vjp}: \bar y \mapsto L^\top \bar y \ \text{(of hand)}, \qquad
    \mathrm{jvp}: t \mapsto L t \ \text{(of plain)}$$

    JAX raises an error for forward mode through a `jax.custom_vjp`. With this function, `jax.jvp`, `jax.linearize`,
    `jax.jacfwd` and `jax.hessian` work, and the gradient is still that of the hand-derived rule, with its residuals.
    Second derivatives are those of `plain`.

    Both functions have to compute the same values, and the pullback has to be the transpose of the derivative: check
    that with `jaxseq.testing.check_jvp`.

    Args:
        hand: a function of pytrees of arrays with a `jax.custom_vjp`.
        plain: the same function, which JAX can differentiate in forward mode.
        static_argnums: positions of arguments that are not arrays, such as a size or a function. Keyword arguments are
            static.

    Returns:
        A function with the arguments and results of `hand`. Integers and booleans among them have no derivative.

    Raises:
        TypeError: if `hand` or `plain` is not a function, or a position is not an integer. The returned function raises
            it if `plain` returns another structure, shape or dtype than `hand`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> @jax.custom_vjp
        ... def hand(x):
        ...     return jnp.sin(x)
        >>> hand.defvjp(lambda x: (hand(x), x), lambda x, y_bar: (y_bar * jnp.cos(x),))
        >>> sin = jaxseq.both_modes(hand, jnp.sin)
        >>> x = jnp.zeros(())
        >>> jax.jacfwd(sin)(x), jax.grad(sin)(x)
        (Array(1., dtype=float32), Array(1., dtype=float32))

    Reference:
        A. Griewank and A. Walther, Evaluating derivatives (2008), chapter 3: both modes of one linear map.
    """
    for name, f in (("hand", hand), ("plain", plain)):
        if not callable(f):
            _checks.bad_type(name, "a function", _checks.describe(f))
    numbers = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    static = tuple(_checks.integer("static_argnums", n, at_least=0) for n in numbers)

    @wraps(hand)
    def run(*args: PyTree, **options: Any) -> PyTree:
        fixed = {n: args[n] for n in static if n < len(args)}
        arrays = [a for n, a in enumerate(args) if n not in fixed]
        functions = (_with_fixed(partial(f, **options), fixed) for f in (hand, plain))
        return _both_modes(*functions)(*arrays)

    return run


def _with_fixed(f: Callable[..., PyTree], fixed: dict[int, Any]) -> Callable[..., PyTree]:
    """Return `f` with the arguments at some positions bound."""

    def call(*arrays: PyTree) -> PyTree:
        rest = iter(arrays)
        return f(*(fixed[n] if n in fixed else next(rest) for n in range(len(fixed) + len(arrays))))

    return call


def _both_modes(hand: Callable[..., PyTree], plain: Callable[..., PyTree]) -> Callable[..., PyTree]:
    f = jax.custom_jvp(hand)

    @f.defjvp
    def jvp(primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> tuple[PyTree, PyTree]:
        leaves, structure = jax.tree.flatten(primals)
        which = [_varies(a) for a in leaves]
        floats = [a for a, yes in zip(leaves, which, strict=True) if yes]
        t = [a for a, yes in zip(jax.tree.leaves(tangents), which, strict=True) if yes]

        def of_floats(f: Callable[..., PyTree], *floats: Array) -> tuple[list[Array], PyTree]:
            """Return the float leaves of the result, and the whole result."""
            rest = iter(floats)
            args = structure.unflatten(next(rest) if yes else a for a, yes in zip(leaves, which, strict=True))
            result = f(*args)
            return [a for a in jax.tree.leaves(result) if _varies(a)], result

        result, pull = _value_and_pullback(partial(of_floats, hand), partial(of_floats, plain), floats)
        _check_same(result, jax.eval_shape(lambda: of_floats(plain, *floats)[1]))
        y = [a for a in jax.tree.leaves(result) if _varies(a)]

        def L(u: list[Array]) -> list[Array]:
            return jax.jvp(lambda *floats: of_floats(plain, *floats)[0], tuple(floats), tuple(u))[1]

        def matvec(x: PyTree) -> PyTree:
            u, y = _tied(x)
            return _tied((u, jax.tree.map(jnp.subtract, y, jax.checkpoint(L)(u))))

        def solve(_: Any, b: PyTree) -> PyTree:
            u, y = b
            return u, jax.tree.map(jnp.add, y, L(u))

        def transpose_solve(_: Any, b: PyTree) -> PyTree:
            u, y = b
            return jax.tree.map(jnp.add, u, list(pull(y))), y

        t = [jnp.asarray(a) for a in t]
        # A zero that is unknown where t is, broadcast so that no array of zeros is stored.
        t, zero = _tied((t, jnp.zeros(())))
        zeros = [jnp.broadcast_to(zero.astype(a.dtype), a.shape) for a in y]
        found = iter(lax.custom_linear_solve(matvec, (t, zeros), solve, transpose_solve)[1])
        return result, jax.tree.map(lambda a: next(found) if _varies(a) else _no_tangent(a), result)

    return f


def _value_and_pullback(
    hand: Callable[..., tuple[list[Array], PyTree]],
    plain: Callable[..., tuple[list[Array], PyTree]],
    floats: list[Array],
) -> tuple[PyTree, Callable[[list[Array]], tuple[Array, ...]]]:
    """Return the result of `hand`, and its pullback.

    A forward rule may call its own `jax.custom_vjp`, which has no forward mode. So the derivative of both, which second
    derivatives take, is that of the plain function. Nothing reads that of the residuals: `custom_linear_solve` only
    differentiates its `matvec`.
    """
    structures = []

    @jax.custom_jvp
    def run(*floats: Array) -> tuple[PyTree, list[Array]]:
        _, pull, result = jax.vjp(hand, *floats, has_aux=True)
        residuals, structure = jax.tree.flatten(pull)
        structures.append(structure)
        return result, residuals

    @run.defjvp
    def jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[PyTree, PyTree]:
        result, residuals = run(*primals)
        tangent = jax.jvp(lambda *floats: plain(*floats)[1], primals, tangents)[1]
        nothing = [jnp.zeros_like(a) if _varies(a) else _no_tangent(a) for a in residuals]
        return (result, residuals), (tangent, nothing)

    result, residuals = run(*floats)
    return result, structures[-1].unflatten(residuals)


def _no_tangent(a: Any) -> Any:
    dtype = jnp.result_type(a)
    return np.zeros(jnp.shape(a), dtype if jnp.issubdtype(dtype, jnp.inexact) else jax.dtypes.float0)


def _varies(a: Any) -> bool:
    """Return whether `a` has a tangent that is not always the same: a float array that is not empty.

    JAX evaluates most operations on empty arrays to constants, which would be known where the tangents are not.
    """
    empty = _sizes.is_concrete(*jnp.shape(a)) and 0 in jnp.shape(a)
    return not empty and jnp.issubdtype(jnp.result_type(a), jnp.inexact)


def _tied(tree: PyTree) -> PyTree:
    """Return the tree. A tangent or cotangent of one leaf is then known only if those of all leaves are.

    XLA removes the selection.
    """
    leaves, structure = jax.tree.flatten(tree)
    first = sum(jnp.real(jnp.ravel(a)[0]).astype(jnp.float32) for a in leaves)
    return structure.unflatten(jnp.where(True, a, jnp.asarray(first, a.dtype)) for a in leaves)


def _check_same(hand: PyTree, plain: PyTree) -> None:
    """Check that both functions return the same structure, shapes and dtypes."""
    described = [jax.tree.map(lambda a: f"{jnp.result_type(a)}{list(jnp.shape(a))}", tree) for tree in (hand, plain)]
    if described[0] != described[1]:
        _checks.bad_type("plain", f"the result of `hand`, {described[0]}", f"{described[1]}")
