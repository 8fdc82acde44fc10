"""What the public functions of every cell call: arguments checked, masks made, the rule run."""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from jaxseq import _checks, _sharding, _time
from jaxseq._recurrence._cell import Cell, Inputs, State, Weights
from jaxseq._recurrence._rule import recurrence
from jaxseq._time import Options


def sequence(
    cell: Cell,
    params: Any,
    carry: State | None,
    xs: Any,
    *,
    lengths: Any = None,
    resets: Any = None,
    reverse: Any = False,
    truncation: Any = None,
    checkpoint: Any = None,
    time_axis: Any = 0,
    unroll: Any = 1,
    precision: Any = None,
) -> tuple[State, jax.Array]:
    """A checked run over xs, whose axis `time_axis` is time."""
    xs = _checks.array("xs", xs)
    if xs.ndim < 2:
        _checks.bad_value("xs", "at least 2 axes (time, *batch, features)", str(xs.ndim), xs=xs)
    axis = _checks.axis("time_axis", time_axis, xs.ndim - 1, xs=xs)
    options = Options(
        reverse=_checks.boolean("reverse", reverse),
        truncation=_checks.truncation(truncation),
        checkpoint=_checks.checkpoint(checkpoint),
        axis=axis,
        unroll=_checks.integer("unroll", unroll, at_least=1),
        precision=_checks.precision(precision),
    )
    steps, batch = xs.shape[axis], (*xs.shape[:axis], *xs.shape[axis + 1 : -1])
    weights, carry = _operands(cell, params, carry, "xs", xs, axis, batch)
    if lengths is not None:
        lengths = _checks.lengths("lengths", lengths, batch, steps)
    if resets is not None:
        resets = _checks.mask("resets", resets)
        _checks.shape("resets", resets, xs.shape[:-1], "that of xs without features", xs=xs)
    if steps == 0:
        return carry, jnp.zeros((*xs.shape[:-1], weights.w_h.shape[0]), xs.dtype)
    live, stop, last = _time.masks(options, steps, lengths, resets)
    # Windows are counted from where each sequence is begun to be read.
    turned = lambda tree: tree  # noqa: E731
    if options.reverse and lengths is not None and options.truncation is not None:
        options = options._replace(reverse=False)
        turned = partial(jax.tree.map, partial(_time.turned, lengths=lengths, axis=axis))
    inputs = _sharding.together(Inputs(weights, carry, *turned((xs, live, stop))))
    run = _of_one if prod(batch) == 1 else recurrence
    result: tuple[State, jax.Array] = run(cell, options, inputs)
    return _time.zeroed(last, result[0]), turned(result[1])


def _of_one(cell: Cell, options: Options, inputs: Inputs) -> tuple[State, jax.Array]:
    """A batch of one as none: over axes of one XLA's CPU backend copies whole arrays, and takes up to 1.5 times as
    long. Where it may lie on several devices it stays.
    """
    weights, carry, xs, *masks = inputs
    if not _sharding.undivided():
        return recurrence(cell, options, inputs)
    steps = xs.shape[options.axis]
    one = Inputs(
        weights,
        jax.tree.map(lambda a: a.reshape(a.shape[-1]), carry),
        xs.reshape(steps, xs.shape[-1]),
        *(a if a is None else a.reshape(steps) for a in masks),
    )
    result: tuple[State, jax.Array] = recurrence(cell, options._replace(axis=0), one)
    out, ys = result
    return jax.tree.map(lambda a, like: a.reshape(like.shape), out, carry), ys.reshape(*xs.shape[:-1], ys.shape[-1])


def one_step(cell: Cell, params: Any, carry: State | None, x: Any, *, precision: Any) -> tuple[State, jax.Array]:
    """A checked sequence of one step, for x (*B, D): the body of somebody's own loop."""
    x = _checks.array("x", x)
    if x.ndim < 1:
        _checks.bad_value("x", "at least 1 axis (*batch, features)", "a scalar")
    options = Options(precision=_checks.precision(precision))
    weights, carry = _operands(cell, params, carry, "x", x, None, x.shape[:-1])
    inputs = _sharding.together(Inputs(weights, carry, x[None], None, None))
    out: tuple[State, jax.Array] = recurrence(cell, options, inputs)
    return out[0], out[1][0]


def _operands(
    cell: Cell, params: Any, carry: State | None, name: str, x: jax.Array, axis: int | None, batch: tuple[int, ...]
) -> tuple[Weights, State]:
    """The linear maps and the first state, checked against each other and x (*batch, D), with time at `axis` if any."""
    _checks.container("params", params, cell.params)
    w_x, w_h = _checks.array("params.w_x", params.w_x), _checks.array("params.w_h", params.w_h)
    gates = len(cell.gates)
    if w_h.ndim != 2 or w_h.shape[1] != gates * w_h.shape[0]:
        expected = f"shape (H, {gates} H), one block of H columns for each gate {', '.join(cell.gates)}"
        _checks.bad_value("params.w_h", expected, str(w_h.shape))
    hidden, width = w_h.shape
    if w_x.ndim != 2 or w_x.shape[1] != width:
        _checks.bad_value("params.w_x", f"shape (D, {width}) to go with `params.w_h`", str(w_x.shape), w_h=w_h)
    if x.shape[-1] != w_x.shape[0]:
        expected = f"{w_x.shape[0]} features on the last axis, the rows of `params.w_x`"
        _checks.bad_value(name, expected, str(x.shape[-1]), **{name: x, "w_x": w_x})
    biases = {
        f: None if b is None else _checks.array(f"params.{f}", b) for f, b in params._asdict().items() if f[0] == "b"
    }
    for field, bias in biases.items():
        if bias is not None:
            _checks.shape(f"params.{field}", bias, (width,), f"({gates} H,)", w_h=w_h)
    weights = Weights(w_x, w_h, biases.get("b", biases.get("b_x")), biases.get("b_h"))

    fields = ("",) if cell.state is None else tuple(f".{f}" for f in cell.state._fields)
    if carry is None:
        leaves = [_sharding.zeros((*batch, hidden), x, axis) for _ in fields]
    else:
        if cell.state is not None:
            _checks.container("carry", carry, cell.state)
        parts = (carry,) if cell.state is None else carry
        leaves = [_checks.array(f"carry{f}", part) for f, part in zip(fields, parts, strict=True)]
        for field, leaf in zip(fields, leaves, strict=True):
            _checks.shape(f"carry{field}", leaf, (*batch, hidden), "(*batch, H)", **{name: x, "w_h": w_h})
    return weights, leaves[0] if cell.state is None else cell.state(*leaves)
