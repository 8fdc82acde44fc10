"""The definition of a linear cell: a step that is linear in its state."""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jaxtyping import PyTree

from jaxseq import _checks, _precision
from jaxseq._recurrence._cell import Cell
from jaxseq.linear_maps import Dense, LinearMap

LinearProduct = Callable[..., jax.Array]  # L(w, x), or L(w, x, kind) for another linear map than a matrix


class LinearCell(NamedTuple):
    """The equations of a recurrence that is linear in its state, elementwise.

        (a_t, v_t) = coefficients(p, x_t, L)
        h_t = a_t h_{t-1} + v_t
        y_t = output(p, h_t, x_t, L)

    The coefficients read x only, so they need no loop over time. Both functions get many steps at once: x is
    `(T, *batch, D)` for any T, and a, v, h and y have the same first axes. `L(w, x)` is x w. Products accumulate in
    float32 at least, with the precision of the call. x and the parameters p are in the dtype of the accumulator. In
    padding, x and h are zero: both functions must be differentiable there, and their results are not used.

    Attributes:
        name: the name of the cell, for errors and profiles.
        coefficients: `(p, x, L) -> (a, v)`. v is `(T, *batch, H)`, real or complex, and so is the state, `(*batch, H)`.
            a broadcasts to the shape of v: `(H,)` is constant in time and over the batch.
        params: the NamedTuple of the parameters. Annotations of jaxtyping, such as `Float[Array, "D 2*H"]`, are
            checked. D is the number of features of x.
        output: `(p, h, x, L) -> y`, real. None is y = h.
    """

    name: str
    coefficients: Callable[..., tuple[jax.Array, jax.Array]]
    params: type
    output: Callable[..., jax.Array] | None = None

    @property
    def state(self) -> None:
        """The state is one array."""

    @property
    def side_inputs(self) -> bool:
        """A linear cell has no side inputs."""
        return False


AnyCell = Cell | LinearCell


class Product(NamedTuple):
    """L(w, x) = x w, with operands in one dtype, accumulated in float32 at least."""

    precision: PrecisionLike
    dtype: np.dtype  # of the operands

    def __call__(self, w: jax.Array, x: jax.Array, kind: LinearMap = Dense()) -> jax.Array:  # noqa: B008
        return kind.product(self.precision, w.astype(self.dtype), x.astype(self.dtype))


class Shapes(NamedTuple):
    """The shapes and dtypes of the state and the output of one example."""

    state: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct


def check_linear_cell(cell: LinearCell) -> LinearCell:
    """Return `cell` if its fields are consistent. The results of its functions are checked when they are traced."""
    for field in ("coefficients", "output"):
        function = getattr(cell, field)
        if not callable(function) and not (function is None and field == "output"):
            _checks.bad_type(f"{cell.name}.{field}", "a function", _checks.describe(function))
    if not getattr(cell.params, "_fields", ()):
        _checks.bad_type(f"{cell.name}.params", "a NamedTuple class", _checks.describe(cell.params))
    return cell


def shapes_of(cell: LinearCell, params: PyTree, features: int, dtype: np.dtype) -> Shapes:
    """Return the shapes of one example, given D and the dtype of x. Check what the functions of the cell return."""
    leaves, structure = jax.tree.flatten(params)
    of_params = structure, tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves)
    return _shapes_of(cell, of_params, features, dtype)


@lru_cache(256)
def _shapes_of(cell: LinearCell, of_params: tuple[Hashable, tuple[PyTree, ...]], D: int, dtype: np.dtype) -> Shapes:
    """Return the shapes, given the structure and the leaves of the parameters, both hashable."""
    params = jax.tree.unflatten(*of_params)
    T, B = 2, 3  # not those of the call, and different from each other
    x = jax.ShapeDtypeStruct((T, B, D), dtype)

    def trace(params: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        run = with_params(cell, params, x, None)
        x = x.astype(run.dtype)
        a, v = run.coefficients(x)
        if v.shape[:2] != (T, B) or v.ndim != 3:
            expected = "v of shape (T, *batch, H), with all features of the state on one axis"
            _checks.bad_value(f"{cell.name}.coefficients", expected, f"{v.shape} for T = {T} and a batch of {B}")
        if a.ndim > v.ndim or a.shape not in (v.shape[-1:], (1,), (), (T, B, v.shape[-1]), (T, B, 1), (T, 1, 1)):
            expected = f"a of shape (T, *batch, H) like v, {v.shape}, or (H,) if it is constant"
            _checks.bad_value(f"{cell.name}.coefficients", expected, f"{a.shape} for T = {T} and a batch of {B}")
        h = v.astype(_precision.promote(a, v))
        y = run.output(h, x)
        if not isinstance(y, jax.Array):
            _checks.bad_type(f"{cell.name}.output", "an array", _checks.describe(y))
        return h, y

    h, y = jax.eval_shape(trace, params, x)
    if y.ndim != 3 or y.shape[:2] != (T, B) or not jnp.issubdtype(y.dtype, jnp.floating):
        got = f"{y.dtype.name} {y.shape} for T = {T} and a batch of {B}"
        _checks.bad_value(f"{cell.name}.output", "real outputs of shape (T, *batch, features)", got)
    return Shapes(*(jax.ShapeDtypeStruct(found.shape[2:], found.dtype) for found in (h, y)))


class BoundCell(NamedTuple):
    """A linear cell with its parameters."""

    cell: LinearCell
    params: PyTree
    product: Product

    @property
    def dtype(self) -> np.dtype:
        """The dtype of x and the parameters."""
        return _precision.accumulator(self.product.dtype)

    def coefficients(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return (a, v) of many steps."""
        found = self.cell.coefficients(self.params, x, self.product)
        if not isinstance(found, tuple) or len(found) != 2:
            _checks.bad_value(f"{self.cell.name}.coefficients", "a pair (a, v)", _checks.describe(found))
        for name, part in zip("av", found, strict=True):
            if not isinstance(part, _checks.ARRAYS) or not jnp.issubdtype(part.dtype, jnp.inexact):
                expected = "a pair (a, v) of float or complex arrays"
                _checks.bad_value(f"{self.cell.name}.coefficients", expected, f"{name} = {_checks.describe(part)}")
        a, v = map(jnp.asarray, found)
        return a, v

    def output(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """Return y of many steps."""
        return h if self.cell.output is None else self.cell.output(self.params, h, x, self.product)


def with_params(cell: LinearCell, params: PyTree, xs: jax.Array, precision: PrecisionLike) -> BoundCell:
    """Return the cell with its parameters, in the dtype of the accumulator."""
    product = Product(precision, _precision.promote(*jax.tree.leaves(params), xs))
    return BoundCell(cell, _precision.cast(params, _precision.accumulator(product.dtype)), product)
