"""Side inputs of a cell: what reaches the step beside the input map. Judged by a loop in the test."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, cotangents_for, mesh_of, normals, place, pullback
from jax.sharding import PartitionSpec as P

import jaxseq
from jaxseq import reference

T, B, D, H = 7, 3, 4, 5
LENGTHS = jnp.array([0, 5, 7])


class Params(NamedTuple):
    w_x: Any
    w_h: Any
    b: Any
    rate: Any  # of the decay, a parameter of the cell


class ProductParams(NamedTuple):
    w_x: Any
    w_h: Any
    b: Any
    w_q: Any


class State(NamedTuple):
    h: Any
    c: Any


def decay(dt, rate):
    """The state decays over the time between two steps, which is a side input."""
    return jnp.exp(-jnp.expand_dims(dt, -1) * rate)


def step(a, h, p, side):
    """A leaky unit over irregular steps, whose action (an integer) flips the sign of the input."""
    keep = decay(side["dt"], jnp.expand_dims(p.rate, range(h.ndim - 1)))
    sign = jnp.where(side["action"] == 1, -1.0, 1.0)[..., None].astype(h.dtype)
    return keep * h + (1 - keep) * sign * jnp.tanh(a[0])


def step_with_residuals(a, h, p, side):
    return jaxseq.StepResult(step(a, h, p, side), jnp.tanh(a[0]))


def pull_back(n, h, h_bar, p, side):
    rate = jnp.expand_dims(p.rate, range(h.ndim - 1))
    dt, keep = jnp.expand_dims(side["dt"], -1), decay(side["dt"], rate)
    sign = jnp.where(side["action"] == 1, -1.0, 1.0)[..., None].astype(h.dtype)
    keep_bar = h_bar * (h - sign * n) * keep  # times -dt and -rate
    return jaxseq.Pullback(
        delta=(h_bar * (1 - keep) * sign * (1 - n * n),),
        state_bar=keep * h_bar,
        params_bar=p._replace(rate=-dt * keep_bar),
        side_bar={"dt": jnp.sum(-rate * keep_bar, -1), "action": None},
    )


def two_leaves(a, s, side):
    c = s.c * decay(side["dt"], 0.5) + jnp.tanh(a[0])
    h = jnp.where(side["action"][..., None] == 1, jnp.tanh(c), s.h)
    return State(h, c)


def with_product(a, h, L, side):
    return L(jnp.tanh(a[0])) * decay(side["dt"], 0.3) + 0.5 * h


CELLS = {
    "autodiff": jaxseq.Cell("decay", "h", step, Params, side_inputs=True),
    "pullback": jaxseq.Cell("decay", "h", step_with_residuals, Params, pullback=pull_back, side_inputs=True),
    "two leaves": jaxseq.Cell("two", "h", two_leaves, jaxseq.RNNParams, state=State, side_inputs=True),
    "product": jaxseq.Cell("product", "h", with_product, ProductParams, side_inputs=True),
}


def operands(label, key, *, batch=(B,), T=T, dtype=jnp.float64):
    """Return (params, carry, x, dt), and the actions."""
    cell = CELLS[label]
    sizes = {"w_x": (D, H), "w_h": (H, H), "b": (H,), "rate": (H,), "w_q": (H, H)}
    like = lambda shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    params = cell.params(*(like(sizes[field]) for field in cell.params._fields))
    carry = like((*batch, H)) if cell.state is None else cell.state(*[like((*batch, H))] * 2)
    args = normals(key, (params, carry, like((T, *batch, D)), like((T, *batch))))
    return (*args[:3], jnp.abs(args[3])), jnp.asarray(np.random.default_rng(0).integers(0, 2, (T, *batch)))


def loop(cell, params, carry, x, dt, *, actions):
    """Run the cell in a Python loop, differentiated by JAX."""
    ys, state = [], carry
    for t in range(T):
        h = state if cell.state is None else state.h
        a = (x[t] @ params.w_x + params.b + h @ params.w_h,)
        more = [params] if "rate" in params._fields else []
        more += [lambda q: q @ params.w_q] if "w_q" in params._fields else []
        new = cell.step(a, state, *more, {"dt": dt[t], "action": actions[t]})
        state = new.state if cell.pullback else new
        ys.append(state if cell.state is None else state.h)
    return state, jnp.stack(ys)


def sequence(namespace, cell, params, carry, x, dt, *, actions, **time):
    return namespace.recurrence(cell, params, carry, (x, {"dt": dt, "action": actions}), **time)


@pytest.mark.parametrize(("label", "options"), [(label, {}) for label in CELLS] + [("two leaves", {"checkpoint": 3})])
def test_equals_a_loop(label, options, key):
    """Values, and the gradients of everything, the time differences included."""
    args, actions = operands(label, key)
    with jax.numpy_rank_promotion("allow"):
        f = partial(sequence, jaxseq, CELLS[label], actions=actions, **options)
        of_loop = partial(loop, CELLS[label], actions=actions)
        cotangents = cotangents_for(f, args, key)
        actual, expected = (jax.jit(pullback(g))(args, cotangents) for g in (f, of_loop))
    assert_close(actual, expected)
    assert actual[1][3].all()


@pytest.mark.parametrize(
    ("label", "options"),
    [
        ("autodiff", {"truncation": (2, 3), "reverse": True}),
        ("pullback", {"lengths": LENGTHS, "truncation": 3, "reverse": True}),
        ("two leaves", {"lengths": LENGTHS, "resets": True, "checkpoint": 2}),
    ],
    ids=str,
)
def test_time_options(label, options, key):
    """Against the reference implementation. Where there are lengths, the padding of every input is NaN."""
    args, actions = operands(label, key)
    if "resets" in options:
        options = {**options, "resets": jax.random.bernoulli(key, 0.3, (T, B))}
    padding = jnp.arange(T)[:, None] >= options.get("lengths", jnp.full(B, T))[None]
    spoilt = (*args[:2], jnp.where(padding[..., None], jnp.nan, args[2]), jnp.where(padding, jnp.nan, args[3]))
    f, by_jax = (partial(sequence, m, CELLS[label], actions=actions, **options) for m in (jaxseq, reference))
    cotangents = cotangents_for(f, args, key)
    assert_close(jax.jit(pullback(f))(spoilt, cotangents), jax.jit(pullback(by_jax))(args, cotangents))


def test_second_derivatives(key):
    """With lengths, where the padding is NaN."""
    args, actions = operands("autodiff", key, dtype=jnp.float64)
    padding = jnp.arange(T)[:, None] >= LENGTHS[None]
    spoilt = (*args[:2], args[2], jnp.where(padding, jnp.nan, args[3]))

    def twice(namespace, args):
        loss = lambda *args: jnp.sum(  # noqa: E731
            jnp.sin(sequence(namespace, CELLS["autodiff"], *args, actions=actions, lengths=LENGTHS)[1])
        )
        gradient = lambda *args: sum(jnp.sum(jnp.cos(a)) for a in jax.tree.leaves(jax.grad(loss, (0, 2, 3))(*args)))  # noqa: E731
        return jax.jit(jax.grad(gradient, (0, 2, 3)))(*args)

    assert_close(twice(jaxseq, spoilt), twice(reference, args))


def test_one_step_in_a_scan(key):
    (params, carry, x, dt), actions = operands("pullback", key)
    expected = sequence(jaxseq, CELLS["pullback"], params, carry, x, dt, actions=actions)
    step = partial(jaxseq.recurrence_cell, CELLS["pullback"], params)
    assert_close(jax.lax.scan(step, carry, (x, {"dt": dt, "action": actions})), expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_time_on_another_axis(axis, key):
    """With two batch axes, mapped by vmap over the first, and with a batch of one."""
    (params, carry, x, dt), actions = operands("two leaves", key, batch=(2, 1))
    expected = sequence(jaxseq, CELLS["two leaves"], params, carry, x, dt, actions=actions)
    over = {"dt": jnp.moveaxis(dt, 0, axis), "action": jnp.moveaxis(actions, 0, axis)}
    _, ys = jaxseq.recurrence(CELLS["two leaves"], params, carry, (jnp.moveaxis(x, 0, axis), over), time_axis=axis)
    assert_close(jnp.moveaxis(ys, axis, 0), expected[1])
    mapped = jax.vmap(
        lambda carry, x, dt, actions: sequence(jaxseq, CELLS["two leaves"], params, carry, x, dt, actions=actions),
        in_axes=(0, 1, 1, 1),
        out_axes=(0, 1),
    )
    assert_close(mapped(carry, x, dt, actions), expected)


@pytest.mark.eight_devices
@pytest.mark.parametrize("sharded", ["batch", "time"])
def test_over_devices(sharded, key):
    args, actions = operands("pullback", key, batch=(8,), T=8)
    expected = jax.jit(jax.grad(lambda *args: sum_of_sines(CELLS["pullback"], args, actions), (0, 1, 2, 3)))(*args)
    mesh = mesh_of((8,), ("d",), "explicit")
    spec = P("d") if sharded == "time" else P(None, "d")
    with jax.set_mesh(mesh):
        placed = place(mesh, args, (P(), P(*spec[1:]), spec, P()))  # the side inputs follow the input
        found = jax.jit(jax.grad(lambda *args: sum_of_sines(CELLS["pullback"], args, actions), (0, 1, 2, 3)))(*placed)
        assert_close(found, expected)


def sum_of_sines(cell, args, actions):
    return jnp.sum(jnp.sin(sequence(jaxseq, cell, *args, actions=actions)[1]))


@pytest.mark.other_types
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda cell, p, x, side: (cell, p, x),
            r"`xs`: expected a pair \(xs, side inputs\), because the cell 'decay' has",
        ),
        (lambda cell, p, x, side: (cell, p, (x,)), r"`xs`: expected a pair \(xs, side inputs\), .*, got tuple"),
        (
            lambda cell, p, x, side: (cell, p, (x, {**side, "dt": side["dt"][:2]})),
            r"`side input\['dt'\]`: expected a shape that begins with \(7, 3\), as that of the input, got \(2, 3\)",
        ),
        (
            lambda cell, p, x, side: (cell, p, (x, {**side, "dt": 0.1})),
            r"`side input\['dt'\]`: expected an array, got float 0\.1",
        ),
        (
            lambda cell, p, x, side: (cell._replace(side_inputs=False), p, (x, side)),
            r"`xs`: expected a float array, got tuple; only a cell with `side_inputs=True` takes a pair",
        ),
        (
            lambda cell, p, x, side: (cell._replace(side_inputs=1), p, (x, side)),
            r"`decay\.side_inputs`: expected True or False",
        ),
        (
            lambda cell, p, x, side: (
                cell._replace(pullback=lambda *args: pull_back(*args)._replace(side_bar=None)),
                p,
                (x, side),
            ),
            r"`decay\.pullback`: expected `side_bar` like the side inputs, None for those that are not floats",
        ),
    ],
)
def test_errors(call, expected, key):
    (params, carry, x, dt), actions = operands("pullback", key)
    cell, params, xs = call(CELLS["pullback"], params, x, {"dt": dt, "action": actions})
    with pytest.raises((TypeError, ValueError), match=expected):
        jaxseq.recurrence(cell, params, carry, xs)


def exponential(a, h, dt):
    keep = decay(dt, 1.0)
    return keep * h + (1 - keep) * jnp.tanh(a[0])


def test_the_first_layer_of_a_stack(key):
    """With zoneout, recurrent dropout and a residual connection, whose masks have the axes of the first part."""
    irregular = jaxseq.Cell("irregular", "h", exponential, jaxseq.RNNParams, side_inputs=True)
    params = [jaxseq.rnn_init(k, D, D, dtype=jnp.float64) for k in jax.random.split(key)]
    xs = normals(key, jax.ShapeDtypeStruct((T, B, D), jnp.float64)), jnp.full((T, B), 0.3)
    options = {"zoneout": 0.1, "recurrent_dropout": 0.2, "key": key, "residual": True, "lengths": LENGTHS}
    found, expected = (
        m.stack([partial(m.recurrence, irregular), m.rnn], params, None, xs, **options)[1] for m in (jaxseq, reference)
    )
    assert_close(found, expected)
