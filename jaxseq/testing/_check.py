"""`check_vjp` and `check_jvp`: validate the arguments, then run the checks, cheap ones first."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxseq import _checks
from jaxseq.testing import _domain, _order2, _point, _rule, _transforms, _value
from jaxseq.testing._point import Args, Leaf, TreeFunction
from jaxseq.testing._report import Failure, Report, Result, Verdict, explain
from jaxseq.testing._subject import Subject
from jaxseq.testing._trial import Trial

Check = Callable[[Trial], Iterator[Result]]

QUICK: Mapping[str, Check] = {
    "contract": _rule.contract,
    "primal": _value.primal,
    "engagement": _rule.engagement,
    "value": _value.value,
    "elements": _value.elements,
    "linearity": _value.linearity,
    "determinism": _value.determinism,
    "power": _value.power,
    "transpose": _value.transpose,
}
FULL: Mapping[str, Check] = {
    **QUICK,
    "jit": _transforms.jit,
    "vmap": _transforms.vmap,
    "composition": _transforms.composition,
    "order 2": _order2.order_2,
    "alone": _transforms.alone,
    "dtypes": _domain.dtypes,
    "integers": _domain.integers,
    "sizes": _domain.sizes,
}


def check_vjp(
    f: Callable[..., PyTree],
    args: Sequence[PyTree],
    *,
    reference: Callable[..., PyTree] | None = None,
    argnums: int | Sequence[int] | None = None,
    order: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    level: str = "full",
) -> Report:
    r"""Check the reverse-mode derivative of a function: values, contract, transformations, second order.

    For cotangents $c$ of the output and directions $u$ of an argument,

    $$\langle \mathrm{vjp}(c), u \rangle = \langle c, D_u f \rangle$$

    where $D_u f$ is computed by finite differences with an error estimate, and every element of $\mathrm{vjp}(c)$
    equals the derivative that JAX computes of `reference`. Without a reference, JAX differentiates f with its custom
    rules removed. These comparisons run in float64. The rule also runs under every transformation, in other dtypes and
    at other sizes. If f has a forward mode too, $\langle c, \mathrm{jvp}(u) \rangle = \langle \mathrm{vjp}(c), u
    \rangle$ holds as well. `jaxseq.testing.CHECKS` describes each check.

    In a test, write `check_vjp(f, args).raise_if_failed()`.

    Args:
        f: any differentiable function of arrays and trees of arrays: a `jax.custom_vjp`, a function of
            `jaxseq.both_modes`, or a function that calls one, jitted or not. Bind options with `functools.partial`.
        args: a tuple of positional arguments. It may contain integers and booleans. Random values work best, with
            nonzero biases and states and sizes that are all different.
        reference: a function with the same arguments and outputs, which JAX differentiates. Its derivative is assumed
            to be correct.
        argnums: one position or several positions of the arguments to differentiate with respect to; None for all
            arguments with floating-point leaves. A rule may return None for the other arguments.
        order: 1, or 2 to also check the second derivative.
        seed: the seed of the random cotangents and directions.
        tolerance: a difference, relative to the largest element of a leaf, that every check accepts. None selects the
            built-in tolerances: 1e-10 against a reference, 1e-7 against finite differences, 64 eps for the output of
            fwd.
        level: `"quick"` (one point, no transformations) or `"full"`.

    Returns:
        A `Report`, to print or to call `raise_if_failed` on. Each check passes, fails, is skipped, or is INCONCLUSIVE:
        it found no error, but it would not have detected a wrong gradient at this point either.

    Raises:
        TypeError: `f` is not a function, `args` is not a tuple of arrays, neither `args` nor the output has a
            floating-point leaf, or an option has the wrong type.
        ValueError: `argnums` is out of range, `args` is not finite, `f` or `reference` does not run at `args`, the
            outputs of `reference` differ from those of `f` in structure, shape or dtype, or an option is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxseq.testing import check_vjp
        >>> @jax.custom_vjp
        ... def square(x):
        ...     return x * x
        >>> square.defvjp(lambda x: (x * x, x), lambda x, c: (x * c,))  # correct: 2 x c
        >>> report = check_vjp(square, (jnp.array([1.0, 2.0, 3.0]),), level="quick")
        >>> report.verdict.name, report.failures[0].diagnosis
        ('FAIL', 'it is the correct one times 0.5')

    Reference:
        C. J. F. Ridders, Accurate computation of F'(x) and F'(x) F''(x) (1982), for the finite differences.
    """
    session = Session(f, args, reference=reference, argnums=argnums)
    return session.report(args, order=order, seed=seed, tolerance=tolerance, level=level)


def check_jvp(
    f: Callable[..., PyTree],
    args: Sequence[PyTree],
    *,
    reference: Callable[..., PyTree] | None = None,
    argnums: int | Sequence[int] | None = None,
    order: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    level: str = "full",
) -> Report:
    r"""Check the forward-mode derivative of a function; the counterpart of `check_vjp`.

    $\mathrm{jvp}(u) = D_u f$ for tangents $u$ of the arguments, and if f also has a reverse mode,
    $\langle c, \mathrm{jvp}(u) \rangle = \langle \mathrm{vjp}(c), u \rangle$. The leaves in the report are those of the
    output.

    Args:
        f: any function with a forward mode: a `jax.custom_jvp`, or plain JAX.
        args: a tuple of positional arguments.
        reference: a function with the same arguments and outputs, which JAX differentiates. Its derivative is assumed
            to be correct.
        argnums: the positions of the arguments that get tangents; None for all arguments with floating-point leaves.
        order: 1, or 2 to also check the second derivative.
        seed: the seed of the random tangents and projections.
        tolerance: a difference, relative to the largest element of a leaf, that every check accepts, or None.
        level: `"quick"` or `"full"`.

    Returns:
        A `Report`.

    Raises:
        TypeError: as in `check_vjp`.
        ValueError: as in `check_vjp`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq.testing import check_jvp
        >>> check_jvp(jnp.sin, (jnp.array([1.0, 2.0, 3.0]),), level="quick").verdict.name
        'PASS'

    Reference:
        C. J. F. Ridders, Accurate computation of F'(x) and F'(x) F''(x) (1982), for the finite differences.
    """
    session = Session(f, args, reference=reference, argnums=argnums, mode="jvp")
    return session.report(args, order=order, seed=seed, tolerance=tolerance, level=level)


class Session:
    """Checks of one function at any number of points. Programs are compiled once and reused at every point.

    Attributes:
        subject: the function on flat leaves, and its compiled programs.
        more: checks in addition to those of `check_vjp`. They run at every level.
    """

    def __init__(
        self,
        f: TreeFunction,
        args: Sequence[PyTree],
        *,
        reference: TreeFunction | None = None,
        argnums: int | Sequence[int] | None = None,
        mode: str = "vjp",
        judge: Callable[[Args], TreeFunction] | None = None,
        more: Mapping[str, Check] = MappingProxyType({}),
    ):
        for name, function in (("f", f), ("reference", reference)):
            if not callable(function) and not (name == "reference" and function is None):
                _checks.bad_type(name, "a function", _checks.describe(function))
        args = _point.as_arrays(args)
        positions = _positions(argnums, args)
        self.argnums = positions
        self.notes: list[str] = []
        self.dtype = np.dtype(np.float64)
        shapes, error = self._outputs(f, self._point(args))
        if error is not None:
            self.dtype = np.dtype(np.float32)
            shapes, again = self._outputs(f, self._point(args))
            if again is not None:
                _checks.bad_value("f", "a function that runs at `args` and that jax.jit can trace", explain(again))
            self.notes.append(f"f does not run in float64, so it is checked in float32: {explain(error)}")
        if not any(_point.inexact(leaf) for leaf in jax.tree.leaves(shapes)):
            got = ", ".join(_checks.describe(leaf) for leaf in jax.tree.leaves(shapes)) or "no array"
            _checks.bad_type("f", "at least one floating-point output to differentiate", got)
        if reference is not None:
            others, error = self._outputs(reference, self._point(args))
            if error is not None:
                _checks.bad_value("reference", "a function that runs at `args`, as `f` does", explain(error))
            if _described(others) != _described(shapes):
                expected = f"outputs that match those of `f`, {_described(shapes)}"
                _checks.bad_value("reference", expected, _described(others))
        self.subject = Subject(
            f, self._point(args), positions, reference=reference, judge=judge, mode=mode, dtype=self.dtype
        )
        self.more = more

    def report(
        self,
        args: Sequence[PyTree],
        *,
        order: int = 2,
        seed: int = 0,
        tolerance: float | None = None,
        level: str = "full",
        only: Collection[str] | None = None,
    ) -> Report:
        """Check the function at one point, with arguments of the same structure as those passed to the constructor.

        If `only` is passed, only the checks that it names run.
        """
        if _checks.integer("order", order, at_least=1) > 2:
            _checks.bad_value("order", "1 or 2", str(order))
        seed = _checks.integer("seed", seed, at_least=0)
        if tolerance is not None and not (isinstance(tolerance, int | float) and 0 < tolerance < 1):
            _checks.bad_value("tolerance", "None, or a number between 0 and 1", _checks.describe(tolerance))
        checks = {**(QUICK if _checks.choice("level", level, ("quick", "full")) == "quick" else FULL), **self.more}
        checks = {name: check for name, check in checks.items() if only is None or name in only}
        if order == 1:
            checks.pop("order 2", None)
        if self.subject.mode == "jvp":
            checks.pop("engagement", None)
        args = _point.as_arrays(args)
        start, results = time.perf_counter(), []
        with self.subject.context():
            trial = self._trial(args, seed, tolerance)
            for name, check in checks.items():
                try:
                    results += check(trial)
                except Exception as error:
                    results.append(
                        Result(name, None, Verdict.FAIL, failure=Failure(name, f"it raises {explain(error)}"))
                    )
                if name == "contract" and any(r.leaf is None and r.verdict is Verdict.FAIL for r in results):
                    trial.notes.append("the rule breaks its contract, so no other check ran")
                    break
        where = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "dtype": self.dtype.name,
            "seed": seed,
            "level": level,
            "seconds": round(time.perf_counter() - start, 1),
        }
        names = _point.leaf_names(self.subject.f, args)
        action = (
            "replaced by random numbers"
            if trial.filled
            else "not replaced, because f is not finite with random numbers"
        )
        zero = [
            f"{names[n]} contains {'a zero' if count == 1 else f'{count} zeros'}, where a wrong gradient may equal the "
            f"correct one and f may have a kink: {action}"
            for n, count in _point.zeros_in(args, self.argnums).items()
        ]
        notes = [*self.notes, *zero, *trial.notes]
        return Report(_point.title(self.subject.f), self.subject.results.names, results, notes, where)

    def _trial(self, args: Args, seed: int, tolerance: float | None) -> Trial:
        """Return the trial with zeros replaced by random numbers, or with the zeros if f is finite only there."""
        trial = Trial(self.subject, self._point(args, seed), seed, tolerance)
        trial.filled = self.argnums
        if _point.zeros_in(args, self.argnums):
            asked = Trial(self.subject, self._cast(args, args), seed, tolerance)
            if asked.finite and not trial.finite:
                return asked
            trial.asked = asked.x
        return trial

    def _point(self, args: Args, seed: int = 0) -> Args:
        """Return the arguments at which the checks run."""
        with jax.enable_x64(True):
            return self._cast(_point.lifted(args, seed=seed, argnums=self.argnums), args)

    def _cast(self, args: Args, given: Args) -> Args:
        """Cast floating-point leaves to float64, or to at most float32 (complex64) if f does not run in float64."""
        narrow = {np.dtype(np.float64): np.float32, np.dtype(np.complex128): np.complex64}

        def cast(leaf: Leaf, given: Leaf) -> Leaf:
            if not _point.inexact(leaf):
                return leaf
            low = narrow.get(np.dtype(given.dtype), given.dtype)
            return jnp.asarray(leaf, _point.wide_dtype(leaf) if self.dtype == np.float64 else low)

        return jax.tree.map(cast, args, given)

    def _outputs(self, f: TreeFunction, args: Args) -> tuple[PyTree[jax.ShapeDtypeStruct], Exception | None]:
        """Return the shapes of the outputs and None, or None and the error that f raises.

        Raise a TypeError if an output is not an array.
        """
        not_arrays: list[str] = []

        def checked(*args: PyTree) -> PyTree:
            out = f(*args)
            for path, leaf in jax.tree.leaves_with_path(out):
                if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
                    not_arrays.append(f"{_checks.describe(leaf)} at output{jax.tree_util.keystr(path)}")
            return out

        try:
            with jax.enable_x64(self.dtype == np.float64):
                return jax.eval_shape(checked, *args), None
        except Exception as error:
            if not_arrays:
                _checks.bad_type("f", "an output of arrays or trees of arrays", not_arrays[0])
            return None, error


def _positions(argnums: int | Sequence[int] | None, args: Args) -> tuple[int, ...]:
    """Return the positions of the arguments to differentiate with respect to, sorted."""
    floating = [any(map(_point.inexact, jax.tree.leaves(arg))) for arg in args]
    if argnums is None:
        positions = [n for n, has in enumerate(floating) if has]
        if not positions:
            _checks.bad_type("args", "at least one floating-point array to differentiate with respect to", "none")
        return tuple(positions)
    positions = [_checks.integer("argnums", n) for n in (argnums if isinstance(argnums, tuple | list) else (argnums,))]
    if not positions:
        _checks.bad_value("argnums", "at least one position", str(argnums))
    for n in positions:
        if not -len(args) <= n < len(args):
            _checks.bad_value("argnums", f"positions of the {len(args)} arguments", str(n))
        if not floating[n]:
            _checks.bad_type("argnums", "positions of arguments with floating-point leaves", f"{n}, which has none")
    return tuple(sorted({n % len(args) for n in positions}))


def _described(shapes: PyTree[jax.ShapeDtypeStruct]) -> str:
    """Format a tree of dtypes and shapes on one line."""
    return str(jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", shapes)).replace("'", "")
