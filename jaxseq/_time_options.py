"""The keyword-only options that every function of a sequence takes: names, types, defaults and documentation."""

import inspect
import re
from types import SimpleNamespace
from typing import Annotated, NamedTuple, TypedDict, get_type_hints

from jax.lax import PrecisionLike
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Integer, PyTree

from jaxseq._mesh import Partitioning
from jaxseq._types import AnyArray
from jaxseq.tuning import LinearTuning, RecurrenceTuning


class Default(NamedTuple):
    """The value of an option that is not passed."""

    value: object


class TimeOptions(TypedDict, total=False):
    """Keyword-only options of every recurrence. All of them can be combined.

    Attributes:
        lengths: the length of each sequence, `(*batch,)` integers from 0 to T. Beyond its length, a sequence is
            padding: `ys` is zero there, the carry does not change, and the content of `xs`, NaN included, affects no
            value and no gradient. A concrete length out of range raises a ValueError. A traced one, as under `jax.jit`,
            is clamped to the range from 0 to T and reported by `jax.experimental.checkify.checkify`.
        resets: `(T, *batch)` booleans. `resets[t]` marks a boundary between steps t - 1 and t, as `done[t - 1]` does in
            reinforcement learning. Across a boundary the state is set to zero, in either direction, and no gradient
            flows.
        reverse: if True, process each sequence from its last step to its first. `ys[t]` still belongs to `xs[t]`, and
            the returned carry is the state after step 0.
        truncation: truncated backpropagation through time. With an integer k, the gradient of the state is cut every k
            steps. With a pair (k1, k2), the loss in each window of k1 steps is backpropagated through k2 steps. Values
            do not change. The backward pass runs in parallel over windows.
        checkpoint: store the state only every `checkpoint` steps for the backward pass, and recompute the rest.
            `"auto"` is about sqrt(T). None stores what makes the backward pass fastest.
        time_axis: the axis of time in `xs`, `resets`, `zoneout` and `ys`; 1 for arrays `(batch, T, D)`.
        unroll: the number of steps per iteration of the compiled loop, as in `jax.lax.scan`.
        precision: the precision of matrix products, as in `jax.lax.dot_general`.
        state_dtype: the dtype of the state between steps. None is float32, or the dtype of the state if that is wider.
            A state in bfloat16 or float16 is rounded at every step and loses small updates. The carry is returned in
            the dtype of `carry`, or in this dtype if `carry` is None.
        recurrent_dropout_mask: `(*batch, H)` floats. h is multiplied by this mask before the recurrent map, with the
            same mask at every step. A mask of zeros and 1 / (1 - p), drawn once for each sequence, is recurrent
            dropout. No gradient flows to it.
        zoneout: the weight of the previous state in the new one: a number >= 0 and < 1, or a tree with the structure of
            the state whose leaves are booleans or floats `(T, *batch, H)`, with time at `time_axis`. No gradient flows
            to it. Where booleans keep all of the state of a sequence, the step is not read: NaN in `xs` affects no
            value and no gradient there. Floats mix both states and do not stop a NaN.
        reset_state: the state after a reset, zero if None: a tree with the structure of the state, whose leaves are
            `(*batch, H)`, or `(H,)` for all of the batch, as a learned initial state is. Gradients flow to it. It has
            no effect without `resets`, and does not replace a carry of None: to start with it, pass it as `carry` too.
        return_states: if True, the first result has the state after every step, of every leaf, with time at
            `time_axis`, in place of the final state. It is zero in the padding.
    """

    lengths: Annotated[Integer[AnyArray, "*batch"] | None, Default(None)]
    resets: Annotated[Bool[AnyArray, "*time_and_batch"] | None, Default(None)]
    reverse: Annotated[bool, Default(False)]
    truncation: Annotated[int | tuple[int, int] | None, Default(None)]
    checkpoint: Annotated[int | str | None, Default(None)]
    time_axis: Annotated[int, Default(0)]
    unroll: Annotated[int, Default(1)]
    precision: Annotated[PrecisionLike, Default(None)]
    state_dtype: Annotated[DTypeLike | None, Default(None)]
    recurrent_dropout_mask: Annotated[Float[AnyArray, "*batch H"] | None, Default(None)]
    zoneout: Annotated[PyTree[ArrayLike] | None, Default(None)]
    reset_state: Annotated[PyTree[ArrayLike] | None, Default(None)]
    return_states: Annotated[bool, Default(False)]


_HINTS = get_type_hints(TimeOptions, include_extras=True)
TYPES = {name: hint.__origin__ for name, hint in _HINTS.items()}
DEFAULTS = {name: hint.__metadata__[0].value for name, hint in _HINTS.items()}


class Options(NamedTuple):
    """Time options after validation, without arrays, and what else is decided once per call. Static and hashable."""

    reverse: bool = False
    truncation: tuple[int, int] | None = None
    checkpoint: int | str | None = None
    axis: int = 0  # the axis of time in xs, ys and the masks
    unroll: int = 1
    precision: PrecisionLike = None
    partitioning: Partitioning = Partitioning()
    tuning: RecurrenceTuning = RecurrenceTuning()
    linear: LinearTuning = LinearTuning()
    return_states: bool = False


def with_defaults(options: TimeOptions) -> SimpleNamespace:
    """Return all time options as attributes, those that were not passed with their defaults."""
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(f"got an unexpected keyword argument {name!r}; the time options are {', '.join(DEFAULTS)}")
    return SimpleNamespace(**{**DEFAULTS, **options})


def described_in(docstring: str) -> str:
    """Return a docstring, without indentation, with an entry for every time option in place of that for `**time`."""
    _, _, entries = inspect.cleandoc(TimeOptions.__doc__ or "").partition("Attributes:\n")
    return re.sub(r"^    \*\*time: .*", lambda _: entries, inspect.cleandoc(docstring), flags=re.MULTILINE)
