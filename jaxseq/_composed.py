"""The call of a layer that is a composition of ops which run forward in time: masks, direction, truncation, meshes.

Such a layer is a function `(params, carry, steps) -> (carry, ys)` that processes steps from the first to the last, time
first, with any number of batch axes. Each leaf of its carry begins with the batch axes.

    reverse       the steps are put in processing order, each sequence within its length, and ys back
    truncation    (k1, k2): windows of k2 steps in parallel, as another batch axis, of which the last k1 outputs count.
                  A first pass without a gradient computes the states in which they start. A window that would start
                  before the first step starts there, with the carry
    mesh          inside, the compiler partitions all axes; the results are sharded like xs
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxseq import _checks, _mesh, _precision, _sizes, _time, _windows
from jaxseq._distributed._sharding import place_masks_like, reshard, sharded_axes, with_auto_axes
from jaxseq._time_options import Options

Result = tuple[PyTree, jax.Array]  # carry, ys


class Steps(NamedTuple):
    """What a layer reads, time first."""

    xs: jax.Array  # (T, *B, D)
    lengths: jax.Array | None = None  # (*B,)
    resets: jax.Array | None = None  # (T, *B), False in padding


Layer = Callable[[PyTree, PyTree, Steps], Result]  # (params, carry, steps)


class Arrays(NamedTuple):
    """The arrays of a call, with time at `Options.axis`."""

    params: PyTree
    carry: PyTree
    xs: jax.Array
    lengths: jax.Array | None = None
    resets: jax.Array | None = None


def check_steps(
    xs: object, lengths: object, resets: object, **options: Any
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, Options]:
    """Check xs, the masks and the options `reverse`, `truncation` and `time_axis`."""
    xs = _checks.array("xs", xs)
    if xs.ndim < 2:
        _checks.bad_value("xs", "at least 2 axes (time, *batch, features)", str(xs.ndim), xs=xs)
    axis = _checks.axis("time_axis", options["time_axis"], xs.ndim - 1, 1, xs=xs)
    checked = Options(
        axis=axis,
        reverse=_checks.boolean("reverse", options["reverse"]),
        truncation=_checks.truncation(options["truncation"]),
    )
    sizes = xs.shape[:-1]
    if lengths is not None:
        lengths = _checks.lengths("lengths", lengths, _without(sizes, axis), sizes[axis])
    if resets is not None:
        resets = _checks.mask("resets", resets)
        _checks.shape("resets", resets, sizes, "the shape of `xs` without features", xs=xs)
    return xs, lengths, resets, checked


def check_step(x: object) -> jax.Array:
    """Check the input of one step."""
    x = _checks.array("x", x)
    if x.ndim < 1:
        _checks.bad_value("x", "at least 1 axis (*batch, features)", "a scalar")
    return x


class StateShapes(NamedTuple):
    """The state of one example."""

    kind: type  # a NamedTuple
    shapes: dict[str, tuple[int, ...]]

    def zeros(self, batch: tuple[int, ...], dtype: np.dtype) -> PyTree:
        """Return a state of zeros."""
        return self.kind(**{field: jnp.zeros((*batch, *shape), dtype) for field, shape in self.shapes.items()})


def check_carry(carry: object, x: jax.Array, axis: int | None, *, input_size: int, state: StateShapes) -> PyTree:
    """Check the features of x, with time at `axis` if not None, and the carry. None is zeros."""
    name = "x" if axis is None else "xs"
    if x.shape[-1] != input_size:
        expected = f"{input_size} features on the last axis, as in `params`"
        _checks.bad_value(name, expected, str(x.shape[-1]), **{name: x})
    batch = tuple(size for n, size in enumerate(x.shape[:-1]) if n != axis)
    if carry is None:
        return state.zeros(batch, _precision.accumulator(x.dtype))
    given: Any = _checks.container("carry", carry, state.kind)
    found = {field: _checks.array(f"carry.{field}", getattr(given, field)) for field in state.shapes}
    for field, shape in state.shapes.items():
        meaning = f"(*batch, {', '.join(map(str, shape))})"
        _checks.shape(f"carry.{field}", found[field], (*batch, *shape), meaning, **{name: x})
    return state.kind(**found)


def run_step(layer: Layer, params: PyTree, carry: PyTree, x: jax.Array) -> Result:
    """Run one step."""
    end, ys = run(layer, Options(), Arrays(params, carry, x[None]))
    return end, ys[0]


def run(layer: Layer, options: Options, arrays: Arrays) -> Result:
    """Run a layer, with the carry in the dtype between steps, and return it in its own."""
    params, carry, xs, *_ = arrays
    between = jax.tree.map(lambda a: a.astype(_precision.accumulator(a.dtype)), carry)
    if xs.shape[options.axis] == 0:
        one_step = jax.ShapeDtypeStruct((1, *_without(xs.shape, options.axis)), xs.dtype)
        on_one_step = lambda params, carry, x: layer(params, carry, Steps(x))  # noqa: E731
        _, ys = jax.eval_shape(on_one_step, params, between, one_step)
        return carry, jnp.zeros((*xs.shape[:-1], ys.shape[-1]), xs.dtype)
    end, ys = _run_on_mesh(layer, options, arrays._replace(carry=between))
    return _precision.cast_like(end, carry), ys


def _without(sizes: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*sizes[:axis], *sizes[axis + 1 :])


def _run_on_mesh(layer: Layer, options: Options, arrays: Arrays) -> Result:
    """Run a layer with the shardings that the module docstring describes."""
    distributed = _mesh.is_distributed(arrays)
    if distributed:
        lengths, resets = place_masks_like(arrays.xs, options.axis, arrays.lengths, arrays.resets)
        arrays = _mesh.align_varying(arrays._replace(lengths=lengths, resets=resets))
    in_time = partial(_run_in_time, layer, options)
    sharding = _mesh.explicit_sharding(arrays.xs)
    if sharding is None:
        return in_time(arrays)
    parts = [*sharding.spec]
    batch = [*parts[: options.axis], *parts[options.axis + 1 : -1]]
    spread = lambda *spec: NamedSharding(sharding.mesh, PartitionSpec(*spec))  # noqa: E731
    of_carry = jax.tree.map(lambda a: spread(*batch, *[None] * (a.ndim - len(batch))), arrays.carry)
    arrays = arrays._replace(carry=jax.tree.map(reshard, arrays.carry, of_carry))
    names = frozenset().union(*(sharded_axes(a) for a in jax.tree.leaves(arrays)))
    result: Result = with_auto_axes(in_time, names, (of_carry, spread(*parts[:-1], None)))(arrays)
    return result


def _run_in_time(layer: Layer, options: Options, arrays: Arrays) -> Result:
    """Run a layer in its direction, with its truncation."""
    params, carry, xs, lengths, resets = arrays
    xs = jnp.moveaxis(xs, options.axis, 0)
    resets = None if resets is None else jnp.moveaxis(resets, options.axis, 0)
    _, resets, last = _time.masks(options._replace(axis=0), xs.shape[0], lengths, resets)
    steps = Steps(xs, lengths, resets)
    turn: Callable[[jax.Array], jax.Array] = partial(jnp.flip, axis=0)
    if lengths is not None:
        turn = partial(_time.reverse_within_length, lengths=lengths, axis=0)
    if options.reverse:
        steps = Steps(turn(xs), lengths, None if resets is None else turn(resets))
    end, ys = _run_windows(layer, options.truncation, params, carry, steps)
    ys = turn(ys) if options.reverse else ys
    return _time.replace_where(last, end), jnp.moveaxis(ys, 0, options.axis)


# --- Truncation ---


def _run_windows(
    layer: Layer, truncation: tuple[int, int] | None, params: PyTree, carry: PyTree, steps: Steps
) -> Result:
    """Run a layer with truncation (k1, k2)."""
    total = steps.xs.shape[0]
    if truncation is None:
        return layer(params, carry, steps)
    if not _sizes.is_concrete(total):
        _checks.bad_value("truncation", "None, since the number of steps is symbolic", repr(truncation))
    k1, k2 = _windows.window_lengths(truncation, total)
    if k1 >= total:
        return layer(params, carry, steps)
    before, count, batch = k2 - k1, -(-total // k1), steps.xs.shape[1:-1]
    window = jnp.arange(count, dtype=jnp.int32)
    first = k1 * window - before  # of the steps that a window reads
    later = first > 0
    states = _states_between(layer, *lax.stop_gradient((params, carry, steps)), first=-before % k1, interval=k1)
    # The first windows start from the carry, the others from one state each.
    number = jnp.maximum(window - (before + -before % k1) // k1, 0)
    starts = jax.tree.map(
        lambda a, c: jnp.where(_time.expand_mask(later, a[number]), a[number], c[None]), states, carry
    )
    first = jnp.maximum(first, 0)
    t = first[None] + jnp.arange(min(k2, total), dtype=jnp.int32)[:, None]  # (k2, W)
    lengths = jnp.full(batch, total, jnp.int32) if steps.lengths is None else steps.lengths
    inside = jnp.clip(lengths[None] - _time.expand_mask(first, lengths[None]), 0, t.shape[0])
    take = lambda a: a[jnp.minimum(t, total - 1)]  # noqa: E731
    resets = steps.resets
    if resets is not None:
        resets = take(resets) & _time.valid_steps(t.shape[0], inside, 0)
    ends, ys = layer(params, starts, Steps(take(steps.xs), inside, resets))
    at = (k1 * window - first)[None] + jnp.arange(k1, dtype=jnp.int32)[:, None]  # (k1, W), the outputs that count
    ys = jnp.take_along_axis(ys, _time.expand_mask(at, ys), 0)
    ys = jnp.moveaxis(ys, 1, 0).reshape(count * k1, *ys.shape[2:])[:total]
    if steps.lengths is None:
        return jax.tree.map(lambda a: a[-1], ends), ys
    final = _time.last_window_of_sequence(_time.valid_steps(total, lengths, 0), 0, k1)
    of_sequence = lambda a: jnp.take_along_axis(a, _time.expand_mask(final[None], a), 0)[0]  # noqa: E731
    return jax.tree.map(of_sequence, ends), ys


def _states_between(layer: Layer, params: PyTree, carry: PyTree, steps: Steps, *, first: int, interval: int) -> PyTree:
    """Return the states before the steps first, first + interval, ... stacked."""
    total = steps.xs.shape[0]

    def piece(start: int | jax.Array, length: int) -> Steps:
        part = lambda a: lax.dynamic_slice_in_dim(a, start, length)  # noqa: E731
        lengths = None if steps.lengths is None else jnp.clip(steps.lengths - start, 0, length)
        return Steps(part(steps.xs), lengths, None if steps.resets is None else part(steps.resets))

    state = layer(params, carry, piece(0, first))[0] if first else carry
    following = lambda state, start: (layer(params, state, piece(start, interval))[0], state)  # noqa: E731
    starts = jnp.arange(first, total - interval + 1, interval, dtype=jnp.int32)
    end, states = lax.scan(following, state, starts)
    return jax.tree.map(lambda a, last: jnp.concatenate([a, last[None]]), states, end)
