"""Helpers to compare functions with NumPy, by differences, and with other libraries."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest


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
