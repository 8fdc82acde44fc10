"""Windows of one tap: a dense map at each position.

    y[b, n, o] = sum_i  x[b, s n, i]  w[0, i, o]

so that with the inputs that are seen, x[:, ::s], all three are those of `_dense.py`.
"""

import jax

from jaxseq import _dense
from jaxseq._correlation._form import Form, padded


def to_output(form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y of (1)."""
    return _dense.apply(form.precision, kernel.reshape(form.near, form.far), None, _seen(form, x))


def to_input(form: Form, kernel: jax.Array, ȳ: jax.Array) -> jax.Array:
    """x̄ of (2): zero between the inputs that were seen."""
    x̄ = _dense.pull_input(form.precision, kernel.reshape(form.near, form.far), ȳ)
    places = [(0, I - ((O - 1) * s + 1), s - 1) for I, O, _, s, *_ in form.axes()]
    return padded(x̄, places)


def to_kernel(form: Form, x: jax.Array, ȳ: jax.Array) -> jax.Array:
    """w̄ of (3)."""
    w̄ = _dense.pull_weight(form.precision, _seen(form, x), ȳ)
    return w̄.reshape(*form.window, *w̄.shape)


def _seen(form: Form, x: jax.Array) -> jax.Array:
    """x[s n], n = 0 .. O - 1."""
    return x[(slice(None), *[slice(0, (O - 1) * s + 1, s) for _, O, _, s, *_ in form.axes()])]
