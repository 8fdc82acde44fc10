"""Values and gradients against other libraries. Needs the extra `peers`."""

from contextlib import ExitStack
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arguments, assert_close, causal_conv, cotangents_for, pullback

import jaxseq
from jaxseq import cells
from jaxseq._cases import CASES
from jaxseq._init import normal

torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")


def tensors(*arrays):
    return [torch.tensor(np.asarray(a), requires_grad=True) for a in arrays]


def gradients(tensors):
    return [jnp.asarray(t.grad.numpy()) for t in tensors]


@pytest.mark.parametrize(
    ("name", "ours", "kind", "theirs"),
    [
        ("rnn", {"activation": "tanh"}, "RNN", {"nonlinearity": "tanh"}),
        ("rnn", {"activation": "relu"}, "RNN", {"nonlinearity": "relu"}),
        ("gru", {}, "GRU", {}),
        ("lstm", {}, "LSTM", {}),
    ],
)
def test_recurrence_equals_torch(name, ours, kind, theirs, key):
    f = partial(CASES[name].op, **ours)
    params, carry, xs = args = arguments(name, "plain", key)
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 1))
    (last, ys), (p_bar, c_bar, xs_bar) = jax.jit(pullback(f))(args, cotangents)

    layer = getattr(torch.nn, kind)(3, 5, **theirs).double()
    w_x, w_h, b_x, b_h = (*params, jnp.zeros_like(params[2]))[:4]
    weights = {"weight_ih_l0": w_x.T, "weight_hh_l0": w_h.T, "bias_ih_l0": b_x, "bias_hh_l0": b_h}
    layer.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in weights.items()})
    (x,), states = tensors(xs), tensors(*jax.tree.leaves(carry))
    first = [s[None] for s in states]
    out, end = layer(x, tuple(first) if kind == "LSTM" else first[0])
    end = end if kind == "LSTM" else (end,)
    assert_close(ys, jnp.asarray(out.detach().numpy()))
    assert_close(jax.tree.leaves(last), [jnp.asarray(e[0].detach().numpy()) for e in end])

    seeds = [torch.tensor(np.asarray(s)) for s in jax.tree.leaves(cotangents)]
    loss = (out * seeds[-1]).sum() + sum((e[0] * s).sum() for e, s in zip(end, seeds[:-1], strict=True))
    loss.backward()
    assert_close([xs_bar, *jax.tree.leaves(c_bar)], gradients([x, *states]))
    assert_close(p_bar.w_x, gradients([layer.weight_ih_l0])[0].T)
    assert_close(p_bar.w_h, gradients([layer.weight_hh_l0])[0].T)
    assert_close(p_bar[2], gradients([layer.bias_ih_l0])[0])
    if name == "gru":
        assert_close(p_bar.b_h, gradients([layer.bias_hh_l0])[0])


@pytest.mark.parametrize(
    ("axes", "options", "theirs"),
    [
        (1, {"stride": 2, "padding": 3, "output_padding": 1}, {"stride": 2, "padding": 3, "output_padding": 1}),
        (
            2,
            {"dilation": (2, 1), "groups": 2, "padding": ((1, 1), (2, 2)), "stride": (1, 3)},
            {"dilation": (2, 1), "groups": 2, "padding": (1, 2), "stride": (1, 3)},
        ),
        (3, {"groups": 4, "stride": (1, 2, 3)}, {"groups": 4, "stride": (1, 2, 3)}),
    ],
    ids=["1d", "2d", "3d"],
)
def test_transposed_convolution_equals_torch(axes, options, theirs, key):
    groups = options.get("groups", 1)
    shapes = (2, *(9, 8, 7)[:axes], 4), (*(3, 2, 4)[:axes], 8 // groups, 4), (8,)
    convolution_equals_torch("conv_transpose", f"conv_transpose{axes}d", shapes, options, theirs, key)


@pytest.mark.parametrize(
    ("axes", "options", "theirs"),
    [
        (1, {"stride": 2, "padding": 3}, {"stride": 2, "padding": 3}),
        (
            2,
            {"dilation": (2, 1), "groups": 2, "padding": ((1, 1), (2, 2))},
            {"dilation": (2, 1), "groups": 2, "padding": (1, 2)},
        ),
        (3, {"groups": 4, "stride": (1, 2, 3)}, {"groups": 4, "stride": (1, 2, 3)}),
    ],
    ids=["1d", "2d", "3d"],
)
def test_convolution_equals_torch(axes, options, theirs, key):
    groups = options.get("groups", 1)
    shapes = (2, *(9, 8, 7)[:axes], 4), (*(3, 2, 4)[:axes], 4 // groups, 8), (8,)
    convolution_equals_torch("conv", f"conv{axes}d", shapes, options, theirs, key)


@pytest.mark.parametrize("options", [{}, {"dilation": 3, "groups": 2}, {"groups": 4}], ids=str)
def test_causal_convolution_equals_torch(options, key):
    """Compare with torch on the concatenation of the carry and x."""
    c_out = options.get("groups", 8)
    shapes = (2, 2 * options.get("dilation", 1), 4), (2, 9, 4), (3, 4 // options.get("groups", 1), c_out), (c_out,)
    args = tuple(normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes))
    f = partial(causal_conv, **options)
    (last, y), vjp = jax.vjp(f, *args)
    cotangents = cotangents_for(f, args, key)
    carry, x, w, b = tensors(*args)
    z = torch.cat([carry, x], 1)
    out = torch.nn.functional.conv1d(z.movedim(-1, 1), w.permute(2, 1, 0), b, **options).movedim(1, -1)
    end = z[:, 9:]
    sum((o * torch.tensor(np.asarray(c))).sum() for o, c in zip((end, out), cotangents, strict=True)).backward()
    assert_close([last, y], [jnp.asarray(o.detach().numpy()) for o in (end, out)])
    assert_close(list(vjp(cotangents)), gradients([carry, x, w, b]))


def convolution_equals_torch(name, its_name, shapes, options, theirs, key):
    """Compare with torch, whose kernels have channels first and space last."""
    args = tuple(normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes))
    f = partial(CASES[name].op, **options)
    y, vjp = jax.vjp(f, *args)
    y_bar = cotangents_for(f, args, key)
    x, w, b = tensors(*args)
    out = getattr(torch.nn.functional, its_name)(x.movedim(-1, 1), w.movedim((-1, -2), (0, 1)), b, **theirs)
    out = out.movedim(1, -1)
    (out * torch.tensor(np.asarray(y_bar))).sum().backward()
    assert_close(y, jnp.asarray(out.detach().numpy()))
    assert_close(list(vjp(y_bar)), gradients([x, w, b]))


def loosely():
    """Allow the implicit promotion that other libraries rely on."""
    stack = ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    return stack


def test_projected_lstm_equals_torch(key):
    f = partial(jaxseq.recurrence, cells.projected_lstm)
    params, carry, xs = args = arguments("recurrence", "projected_lstm", key)
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 1))
    (last, ys), (p_bar, c_bar, xs_bar) = jax.jit(pullback(f))(args, cotangents)

    layer = torch.nn.LSTM(3, 5, proj_size=4).double()
    w_x, w_h, b, w_q = params
    weights = {
        "weight_ih_l0": w_x.T,
        "weight_hh_l0": w_h.T,
        "bias_ih_l0": b,
        "bias_hh_l0": 0 * b,
        "weight_hr_l0": w_q.T,
    }
    layer.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in weights.items()})
    x, h, c = tensors(xs, *carry)
    out, end = layer(x, (h[None], c[None]))
    seeds = [torch.tensor(np.asarray(s)) for s in jax.tree.leaves(cotangents)]
    ((out * seeds[-1]).sum() + sum((e[0] * s).sum() for e, s in zip(end, seeds[:-1], strict=True))).backward()
    assert_close([ys, *last], [jnp.asarray(a.detach().numpy()) for a in (out, end[0][0], end[1][0])])
    assert_close([xs_bar, *c_bar], gradients([x, h, c]))
    found = gradients([layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.weight_hr_l0])
    assert_close(p_bar, cells.ProjectedLSTMParams(found[0].T, found[1].T, found[2], found[3].T))


def test_minimal_gated_unit_equals_flax(key):
    nn = pytest.importorskip("flax.linen")
    f = partial(jaxseq.recurrence, cells.mgu)
    args = arguments("recurrence", "mgu", key)
    args = (args[0]._replace(b_h=args[0].b_h.at[:5].set(0)), *args[1:])  # Flax has no second bias of f
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 1))

    def theirs(params, carry, xs):
        w_x, w_h, b_x, b_h = (jnp.split(a, 2, -1) for a in params)
        maps = {"if": (w_x[0], b_x[0]), "in": (w_x[1], b_x[1]), "hf": (w_h[0], None), "hn": (w_h[1], b_h[1])}
        weights = {k: {"kernel": w} | ({} if b is None else {"bias": b}) for k, (w, b) in maps.items()}
        model = nn.RNN(nn.MGUCell(5, reset_gate=True), time_major=True, return_carry=True)
        return model.apply({"params": {"cell": weights}}, xs, initial_carry=carry)

    with loosely():
        expected = pullback(theirs)(args, cotangents)
    assert_close(no_bias_of_f(pullback(f)(args, cotangents)), no_bias_of_f(expected))


def no_bias_of_f(result):
    """Drop the gradient of the bias that Flax lacks."""
    out, (params, *others) = result
    return out, (params._replace(b_h=params.b_h[5:]), *others)


def test_classic_gru_equals_haiku(key):
    hk = pytest.importorskip("haiku")
    f = partial(jaxseq.recurrence, cells.classic_gru)
    args = arguments("recurrence", "classic_gru", key)
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 1))
    unroll = hk.without_apply_rng(hk.transform(lambda xs, h: hk.dynamic_unroll(hk.GRU(5), xs, h))).apply

    def theirs(params, carry, xs):
        """Haiku's gates are z, r, a, where z is 1 - z of jaxseq, so the weights of z change sign."""

        def negate_z(a):
            r, z, *n = jnp.split(a, a.shape[-1] // 5, -1)
            return jnp.concatenate([-z, r, *n], -1)

        w_h = jnp.concatenate([params.w_h, params.w_q], -1)
        weights = {"w_i": negate_z(params.w_x), "w_h": negate_z(w_h), "b": negate_z(params.b)}
        return unroll({"gru": weights}, xs, carry)[::-1]

    with loosely():
        expected = pullback(theirs)(args, cotangents)
    assert_close(pullback(f)(args, cotangents), expected)


@pytest.mark.parametrize("axes", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("options", [{"padding": "SAME"}, {"padding": "VALID", "stride": 2}], ids=str)
def test_conv_lstm_equals_keras(axes, options, key, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    space, kernel_size = (6, 5, 4)[:axes], (3, 2, 2)[:axes]
    draw = lambda i, *shape: normal(jax.random.fold_in(key, i), shape) * 0.4  # noqa: E731
    params = jaxseq.LSTMParams(draw(1, *kernel_size, 2, 12), draw(2, *kernel_size, 3, 12), draw(3, 12))
    xs = draw(4, 4, 2, *space, 2)
    f = partial(jaxseq.conv_lstm, **options)
    like = jax.eval_shape(f, params, None, xs)
    carry = jaxseq.LSTMState(*(draw(i, *leaf.shape) for i, leaf in enumerate(like[0], 5)))
    args = params, carry, xs
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 9))
    with loosely():
        layer = getattr(keras.layers, f"ConvLSTM{axes}D")(
            3,
            kernel_size,
            strides=options.get("stride", 1),
            padding=options["padding"].lower(),
            return_sequences=True,
            return_state=True,
            dtype="float64",
        )
        layer.build((2, 4, *space, 2))
        others = [variable.value for variable in layer.non_trainable_variables]

        def theirs(params, carry, xs):
            weights = [params.w_x, params.w_h, params.b]
            first = jnp.swapaxes(xs, 0, 1)
            (ys, *last), _ = layer.stateless_call(weights, others, first, initial_state=list(carry))
            return jaxseq.LSTMState(*last), jnp.swapaxes(ys, 0, 1)

        expected = jax.jit(pullback(theirs))(args, cotangents)
    assert_close(jax.jit(pullback(f))(args, cotangents), expected, relative=1e-5)  # Keras rounds to float32
