"""The LSTM: jaxseq's gradient by hand, against autodiff of its plain twin and against Flax.

    python -m benchmarks.lstm [--rounds N] [--json FILE] [--quick]

The gradient is that of all parameters, the initial state and the input, with the outputs beside it. Ratios say how
many times as long as `hand`. Temporary bytes with a gradient hold all that its backward sweep keeps of the forward one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxseq
from benchmarks import harness
from benchmarks.harness import Candidate, Problem, with_gradient
from jaxseq import LSTMParams, LSTMState

SIZES = ((32, 128, 128, 128, None), (1, 1024, 64, 64, None), (64, 128, 256, 256, None), (1, 1024, 64, 64, 64))
TINY = ((2, 5, 3, 4, None), (1, 7, 3, 4, 2))  # B, T, D, H, truncation


def problems(quick: bool) -> Iterator[Problem]:
    for B, T, D, H, truncation in TINY if quick else SIZES:
        title = f"B={B} T={T} D={D} H={H}"
        args, cotangents = data(B, T, D, H)
        hand, twin = jaxseq.lstm, jaxseq.reference.lstm
        if truncation is None:
            flax = flax_lstm(H)
            flax_args = (to_flax(args[0]), *args[1:])
            both = [Candidate("hand", hand, args), Candidate("twin", twin, args), Candidate("flax", flax, flax_args)]
            yield Problem(f"lstm forward, {title}", "hand", both)
            peers = [Candidate("flax", flax and with_gradient(flax), (cotangents, *flax_args), from_flax)]
        else:
            # Of truncation Flax knows nothing, and forward is the same without it.
            title = f"{title} truncation={truncation}"
            hand, twin = partial(hand, truncation=truncation), partial(twin, truncation=truncation)
            peers = []
        ours = [Candidate(n, with_gradient(f), (cotangents, *args)) for n, f in (("hand", hand), ("twin", twin))]
        yield Problem(f"lstm forward + gradient, {title}", "hand", ours + peers)


def data(B: int, T: int, D: int, H: int) -> tuple[tuple[LSTMParams, LSTMState, jax.Array], Any]:
    """Arguments, none of them zero, and cotangents of the outputs."""
    key_params, *keys = jax.random.split(jax.random.key(0), 8)
    w_x, w_h, _ = jaxseq.lstm_init(key_params, D, H)
    shapes = [(4 * H,), (B, H), (B, H), (T, B, D), (B, H), (B, H), (T, B, H)]
    b, h, c, xs, h̄, c̄, ȳs = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True))
    return (LSTMParams(w_x, w_h, b), LSTMState(h, c), xs), (LSTMState(h̄, c̄), ȳs)


def flax_lstm(H: int) -> Callable[..., Any] | None:
    """Flax's sequence, with our order of the state. Of its two cells it calls this one the faster up to H = 2048."""
    nn = harness.peer("flax.linen")
    if nn is None:
        return None
    model = nn.RNN(nn.OptimizedLSTMCell(H), time_major=True, return_carry=True)

    def run(variables: Any, carry: LSTMState, xs: jax.Array) -> tuple[LSTMState, jax.Array]:
        (c, h), ys = model.apply(variables, xs, initial_carry=(carry.c, carry.h))
        return LSTMState(h, c), ys

    return run


def to_flax(params: LSTMParams) -> Any:
    """Our weights in Flax's names: an array for each map and gate, the bias with the recurrent map."""
    w_x, w_h, b = (jnp.split(jnp.asarray(w), 4, -1) for w in params)
    cell = {f"i{gate}": {"kernel": w} for gate, w in zip("ifgo", w_x, strict=True)}
    cell |= {f"h{gate}": {"kernel": w, "bias": v} for gate, w, v in zip("ifgo", w_h, b, strict=True)}
    return {"params": {"cell": cell}}


def from_flax(result: Any) -> Any:
    """Outputs and gradients, those of the weights put together as ours are."""
    outputs, (variables, *others) = result
    cell = variables["params"]["cell"]
    w_x, w_h = (jnp.concatenate([cell[side + gate]["kernel"] for gate in "ifgo"], -1) for side in "ih")
    b = jnp.concatenate([cell[f"h{gate}"]["bias"] for gate in "ifgo"])
    return outputs, (LSTMParams(w_x, w_h, b), *others)


def main(argv: Any = None) -> None:
    harness.main(problems, "The LSTM by hand, against autodiff and against Flax.", ["flax"], argv)


if __name__ == "__main__":
    main()
