"""`cells.rg_lru` against recurrentgemma, values and gradients.

Its requirements exclude current versions of NumPy, absl and chex, so it is not part of an extra and needs an
environment of its own: `pip install recurrentgemma==1.0.1`. Elsewhere, `conftest.py` does not collect this file.
"""

import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close, pullback
from test_linear_peers import B, T, batch_major, in_torch, problem, set_tensors


def rg_lru_maps(p, split):
    """Return the names and arrays of recurrentgemma. Its parameter of the decay is -Λ, since a = exp(-8 r softplus)."""
    b_r, b_i = split(p.b)
    gates = {"a_gate": (p.w_x[:, :, 0], b_r), "input_gate": (p.w_x[:, :, 1], b_i)}
    return -p.rate, {name: {"w": w, "b": b.reshape(w.shape[0], -1)} for name, (w, b) in gates.items()}


def test_rg_lru_equals_recurrentgemma_in_jax():
    """Compare without the position 0, at which it resets the state and does not normalize x."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the modules of JAX that it imports
        layers = importlib.import_module("recurrentgemma.jax.layers")
    f, args, cotangents = problem("rg_lru", np.float32)
    layer = layers.RGLRU(width=12, num_heads=4)

    @batch_major
    def theirs(p, carry, xs):
        rate, gates = rg_lru_maps(p, lambda b: jnp.split(b, 2))
        positions = jnp.broadcast_to(jnp.arange(1, T + 1), (B, T))
        return layer.apply({"params": {"a_param": rate, **gates}}, xs, positions, carry)[::-1]

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = jax.jit(pullback(theirs))(args, cotangents)
    assert_close(jax.jit(pullback(f))(args, cotangents), expected, relative=1e-5)


def test_rg_lru_equals_recurrentgemma_in_torch():
    torch = importlib.import_module("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = importlib.import_module("recurrentgemma.torch.layers")
    f, args, cotangents = problem("rg_lru", np.float32)

    @batch_major
    def theirs(p, carry, xs):
        layer = layers.RGLRU(width=12, num_heads=4)
        rate, gates = rg_lru_maps(p, lambda b: b.chunk(2))
        maps = {f"{gate}__{name}": a for gate, arrays in gates.items() for name, a in arrays.items()}
        set_tensors(layer, a_param=rate, **maps)
        return layer(xs, torch.arange(1, T + 1).expand(B, T), carry)[::-1]

    assert_close(jax.jit(pullback(f))(args, cotangents), in_torch(torch, theirs, args, cotangents), relative=1e-5)
