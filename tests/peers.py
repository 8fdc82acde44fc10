"""Helpers to compare functions with NumPy, by differences, and with other libraries."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq


def differences(f, args, cotangents):
    """Return the gradient by central differences of fourth order, in the convention of JAX for complex arguments."""
    leaves, tree = jax.tree.flatten(args)
    leaves = [np.array(leaf) for leaf in leaves]

    def loss():
        outputs = f(*jax.tree.unflatten(tree, leaves))
        return sum(np.sum(bar * out).real for bar, out in zip(cotangents, outputs, strict=True))

    def derivative(leaf, index, step):
        value, total = leaf[index], 0.0
        for steps, weight in ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)):
            leaf[index] = value + steps * step
            total += weight * loss()
        leaf[index] = value
        return total / abs(step)

    gradients = []
    for leaf in leaves:
        found = np.zeros_like(leaf)
        for index in np.ndindex(leaf.shape):
            found[index] = derivative(leaf, index, 1e-3)
            if np.iscomplexobj(leaf):
                found[index] -= 1j * derivative(leaf, index, 1e-3j)
        gradients.append(jnp.asarray(found))
    return jax.tree.unflatten(tree, gradients)


def need(module):
    """Import another library, whose import may warn about its dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
        return torch, pytest.importorskip(module, reason=f"{module} is not installed (extra `peers`)")


def in_torch(torch, run, args, cotangents):
    """Return what `pullback` returns, for a function of tensors. Its first output may be None: not available.

    The gradient of torch for a complex tensor is the conjugate of that of JAX.
    """
    leaves, tree = jax.tree.flatten(args)
    tensors = [torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in leaves]
    outputs = run(*jax.tree.unflatten(tree, tensors))
    pairs = [(o, torch.tensor(np.asarray(c))) for o, c in zip(outputs, cotangents, strict=True) if o is not None]
    loss = sum((bar * out).sum().real for out, bar in pairs)
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    array = lambda t: jnp.asarray(t.detach().resolve_conj().numpy())  # noqa: E731
    out = tuple(None if o is None else array(o) for o in outputs)
    return out, jax.tree.unflatten(tree, [array(g.conj()) for g in gradients])


def layer_problem(name, steps=7, batch=2, sizes=(3, 2, 4, 3), exponent=0.0):
    """Return random parameters, carry, inputs and cotangents of D, N, K, V, or of D, K taps and H, in float64."""
    generator = np.random.default_rng(list(name.encode()))
    draw = lambda *shape: jnp.asarray(0.6 * generator.standard_normal(shape))  # noqa: E731
    if name == "mlstm":
        D, N, K, V = sizes
        params = jaxseq.MLSTMParams(
            w_q=draw(D, N, K),
            w_k=draw(D, N, K),
            w_v=draw(D, N, V),
            w_i=2 * draw(D, N),
            w_f=2 * draw(D, N),
            w_o=draw(D, N, V),
            b_i=draw(N) + exponent,
            b_f=draw(N),
            b_o=draw(N, V),
        )
        state = lambda: jaxseq.MLSTMState(draw(batch, N, K, V), draw(batch, N, K), draw(batch, N))  # noqa: E731
        features = N * V
    else:
        D, taps, features = sizes[:3]
        params = jaxseq.QRNNParams(draw(taps, D, 3 * features), draw(3 * features))
        state = lambda: jaxseq.QRNNState(draw(batch, taps - 1, D), draw(batch, features))  # noqa: E731
    return (params, state(), draw(steps, batch, D)), (state(), draw(steps, batch, features))
