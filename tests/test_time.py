"""Time options: the meaning of each, and all pairs of options against the reference implementation."""

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arguments, assert_close, bound, cotangents_for, in_chunks, normals, pullback, subjaxprs

import jaxseq
from jaxseq._cases import CASES

T, B = 7, 4
LENGTHS = np.array([3, 0, 7, 4])
RESETS = np.zeros((T, B), bool)
# Two consecutive resets from (2, 0), one at the first step (0, 2), and one in the padding (5, 0).
RESETS[[2, 3, 5, 0, 6, 4], [0, 0, 0, 2, 2, 3]] = True


def long(*values):
    """Return a parametrization that the default suite skips."""
    return pytest.param(*values, marks=pytest.mark.long)


def gradients(f, args, key):
    """Return the value of `f` and its gradient at random cotangents."""
    return jax.jit(pullback(f))(args, cotangents_for(f, args, key))


# --- lengths ---


@pytest.mark.parametrize(
    ("name", "options"),
    [("gru", {"truncation": (2, 3), "reverse": True}), ("lstm", {"checkpoint": 2})],
    ids=str,
)
def test_nothing_in_the_padding_counts(name, options, key):
    """NaN and resets in the padding change no value and no gradient."""
    params, carry, xs = arguments(name, "plain", key, batch=(B,), length=T)
    padding = jnp.arange(T)[:, None] >= LENGTHS[None]
    f = jax.jit(pullback(lambda p, c, x, r: CASES[name].op(p, c, x, lengths=jnp.asarray(LENGTHS), resets=r, **options)))
    ends = normals(key, jax.eval_shape(lambda: CASES[name].op(params, carry, xs)))
    clean = jnp.where(padding[..., None], 0, xs), jnp.asarray(RESETS & ~padding)
    dirty = jnp.where(padding[..., None], jnp.nan, xs), jnp.asarray(RESETS | padding)
    # The cotangent of ys in the padding is ignored too.
    spoilt = ends[0], jnp.where(padding[..., None], jnp.nan, ends[1])
    expected, actual = f((params, carry, *clean), ends), f((params, carry, *dirty), spoilt)
    assert_close(actual, expected, relative=0)
    ys, xs_bar = expected[0][1], expected[1][2]
    assert not ys[padding].any()
    assert not xs_bar[padding].any()
    assert ys[~padding].all()


@pytest.mark.parametrize("options", [long({}), {"truncation": (2, 3), "reverse": True}, {"checkpoint": 2}], ids=str)
def test_each_sequence_is_as_it_is_alone(options, key):
    """Values and gradients equal those of separate sequences without padding, also with truncation."""
    params, carry, xs = arguments("lstm", "plain", key, batch=(B,), length=T)
    op = partial(CASES["lstm"].op, **options)
    cotangents = normals(key, jax.eval_shape(op, params, carry, xs))

    def one_by_one(params, carry, xs):
        ends, ys = [], []
        for b, n in enumerate(LENGTHS):
            end, y = op(params, jax.tree.map(lambda a, b=b: a[b], carry), xs[:n, b])
            ends.append(end)
            ys.append(jnp.pad(y, [(0, T - n), (0, 0)]))
        return jax.tree.map(lambda *a: jnp.stack(a), *ends), jnp.stack(ys, 1)

    together = partial(op, lengths=jnp.asarray(LENGTHS))
    actual, expected = (jax.jit(pullback(f))((params, carry, xs), cotangents) for f in (together, one_by_one))
    assert_close(actual, expected)


# --- resets ---


@pytest.mark.parametrize(("name", "reverse"), [("gru", False), ("lstm", True)])
def test_a_reset_splits_the_sequence(name, reverse, key):
    """A reset at t equals two calls, for the steps before t and from t on; the one processed last starts from zero."""
    params, carry, xs = arguments(name, "plain", key, length=T)
    op = partial(CASES[name].op, reverse=reverse)
    marked = jax.jit(pullback(lambda params, carry, xs, resets: op(params, carry, xs, resets=resets)))
    cotangents = cotangents_for(op, (params, carry, xs), key)
    for t in (0, 3, T - 1):

        def split(params, carry, xs, t=t):
            zero = jax.tree.map(jnp.zeros_like, carry)
            early, late = xs[:t], xs[t:]
            if reverse:
                _, late = op(params, carry, late)
                end, early = op(params, zero, early)
            else:
                _, early = op(params, carry, early)
                end, late = op(params, zero, late)
            return end, jnp.concatenate([early, late])

        resets = np.broadcast_to(np.arange(T)[:, None] == t, (T, 2))
        outputs, (*found, _) = marked((params, carry, xs, resets), cotangents)
        actual = outputs, tuple(found)
        assert_close(actual, jax.jit(pullback(split))((params, carry, xs), cotangents))
        if t == 0 and not reverse:
            assert not any(leaf.any() for leaf in jax.tree.leaves(actual[1][1]))


@pytest.mark.parametrize(("name", "reverse"), [("lstm", False), ("gru", True)])
def test_after_a_reset_the_state_is_reset_state(name, reverse, key):
    """A reset at t equals two calls, the second of which starts from `reset_state`, with gradients to it."""
    params, carry, xs = arguments(name, "plain", key, length=T)
    fresh = normals(key, jax.tree.map(lambda a: a[0], carry), stream=2)  # one for all of the batch
    op = partial(CASES[name].op, reverse=reverse)
    cotangents = cotangents_for(op, (params, carry, xs), key)
    for t in (0, 3):
        resets = np.broadcast_to(np.arange(T)[:, None] == t, (T, 2))

        def marked(params, carry, xs, fresh, resets=resets):
            return op(params, carry, xs, resets=resets, reset_state=fresh)

        def split(params, carry, xs, fresh, t=t):
            fresh = jax.tree.map(lambda a: jnp.stack([a, a]), fresh)
            first, second = (xs[t:], xs[:t]) if reverse else (xs[:t], xs[t:])
            _, first = op(params, carry, first)
            end, second = op(params, fresh, second)
            return end, jnp.concatenate([second, first] if reverse else [first, second])

        args = params, carry, xs, fresh
        actual, expected = (jax.jit(pullback(f))(args, cotangents) for f in (marked, split))
        assert_close(actual, expected)
        assert all(leaf.any() for leaf in jax.tree.leaves(actual[1][3]))


@pytest.mark.parametrize("reverse", [False, True])
def test_no_gradient_crosses_a_reset(reverse, key):
    """The gradient of a loss after the boundary is exactly zero before it."""
    params, carry, xs = arguments("lstm", "plain", key, length=T)
    resets = jnp.broadcast_to(jnp.arange(T)[:, None] == 4, (T, 2))
    before, behind = (slice(4, T), slice(0, 4)) if reverse else (slice(0, 4), slice(4, T))
    loss = lambda carry, xs: CASES["lstm"].op(params, carry, xs, resets=resets, reverse=reverse)[1][behind].sum()  # noqa: E731
    carry_bar, xs_bar = jax.grad(loss, (0, 1))(carry, xs)
    assert not xs_bar[before].any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(carry_bar))
    assert xs_bar[behind].all()


@pytest.mark.parametrize("name", ["lstm"])
def test_chunks_with_resets_equal_the_whole(name, key):
    """The carry is passed from chunk to chunk, with resets at the edge of a chunk and within it."""
    args = (*arguments(name, "plain", key, length=T), jnp.asarray(RESETS[:, :2]))
    op = CASES[name].op

    def chunked(params, carry, xs, resets):
        parts = []
        for lo, hi in ((0, 2), (2, 2), (2, 6), (6, 7)):
            carry, ys = op(params, carry, xs[lo:hi], resets=resets[lo:hi])
            parts.append(ys)
        return carry, jnp.concatenate(parts)

    whole = lambda params, carry, xs, resets: op(params, carry, xs, resets=resets)  # noqa: E731
    assert_close(*(gradients(f, args, key) for f in (chunked, whole)))


# --- recurrent_dropout_mask and zoneout ---


def test_zoneout_of_all_and_of_none(key):
    params, carry, xs = arguments("gru", "plain", key, length=T)
    end, ys = jaxseq.gru(params, carry, xs, zoneout=jnp.ones((*xs.shape[:2], 5), bool))
    assert_close((end, ys), (carry, jnp.broadcast_to(carry, ys.shape)))
    none = jaxseq.gru(params, carry, xs, zoneout=0.0, recurrent_dropout_mask=jnp.ones_like(carry))
    assert_close(none, jaxseq.gru(params, carry, xs))


def test_all_dropped_there_is_no_recurrent_map(key):
    params, carry, xs = arguments("lstm", "plain", key, length=T)
    without = params._replace(w_h=jnp.zeros_like(params.w_h))
    recurrent_dropout_mask = jnp.zeros_like(carry.h)
    assert_close(
        jaxseq.lstm(params, carry, xs, recurrent_dropout_mask=recurrent_dropout_mask), jaxseq.lstm(without, carry, xs)
    )
    gradient = jax.grad(
        lambda w_h: jaxseq.lstm(params._replace(w_h=w_h), carry, xs, recurrent_dropout_mask=recurrent_dropout_mask)[
            1
        ].sum()
    )(params.w_h)
    np.testing.assert_array_equal(gradient, 0)


def test_no_gradient_flows_to_what_masks_and_zoneout(key):
    params, carry, xs = arguments("gru", "plain", key, length=T)
    op = partial(jaxseq.gru, params, carry, xs)
    f = lambda mask, zoneout: op(recurrent_dropout_mask=mask, zoneout=zoneout)[1].sum()  # noqa: E731
    found = jax.grad(f, (0, 1))(jnp.ones_like(carry), jnp.full((*xs.shape[:2], 5), 0.3))
    assert all((g == 0).all() for g in found)


def test_loop_of_steps_is_as_it_was_without_drop_and_hold(key):
    """Without these options, the program has no select."""
    args = arguments("gru", "plain", key, length=T)
    jaxpr = str(jax.make_jaxpr(pullback(jaxseq.gru))(args, jax.eval_shape(jaxseq.gru, *args)))
    assert "select_n" not in jaxpr


# --- Steps without effect: padding, and steps at which zoneout keeps the whole state ---

CELLS = [
    *(("recurrence", label) for label in CASES["recurrence"].variants if "," not in label),
    *(("rnn", "plain"), ("rnn", "relu"), ("gru", "plain"), ("lstm", "plain")),
    *((name, next(iter(CASES[name].variants))) for name in ("conv_gru", "conv_lstm")),
]
MIXES = [
    {},
    {"reverse": True, "lengths": True},
    {"truncation": (2, 3), "resets": True},
    {"checkpoint": 2, "lengths": True, "resets": True},
    {"truncation": 2, "reverse": True, "lengths": True, "resets": True},
    {"checkpoint": 2, "truncation": (1, 3), "unroll": 2, "recurrent_dropout_mask": True},
]


def whole_steps(a, b, mask):
    """Select, leaf by leaf, `a` where the mask (T, B) is true and `b` elsewhere."""
    choose = lambda a, b: jnp.where(mask.reshape(*mask.shape, *(1,) * (a.ndim - 2)), a, b)  # noqa: E731
    return jax.tree.map(choose, a, b)


FEW = ("leaky", "twice", "slstm", "relu")


@pytest.mark.parametrize(
    ("number", "use_reference"),
    [
        pytest.param(
            n,
            use_reference,
            id=f"{name}-{label}-{'reference' if use_reference else 'op'}",
            marks=[] if label in FEW or name == "gru" else pytest.mark.long,
        )
        for n, (name, label) in enumerate(CELLS)
        # The reference implementation has these two branches.
        for use_reference in ([False, True] if label in ("leaky", "relu") else [False])
    ],
)
def test_what_a_kept_step_reads_changes_nothing(number, use_reference, key):
    """NaN or infinity at a step that zoneout skips changes no value and no gradient.

    At the other steps, zoneout keeps some units.
    """
    name, label = CELLS[number]
    variant, options = CASES[name].variants[label], dict(MIXES[number % len(MIXES)])
    params, carry, xs = variant.arguments(key, dtype=jnp.float32, batch=(B,), length=T)
    keys = jax.random.split(key, 4)
    skipped = jax.random.bernoulli(keys[0], 0.4, (T, B))
    units = lambda a: jax.random.bernoulli(keys[1], 0.3, (T, *a.shape))  # noqa: E731
    zoneout = jax.tree.map(lambda a: whole_steps(jnp.ones((T, *a.shape), bool), units(a), skipped), carry)
    given = {"lengths": jnp.asarray(LENGTHS), "resets": jnp.asarray(RESETS)}
    given["recurrent_dropout_mask"] = jax.random.bernoulli(keys[2], 0.5, jax.tree.leaves(carry)[0].shape).astype(
        xs.dtype
    )
    options |= {option: value for option, value in given.items() if options.get(option)}
    options = {**{k: v for k, v in variant.options.items() if k in ("activation", "stride", "dilation")}, **options}
    op = partial(CASES[name].reference if use_reference else CASES[name].op, *variant.first, **options)
    f = jax.jit(pullback(lambda p, c, x: op(p, c, x, zoneout=zoneout)))
    cotangents = normals(keys[3], jax.eval_shape(op, params, carry, xs))
    spoilt = jnp.where(jax.random.bernoulli(key, 0.5, xs.shape), jnp.nan, jnp.inf).astype(xs.dtype)
    expected, actual = (
        f((params, carry, whole_steps(bad, xs, skipped)), cotangents) for bad in (jnp.full_like(xs, 3), spoilt)
    )
    assert_close(actual, expected, relative=0)
    assert not whole_steps(actual[1][2], jnp.zeros_like(xs), skipped).any()
    assert all(leaf.any() for leaf in jax.tree.leaves(actual[1][0]))


@pytest.mark.parametrize("name", ["gru", long("lstm")])
def test_kept_steps_are_as_if_they_were_not_there(name, key):
    """Values, gradients and a Hessian-vector product equal those of each sequence without these steps."""
    op, H, D = getattr(jaxseq, name), 16, 16
    params = getattr(jaxseq, f"{name}_init")(key, D, H)
    xs = jax.random.normal(key, (T, 2, D), jnp.float32)
    skipped = np.random.default_rng(0).random((T, 2)) < 0.4
    xs = jnp.where(skipped[..., None], jnp.nan, xs)
    mask = jnp.broadcast_to(skipped[..., None], (T, 2, H))
    zoneout = mask if name == "gru" else jaxseq.LSTMState(mask, mask)

    def loss(ys, skipped):
        return jnp.sum(jnp.where(skipped[..., None], 0, jnp.sin(ys)))

    def one_by_one(params, xs):
        return sum(loss(op(params, None, xs[~skipped[:, b], b])[1], skipped[~skipped[:, b], b]) for b in range(2))

    masked = lambda params, xs: loss(op(params, None, xs, zoneout=zoneout)[1], skipped)  # noqa: E731

    def derivatives(f):
        to_params = jax.grad(f)
        return jax.jit(
            lambda p, x: (*jax.value_and_grad(f, (0, 1))(p, x), jax.jvp(lambda p: to_params(p, x), (p,), (p,))[1])
        )

    actual, expected = (derivatives(f)(params, xs) for f in (masked, one_by_one))
    assert_close(actual, expected, relative=2e-5)


def unit(a, *_):
    """A step whose derivative is singular at zero and couples the units."""
    return a[0] / jnp.linalg.norm(a[0], axis=-1, keepdims=True)


class GainParams(NamedTuple):
    w_x: Any
    w_h: Any
    b: Any
    gain: Any


class ProductParams(NamedTuple):
    w_x: Any
    w_h: Any
    b: Any
    w_q: Any


def unit_pullback(residuals, _, h_bar):
    h, norm = residuals
    delta = (h_bar - h * jnp.sum(h * h_bar, -1, keepdims=True)) / norm
    return jaxseq.Pullback((delta,), jnp.zeros_like(h_bar))


def with_residuals(a, h):
    return jaxseq.StepResult(unit(a), (jaxseq.SAME_AS_H, jnp.linalg.norm(a[0], axis=-1, keepdims=True)))


def scaled(a, h, p):
    return jnp.expand_dims(p.gain, range(h.ndim - 1)) * unit(a)


SINGULAR = {
    "autodiff": (jaxseq.Cell("unit", "h", unit, jaxseq.RNNParams), {"reverse": True}),
    "hand-derived pullback": (
        jaxseq.Cell("unit", "h", with_residuals, jaxseq.RNNParams, pullback=unit_pullback),
        {"checkpoint": 2},
    ),
    "cell parameters": (jaxseq.Cell("scaled", "h", scaled, GainParams), {"truncation": (2, 3)}),
    "product inside": (jaxseq.Cell("product", "h", lambda a, h, L: L(unit(a)), ProductParams), {}),
}


def later(label, use_reference):
    return [] if label == "product inside" and not use_reference else pytest.mark.long


@pytest.mark.parametrize(
    ("cell", "options", "use_reference"),
    [
        pytest.param(
            cell,
            options,
            use_reference,
            id=f"{label}-{'reference' if use_reference else 'op'}",
            marks=later(label, use_reference),
        )
        for label, (cell, options) in SINGULAR.items()
        # The reference implementation ignores pullbacks, so the first two cells are the same.
        for use_reference in ([False] if cell.name == "unit" else [False, True])
    ],
)
def test_padding_is_not_differentiated(cell, options, use_reference, key):
    """For a step whose derivative at x = 0 is NaN, derivatives equal those without padding and empty sequences."""
    f = partial((jaxseq.reference if use_reference else jaxseq).recurrence, cell, **options)
    keys = jax.random.split(key, 5)
    sizes = {"w_x": (3, 4), "w_h": (4, 4), "gain": (4,), "w_q": (4, 4)}
    params = cell.params(
        **{
            field: None if field == "b" else jax.random.normal(k, sizes[field], jnp.float32)
            for field, k in zip(cell.params._fields, keys, strict=False)
        }
    )
    xs = jax.random.normal(keys[4], (6, 3, 3), jnp.float32)

    def padded(params, xs):
        return jnp.sum(jnp.sin(f(params, None, xs, lengths=jnp.array([4, 0, 4]))[1]))

    def cut(params, xs):
        return jnp.sum(jnp.sin(f(params, None, xs[:4, ::2])[1]))

    def derivatives(loss):
        both = jax.grad(loss, (0, 1))
        return jax.jit(lambda p, x: (both(p, x), jax.jvp(both, (p, x), (p, x))[1]))

    assert_close(*(derivatives(loss)(params, xs) for loss in (padded, cut)), relative=1e-4)


def test_zoneout_that_is_nan_in_the_padding_counts_for_nothing(key):
    params, carry, xs = arguments("gru", "plain", key, dtype=jnp.float32, batch=(B,), length=T)
    padding = (jnp.arange(T)[:, None] >= LENGTHS[None])[..., None]

    @partial(jax.jit, static_argnums=0)
    def derivatives(op, amount):
        zoneout = jnp.where(padding, amount, jnp.full((T, B, 5), 0.1)).astype(xs.dtype)
        loss = lambda p, x: jnp.sum(jnp.sin(op(p, carry, x, lengths=jnp.asarray(LENGTHS), zoneout=zoneout)[1]))  # noqa: E731
        both = jax.grad(loss, (0, 1))
        return both(params, xs), jax.jvp(both, (params, xs), (params, xs))[1]

    for op in (jaxseq.gru, jaxseq.reference.gru):
        assert_close(*(derivatives(op, amount) for amount in (jnp.nan, 0.1)), relative=1e-6)


@pytest.mark.parametrize("use_reference", [False, True], ids=["op", "reference"])
def test_zoneout_of_one_keeps_the_state_exactly(use_reference):
    """If the new state b is large, rounding makes b + k (a - b) differ from a at k = 1."""
    params = jaxseq.RNNParams(jnp.ones((1, 1), jnp.float32), jnp.ones((1, 1), jnp.float32), None)
    xs, h = jnp.full((2, 1, 1), 1e9, jnp.float32), jnp.full((1, 1), 1.5, jnp.float32)
    op = jaxseq.reference.rnn if use_reference else jaxseq.rnn
    for zoneout in (jnp.ones((2, 1, 1), jnp.float32), jnp.ones((2, 1, 1), bool)):
        np.testing.assert_array_equal(op(params, h, xs, activation="relu", zoneout=zoneout)[1].ravel(), 1.5)


@pytest.mark.parametrize(("name", "use_reference"), [("gru", False), ("lstm", False), ("lstm", True)])
def test_a_state_that_does_not_count_may_be_nan(name, use_reference, key):
    """The initial state may be NaN if the sequence is reset at t = 0 or has no steps."""
    params, carry, xs = arguments(name, "plain", key, dtype=jnp.float32, batch=(B,), length=T)
    op = CASES[name].reference if use_reference else CASES[name].op
    unused = np.array([False, True, True, False])
    assert LENGTHS[1] == 0
    assert RESETS[0, 2]
    masks = {"lengths": jnp.asarray(LENGTHS), "resets": jnp.asarray(RESETS)}
    weight = normals(key, jnp.zeros((T, B, 5), jnp.float32))

    @jax.jit
    def derivatives(bad):
        start = jax.tree.map(lambda a: jnp.where(unused[:, None], bad, a).astype(a.dtype), carry)
        loss = lambda p, c, x: jnp.sum(jnp.sin(op(p, c, x, **masks)[1]) * weight)  # noqa: E731
        all_of_them, args = jax.grad(loss, (0, 1, 2)), (params, start, xs)
        return all_of_them(*args), jax.jvp(lambda p: all_of_them(p, start, xs), (params,), (params,))[1]

    assert_close(derivatives(jnp.nan), derivatives(0.0), relative=0)


# --- return_states ---


@pytest.mark.parametrize("options", [{}, {"reverse": True, "checkpoint": 2}, {"truncation": 3}], ids=str)
def test_all_states_are_those_of_a_loop(options, key):
    """Compare with `lstm_cell` in a loop of the test, with a loss of every h, every c and every output."""
    args = arguments("lstm", "plain", key, length=T)
    f = partial(CASES["lstm"].op, return_states=True, **options)

    def loop(params, carry, xs):
        states, order = {}, range(T - 1, -1, -1) if options.get("reverse") else range(T)
        for n, t in enumerate(order):
            if n and n % options.get("truncation", T) == 0:
                carry = jax.lax.stop_gradient(carry)
            carry, _ = jaxseq.reference.lstm_cell(params, carry, xs[t])
            states[t] = carry
        states = jax.tree.map(lambda *a: jnp.stack(a), *(states[t] for t in range(T)))
        return states, states.h

    assert_close(gradients(f, args, key), gradients(loop, args, key))


def test_states_of_layers(key):
    """A stack returns those of every layer, `bidirectional` those of both directions."""
    params, _, xs = arguments("lstm", "plain", key, length=T)
    both = lambda p, carry, xs, **time: jaxseq.bidirectional(jaxseq.lstm, [p, p], carry, xs, **time)  # noqa: E731
    fresh = jaxseq.LSTMState(jnp.ones(5), jnp.full(5, -0.5))
    marks = {"resets": jnp.asarray(RESETS[:, :2]), "return_states": True}
    ((states, back),), ys = jaxseq.stack([both], [params], None, xs, reset_state=[(fresh, fresh)], **marks)
    expected, hs = jaxseq.lstm(params, None, xs, reset_state=fresh, **marks)
    assert_close((states, ys[..., :5]), (expected, hs))
    assert_close(back.h, ys[..., 5:])


# --- checkpoint and time_axis ---


@pytest.mark.parametrize(
    ("name", "steps"), [long("rnn", 1), ("gru", 5), long("lstm", 2), long("lstm", 20), ("lstm", "auto")]
)
def test_a_checkpoint_changes_nothing(name, steps, key):
    args = arguments(name, "plain", key, length=T)
    checkpointed = partial(CASES[name].op, checkpoint=steps)
    assert_close(gradients(checkpointed, args, key), gradients(bound(name, "plain"), args, key), relative=1e-13)


@pytest.mark.parametrize(("steps", "kept"), [(1, 12), (3, 4), (5, 3), (12, 1), (20, 1), ("auto", 3)])
def test_what_a_checkpoint_keeps(steps, kept, key):
    """Residuals are the arguments, ys, and the state at the start of each segment. ceil(sqrt(12)) is 4."""
    args = arguments("lstm", "plain", key, length=12)
    _, vjp = jax.vjp(partial(CASES["lstm"].op, checkpoint=steps), *args)
    bytes_kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    given = sum(leaf.nbytes for leaf in jax.tree.leaves(args))
    assert bytes_kept == given + (12 + 2 * kept) * 2 * 5 * 8


def promised():
    """Yield the entries (op, T, checkpoint, units) of the table in docs/time.md."""
    text = (Path(__file__).parents[1] / "docs" / "time.md").read_text("utf-8")
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    for name, steps, *units in (row for row in rows if row[0] in CASES):
        for checkpoint, unit in zip((None, 8, 32, 128, "auto"), units[:5], strict=True):
            yield name, int(steps), checkpoint, float(unit)


PROMISED = [
    pytest.param(*p, marks=[] if p[0] == "lstm" and p[2] in (None, 8) else pytest.mark.long)
    for p in promised()
    if p[1] == 1024
]


@pytest.mark.parametrize(("name", "steps", "checkpoint", "units"), PROMISED)
def test_temporary_bytes_are_what_the_docs_say(name, steps, checkpoint, units):
    batch, hidden = 16, 64
    args = (
        getattr(jaxseq, f"{name}_init")(jax.random.key(0), hidden, hidden),
        None,
        jnp.ones((steps, batch, hidden), "f4"),
    )
    f = partial(CASES[name].op, checkpoint=checkpoint)
    cotangents = jax.eval_shape(f, *args)
    program = jax.jit(pullback(f)).lower(args, cotangents).compile()
    found = program.memory_analysis().temp_size_in_bytes / (steps * batch * hidden * 4)
    assert found <= 1.1 * units + 0.02


@pytest.mark.parametrize("axis", [1, long(2), long(-3), -2])
def test_time_at_another_axis(axis, key):
    params, carry, xs = arguments("lstm", "plain", key, batch=(2, 3), length=T)
    place = axis % xs.ndim
    op = CASES["lstm"].op
    moved = lambda params, carry, xs: op(params, carry, xs, time_axis=axis)  # noqa: E731

    def time_first(params, carry, xs):
        end, ys = op(params, carry, jnp.moveaxis(xs, place, 0))
        return end, jnp.moveaxis(ys, 0, place)

    args = params, carry, jnp.moveaxis(xs, 0, place)
    assert_close(gradients(moved, args, key), gradients(time_first, args, key), relative=1e-13)


def test_no_transpose_of_a_batch_major_input(key):
    """Each step is sliced out of xs, which is never transposed as a whole."""
    params, carry, xs = arguments("gru", "plain", key, batch=(6,), length=T)
    f = lambda p, c, x: CASES["gru"].op(p, c, x, time_axis=1)  # noqa: E731
    equations = subjaxprs(jax.make_jaxpr(f)(params, carry, jnp.moveaxis(xs, 0, 1)).jaxpr)
    whole = {e.primitive.name for e in equations for v in e.outvars if v.aval.shape in ((6, T, 3), (T, 6, 3))}
    assert whole == {"stop_gradient"}


# --- Combinations ---

OPTIONS = {
    "lengths": (None, LENGTHS),
    "resets": (None, RESETS),
    "reverse": (False, True),
    "truncation": (None, 3, (2, 5)),
    "checkpoint": (None, 2, "auto"),
    "time_axis": (0, 1),
    "unroll": (1, 2),
    "precision": (None, "highest"),
    "recurrent_dropout_mask": (None, True),
    "zoneout": (None, "mask", "amount"),
    "reset_state": (None, True),
    "return_states": (False, True),
}


def levels(row):
    return {((i, a), (j, b)) for (i, a), (j, b) in combinations(enumerate(row), 2)}


def covering():
    """Return rows of levels that cover every pair of levels of every pair of options, chosen greedily among some."""
    rng, sizes = np.random.default_rng(0), [len(values) for values in OPTIONS.values()]
    rows = [tuple(map(int, row)) for row in rng.integers(0, sizes, (500, len(sizes)))]
    left, chosen = set().union(*map(levels, rows)), []
    while left:
        row = max(rows, key=lambda row: len(levels(row) & left))
        chosen.append(row)
        left -= levels(row)
    return chosen


ROWS = covering()


# rnn, whose only residual is h, takes a separate branch for fractional zoneout. lstm covers all other branches.
EACH_PAIR = [("rnn", (0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0)), *(("lstm", row) for row in ROWS)]


@pytest.mark.parametrize(
    ("name", "row"), [pytest.param(name, row, id=f"{name}-{''.join(map(str, row))}") for name, row in EACH_PAIR]
)
def test_every_pair_of_options_against_the_reference(name, row, key):
    """Without checkpointing, the backward pass runs in three chunks."""
    options = {name: values[level] for (name, values), level in zip(OPTIONS.items(), row, strict=True)}
    params, carry, xs = arguments(name, "plain", key, batch=(B,), length=T)
    axis, resets = options["time_axis"], options["resets"]
    if options["lengths"] is not None:
        options["lengths"] = jnp.asarray(options["lengths"])
    if resets is not None:
        options["resets"] = jnp.moveaxis(jnp.asarray(resets), 0, axis)
    keys = iter(jax.random.split(key, 8))
    if options["recurrent_dropout_mask"]:
        options["recurrent_dropout_mask"] = 1.5 * jax.random.bernoulli(next(keys), 0.6, (B, 5)).astype(xs.dtype)
    if options["zoneout"]:
        draw = {"mask": partial(jax.random.bernoulli, p=0.3), "amount": partial(jax.random.uniform, dtype=xs.dtype)}
        sizes = (*xs.shape[:2], 5)
        leaf = lambda _: jnp.moveaxis(draw[options["zoneout"]](next(keys), shape=sizes), 0, axis)  # noqa: E731
        options["zoneout"] = jax.tree.map(leaf, carry)
    if options["reset_state"]:
        options["reset_state"] = normals(key, carry, stream=3)
    args = params, carry, jnp.moveaxis(xs, 0, axis)
    with in_chunks(3):
        actual = gradients(lambda *a: CASES[name].op(*a, **options), args, key)
    assert_close(actual, gradients(lambda *a: CASES[name].reference(*a, **options), args, key))


def test_few_rows_hold_every_pair():
    assert len(ROWS) <= 18
    pairs = sum(len(a) * len(b) for a, b in combinations(OPTIONS.values(), 2))
    assert len(set().union(*map(levels, ROWS))) == pairs


@pytest.mark.parametrize("options", [long({"reverse": True}), {"truncation": (2, 3)}, {"checkpoint": "auto"}], ids=str)
def test_nothing_at_all(options, key):
    """No steps, an empty batch, or only empty sequences."""
    for sizes in ({"length": 0}, {"batch": (0,)}, {"batch": (3,)}):
        params, carry, xs = arguments("lstm", "plain", key, **sizes)
        lengths = jnp.zeros(xs.shape[1], int)
        resets = jnp.ones(xs.shape[:-1], bool)
        f = lambda p, c, x, o=options, n=lengths, r=resets: CASES["lstm"].op(p, c, x, lengths=n, resets=r, **o)  # noqa: E731
        (end, ys), (w_bar, carry_bar, xs_bar) = gradients(f, (params, carry, xs), key)
        assert_close(end, carry)
        assert not ys.any()
        assert not xs_bar.any()
        assert not any(leaf.any() for leaf in jax.tree.leaves(w_bar))
        assert all(leaf.all() for leaf in jax.tree.leaves(carry_bar))


def test_second_order_of_options_together(key):
    """Hessian-vector products with lengths, resets and truncation, where two windows reach back to the carry."""
    params, carry, xs = arguments("lstm", "plain", key, batch=(2,), length=5)
    options = {"lengths": jnp.array([5, 3]), "resets": jnp.asarray(RESETS[:5, :2]), "truncation": (2, 4)}

    def hvp(f):
        value = lambda args: sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(f(*args, **options)))  # noqa: E731
        direction = normals(key, (params, carry, xs))
        return jax.jit(jax.grad(lambda args: inner(jax.grad(value)(args), direction)))((params, carry, xs))

    inner = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))  # noqa: E731
    assert_close(hvp(CASES["lstm"].op), hvp(CASES["lstm"].reference), relative=1e-9)
