"""Bidirectional layers and stacks against torch; dropout, zoneout and residual connections."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arguments, assert_close, cotangents_for, pullback

import jaxseq
from jaxseq import _layers, bidirectional, cells, gru, stack
from jaxseq._init import normal


def weights(kind, key, D, H):
    """Return nonzero parameters of one layer."""
    like = jax.eval_shape(partial(getattr(jaxseq, f"{kind}_init"), key, D, H, dtype=jnp.float64))
    return jax.tree.map(lambda a: 0.4 * normal(jax.random.fold_in(key, a.size), a.shape), like)


def in_both(kind, params, carry, xs, **time):
    """Apply a stack of bidirectional layers."""
    return jaxseq.stack(partial(jaxseq.bidirectional, getattr(jaxseq, kind)), params, carry, xs, **time)


@pytest.mark.parametrize("lengths", [None, [6, 2, 4]], ids=["whole", "lengths"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_two_layers_of_both_directions_equal_torch(kind, lengths, key):
    torch = pytest.importorskip("torch")
    keys = jax.random.split(key, 4)
    params = [[weights(kind, k, D, 5) for k in ks] for D, ks in ((3, keys[:2]), (10, keys[2:]))]
    xs = normal(key, (6, 3, 3))
    time = {} if lengths is None else {"lengths": jnp.array(lengths)}
    f = lambda params, xs: in_both(kind, params, None, xs, **time)  # noqa: E731
    cotangents = cotangents_for(f, (params, xs), key)
    (ends, ys), (p_bar, xs_bar) = jax.jit(pullback(f))((params, xs), cotangents)

    layer = getattr(torch.nn, kind.upper())(3, 5, num_layers=2, bidirectional=True).double()
    suffixes = [[f"l{i}", f"l{i}_reverse"] for i in range(2)]
    for i in range(2):
        for p, suffix in zip(params[i], suffixes[i], strict=True):
            w_x, w_h, b_x, b_h = (*p, jnp.zeros_like(p[2]))[:4]
            for name, a in (("weight_ih", w_x.T), ("weight_hh", w_h.T), ("bias_ih", b_x), ("bias_hh", b_h)):
                getattr(layer, f"{name}_{suffix}").data = torch.tensor(np.asarray(a))
    x = torch.tensor(np.asarray(xs), requires_grad=True)
    pack = torch.nn.utils.rnn
    out, end = layer(x if lengths is None else pack.pack_padded_sequence(x, lengths, enforce_sorted=False))
    out = out if lengths is None else pack.pad_packed_sequence(out)[0]
    end = end if kind == "lstm" else (end,)
    array = lambda t: jnp.asarray(t.detach().numpy())  # noqa: E731
    assert_close(ys, array(out))
    for i in range(2):
        for d in range(2):
            assert_close(jax.tree.leaves(ends[i][d]), [array(e[2 * i + d]) for e in end])

    cs_bar, ys_bar = jax.tree.map(lambda a: torch.tensor(np.asarray(a)), cotangents)
    loss = (out * ys_bar).sum()
    for i in range(2):
        for d in range(2):
            loss = loss + sum((e[2 * i + d] * c).sum() for e, c in zip(end, jax.tree.leaves(cs_bar[i][d]), strict=True))
    loss.backward()
    assert_close(xs_bar, jnp.asarray(x.grad.numpy()))
    for i in range(2):
        for p, suffix in zip(p_bar[i], suffixes[i], strict=True):
            grads = [getattr(layer, f"{name}_{suffix}").grad.numpy() for name in ("weight_ih", "weight_hh", "bias_ih")]
            assert_close(list(p[:3]), [jnp.asarray(g.T) for g in grads])


def test_different_layers_and_a_residual_link(key):
    keys = jax.random.split(key, 3)
    params = [
        weights("rnn", keys[0], 5, 5),
        cells.mgu_init(keys[1], 5, 5, dtype=jnp.float64),
        weights("lstm", keys[2], 5, 5),
    ]
    layers = [partial(jaxseq.rnn, activation="relu"), cells.mgu, jaxseq.lstm]  # a cell is a layer, too
    xs = normal(key, (6, 2, 5))
    ends, ys = jaxseq.stack(layers, params, None, xs, residual=True, truncation=4)
    _, a = layers[0](params[0], None, xs)
    end, b = jaxseq.recurrence(cells.mgu, params[1], None, xs + a)
    _, c = layers[2](params[2], None, xs + a + b)
    assert_close(ys, xs + a + b + c)
    assert_close(ends[1], end)


def test_both_directions_of_a_cell(key):
    params, xs = [cells.mgu_init(k, 3, 5, dtype=jnp.float64) for k in jax.random.split(key)], normal(key, (6, 2, 3))
    actual = jaxseq.bidirectional(cells.mgu, params, None, xs, zoneout=0.2)
    forwards, ys = jaxseq.recurrence(cells.mgu, params[0], None, xs, zoneout=0.2)
    backwards, zs = jaxseq.recurrence(cells.mgu, params[1], None, xs, zoneout=0.2, reverse=True)
    assert_close(actual, ((forwards, backwards), jnp.concatenate([ys, zs], -1)))
    layer = partial(jaxseq.reference.recurrence, cells.mgu)
    assert_close(actual, jaxseq.reference.bidirectional(layer, params, None, xs, zoneout=0.2))


@pytest.mark.other_types
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda p, q, xs: jaxseq.stack(jaxseq.gru, [p, p], None, xs),
            r"`xs`: expected 3 features .*, got 5 .*\n?in layer 1 of jaxseq\.stack, counted from 0",
        ),
        (
            lambda p, q, xs: jaxseq.stack(jaxseq.gru, [p, q], None, xs, residual=True),
            r"`residual`: expected False, or layers with outputs of the shape of their inputs, \(6, 2, 3\), "
            r"got True and outputs \(6, 2, 5\)\n?in layer 0 of",
        ),
        (
            lambda p, q, xs: jaxseq.bidirectional(cells.mgu, [q, p], None, xs),
            r"expected MGUParams\(.*\n?in the forward direction of jaxseq\.bidirectional",
        ),
        (
            lambda p, q, xs: jaxseq.stack(jaxseq.gru_cell, [p, p], None, xs),
            r"`layer`: expected a function of a sequence, such as gru, got gru_cell",
        ),
        (
            lambda p, q, xs: jaxseq.bidirectional(partial(jaxseq.recurrence_cell, cells.gru), [p, p], None, xs),
            r"`layer`: expected a function of a sequence, such as recurrence, got recurrence_cell",
        ),
        (lambda p, q, xs: jaxseq.stack([jaxseq.gru, 3], [p, q], None, xs), r"`layer`: .* or a jaxseq\.Cell, got int 3"),
    ],
    ids=["features", "residual", "direction", "one step", "one step of any cell", "no layer"],
)
def test_errors_name_the_layer(call, expected, key):
    p, q = jaxseq.gru_init(key, 3, 5), jaxseq.gru_init(key, 5, 5)
    with pytest.raises((TypeError, ValueError), match=expected):
        call(p, q, jnp.ones((6, 2, 3)))


@pytest.mark.parametrize("namespace", [jaxseq, jaxseq.reference], ids=["op", "reference"])
def test_a_residual_link_does_not_read_the_padding(namespace, key):
    """In the padding, ys is zero, and NaN in xs changes no value and no gradient."""
    params = [jaxseq.gru_init(k, 16, 16) for k in jax.random.split(key)]
    lengths = jnp.array([5, 2, 0])
    padding = (jnp.arange(5)[:, None] >= lengths[None])[..., None]
    xs = normal(key, (5, 3, 16)).astype(jnp.float32)
    op = partial(namespace.stack, namespace.gru, residual=True, lengths=lengths)

    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, xs):
        _, ys = op(params, None, xs)
        return jnp.sum(ys**2), ys

    both = jax.jit(loss)
    assert_close(*(both(params, jnp.where(padding, fill, xs).astype(xs.dtype)) for fill in (jnp.nan, 3.0)), relative=0)
    (_, ys), _ = both(params, xs)
    assert not jnp.where(padding, ys, 0).any()


def test_a_stack_handed_on_equals_the_whole(key):
    params = [weights("gru", k, 5, 5) for k in jax.random.split(key)]
    xs = normal(key, (7, 2, 5))
    whole = jaxseq.stack(jaxseq.gru, params, None, xs, residual=True)
    carry, first = jaxseq.stack(jaxseq.gru, params, None, xs[:3], residual=True)
    carry, second = jaxseq.stack(jaxseq.gru, params, carry, xs[3:], residual=True)
    assert_close((carry, jnp.concatenate([first, second])), whole)


def test_dropout_is_between_layers_and_keeps_the_mean(key):
    seen = []

    def spy(params, carry, xs, **time):
        seen.append(xs)
        return carry, xs

    xs = jnp.ones((50, 20, 10))
    jaxseq.stack(spy, [None] * 3, None, xs, dropout=0.3, key=key)
    np.testing.assert_array_equal(seen[0], xs)
    np.testing.assert_allclose(np.unique(seen[1]), [0, 1 / 0.7])
    assert all(abs(float(between.mean()) - 1) < 0.03 for between in seen[1:])
    dropped = [np.asarray(a == 0) for a in (seen[1], seen[2])]
    assert 0.28 < dropped[0].mean() < 0.32
    assert (dropped[1] & ~dropped[0]).any(), "expected a different mask for each layer"


def masks_of(layers, params, xs, **options):
    """Return the masks that a stack passes to its layers."""
    given = []

    def spy(params, carry, xs, **time):
        given.append({option: time.pop(option, None) for option in ("recurrent_dropout_mask", "zoneout")})
        return jaxseq.lstm(params, carry, xs, **time)

    stack([spy] * layers, params, None, xs, **options)
    return [g for g in given if g["recurrent_dropout_mask"] is not None or g["zoneout"] is not None]


def test_recurrent_dropout_is_one_mask_for_a_sequence_and_layer(key):
    params = [weights("lstm", k, 20, 20) for k in jax.random.split(key)]
    first, second = masks_of(2, params, jnp.ones((3, 100, 20)), recurrent_dropout=0.3, key=key)
    for recurrent_dropout_mask in (first["recurrent_dropout_mask"], second["recurrent_dropout_mask"]):
        assert recurrent_dropout_mask.shape == (100, 20)
        np.testing.assert_allclose(np.unique(recurrent_dropout_mask), [0, 1 / 0.7])
        assert 0.67 < (recurrent_dropout_mask > 0).mean() < 0.73
    assert (first["recurrent_dropout_mask"] != second["recurrent_dropout_mask"]).any()


def test_a_number_of_zoneout_holds_for_every_leaf_of_the_state(key):
    params, carry, xs = arguments("lstm", "plain", key, length=4)
    both = jaxseq.LSTMState(0.3, 0.3)
    expected = jaxseq.reference.lstm(params, carry, xs, zoneout=both)
    for op in (jaxseq.lstm, jaxseq.reference.lstm):
        assert_close(op(params, carry, xs, zoneout=0.3), expected)


def test_zoneout_is_drawn_for_each_step_and_leaf_or_taken_in_the_mean(key):
    params = [weights("lstm", key, 20, 20)]
    (given,) = masks_of(1, params, jnp.ones((30, 10, 20)), zoneout=0.2, key=key)
    h, c = given["zoneout"]
    assert h.shape == c.shape == (30, 10, 20)
    assert h.dtype == bool
    assert (h != c).any()
    assert 0.17 < h.mean() < 0.23
    (given,) = masks_of(1, params, jnp.ones((30, 10, 20)), zoneout=0.2)
    assert given["zoneout"] == jaxseq.LSTMState(0.2, 0.2)


def test_without_dropout_no_key_is_needed(key):
    params = [weights("gru", k, 5, 5) for k in jax.random.split(key)]
    assert_close(*(jaxseq.stack(jaxseq.gru, params, None, jnp.ones((3, 2, 5)), key=k) for k in (None, key)))


def test_convolutional_layers(key):
    keys = jax.random.split(key)
    params = [jaxseq.conv_lstm_init(keys[0], 3, 1, 4), jaxseq.conv_gru_init(keys[1], 3, 4, 2)]
    layers = [partial(jaxseq.conv_lstm, stride=2), jaxseq.conv_gru]
    _, ys = jaxseq.stack(layers, params, None, jnp.ones((5, 2, 8, 1), jnp.float32))
    assert ys.shape == (5, 2, 4, 2)


PARAMS = [jaxseq.gru_init(jax.random.key(i), 3, 3) for i in range(2)]
XS = jnp.ones((4, 2, 3), jnp.float32)


@pytest.mark.other_types
@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: stack(gru, PARAMS[0], None, XS), TypeError, r"`params`: expected a sequence"),
        (lambda: stack(gru, [], None, XS), TypeError, r"`params`: expected a sequence"),
        (
            lambda: stack([gru], PARAMS, None, XS),
            ValueError,
            r"`layer`: expected a sequence of 2, .* got 1",
        ),
        (
            lambda: stack(gru, PARAMS, [None], XS),
            ValueError,
            r"`carry`: expected a sequence of 2, .* got 1",
        ),
        (lambda: stack("gru", PARAMS, None, XS), TypeError, r"`layer`: expected a sequence of 2"),
        (lambda: stack(["gru", "gru"], PARAMS, None, XS), TypeError, r"`layer`: expected a function"),
        (
            lambda: stack(gru, PARAMS, None, XS, dropout=0.1),
            ValueError,
            r"`key`: expected a JAX random key",
        ),
        (
            lambda: stack(gru, PARAMS, None, XS, dropout=1.0),
            ValueError,
            r"`dropout`: expected .* got 1\.0",
        ),
        (lambda: stack(gru, PARAMS, None, XS, dropout="a"), TypeError, r"`dropout`: expected a number"),
        (
            lambda: bidirectional(gru, PARAMS[:1], None, XS),
            ValueError,
            r"`params`: expected a sequence of 2",
        ),
        (
            lambda: bidirectional(gru, PARAMS, None, XS, reverse=True),
            ValueError,
            r"`reverse`: expected False",
        ),
        (lambda: bidirectional(gru, PARAMS, XS[0], XS), TypeError, r"`carry`: expected a sequence of 2"),
        (
            lambda: bidirectional(gru, PARAMS, None, XS, truncate=3),
            TypeError,
            r"bidirectional: got an unexpected",
        ),
    ],
)
def test_bad_layers(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_as_many_masks_as_a_nested_layer_has_states(key):
    carry = tuple(jnp.zeros((2, 5)) for _ in range(70))
    masks = _layers.dropout_masks(key, carry, jnp.ones((3, 2, 5)), 0, recurrent_dropout=0.5, zoneout=0.0)
    assert len({np.asarray(m).tobytes() for m in masks["recurrent_dropout_mask"]}) > 60
