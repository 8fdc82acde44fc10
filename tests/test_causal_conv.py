"""causal_conv against the whole sequence, separate episodes, loops over indices, and manually computed values."""

from functools import partial
from itertools import pairwise, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from helpers import assert_close, causal_conv, cotangents_for, normals, pullback, subjaxprs
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxseq
from jaxseq import reference

# (kernel, options): dense, dilated, grouped, depthwise, one tap
LONG = pytest.mark.long
KINDS = {
    "dense": ((3, 4, 5), {}),
    "dilated": ((3, 4, 5), {"dilation": 2}),
    "grouped": ((2, 2, 6), {"dilation": 3, "groups": 2}),
    "depthwise": ((4, 1, 4), {"groups": 4}),
    "one tap": ((1, 4, 5), {}),
}


def operands(key, kind, *, batch=(2,), T=9, dtype=jnp.float64):
    """Return (carry, x, kernel, bias) and the options."""
    (K, per_in, c_out), options = KINDS[kind]
    c_in, P = per_in * options.get("groups", 1), (K - 1) * options.get("dilation", 1)
    shapes = (*batch, P, c_in), (*batch, T, c_in), (K, per_in, c_out), (c_out,)
    return normals(key, tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes)), options


def pulled(f, args, cotangents):
    """Return (outputs, cotangents of args)."""
    return jax.jit(pullback(f))(args, cotangents)


def marks(*at, T=9):
    """Return resets at the given steps."""
    return jnp.zeros(T, bool).at[jnp.array(at, int)].set(True)


# --- Without resets ---


@pytest.mark.parametrize(
    ("kind", "batch"), [*((kind, (2,)) for kind in KINDS), ("dense", ()), ("depthwise", (2, 3)), ("grouped", (0, 2))]
)
def test_from_no_carry_it_is_the_causal_convolution(kind, batch, key):
    (_, x, w, b), options = operands(key, kind, batch=batch)
    ours = lambda x, w, b: causal_conv(None, x, w, b, **options)[1]  # noqa: E731
    conv = partial(jaxseq.conv, padding="CAUSAL", **options)
    y_bar = cotangents_for(conv, (x, w, b), key)
    assert_close(pulled(ours, (x, w, b), y_bar), pulled(conv, (x, w, b), y_bar), relative=1e-14)


def test_equals_the_filter_of_scipy(key):
    """A finite impulse response filter whose initial state comes from the preceding inputs."""
    carry, x, w = (jax.random.normal(jax.random.fold_in(key, n), (s, 1)) for n, s in enumerate((3, 8, 4)))
    taps = np.asarray(w)[::-1, 0]
    state = scipy.signal.lfiltic(taps, [1.0], y=[], x=np.asarray(carry)[::-1, 0])
    expected, _ = scipy.signal.lfilter(taps, [1.0], np.asarray(x)[:, 0], zi=state)
    np.testing.assert_allclose(causal_conv(carry, x, w[..., None])[1][:, 0], expected, atol=1e-14)


def test_by_hand():
    """The decimal digits of an output are the inputs at the current step, one step back and two steps back."""
    x, w = jnp.arange(3.0, 7.0)[:, None], jnp.array([100.0, 10.0, 1.0])[:, None, None]
    past = jnp.array([1.0, 2.0])[:, None]
    carry, y = causal_conv(past, x, w, jnp.array([0.5]))
    assert y[:, 0].tolist() == [123.5, 234.5, 345.5, 456.5]
    assert carry[:, 0].tolist() == [5, 6]
    carry, y = causal_conv(past, x, w, resets=marks(1, 3, T=4))
    assert y[:, 0].tolist() == [123, 4, 45, 6]
    assert carry[:, 0].tolist() == [0, 6]
    past = jnp.arange(1.0, 5.0)[:, None]
    carry, y = causal_conv(past, x[2:], w, dilation=2, resets=marks(0, T=2))
    assert y[:, 0].tolist() == [5, 6]
    assert carry[:, 0].tolist() == [0, 0, 5, 6]


# --- Chunks ---


def in_chunks(f, carry, x, w, b, *, resets, lengths):
    ys, t = [], 0
    for length in lengths:
        part = None if resets is None else resets[..., t : t + length]
        carry, y = f(carry, x[..., t : t + length, :], w, b, resets=part)
        ys.append(y)
        t += length
    return carry, jnp.concatenate(ys, -2)


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    kind=st.sampled_from(list(KINDS)),
    resets=st.one_of(st.none(), st.integers(0, 99)),
)
def test_chunks_of_any_lengths_are_the_whole(lengths, kind, resets):
    """Values and gradients, also with empty chunks, chunks of one step, and chunks shorter than the kernel."""
    key, T = jax.random.key(len(lengths)), sum(lengths)
    args, options = operands(key, kind, T=T)
    f = partial(causal_conv, **options)
    if resets is not None:
        resets = jax.random.bernoulli(jax.random.key(resets), 0.3, (2, T))
    whole = lambda *args: f(*args, resets=resets)  # noqa: E731
    chunks = lambda *args: in_chunks(f, *args, resets=resets, lengths=lengths)  # noqa: E731
    cotangents = cotangents_for(whole, args, key)
    expected = pulled(partial(causal_conv, module=reference, resets=resets, **options), args, cotangents)
    for run in (whole, chunks):
        assert_close(pulled(run, args, cotangents), expected, relative=1e-13)


@pytest.mark.parametrize("kind", ["dilated", "depthwise"])
@pytest.mark.parametrize("with_resets", [False, True])
def test_step_by_step_in_a_loop_is_the_whole(kind, with_resets, key):
    """In the body of `lax.scan`, as when sampling."""
    (carry, *rest), options = operands(key, kind)
    resets = jax.random.bernoulli(key, 0.3, (2, 9)) if with_resets else None
    f = partial(causal_conv, **options)

    def steps(carry, x, w, b):
        def step(carry, at):
            x, mark = at
            carry, y = f(carry, x[:, None], w, b, resets=None if mark is None else mark[:, None])
            return carry, y[:, 0]

        carry, ys = jax.lax.scan(step, carry, (x.swapaxes(0, 1), None if resets is None else resets.T))
        return carry, ys.swapaxes(0, 1)

    whole = partial(f, resets=resets)
    cotangents = cotangents_for(whole, (carry, *rest), key)
    expected = pulled(whole, (carry, *rest), cotangents)
    assert_close(pulled(steps, (carry, *rest), cotangents), expected, relative=1e-13)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_hand_the_carry_through(kind, with_resets, key):
    args, options = operands(key, kind, T=0)
    resets = jnp.zeros((2, 0), bool) if with_resets else None
    f = partial(causal_conv, resets=resets, **options)
    carry, y = f(*args)
    (last, _), (c_bar, x_bar, w_bar, b_bar) = pulled(f, args, (carry, y))
    assert_close((last, c_bar), (args[0], args[0]))
    assert x_bar.shape == args[1].shape
    assert not w_bar.any()
    assert not b_bar.any()


# --- Resets ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "at", [(1, 2, 6), *(pytest.param(at, marks=pytest.mark.long) for at in ((), (0,), (8,), tuple(range(9))))], ids=str
)
def test_each_episode_is_run_by_itself(kind, at, key):
    args, options = operands(key, kind, batch=())
    ours = partial(causal_conv, resets=marks(*at), **options)

    def separately(carry, x, w, b):
        ys = []
        for start, stop in pairwise(sorted({0, *at, 9})):
            carry, y = causal_conv(None if start in at else carry, x[start:stop], w, b, **options)
            ys.append(y)
        return carry, jnp.concatenate(ys)

    cotangents = cotangents_for(ours, args, key)
    actual, expected = (pulled(f, args, cotangents) for f in (ours, separately))
    assert_close(actual, expected, relative=1e-13)


def loops(z, w, resets, d, groups):
    """Return (y, z̄, w̄) by loops over indices, for ȳ = y. Taps across a boundary are skipped."""
    (rows, _), (K, per_in, c_out), T = z.shape, w.shape, len(resets)
    P = rows - T
    y, z_bar, w_bar = np.zeros((T, c_out)), np.zeros_like(z), np.zeros_like(w)
    terms = [
        (t, k, t + d * k, o // (c_out // groups) * per_in + i, i, o)
        for t, k, i, o in product(range(T), range(K), range(per_in), range(c_out))
        if not any(resets[s] for s in range(max(0, t + d * k - P + 1), t + 1))
    ]
    for t, k, m, c, i, o in terms:
        y[t, o] += z[m, c] * w[k, i, o]
    for t, k, m, c, i, o in terms:
        z_bar[m, c] += y[t, o] * w[k, i, o]
        w_bar[k, i, o] += y[t, o] * z[m, c]
    return y, z_bar, w_bar


@pytest.mark.parametrize("kind", KINDS)
def test_equals_loops_over_indices(kind, key):
    (carry, x, w, _), options = operands(key, kind, batch=())
    if kind == "one tap":
        carry = carry.reshape(0, 4)
    resets = np.array([0, 0, 1, 0, 0, 0, 1, 1, 0], bool)
    z = np.concatenate([carry, x])
    y, z_bar, w_bar = loops(z, np.asarray(w), resets, options.get("dilation", 1), options.get("groups", 1))
    f = lambda carry, x, w: causal_conv(carry, x, w, resets=jnp.asarray(resets), **options)[1]  # noqa: E731
    actual, (c_bar, x_bar, ours) = pulled(f, (carry, x, w), jnp.asarray(y))
    np.testing.assert_allclose(actual, y, atol=1e-13)
    np.testing.assert_allclose(np.concatenate([c_bar, x_bar]), z_bar, atol=1e-12)
    np.testing.assert_allclose(ours, w_bar, atol=1e-12)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("kind", ["dilated", "one tap"])
def test_each_sequence_ends_at_its_length(kind, with_resets, key):
    """Compare with each sequence cut at its length. The padding is NaN, in inputs and cotangents."""
    lengths = (0, 1, 6, 9)  # none, fewer steps than the kernel reaches, more, and all
    (carry, x, w, b), options = operands(key, kind, batch=(4,))
    resets = jax.random.bernoulli(key, 0.3, (4, 9)).at[:, 7:].set(True) if with_resets else None  # also in the padding
    f = partial(causal_conv, lengths=jnp.array(lengths), resets=resets, **options)
    padded = (jnp.arange(9)[None] >= jnp.array(lengths)[:, None])[..., None]
    last_bar, y_bar = cotangents_for(f, (carry, x, w, b), key)
    (last, y), gradients = pulled(
        f, (carry, jnp.where(padded, jnp.nan, x), w, b), (last_bar, jnp.where(padded, jnp.nan, y_bar))
    )
    assert not jnp.where(padded, y, 0).any()
    assert not jnp.where(padded, gradients[1], 0).any()
    totals = [jnp.zeros_like(w), jnp.zeros_like(b)]
    for i, n in enumerate(lengths):
        part = None if resets is None else resets[i, :n]
        one = partial(causal_conv, resets=part, **options)
        (own_last, own), (c_bar, x_bar, *of_params) = pulled(
            one, (carry[i], x[i, :n], w, b), (last_bar[i], y_bar[i, :n])
        )
        assert_close((last[i], y[i, :n], gradients[0][i], gradients[1][i, :n]), (own_last, own, c_bar, x_bar))
        totals = [total + part for total, part in zip(totals, of_params, strict=True)]
    assert_close(list(gradients[2:]), totals)


@pytest.mark.parametrize("axis", [0, 1, -3])
def test_time_on_another_axis(axis, key):
    """Two batch axes, with lengths and resets."""
    (carry, x, w, b), options = operands(key, "dense", batch=(2, 3))
    resets, lengths = jax.random.bernoulli(key, 0.3, (2, 3, 9)), jnp.array([[0, 9, 3], [2, 8, 5]])
    expected = causal_conv(carry, x, w, b, resets=resets, lengths=lengths, **options)
    at = jnp.moveaxis
    over = {"resets": at(resets, -1, axis % 4), "lengths": lengths, "time_axis": axis, **options}
    found = jaxseq.causal_conv(jaxseq.ConvParams(w, b), at(carry, -2, axis % 4), at(x, -2, axis % 4), **over)
    assert_close([at(a, axis % 4, -2) for a in found], list(expected))


@pytest.mark.parametrize("kind", ["dense", "grouped", "depthwise"])
def test_no_gradient_crosses_a_boundary(kind, key):
    """The gradient is exactly zero, also with infinite weights."""
    (carry, x, w, b), options = operands(key, kind)
    after = lambda f: lambda c, x: jax.tree.map(lambda a: a[..., -4:, :], f(c, x))  # noqa: E731 - carry', y from 5 on
    f = after(lambda c, x: causal_conv(c, x, w, b, resets=jnp.broadcast_to(marks(5), (2, 9)), **options))
    _, (c_bar, x_bar) = pulled(f, (carry, x), cotangents_for(f, (carry, x), key))
    assert not c_bar.any()
    assert not x_bar[:, :5].any()
    assert x_bar[:, 5:].all()
    # Infinite weights turn a zero into NaN if it is multiplied, but not if it is selected.
    f = lambda c, w: causal_conv(c, x, w, resets=jnp.broadcast_to(marks(0), (2, 9)), **options)  # noqa: E731
    _, (c_bar, _) = pulled(f, (carry, jnp.full_like(w, jnp.inf)), jax.tree.map(jnp.ones_like, f(carry, w)))
    assert not c_bar.any()


@pytest.mark.parametrize("kind", ["dense", "grouped", "depthwise"])
def test_what_is_not_seen_may_be_nan(kind, key):
    """NaN in the carry, before a boundary at its end, changes no value and no gradient, not even the kernel's."""
    (carry, *rest), options = operands(key, kind)
    resets = jnp.broadcast_to(marks(0, 5), (2, 9))
    f = jax.jit(pullback(partial(causal_conv, resets=resets, **options)))
    cotangents = normals(key, jax.eval_shape(partial(causal_conv, **options), carry, *rest))
    expected = f((jnp.zeros_like(carry), *rest), cotangents)
    assert_close(f((jnp.full_like(carry, jnp.nan), *rest), cotangents), expected, relative=0)
    # NaN in x, before the second boundary, changes nothing after it.
    x = rest[0].at[:, 3].set(jnp.nan)
    (last, y), (_, x_bar, *_) = f((carry, x, *rest[1:]), cotangents)
    assert not jnp.isfinite(y[:, 3:5]).all()
    assert_close((last, y[:, 5:], x_bar), (expected[0][0], expected[0][1][:, 5:], expected[1][1]), relative=0)


@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_resets_of_each_example(kind, key):
    """Results are the same for traced resets, mapped by vmap, and with one or two batch axes."""
    args, options = operands(key, kind, batch=(6,))
    resets = jax.random.bernoulli(key, 0.3, (6, 9))
    native = lambda r, c, x, w, b: causal_conv(c, x, w, b, resets=r, **options)  # noqa: E731
    mapped = jax.vmap(native, in_axes=(0, 0, 0, None, None))

    def two(r, c, x, w, b):
        r, c, x = (a.reshape(2, 3, *a.shape[1:]) for a in (r, c, x))
        return jax.tree.map(lambda a: a.reshape(6, *a.shape[2:]), native(r, c, x, w, b))

    cotangents = cotangents_for(native, (resets, *args), key)
    expected = pulled(native, (resets, *args), cotangents)
    for f in (mapped, two):
        assert_close(pulled(f, (resets, *args), cotangents), expected, relative=1e-13)


@pytest.mark.parametrize("with_resets", [False, True])
def test_many_kernels_for_one_signal(with_resets, key):
    """vmap over the kernels only: the carry is shared, and its cotangent must not count once for each kernel."""
    (carry, x, w, b), options = operands(key, "dense")
    ws = jnp.stack([w, 2 * w, -w])
    resets = jax.random.bernoulli(key, 0.3, (2, 9)) if with_resets else None
    mapped = lambda f: jax.vmap(partial(f, resets=resets, **options), in_axes=(None, None, 0, None))  # noqa: E731
    cotangents = cotangents_for(mapped(causal_conv), (carry, x, ws, b), key)
    ours, reference_op = (
        pulled(mapped(f), (carry, x, ws, b), cotangents) for f in (causal_conv, partial(causal_conv, module=reference))
    )
    assert_close(ours, reference_op, relative=1e-13)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("kind", "split"),
    [
        pytest.param(
            kind, split, marks=[] if (kind, split) in [("dense", "channels"), ("depthwise", "batch")] else LONG
        )
        for kind in ("dense", "grouped", "depthwise")
        for split in ("batch", "channels")
    ],
)
def test_no_axis_is_reshaped_that_lies_on_several_devices(kind, split, key):
    """Shard the second of two batch axes, or the channels, over an explicit mesh. See also test_sharding.py."""
    (carry, x, w, b), options = operands(key, kind, batch=(3, 2))
    resets = jax.random.bernoulli(key, 0.3, (3, 2, 9))
    batch, channels = PartitionSpec(None, "d"), PartitionSpec(None, None, None, "d")
    rows, marks = (batch, batch) if split == "batch" else (channels, PartitionSpec())

    def loss(carry, x, w, b, resets):
        results = causal_conv(carry, x, w, b, resets=resets, **options)
        return sum(jnp.sum(jnp.sin(a)) for a in results)

    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    expected = gradient(carry, x, w, b, resets)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    specs = rows, rows, PartitionSpec(), PartitionSpec(), marks
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip((carry, x, w, b, resets), specs, strict=True)
        ]
        assert_close(gradient(*placed), expected, relative=1e-13)


# --- Cost ---


def gradient_with_resets(K, groups, of=lambda f: f):
    """Return the gradient for K taps, transformed by `of`, and its arguments."""
    args = jnp.ones((2, 256, 8)), jnp.ones((K, 8 // groups, 8)), jnp.zeros((2, 256), bool)

    def loss(x, w, resets):
        carry, y = causal_conv(None, x, w, groups=groups, resets=resets)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(carry))

    return of(jax.grad(loss, (0, 1))), args


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_program_does_not_grow_with_the_window(groups):
    sizes = []
    for K in (2, 40):
        f, args = gradient_with_resets(K, groups)
        sizes.append(sum(1 for _ in subjaxprs(jax.make_jaxpr(f)(*args).jaxpr)))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("groups", [1, 8])
def test_memory_does_not_grow_with_the_window(groups):
    """Neither that of the gradient nor that of the second derivative."""

    def twice(gradient):
        return jax.grad(lambda x, w, r: sum(jnp.sum(a**2) for a in gradient(x, w, r)), (0, 1))

    for of in (lambda f: f, twice):
        few, many = (
            jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
            for f, args in (gradient_with_resets(K, groups, of) for K in (3, 24))
        )
        assert many < 1.3 * few


# --- Dtypes ---


@pytest.mark.parametrize("with_resets", [pytest.param(False, marks=LONG), True])
@pytest.mark.parametrize(
    ("of_carry", "of_x", "of_w"),
    [
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float64, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.float64),
        (jnp.complex128, jnp.complex64, jnp.complex64),
    ],
)
def test_each_keeps_its_dtype(with_resets, of_carry, of_x, of_w, key):
    (carry, x, w, b), options = operands(key, "grouped")
    args = carry.astype(of_carry), x.astype(of_x), w.astype(of_w), b.astype(of_w)
    if with_resets:
        options = {**options, "resets": jax.random.bernoulli(key, 0.3, (2, 9))}
    f, reference_op = (partial(causal_conv, module=module, **options) for module in (jaxseq, reference))
    carry, y = f(*args)
    assert (carry.dtype, y.dtype) == (of_carry, of_x)
    cotangents = cotangents_for(f, args, key)
    assert_close(pulled(f, args, cotangents), pulled(reference_op, args, cotangents), relative=2e-2)


@pytest.mark.parametrize("kind", ["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("with_resets", [False, True])
def test_complex_numbers(kind, with_resets, key):
    real, options = operands(key, kind)
    imaginary, _ = operands(jax.random.fold_in(key, 1), kind)
    args = jax.tree.map(jax.lax.complex, real, imaginary)
    if with_resets:
        options = {**options, "resets": jax.random.bernoulli(key, 0.3, (2, 9))}
    f, reference_op = (partial(causal_conv, module=module, **options) for module in (jaxseq, reference))
    parts = (normals(k, jax.eval_shape(f, *real)) for k in jax.random.split(key))
    cotangents = jax.tree.map(jax.lax.complex, *parts)
    assert_close(pulled(f, args, cotangents), pulled(reference_op, args, cotangents), relative=1e-13)
