"""check_vjp and check_jvp: the arguments are looked at, then the checks run, cheap ones first."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq import _checks
from jaxseq.testing import _domain, _order2, _point, _rule, _transforms, _value
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
    "power": _value.power,  # it costs nothing
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
    f: Callable[..., Any],
    args: Sequence[Any],
    *,
    reference: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] | None = None,
    order: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    level: str = "full",
) -> Report:
    r"""Whether the reverse-mode derivative of a function is right: values, contract, transformations, second order.

    For cotangents $c$ of the output and directions $u$ of an argument,

    $$\langle \mathrm{vjp}(c), u \rangle = \langle c, D_u f \rangle$$

    where $D_u f$ is found by differences whose error is known, and every element of $\mathrm{vjp}(c)$ equals the
    derivative that JAX takes of `reference`. Without a reference, it takes that of what f computes, the custom rules
    in f set aside. All of that runs in float64; besides, the rule runs under every transformation, in other dtypes and
    at other sizes. What each check asks is in `jaxseq.testing.CHECKS`.

    In a test of your own: `check_vjp(f, args).raise_if_failed()`.

    Args:
        f: any differentiable function of arrays and trees of arrays: a `jax.custom_vjp`, a function that calls some,
            jitted or not. Bind options with `functools.partial`.
        args: a tuple of its positional arguments; integers and booleans may be among them. Better random, with biases
            and states that are not zero, and sizes that are all different.
        reference: a function with the same arguments and outputs, which JAX differentiates. It is believed.
        argnums: the arguments to differentiate in, one or several; None for all that hold floating numbers. For those
            left out, a rule may return None.
        order: 1, or 2 to check the derivative of the derivative too.
        seed: of cotangents and directions.
        tolerance: a difference that passes everywhere, relative to a leaf's largest element; None for the built-in
            ones: 1e-10 against a reference, 1e-7 against differences, 64 eps for the output of fwd.
        level: `"quick"` (one point, no transformations) or `"full"`.

    Returns:
        a `Report`, to print or to call `raise_if_failed` on. Each check passes, fails, is skipped, or is INCONCLUSIVE:
        nothing wrong was seen at this point, where a wrong gradient would have looked the same.

    Raises:
        TypeError: f is no function, `args` is no tuple of arrays, nothing in it or in the output is floating, an
            option is of the wrong kind.
        ValueError: `argnums` out of range, `args` not finite, f or `reference` does not run at `args`, outputs of
            `reference` that are not like those of f, an option out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxseq.testing import check_vjp
        >>> @jax.custom_vjp
        ... def square(x):
        ...     return x * x
        >>> square.defvjp(lambda x: (x * x, x), lambda x, c: (x * c,))  # 2 x c would be right
        >>> report = check_vjp(square, (jnp.array([1.0, 2.0, 3.0]),), level="quick")
        >>> report.verdict.name, report.failures[0].diagnosis
        ('FAIL', 'it is the right one times 0.5')

    Reference:
        C. J. F. Ridders, Accurate computation of F'(x) and F'(x) F''(x) (1982), for the differences.
    """
    session = Session(f, args, reference=reference, argnums=argnums)
    return session.report(args, order=order, seed=seed, tolerance=tolerance, level=level)


def check_jvp(
    f: Callable[..., Any],
    args: Sequence[Any],
    *,
    reference: Callable[..., Any] | None = None,
    argnums: int | Sequence[int] | None = None,
    order: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    level: str = "full",
) -> Report:
    r"""Whether the forward-mode derivative of a function is right; the counterpart of `check_vjp`.

    $\mathrm{jvp}(u) = D_u f$ for tangents $u$ of the arguments, and where f has a reverse mode as well,
    $\langle c, \mathrm{jvp}(u) \rangle = \langle \mathrm{vjp}(c), u \rangle$. The leaves in the report are those of the
    output.

    Args:
        f: any function with a forward mode: a `jax.custom_jvp`, or plain JAX.
        args: a tuple of its positional arguments.
        reference: a function with the same arguments and outputs, which JAX differentiates. It is believed.
        argnums: the arguments that get tangents; None for all that hold floating numbers.
        order: 1, or 2 to check the derivative of the derivative too.
        seed: of tangents and projections.
        tolerance: a difference that passes everywhere, relative to a leaf's largest element, or None.
        level: `"quick"` or `"full"`.

    Returns:
        a `Report`.

    Raises:
        TypeError: as `check_vjp`.
        ValueError: as `check_vjp`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxseq.testing import check_jvp
        >>> check_jvp(jnp.sin, (jnp.array([1.0, 2.0, 3.0]),), level="quick").verdict.name
        'PASS'

    Reference:
        C. J. F. Ridders, Accurate computation of F'(x) and F'(x) F''(x) (1982), for the differences.
    """
    session = Session(f, args, reference=reference, argnums=argnums, mode="jvp", more={"transpose": _value.transpose})
    return session.report(args, order=order, seed=seed, tolerance=tolerance, level=level)


class Session:
    """One function and its checks, at as many points as there are seeds and time for: programs are compiled once.

    Attributes:
        subject: the function on flat leaves, and its programs.
        more: checks beside those of `check_vjp`, which run at every level.
    """

    def __init__(
        self,
        f: Any,
        args: Any,
        *,
        reference: Any = None,
        argnums: Any = None,
        mode: str = "vjp",
        judge: Callable[[tuple[Any, ...]], Callable[..., Any]] | None = None,
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
            self.notes.append(f"f does not run in float64, so it is judged in float32: {explain(error)}")
        if not any(_point.inexact(leaf) for leaf in jax.tree.leaves(shapes)):
            got = ", ".join(_checks.describe(leaf) for leaf in jax.tree.leaves(shapes)) or "no array"
            _checks.bad_type("f", "at least one floating output to differentiate", got)
        if reference is not None:
            others, error = self._outputs(reference, self._point(args))
            if error is not None:
                _checks.bad_value("reference", "a function that runs at `args`, as `f` does", explain(error))
            if _described(others) != _described(shapes):
                expected = f"outputs like those of `f`, {_described(shapes)}"
                _checks.bad_value("reference", expected, _described(others))
        self.subject = Subject(
            f, self._point(args), positions, reference=reference, judge=judge, mode=mode, dtype=self.dtype
        )
        self.more = more

    def report(
        self,
        args: Any,
        *,
        order: Any = 2,
        seed: Any = 0,
        tolerance: Any = None,
        level: Any = "full",
        only: Collection[str] | None = None,
    ) -> Report:
        """The function judged at one point, whose arguments have the structure of the first; by some checks `only`."""
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
        taken = (
            "a random number took the place of each" if trial.filled else "they stay, for f is finite with them alone"
        )
        zero = [
            f"{names[n]} holds {'a zero' if count == 1 else f'{count} zeros'}, where wrong gradients may equal right "
            f"ones and functions have kinks: {taken}"
            for n, count in _point.zeros_in(args, self.argnums).items()
        ]
        notes = [*self.notes, *zero, *trial.notes]
        return Report(_point.title(self.subject.f), self.subject.results.names, results, notes, where)

    def _trial(self, args: tuple[Any, ...], seed: int, tolerance: float | None) -> Trial:
        """The trial with random numbers in the place of zeros; with the zeros where f is finite there alone."""
        trial = Trial(self.subject, self._point(args, seed), seed, tolerance)
        trial.filled = self.argnums
        if _point.zeros_in(args, self.argnums):
            asked = Trial(self.subject, self._cast(args, args), seed, tolerance)
            if asked.finite and not trial.finite:
                return asked
            trial.asked = asked.x
        return trial

    def _point(self, args: tuple[Any, ...], seed: int = 0) -> tuple[Any, ...]:
        """The arguments as they are judged."""
        with jax.enable_x64(True):
            return self._cast(_point.lifted(args, seed=seed, argnums=self.argnums), args)

    def _cast(self, args: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Floating leaves in float64, or, where f does not run in that, in the dtype in which they were given."""
        narrow = {np.dtype(np.float64): np.float32, np.dtype(np.complex128): np.complex64}

        def cast(leaf: Any, given: Any) -> Any:
            if not _point.inexact(leaf):
                return leaf
            low = narrow.get(np.dtype(given.dtype), given.dtype)
            return jnp.asarray(leaf, _point.wide_dtype(leaf) if self.dtype == np.float64 else low)

        return jax.tree.map(cast, args, given)

    def _outputs(self, f: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Exception | None]:
        """The shapes of the outputs, or why there are none. An output that is no array is the caller's mistake."""
        strange: list[str] = []

        def watched(*args: Any) -> Any:
            out = f(*args)
            for path, leaf in jax.tree.leaves_with_path(out):
                if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
                    strange.append(f"{_checks.describe(leaf)} at output{jax.tree_util.keystr(path)}")
            return out

        try:
            with jax.enable_x64(self.dtype == np.float64):
                return jax.eval_shape(watched, *args), None
        except Exception as error:
            if strange:
                _checks.bad_type("f", "arrays, or trees of arrays, for its output", strange[0])
            return None, error


def _positions(argnums: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Of the arguments to differentiate in."""
    floating = [any(map(_point.inexact, jax.tree.leaves(arg))) for arg in args]
    if argnums is None:
        positions = [n for n, has in enumerate(floating) if has]
        if not positions:
            _checks.bad_type("args", "at least one floating array to differentiate in", "none")
        return tuple(positions)
    positions = [_checks.integer("argnums", n) for n in (argnums if isinstance(argnums, tuple | list) else (argnums,))]
    if not positions:
        _checks.bad_value("argnums", "at least one position", str(argnums))
    for n in positions:
        if not -len(args) <= n < len(args):
            _checks.bad_value("argnums", f"positions of the {len(args)} arguments", str(n))
        if not floating[n]:
            _checks.bad_type("argnums", "arguments that hold floating numbers", f"{n}, which holds none")
    return tuple(sorted({n % len(args) for n in positions}))


def _described(shapes: Any) -> str:
    """A tree of shapes in a line."""
    return str(jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", shapes)).replace("'", "")
