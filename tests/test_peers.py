"""Values and gradients against torch, whose recurrences nobody here wrote. Needs the extra `peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arguments, assert_close, bound, compiled, cotangents_for

torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")


def tensors(*arrays):
    return [torch.tensor(np.asarray(a), requires_grad=True) for a in arrays]


def gradients(tensors):
    return [jnp.asarray(t.grad.numpy()) for t in tensors]


@pytest.mark.parametrize(
    ("name", "label", "kind", "options"),
    [
        ("rnn", "plain", "RNN", {"nonlinearity": "tanh"}),
        ("rnn", "relu-full", "RNN", {"nonlinearity": "relu"}),
        ("gru", "plain", "GRU", {}),
        ("lstm", "plain", "LSTM", {}),
    ],
)
def test_equals_torch(name, label, kind, options, key):
    relu = label == "relu-full"
    f = (lambda *a: bound("rnn", "plain")(*a, activation="relu")) if relu else bound(name, label)
    params, carry, xs = args = arguments(name, "plain", key)
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 1))
    (last, ys), (p̄, c̄, x̄s) = (jax.jit(lambda a, c: (f(*a), jax.vjp(f, *a)[1](c))) if relu else compiled(name, label))(
        args, cotangents
    )

    layer = getattr(torch.nn, kind)(3, 5, **options).double()
    ours = dict(params._asdict())
    ours["b_x"] = ours.pop("b", ours.get("b_x"))
    theirs = {"weight_ih_l0": ours["w_x"].T, "weight_hh_l0": ours["w_h"].T, "bias_ih_l0": ours["b_x"]}
    theirs["bias_hh_l0"] = ours.get("b_h", jnp.zeros_like(ours["b_x"]))
    layer.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in theirs.items()})
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
    import jaxseq

    groups = options.get("groups", 1)
    shapes = (2, *(9, 8, 7)[:axes], 4), (*(3, 2, 4)[:axes], 4 // groups, 8), (8,)
    args = tuple(jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes))
    f = lambda *a: jaxseq.conv(*a, **options)  # noqa: E731
    y, vjp = jax.vjp(f, *args)
    ȳ = cotangents_for(f, args, key)
    x, w, b = tensors(*args)
    out = getattr(torch.nn.functional, f"conv{axes}d")(x.movedim(-1, 1), w.movedim((-1, -2), (0, 1)), b, **theirs)
    out = out.movedim(1, -1)
    (out * torch.tensor(np.asarray(ȳ))).sum().backward()
    assert_close(y, jnp.asarray(out.detach().numpy()))
    assert_close(list(vjp(ȳ)), gradients([x, w, b]))
