"""Values and gradients against torch, whose recurrences nobody here wrote. Needs the extra `peers`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arguments, assert_close, cotangents_for, pullback

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
    (last, ys), (p̄, c̄, x̄s) = jax.jit(pullback(f))(args, cotangents)

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
    assert_close([x̄s, *jax.tree.leaves(c̄)], gradients([x, *states]))
    assert_close(p̄.w_x, gradients([layer.weight_ih_l0])[0].T)
    assert_close(p̄.w_h, gradients([layer.weight_hh_l0])[0].T)
    assert_close(p̄[2], gradients([layer.bias_ih_l0])[0])
    if name == "gru":
        assert_close(p̄.b_h, gradients([layer.bias_hh_l0])[0])


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
    """The carry laid in front of x."""
    c_out = options.get("groups", 8)
    shapes = (2, 2 * options.get("dilation", 1), 4), (2, 9, 4), (3, 4 // options.get("groups", 1), c_out), (c_out,)
    args = tuple(normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes))
    f = partial(CASES["causal_conv"].op, **options)
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
    """Both have output or input channels first on the kernel, and space last."""
    args = tuple(normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes))
    f = partial(CASES[name].op, **options)
    y, vjp = jax.vjp(f, *args)
    ȳ = cotangents_for(f, args, key)
    x, w, b = tensors(*args)
    out = getattr(torch.nn.functional, its_name)(x.movedim(-1, 1), w.movedim((-1, -2), (0, 1)), b, **theirs)
    out = out.movedim(1, -1)
    (out * torch.tensor(np.asarray(ȳ))).sum().backward()
    assert_close(y, jnp.asarray(out.detach().numpy()))
    assert_close(list(vjp(ȳ)), gradients([x, w, b]))
