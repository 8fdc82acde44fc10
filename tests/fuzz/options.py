"""Fuzz the time options of recurrences: values and gradients in float32 and bfloat16, against loops in float64.

    python tests/fuzz/options.py --count 300

Each trial draws a cell, sizes and a mix of options. The oracle is a Python loop over each sequence of the batch, which
implements every option as a plain `if` and is differentiated by `jax.vjp`. xs is NaN in the padding and at steps where
zoneout keeps the whole state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import runner
from comparison import problems, rounded

import jaxseq
from jaxseq import cells

Tree = Any

# --- Equations of each cell for one sequence: (params, state, x, mask of h) -> state, a tuple with h first ---


def _sigmoid(a: Any) -> Any:
    return 1 / (1 + jnp.exp(-a))


def _rnn(activation: Callable[[Any], Any], p: Any, s: Any, x: Any, mask: Any) -> Any:
    return (activation(x @ p.w_x + (mask * s[0]) @ p.w_h + p.b),)


def _indrnn(p: Any, s: Any, x: Any, mask: Any) -> Any:
    return (_relu(x @ p.w_x + mask * s[0] * p.w_h[0] + p.b),)


def _relu(a: Any) -> Any:
    return jnp.where(a > 0, a, 0)


def _gru(p: Any, s: Any, x: Any, mask: Any) -> Any:
    u, v = jnp.split(x @ p.w_x + p.b_x, 3), jnp.split((mask * s[0]) @ p.w_h + p.b_h, 3)
    r, z = _sigmoid(u[0] + v[0]), _sigmoid(u[1] + v[1])
    return ((1 - z) * jnp.tanh(u[2] + r * v[2]) + z * s[0],)


def _mgu(p: Any, s: Any, x: Any, mask: Any) -> Any:
    u, v = jnp.split(x @ p.w_x + p.b_x, 2), jnp.split((mask * s[0]) @ p.w_h + p.b_h, 2)
    f = _sigmoid(u[0] + v[0])
    return ((1 - f) * jnp.tanh(u[1] + f * v[1]) + f * s[0],)


def _lstm(p: Any, s: Any, x: Any, mask: Any) -> Any:
    i, f, g, o = jnp.split(x @ p.w_x + (mask * s[0]) @ p.w_h + p.b, 4)
    c = _sigmoid(f) * s[1] + _sigmoid(i) * jnp.tanh(g)
    return _sigmoid(o) * jnp.tanh(c), c


def _peephole(p: Any, s: Any, x: Any, mask: Any) -> Any:
    i, f, g, o = jnp.split(x @ p.w_x + (mask * s[0]) @ p.w_h + p.b, 4)
    c = _sigmoid(f + p.p_f * s[1]) * s[1] + _sigmoid(i + p.p_i * s[1]) * jnp.tanh(g)
    return _sigmoid(o + p.p_o * c) * jnp.tanh(c), c


CELLS = {
    "rnn": (jaxseq.rnn, jaxseq.RNNParams, partial(_rnn, jnp.tanh), 1, None),
    "rnn relu": (partial(jaxseq.rnn, activation="relu"), jaxseq.RNNParams, partial(_rnn, _relu), 1, None),
    "gru": (jaxseq.gru, jaxseq.GRUParams, _gru, 3, None),
    "lstm": (jaxseq.lstm, jaxseq.LSTMParams, _lstm, 4, jaxseq.LSTMState),
    "mgu": (partial(jaxseq.recurrence, cells.mgu), cells.mgu.params, _mgu, 2, None),
    "indrnn": (partial(jaxseq.recurrence, cells.indrnn), cells.indrnn.params, _indrnn, 1, None),
    "peephole_lstm": (
        partial(jaxseq.recurrence, cells.peephole_lstm),
        cells.peephole_lstm.params,
        _peephole,
        4,
        jaxseq.LSTMState,
    ),
}


# --- The oracle ---


def one_sequence(
    step: Any, state: Any, xs: Any, o: dict[str, Any], *, stop: int | None = None
) -> tuple[Any, dict[int, Any]]:
    """Return (final state, h by time) of one sequence. The gradient is cut before the `stop`-th processed step."""
    n = o["length"]
    order = range(n) if not o["reverse"] else range(n)[::-1]
    outputs = {}
    for i, t in enumerate(order):
        boundary = t if not o["reverse"] else t + 1
        if o["resets"] is not None and boundary < n and o["resets"][boundary]:
            state = jax.tree.map(jnp.zeros_like, state)
        if i == stop:
            state = jax.lax.stop_gradient(state)
        held = o["zoneout"] and tuple(leaf[t] for leaf in o["zoneout"])
        if held and all(np.asarray(k).dtype == bool and np.asarray(k).all() for k in held):
            new = state
        else:
            new = step(state, xs[t])
        if held:
            new = tuple(_mixed(k, a, b) for k, a, b in zip(held, state, new, strict=True))
        state = new
        outputs[t] = state[0]
    if o["reverse"] and o["resets"] is not None and n and o["resets"][0]:
        state = jax.tree.map(jnp.zeros_like, state)
    return state, outputs


def _mixed(k: Any, before: Any, after: Any) -> Any:
    return jnp.where(k, before, after) if np.asarray(k).dtype == bool else k * before + (1 - k) * after


def truncated(step: Any, state: Any, xs: Any, o: dict[str, Any]) -> tuple[Any, dict[int, Any]]:
    """Do the same with truncation: run the loop once for each window of k1 steps, backpropagated through k2 steps."""
    n = o["length"]
    if o["truncation"] is None or o["truncation"][0] >= o["steps"]:
        return one_sequence(step, state, xs, o)
    k1, k2 = o["truncation"]
    outputs, last = {}, state
    for first in range(0, max(n, 1), k1):
        stop = first - (k2 - k1)
        last, found = one_sequence(step, state, xs, o, stop=stop if stop > 0 else None)
        read = [t if not o["reverse"] else n - 1 - t for t in range(first, min(n, first + k1))]
        outputs |= {t: found[t] for t in read}
    return last, outputs


def oracle(cell: str, options: dict[str, Any], params: Any, carry: Any, xs: Any) -> Any:
    """Return (carry, ys) of a batch, for xs (T, B, D)."""
    _, _, equations, _, state = CELLS[cell]
    T, B, _ = xs.shape
    ends, ys = [], []
    for b in range(B):
        pick = lambda a: None if a is None else a[:, b]  # noqa: B023, E731
        o = {
            **options,
            "steps": T,
            "length": T if options["lengths"] is None else int(options["lengths"][b]),
            "resets": pick(options["resets"]),
            "zoneout": options["zoneout"] and tuple(pick(leaf) for leaf in options["zoneout"]),
        }
        mask = 1.0 if options["mask"] is None else options["mask"][b]
        step = lambda s, x: equations(params, s, x, mask)  # noqa: B023, E731
        start = tuple(leaf[b] for leaf in (carry if state else (carry,)))
        end, outputs = truncated(step, start, xs[:, b], o)
        ends.append(end)
        nothing = jnp.zeros_like(start[0])
        ys.append(jnp.stack([outputs.get(t, nothing) for t in range(T)]))
    leaves = [jnp.stack(leaf) for leaf in zip(*ends, strict=True)]
    return state(*leaves) if state else leaves[0], jnp.stack(ys, 1)


# --- The trial ---


def draw_options(rng: np.random.Generator, T: int, B: int, H: int, leaves: int) -> dict[str, Any]:
    """Draw a random mix of time options."""
    yes = lambda p: rng.random() < p  # noqa: E731
    k1 = int(rng.integers(1, T + 2))
    zoneout = None
    if yes(0.4):
        booleans = yes(0.7)
        zoneout = tuple(rng.random((T, B, H)) < 0.3 if booleans else rng.random((T, B, H)) for _ in range(leaves))
        if booleans:  # at some steps of some sequences, keep the whole state
            whole = rng.random((T, B, 1)) < 0.25
            zoneout = tuple(leaf | whole for leaf in zoneout)
    return {
        "lengths": rng.integers(0, T + 1, B) if yes(0.5) else None,
        "resets": rng.random((T, B)) < 0.25 if yes(0.5) else None,
        "reverse": yes(0.5),
        "truncation": [None, (k1, k1), (k1, k1 + int(rng.integers(0, T + 1)))][rng.integers(3)],
        "checkpoint": [None, None, "auto", int(rng.integers(1, T + 2))][rng.integers(4)],
        "unroll": int(rng.choice([1, 1, 2])),
        "time_axis": int(yes(0.3)),
        "mask": (rng.random((B, H)) < 0.8) * 1.25 if yes(0.3) else None,
        "zoneout": zoneout,
    }


def trial(seed: int) -> tuple[str, list[str]]:
    """Compare one cell with one mix of options, in both dtypes."""
    rng = np.random.default_rng(seed)
    cell = str(rng.choice(list(CELLS)))
    op, kind, _, gates, state = CELLS[cell]
    T, B, D, H = (
        int(rng.integers(1, 15)),
        int(rng.integers(1, 4)),
        int(rng.choice([3, 16, 20])),
        int(rng.choice([5, 16, 24])),
    )
    leaves = 2 if state else 1
    options = draw_options(rng, T, B, H, leaves)
    sizes = {"w_x": (D, gates * H), "w_h": (1 if cell == "indrnn" else H, gates * H)}
    params = kind(
        *(
            rng.normal(size=s) / s[0] ** 0.5
            for s in (sizes.get(f, (H,) if f[0] == "p" else (gates * H,)) for f in kind._fields)
        )
    )
    carry = tuple(rng.normal(size=(B, H)) for _ in range(leaves))
    xs = rng.normal(size=(T, B, D))
    args = params, state(*carry) if state else carry[0], xs
    with jax.enable_x64(True):
        args = rounded(jax.tree.map(np.asarray, args), jnp.bfloat16)
        args = rounded(args, jnp.float64)
        out, pull = jax.vjp(partial(oracle, cell, options), *args)
        cotangents = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), out)
        cotangents = rounded(rounded(cotangents, jnp.bfloat16), jnp.float64)
        expected = jax.tree.map(np.asarray, (out, pull(cotangents)))
        args, cotangents = jax.tree.map(np.asarray, (args, cotangents))
    args = *args[:2], _with_nan(args[2], options)
    keywords, axis = _keywords(options, state), options["time_axis"]
    place = lambda a: jnp.moveaxis(a, 0, axis)  # noqa: E731

    def both(params: Any, carry: Any, xs: Any, cotangents: Any, arrays: Any) -> Any:
        def f(params: Any, carry: Any, xs: Any) -> Any:
            arrays_ = {**arrays, **({"resets": place(arrays["resets"])} if "resets" in arrays else {})}
            end, ys = op(params, carry, place(xs), **_static(options), **arrays_)
            return end, jnp.moveaxis(ys, axis, 0)

        out, pull = jax.vjp(f, params, carry, xs)
        cotangents = jax.tree.map(lambda a, like: a.astype(like.dtype), cotangents, out)
        return out, pull(cotangents)

    found = []
    for dtype in ("float32", "bfloat16"):
        given = rounded((*args, cotangents), jnp.dtype(dtype))
        arrays = rounded(keywords, dtype)
        if "zoneout" in arrays:
            arrays["zoneout"] = jax.tree.map(place, arrays["zoneout"])
        found += problems(jax.jit(both)(*given, arrays), expected, dtype)
    shown = {k: v for k, v in options.items() if v is not None and k not in ("zoneout", "mask", "resets")}
    shown |= {k: "yes" for k in ("zoneout", "mask", "resets") if options[k] is not None}
    return f"{cell} T={T} B={B} D={D} H={H} {shown}", found


def _with_nan(xs: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Put NaN in the padding, and at steps where zoneout keeps the whole state."""
    T, B, _ = xs.shape
    missing = np.zeros((T, B), bool)
    if options["lengths"] is not None:
        missing |= np.arange(T)[:, None] >= options["lengths"]
    if options["zoneout"] and options["zoneout"][0].dtype == bool:
        missing |= np.logical_and.reduce([leaf.all(-1) for leaf in options["zoneout"]])
    return np.where(missing[..., None], np.nan, xs)


def _static(options: dict[str, Any]) -> dict[str, Any]:
    names = ("reverse", "truncation", "checkpoint", "unroll", "time_axis")
    return {name: options[name] for name in names}


def _keywords(options: dict[str, Any], state: Any) -> dict[str, Any]:
    """Return the options that are arrays, with the names of the public functions."""
    found = {name: options[name] for name in ("lengths", "resets") if options[name] is not None}
    if options["mask"] is not None:
        found["recurrent_dropout_mask"] = options["mask"]
    if options["zoneout"] is not None:
        found["zoneout"] = state(*options["zoneout"]) if state else options["zoneout"][0]
    return found


if __name__ == "__main__":
    runner.main(trial, count=300)
