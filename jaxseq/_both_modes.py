r"""Forward mode for a function with a hand-derived pullback.

Let y = f(x) have the derivative t -> L t. A `jax.custom_vjp` gives JAX the pullback ȳ -> L^T ȳ, and JAX then refuses
forward mode. A `jax.custom_jvp` gives JAX the map t -> L t, and reverse mode is then what JAX makes of it: it evaluates
the rule with values that are known and tangents that are not, and transposes the operations that it has recorded.

Here f is a `jax.custom_jvp` whose rule is one operation, `tangent_call`, for values y and tangents y' = L t:

    both      (x, t) -> (y, L t)        one pass, by JAX's derivative of the plain function, or forward(x) and push
    split      x -> (y, r), L           forward(x) with its residuals r, as in the `jax.custom_vjp`, and a linear map

Forward mode runs `both`. Where the tangents are unknown, JAX's partial evaluation splits the operation into the values,
which are known, and the linear map, a second operation with two functions:

    apply      t -> L t                 push(x, r, t), or JAX's derivative of the plain function
    transpose  ȳ -> L^T ȳ               pull(r, ȳ), as in the `jax.custom_vjp`

JAX transposes it as a whole. So reverse mode runs the same forward and backward pass as the `jax.custom_vjp`, and
forward mode the same pass as the plain function.

Second derivatives are JAX's own, of the plain function: the residuals have no derivative. Where x is being
differentiated when f is called, as in `jax.hessian`, JAX differentiates the plain function both times. Inside `jax.jit`
or `lax.scan`, that is not known yet. There, the derivative of y is that of f, and the derivatives of L t and L^T ȳ are
those of the plain function (`with_derivative_of`), which runs once more.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from types import MethodType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jaxtyping import PyTree

from jaxseq import _checks
from jaxseq._derivative import call_with, with_derivative_of
from jaxseq._linear_call import Arrays, LinearFunction
from jaxseq._linear_transpose import Linearity, transposable
from jaxseq._tangent_call import tangent_call

Function = Callable[..., PyTree]


class Rule(NamedTuple):
    """A function of pytrees of arrays, and its derivative in both modes.

    `hand` is the `jax.custom_vjp`, and `forward` and `pull` are the two functions of its rule. `push` maps
    (x, residuals, tangents) to the tangent of the result, where tangents that are zero are None. For second
    derivatives, JAX differentiates `push` and `pull`. Without `push`, it differentiates `plain`, once or twice. With
    `linearity`, the function can be transposed. `check` is called with the arguments where the function is
    differentiated. `parts` are functions of a user that may close over traced arrays.
    """

    hand: Function
    forward: Function
    pull: Function
    plain: Function
    push: Function | None = None
    linearity: Linearity | None = None
    check: Function | None = None
    parts: tuple[Any, ...] = ()


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
    that with `jaxseq.testing.check_jvp`. Pass all traced arrays as positional arguments: if a function closes over
    one, there is no forward mode.

    Args:
        hand: a function of pytrees of arrays with a `jax.custom_vjp`.
        plain: the same function, which JAX can differentiate in forward mode.
        static_argnums: positions of arguments that are not arrays, such as a size or a function. Keyword arguments may
            be anything, but have no derivative in forward mode.

    Returns:
        A function with the arguments and results of `hand`. Integers and booleans among them have no derivative.

    Raises:
        TypeError: if `hand` or `plain` is not a function, or a position is not an integer. Where the returned function
            is differentiated, it raises this if `plain` takes other arguments than `hand`, or returns another
            structure, shape or dtype.
        ValueError: if a position is negative.

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
    numbers = static_argnums if isinstance(static_argnums, tuple | list) else (static_argnums,)
    static = tuple(_checks.integer("static_argnums", n, at_least=0) for n in numbers)

    @wraps(hand)
    def run(*args: PyTree, **options: Any) -> PyTree:
        fixed = {n: args[n] for n in static if n < len(args)}
        arrays = [a for n, a in enumerate(args) if n not in fixed]
        functions = (_with_fixed(partial(f, **options), fixed) for f in (hand, plain))
        return call_in_both_modes(rule_of(*functions), *arrays)

    return run


def _with_fixed(f: Function, fixed: dict[int, Any]) -> Function:
    """Return `f` with the arguments at some positions bound."""

    def call(*arrays: PyTree) -> PyTree:
        rest = iter(arrays)
        return f(*(fixed[n] if n in fixed else next(rest) for n in range(len(fixed) + len(arrays))))

    return call


def rule_of(hand: Function, plain: Function) -> Rule:
    """Return the rule of a `jax.custom_vjp`, whose two functions JAX calls."""
    structures = []

    def forward(*args: PyTree) -> tuple[PyTree, list[Any]]:
        result, pullback = jax.vjp(hand, *args)
        residuals, structure = jax.tree.flatten(pullback)
        structures.append(structure)
        return result, residuals

    def pull(residuals: list[Any], result_bar: PyTree) -> tuple[PyTree, ...]:
        return structures[-1].unflatten(residuals)(result_bar)

    return Rule(hand, forward, pull, plain, check=partial(_check_same, hand, plain), parts=(hand, plain))


def call_in_both_modes(rule: Rule, *args: PyTree) -> PyTree:
    """Return `rule.hand(*args)`, with the derivatives of the rule.

    If a part of it closes over a traced array, it stays a `jax.custom_vjp`, without forward mode: the operations are
    evaluated where the array may not exist, and their derivatives with respect to it would be zero.
    """
    if any(closes_over_traced(part, set()) for part in rule.parts):
        return rule.hand(*args)
    leaves, structure = jax.tree.flatten(args)
    leaves = [jnp.asarray(a) for a in leaves]

    @jax.custom_jvp
    def in_both_modes(*leaves: jax.Array) -> PyTree:
        if rule.linearity is not None:
            value = lambda *leaves: rule.hand(*structure.unflatten(leaves))  # noqa: E731
            return transposable(rule.linearity, value, in_both_modes, leaves)
        # Partial evaluation inlines a `jax.custom_jvp` without its rule, for example where `lax.scan` hoists
        # loop-invariant work. From then on JAX differentiates this body, which has the same derivative.
        result = rule.hand(*structure.unflatten(lax.stop_gradient(leaves)))
        return with_derivative_of(in_both_modes, result, *leaves)

    @partial(in_both_modes.defjvp, symbolic_zeros=True)
    def jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
        moving = tuple(n for n, t in enumerate(tangents) if not isinstance(t, SymbolicZero))
        if rule.check is not None:
            rule.check(*structure.unflatten(lax.stop_gradient(primals)))
        op = _Operation(rule, in_both_modes, structure, moving)
        v = [tangents[n] for n in moving]
        if rule.push is None and any(map(_is_differentiated, primals)):
            values, directions = op.both(primals, v)
        else:
            values, directions = tangent_call(op, primals, v, op.types_of_values(primals))
        all_directions: list[Any] = [SymbolicZero(jax.typeof(a).to_tangent_aval()) for a in values]
        for n, a in zip(op.floats, directions, strict=True):
            all_directions[n] = a
        return op.result(values), op.result(all_directions)

    return in_both_modes(*leaves)


class _Operation:
    """A rule on the leaves of its arguments, of which some move, and on those of its result."""

    def __init__(self, rule: Rule, f: Function, structure: Any, moving: tuple[int, ...]):
        self.rule, self.f, self.structure, self.moving = rule, f, structure, moving
        settings: Any = jax.config
        # JAX compiles `both` and `apply` after the program has left these.
        self.settings = settings.jax_enable_x64, settings.jax_default_matmul_precision

    def types_of_values(self, xs: Arrays) -> Callable[[], list[Any]]:
        """Return a function that returns the types of the values, by tracing them."""
        hand = lambda *xs: self._leaves(self.rule.hand(*self.structure.unflatten(xs)))  # noqa: E731
        return lambda: jax.make_jaxpr(hand)(*lax.stop_gradient(xs)).out_avals

    def _leaves(self, result: PyTree) -> list[jax.Array]:
        """Return the leaves of a result, and note its structure and the leaves that have a derivative."""
        leaves, self.result_structure = jax.tree.flatten(result)
        self.zeros: list[Any] = [None if is_float(a) else np.zeros(a.shape, jax.dtypes.float0) for a in leaves]
        return leaves

    def result(self, leaves: list[Any]) -> PyTree:
        return self.result_structure.unflatten(leaves)

    @property
    def floats(self) -> list[int]:
        """The positions of the leaves of the result that have a derivative."""
        return [n for n, zero in enumerate(self.zeros) if zero is None]

    @contextmanager
    def _with_settings(self) -> Iterator[None]:
        x64, precision = self.settings
        with jax.enable_x64(x64), jax.default_matmul_precision(precision):
            yield

    # --- Forward mode ---

    def both(self, xs: Arrays, v: Arrays) -> tuple[list[jax.Array], list[jax.Array]]:
        with self._with_settings():
            if not v:
                return self._leaves(self.f(*xs)), []
            if self.rule.push is not None:
                result, residuals = self.rule.forward(*self.structure.unflatten(xs))
                return self._leaves(result), self._push(xs, residuals, v)
            f, moved = self._of_moving(xs)
            values, directions = jax.jvp(f, moved, list(map(jnp.asarray, v)))
            return values, [directions[n] for n in self.floats]

    def _push(self, xs: Arrays, residuals: PyTree, v: Arrays) -> list[jax.Array]:
        assert self.rule.push is not None
        directions: list[Any] = [None] * len(xs)
        for n, a in zip(self.moving, v, strict=True):
            directions[n] = a
        return self._floats(
            self.rule.push(self.structure.unflatten(xs), residuals, self.structure.unflatten(directions))
        )

    # --- Reverse mode ---

    def split(self, xs: Arrays) -> tuple[list[jax.Array], list[jax.Array], LinearFunction]:
        known = lax.stop_gradient(tuple(xs))
        result, residuals = self.rule.forward(*self.structure.unflatten(known))
        values = self._leaves(with_derivative_of(self.f, result, *xs))
        constants, read = _without_repeats(xs, known, residuals)
        count = len(xs)

        def apply(constants: Arrays, v: Arrays) -> list[jax.Array]:
            with self._with_settings():
                return self._push(constants[:count], read(constants), v)

        def transpose(constants: Arrays, y_bar: Arrays) -> list[jax.Array]:
            bars = list(self.zeros)
            for n, a in zip(self.floats, y_bar, strict=True):
                bars[n] = a
            args_bar = self.rule.pull(read(constants), self.result(bars))
            found = _leaves_of_cotangents(args_bar, self.structure.unflatten(constants[:count]))
            return [jnp.zeros_like(constants[n]) if found[n] is None else found[n] for n in self.moving]

        def plain(constants: Arrays, v: Arrays) -> list[jax.Array]:
            return self.both(constants[:count], v)[1]

        def plain_transpose(constants: Arrays, y_bar: Arrays) -> list[jax.Array]:
            f, moved = self._of_moving(constants[:count])
            g = lambda *moved: self._only_floats(f(*moved))  # noqa: E731
            return list(jax.vjp(g, *moved)[1](list(y_bar)))

        if self.rule.push is not None:
            return values, constants, LinearFunction(apply, transpose)
        return values, constants, LinearFunction(plain, transpose, plain, plain_transpose)

    def _of_moving(self, xs: Arrays) -> tuple[Callable[..., list[jax.Array]], list[Any]]:
        """Return the plain function of the leaves that move, and these leaves."""
        plain = lambda *xs: self._leaves(self.rule.plain(*self.structure.unflatten(xs)))  # noqa: E731
        return partial(call_with, plain, self.moving, xs), [xs[n] for n in self.moving]

    def _floats(self, result: PyTree) -> list[jax.Array]:
        return self._only_floats(jax.tree.leaves(result))

    def _only_floats(self, leaves: list[Any]) -> list[Any]:
        return [leaves[n] for n in self.floats]


def _without_repeats(xs: Arrays, known: Arrays, residuals: PyTree) -> tuple[list[Any], Callable[[Arrays], PyTree]]:
    """Return `xs` and those residuals that are not among them, and a function that reads the residuals."""
    arrays, structure = jax.tree.flatten(residuals)
    places = {id(a): n for n, a in enumerate(known)}
    constants, at = list(xs), []
    for a in arrays:
        if id(a) not in places:
            places[id(a)] = len(constants)
            constants.append(lax.stop_gradient(a))
        at.append(places[id(a)])
    return constants, lambda constants: structure.unflatten([constants[n] for n in at])


def _leaves_of_cotangents(args_bar: PyTree, args: PyTree) -> list[Any]:
    """Return the cotangent of each leaf of `args`, or None where the cotangents have None in place of a subtree."""
    is_none = lambda a: a is None  # noqa: E731
    found: list[Any] = []

    def collect(bar: Any, arg: PyTree) -> None:
        found.extend([None] * len(jax.tree.leaves(arg)) if bar is None else [bar])

    jax.tree.map(collect, args_bar, args, is_leaf=is_none)
    return found


def closes_over_traced(f: Any, seen: set[int]) -> bool:
    """Return whether a function, or one that it is made of, closes over a traced array."""
    if id(f) in seen:
        return False
    seen.add(id(f))
    if isinstance(f, jax.custom_vjp):
        parts: list[Any] = [f.fun, f.fwd, f.bwd]
    elif isinstance(f, partial):
        parts = [f.func, f.args, f.keywords]
    elif isinstance(f, MethodType):
        parts = [f.__func__, getattr(f.__self__, "__dict__", None)]
    else:
        parts = [getattr(f, name, None) for name in ("__wrapped__", "__defaults__", "__kwdefaults__")]
        for cell in getattr(f, "__closure__", None) or ():
            with suppress(ValueError):  # a name that has no value yet
                parts.append(cell.cell_contents)
    leaves = jax.tree.leaves(parts)
    return any(isinstance(a, Tracer) or (callable(a) and closes_over_traced(a, seen)) for a in leaves)


def _is_differentiated(a: Any) -> bool:
    """Return whether `a` belongs to an outer differentiation, which holds its value as another kind of array."""
    return isinstance(a, Tracer) and type(lax.stop_gradient(a)) is not type(a)


def is_float(a: Any) -> bool:
    """Return whether `a` has a derivative."""
    return jnp.issubdtype(jnp.result_type(a), jnp.inexact)


def _check_same(hand: Function, plain: Function, *args: PyTree) -> None:
    """Check that `plain` takes the same arguments, and returns the same structure, shapes and dtypes."""
    expected = jax.eval_shape(hand, *args)
    try:
        found = jax.eval_shape(plain, *args)
    except TypeError as error:
        raise TypeError(f"`plain`: expected a function of the arguments of `hand`, got an error: {error}") from error
    described = [
        jax.tree.map(lambda a: f"{jnp.result_type(a)}{list(jnp.shape(a))}", tree) for tree in (expected, found)
    ]
    if described[0] != described[1]:
        _checks.bad_type("plain", f"the result of `hand`, {described[0]}", f"{described[1]}")
