"""The contract of every op: compile a variant once for each dtype, and check the properties below.

`verify_contract(op, variant)` compiles the reference implementation in float64, and the op in each of `dtypes`, which
are float64, float32 and bfloat16 by default. Below float64, XLA optimises as it does for users. All arguments have the
same shapes, with at least 15 channels and 40 steps or positions, so that the vectorised kernels of XLA are reached.
Each property is checked by running one of these programs on other numbers. Nothing else is compiled, and programs
exchange NumPy arrays.

    values, gradients   float64 equals the reference to 1e-10; float32 and bfloat16 are close to it
    dtypes              outputs and cotangents have the dtypes of the inputs
    no carry            `carry=None` equals the reference from a zero carry
    batch               no NaN and no cotangent passes from one batch entry to another
    causality           an output does not depend on later steps (in the direction of the op)
    padding             steps past `lengths` may be NaN, in inputs and cotangents; outputs and cotangents there are zero
    resets              no value and no cotangent crosses a reset
    truncation          cotangents reach back exactly as far as the option `truncation` allows
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close, normals, pullback

from jaxseq._cases import CASES, Variant
from tests.support.flags import OPTIMISED, UNOPTIMISED

WIDTH, LENGTH, BATCH = 5, 40, 3

# Largest error of a leaf, relative to its largest element in float64. Where a step is unstable, the bound is four times
# the error of autodiff of the reference implementation in the same dtype.
BOUNDS = {jnp.float32: 2e-5, jnp.bfloat16: 4e-2}
# JAX differentiates this cell, which multiplies two pre-activations stored in bfloat16.
LOOSE = {"twice": 3}

# Ops with one output, whose first argument is the input.
CONVOLUTIONS = ("conv", "conv_transpose", "depthwise_conv", "separable_conv")

Program = Callable[[tuple[Any, ...], Any], tuple[Any, tuple[Any, ...]]]  # (args, cotangents) -> (outputs, cotangents)


class Contract(NamedTuple):
    """One variant of an op in one dtype: its program, arguments and results."""

    name: str
    label: str
    variant: Variant
    program: Program
    args: tuple[Any, ...]
    cotangents: Any
    outputs: Any
    gradients: tuple[Any, ...]

    @property
    def place(self) -> int:
        """The position of xs among the arguments. A carry, if any, precedes it."""
        return 0 if self.name in CONVOLUTIONS else 2

    @property
    def time(self) -> int | None:
        """The time axis of xs and ys."""
        if self.name in CONVOLUTIONS or self.name.endswith("_cell"):
            return None
        return self.variant.options.get("time_axis", 0)

    @property
    def batch(self) -> int:
        """The batch axis of xs and ys."""
        return 1 if self.time == 0 else 0

    @property
    def reverse(self) -> bool:
        return self.variant.options.get("reverse", False)

    @property
    def both_directions(self) -> bool:
        return "bidirectional" in self.name or "bidirectional" in self.label

    @property
    def xs(self) -> np.ndarray:
        return self.args[self.place]

    @property
    def ys_bar(self) -> np.ndarray:
        return self.ys(self.cotangents)

    def ys(self, outputs: Any) -> np.ndarray:
        """Return the first output that is not the carry."""
        return jax.tree.leaves(outputs if self.name in CONVOLUTIONS else outputs[1])[0]

    def of_ys(self, ys_bar: np.ndarray) -> Any:
        """Return cotangents of all outputs: `ys_bar`, and zero for the other outputs."""
        leaves, structure = jax.tree.flatten(self.cotangents)
        return structure.unflatten([ys_bar if leaf is self.ys_bar else np.zeros_like(leaf) for leaf in leaves])

    def carry_bar_is_zero(self, gradients: tuple[Any, ...]) -> bool:
        return not any(leaf.any() for leaf in jax.tree.leaves(gradients[self.place - 1]))

    def replaced(self, place: int, a: np.ndarray) -> tuple[Any, ...]:
        """Return the arguments with `a` at position `place`."""
        return (*self.args[:place], a, *self.args[place + 1 :])

    def place_of(self, mask: str) -> int:
        """Return the position among the arguments of an array that the op takes by name."""
        return len(self.args) - len(self.variant.arrays) + self.variant.arrays.index(mask)

    def along_time(self, steps: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Reshape a vector over the steps so that it broadcasts against `a`."""
        return steps.reshape([-1 if axis == self.time else 1 for axis in range(a.ndim)])

    def order(self) -> np.ndarray:
        """Return, for each step, the number of steps that are processed before it."""
        return np.arange(LENGTH)[::-1] if self.reverse else np.arange(LENGTH)


def verify_contract(name: str, label: str, key: Any, dtypes: Sequence[Any] = (jnp.float64, *BOUNDS)) -> None:
    """Compile one variant of an op in each dtype, and its reference implementation, and check all properties above.

    Properties that need one program only are checked in the first dtype.
    """
    case, variant = CASES[name], CASES[name].variants[label].widened(WIDTH)
    f, reference_op = variant.bound(case.op), variant.bound(case.reference)
    args = jax.tree.map(np.asarray, variant.arguments(key, length=LENGTH, batch=(BATCH,), dtype=jnp.float32))
    args = _with_lengths(variant, args)
    wide = as_dtype((args, _cotangents(f, args, key)), jnp.float64)
    reference = _reference(reference_op, *wide, jax.eval_shape(f, *wide[0]))
    contracts = []
    for dtype in dtypes:
        given = as_dtype(args, dtype)
        cotangents = _cotangents(f, given, key)
        program = _compile(pullback(f), (given, cotangents), UNOPTIMISED if dtype == jnp.float64 else OPTIMISED)
        contracts.append(Contract(name, label, variant, program, given, cotangents, *program(given, cotangents)))
        check_reference(contracts[-1], reference, reference_op)
    for check in (check_batch, check_causality, check_padding, check_resets, check_truncation):
        check(contracts[0])


def _reference(f: Callable[..., Any], args: tuple[Any, ...], cotangents: Any, outputs: Any) -> Program:
    """Compile the reference implementation in float64. Where the carry is None, pass a zero carry instead.

    The first output is the carry.
    """
    if len(args) < 2 or args[1] is not None:
        return _compile(pullback(f), (args, cotangents), UNOPTIMISED)
    zero = jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), outputs[0])
    program = _compile(pullback(f), ((args[0], zero, *args[2:]), cotangents), UNOPTIMISED)

    def run(args: tuple[Any, ...], cotangents: Any) -> tuple[Any, tuple[Any, ...]]:
        outputs, (params_bar, _, *rest) = program((args[0], zero, *args[2:]), cotangents)
        return outputs, (params_bar, None, *rest)

    return run


def check_reference(c: Contract, reference: Program, reference_op: Callable[..., Any]) -> None:
    """Values and gradients have the dtype of the input and are close to those of the reference in float64."""
    dtype = c.xs.dtype
    no_carry = len(c.args) > 1 and c.args[1] is None  # the returned carry is then at least float32
    assert {leaf.dtype for leaf in jax.tree.leaves(c.outputs[1] if no_carry else c.outputs)} == {dtype}
    chex.assert_trees_all_equal_shapes_and_dtypes(c.gradients, jax.tree.map(_cotangent_type, c.args))
    expected = reference(*as_dtype((c.args, c.cotangents), jnp.float64))
    if dtype == jnp.float64:
        return assert_close((c.outputs, c.gradients), expected)
    limit = BOUNDS[dtype.type] * (LOOSE.get(c.label, 1) if dtype == jnp.bfloat16 else 1)
    found = dict(relative_errors((c.outputs, c.gradients), expected))
    if all(error < limit for error in found.values()):  # false where an error is NaN
        return None
    program = _compile(pullback(reference_op), (c.args, c.cotangents), OPTIMISED)  # equally unstable
    autodiff = dict(relative_errors(program(c.args, c.cotangents), expected))
    for path, error in found.items():
        bound = max(limit, 4 * autodiff[path])
        assert error < bound, f"relative error at {path}: {error:.1e}, of autodiff {autodiff[path]:.1e}"
    return None


# --- Properties ---


def check_batch(c: Contract) -> None:
    """A NaN in the first batch entry of xs does not change the other entries, nor does its cotangent reach them."""
    one, rest = ((slice(None),) * c.batch + (entry,) for entry in (0, slice(1, None)))
    outputs, _ = c.program(c.replaced(c.place, _with(c.xs, one, np.nan)), c.cotangents)
    assert_close(c.ys(outputs)[rest], c.ys(c.outputs)[rest], relative=rounding(c.xs.dtype))
    _, gradients = c.program(c.args, c.of_ys(_with(c.ys_bar, rest, 0)))
    assert gradients[c.place][one].any()
    assert not gradients[c.place][rest].any()


def check_causality(c: Contract) -> None:
    """Outputs of the first half of the steps do not depend on the second half, in value or gradient."""
    if c.time is None or c.both_directions or (c.reverse and "lengths" in c.variant.arrays):
        return  # in reverse, the order of the steps depends on the lengths
    late = partial(c.along_time, c.order() >= LENGTH // 2)
    outputs, _ = c.program(c.replaced(c.place, np.where(late(c.xs), c.xs + 1, c.xs)), c.cotangents)
    early = [np.where(late(ys), 0, ys) for ys in (c.ys(outputs), c.ys(c.outputs))]
    assert_close(*early, relative=rounding(c.xs.dtype))
    _, gradients = c.program(c.args, c.of_ys(np.where(late(c.ys_bar), 0, c.ys_bar)))
    xs_bar = gradients[c.place]
    _assert_negligible(np.where(late(xs_bar), xs_bar, 0), xs_bar)


def check_padding(c: Contract) -> None:
    """Steps past the length of a sequence may be NaN; outputs and cotangents there are zero."""
    if "lengths" not in c.variant.arrays or c.time is None:
        return
    padded = np.arange(LENGTH)[:, None] >= c.args[c.place_of("lengths")]
    padded = padded.T if c.time == 1 else padded
    spoil = lambda a: np.where(padded.reshape(*padded.shape, *(1,) * (a.ndim - 2)), np.nan, a)  # noqa: E731
    of_states = c.variant.options.get("return_states", False)
    carry_bar = jax.tree.map(spoil, c.cotangents[0]) if of_states else c.cotangents[0]
    found = c.program(c.replaced(c.place, spoil(c.xs)), (carry_bar, spoil(c.ys_bar)))
    assert_close(found, (c.outputs, c.gradients), relative=0)
    for a in (c.ys(c.outputs), c.gradients[c.place]):
        assert not a[padded].any()
        assert a[~padded].any()


def check_resets(c: Contract) -> None:
    """A reset at t splits the sequence into [0, t) and [t, T): no value and no cotangent crosses."""
    if "resets" not in c.variant.arrays:
        return
    place, t = c.place_of("resets"), LENGTH // 2
    marks = _with(np.zeros_like(c.args[place]), (slice(None),) * c.time + (t,), True)
    split = c._replace(args=c.replaced(place, marks))
    later = partial(c.along_time, (np.arange(LENGTH) >= t) != c.reverse)  # the part that is processed last
    cotangents = c.of_ys(np.where(later(c.ys_bar), c.ys_bar, 0))
    outputs, gradients = c.program(split.args, cotangents)
    xs_bar = gradients[c.place]
    _assert_negligible(np.where(later(xs_bar), 0, xs_bar), xs_bar)
    assert c.both_directions or c.carry_bar_is_zero(gradients)
    others, _ = c.program(split.replaced(c.place, np.where(later(c.xs), c.xs, c.xs + 1)), cotangents)
    assert_close(*(np.where(later(ys), ys, 0) for ys in (c.ys(others), c.ys(outputs))), relative=rounding(c.xs.dtype))


def check_truncation(c: Contract) -> None:
    """The loss in one window of k1 steps is backpropagated through k2 steps, and no further."""
    truncation = c.variant.options.get("truncation")
    if truncation is None or c.time is None:
        return
    k1, k2 = truncation if isinstance(truncation, tuple) else (truncation, truncation)
    start, order = k1 * (LENGTH // (2 * k1)), c.order()
    first = start + k1 - k2
    window = c.along_time((order >= start) & (order < start + k1), c.ys_bar)
    _, gradients = c.program(c.args, c.of_ys(np.where(window, c.ys_bar, 0)))
    xs_bar = gradients[c.place]
    assert not np.where(c.along_time(order < first, xs_bar), xs_bar, 0).any()
    assert c.carry_bar_is_zero(gradients)
    if not c.variant.arrays:  # a reset would stop the gradient earlier
        assert np.where(c.along_time(order == first, xs_bar), xs_bar, 0).any()


def _with(a: np.ndarray, at: Any, value: Any) -> np.ndarray:
    """Return a copy of `a` with `value` at the index `at`."""
    a = a.copy()
    a[at] = value
    return a


def _assert_negligible(part: np.ndarray, whole: np.ndarray) -> None:
    """Assert that `part` is zero, except for rounding errors that a Fourier transform spreads."""
    assert whole.any()
    assert np.abs(part).max() <= rounding(whole.dtype) * np.abs(whole).max()


def rounding(dtype: Any) -> float:
    """Return a relative bound on the effect of summing some hundred terms in another order."""
    return 1e4 * float(np.finfo(dtype).eps) if dtype == np.float64 else 1e2 * float(np.finfo(dtype).eps)


# --- Numbers ---


def _wide(a: np.ndarray) -> np.ndarray:
    return a.astype(np.complex128 if np.iscomplexobj(a) else np.float64)


def as_dtype(tree: Any, dtype: Any) -> Any:
    """Convert the floats of a tree to `dtype`; leave other leaves as they are."""

    def cast(a):
        if jnp.issubdtype(a.dtype, jnp.complexfloating):
            return a.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.inexact) else a

    return jax.tree.map(cast, tree)


def relative_errors(actual: Any, expected: Any) -> Iterator[tuple[str, float]]:
    """Yield the error of each leaf, relative to its largest element. Skip float0 cotangents, which have no value."""
    for (path, got), want in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if want.dtype == jax.dtypes.float0:
            continue
        low, exact = (_wide(np.asarray(a)) for a in (got, want))
        yield jax.tree_util.keystr(path), np.abs(low - exact).max(initial=0) / (np.abs(exact).max(initial=0) or 1)


def _with_lengths(variant: Variant, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """If the op takes lengths, replace them by lengths that cover all, none and a part of the sequence."""
    if "lengths" not in variant.arrays:
        return args
    place = len(args) - len(variant.arrays) + variant.arrays.index("lengths")
    lengths = np.array([LENGTH, 0, LENGTH // 2 + 3], args[place].dtype)
    return (*args[:place], lengths, *args[place + 1 :])


def _cotangents(f: Any, args: tuple[Any, ...], key: Any) -> Any:
    """Return random cotangents of the outputs of `f`, in their dtypes: a carry may be wider than the input."""
    return jax.tree.map(np.asarray, normals(key, jax.eval_shape(f, *args), stream=1))


def _cotangent_type(a: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype if jnp.issubdtype(a.dtype, jnp.inexact) else jax.dtypes.float0)


def _compile(f: Any, args: tuple[Any, ...], options: Any) -> Program:
    """Compile a program that returns NumPy arrays, so that operations on its results are not compiled."""
    program = jax.jit(f, compiler_options=options).lower(*args).compile()
    return lambda *args: jax.tree.map(np.asarray, program(*args))
