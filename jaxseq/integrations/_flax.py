"""What the modules of Flax linen and Flax nnx share: the call of `nn.RNN`, and the dtype of a computation.

A layer has `_apply(params, carry, xs, **options)`. `Stack` has `layers`, `Bidirectional` has `forward_rnn`, and
`Recurrence` has `cell`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jaxseq


def call(layer: Any, params: Any, xs: Any, *, carry: Any, return_carry: bool, **time: Any) -> Any:
    """Return ys, or (carry, ys). The state of an LSTM is (c, h), as in Flax, and so is the state after a reset."""
    lstm = isinstance(params, jaxseq.LSTMParams) and not hasattr(layer, "cell")
    state = lambda s: jaxseq.LSTMState(*s[::-1]) if lstm and type(s) is tuple else s  # noqa: E731
    if "reset_state" in time:
        time["reset_state"] = state(time["reset_state"])
    carry, ys = layer._apply(params, state(carry), xs, **{"time_axis": _time_axis(layer, params), **time})
    return (carry[::-1] if lstm else carry, ys) if return_carry else ys


def _time_axis(layer: Any, params: Any) -> int:
    """Return the axis before the features, for a layer whose first layer has these parameters."""
    while not hasattr(params, "_fields"):
        layer, params = layer.layers[0] if hasattr(layer, "layers") else layer.forward_rnn, params[0]
    if isinstance(getattr(layer, "cell", None), jaxseq.LinearCell):
        return -2
    if hasattr(layer, "cell"):
        return -2 - layer.cell.input.dimensions(params.w_x)
    return -params.w_x.ndim if hasattr(params, "w_x") else -2  # a kernel (*kernel_size, C, F), or a matrix


def main_input(xs: Any) -> Array:
    """Return the input of the input map, without side inputs."""
    return xs[0] if isinstance(xs, tuple) else xs


def cast(params: Any, xs: Any, dtype: Any) -> tuple[Any, Any]:
    """Cast parameters and input to `dtype`, or to their common dtype, as Flax does. Side inputs stay as they are."""
    x = main_input(xs)
    dtype = dtype or jnp.result_type(x, *jax.tree.leaves(params))
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    return params, (x, *xs[1:]) if isinstance(xs, tuple) else x
