"""Which rule and which plan a call takes, why, and what it keeps for its gradient."""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from itertools import count
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxseq import _checks


class Decision(NamedTuple):
    """One choice that an op made when it was called.

    Attributes:
        subject: what was decided, such as `kernel gradient` or `backward pass`.
        choice: what was chosen.
        reason: why.
    """

    subject: str
    choice: str
    reason: str


class Explanation(NamedTuple):
    """The result of `jaxseq.explain`. `print` it, or read its fields.

    Attributes:
        op: the name of the op.
        decisions: the choices that the op made, without repetitions, in the order in which it made them.
        residuals: the shape and dtype of every array that is kept between the forward pass and the backward pass, the
            arguments that the gradient needs among them.
    """

    op: str
    decisions: tuple[Decision, ...]
    residuals: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def residual_bytes(self) -> int:
        """The size of all residuals."""
        return sum(prod(a.shape) * a.dtype.itemsize for a in self.residuals)

    def __str__(self) -> str:
        lines = [self.op]
        for subject, choice, reason in self.decisions:
            lines.append(f"  {subject}: {choice}")
            lines.append(f"      {reason}")
        lines.append(f"  kept for the gradient: {self.residual_bytes:,} bytes in {len(self.residuals)} arrays")
        shapes = [f"{a.dtype.name}[{', '.join(map(str, a.shape))}]" for a in self.residuals]
        lines += [f"      {shapes.count(shape)} x {shape}" for shape in dict.fromkeys(shapes)]
        return "\n".join(lines)


# Numbers the calls of `explain`.
CALLS = count()
# The decisions of the call that is being explained; None outside of `explain`.
RECORDED: ContextVar[list[Decision] | None] = ContextVar("jaxseq.explain", default=None)


def explain(op: Callable[..., PyTree], *args: PyTree, **options: PyTree) -> Explanation:
    """Explain how a call and its gradient are computed: which rules and which plan, why, and what is kept.

    The call is traced, not computed: arrays may be `jax.ShapeDtypeStruct`. A *rule* is one way to compute a
    convolution, its transpose (the gradient to the input) or the kernel gradient. The *plan* of a recurrence splits
    time into windows, by `truncation`, and these into chunks, whose states are computed together in the backward pass.

    Args:
        op: a function of jaxseq, or any function that calls some, such as a whole model. What `jax.jit` has traced
            before is traced again.
        *args: its positional arguments. It is differentiated with respect to those that consist of arrays.
        **options: its keyword-only arguments.

    Returns:
        An `Explanation`, to print or to read.

    Raises:
        TypeError: if `op` is not a function. Errors of the op itself are raised as they are.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.lstm_init(jax.random.key(0), 16, 32)
        >>> xs = jnp.ones((200, 8, 16))
        >>> found = jaxseq.explain(jaxseq.lstm, params, None, xs, truncation=50)
        >>> print(found.decisions[0].choice)
        4 windows of 50 steps in parallel, in chunks of 13 steps
        >>> kept = jaxseq.explain(jaxseq.lstm, params, None, xs, truncation=50, checkpoint="auto")
        >>> kept.residual_bytes < found.residual_bytes
        True

    Reference:
        The choices and their measurements: `docs/measured-convolution.md` and `docs/measured-recurrence.md`.
    """
    from jax.experimental.xla_metadata import set_xla_metadata  # noqa: PLC0415  # slow to import

    if not callable(op):
        _checks.bad_type("op", "a function", repr(op))
    residuals: list[jax.ShapeDtypeStruct] = []
    of_arrays = {i: arg for i, arg in enumerate(args) if all(map(_is_array, jax.tree.leaves(arg)))}

    def f(given: dict[int, PyTree]) -> PyTree:
        return jax.tree.map(jnp.asarray, op(*(given.get(i, arg) for i, arg in enumerate(args)), **options))

    def differentiate(given: dict[int, PyTree]) -> PyTree:
        y, pull = jax.vjp(f, given)
        residuals.extend(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jax.tree.leaves(pull))
        return pull(jax.tree.map(_cotangent_like, y))

    decisions: list[Decision] = []
    token = RECORDED.set(decisions)
    try:
        with set_xla_metadata(jaxseq_explain=str(next(CALLS))):  # so that `jax.jit` traces again
            jax.eval_shape(differentiate, of_arrays)
    finally:
        RECORDED.reset(token)
    while isinstance(op, partial):
        op = op.func
    name = getattr(op, "__name__", None) or type(op).__name__
    return Explanation(name, tuple(dict.fromkeys(decisions)), tuple(residuals))


def _is_array(leaf: object) -> bool:
    """Return True for arrays, shapes of arrays, and floats, as the carry of `jaxseq.scan` may be."""
    return isinstance(leaf, float | complex) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def _cotangent_like(y: jax.Array) -> jax.Array | np.ndarray:
    if jnp.issubdtype(y.dtype, jnp.inexact):
        return jnp.ones_like(y)
    return np.zeros(y.shape, jax.dtypes.float0)
