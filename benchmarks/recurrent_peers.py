"""The recurrences of other libraries: how each one runs, and the way from our arrays to its layout and back.

Each `in_*` takes the kind ("rnn", "gru" or "lstm") and the sizes D and H, and gives None where it is not installed.

What they mean by the same name differs, and `LIBRARIES` says who computes what we do:

- Haiku adds one to the forget gate of its LSTM, which is taken off the bias here. Its RNN is that of a relu without a
  choice, and its GRU resets before the recurrent product: neither is ours, and neither is measured.
- Flax and Equinox have no second bias in the gates r and z of a GRU, where it would only be added to the first. It is
  zero in what is measured, and its gradient there left out of what is compared.
- torch has a second bias everywhere. Where we have one, that is zero, and no gradient of it is taken.
- Keras has batches first, and its GRU the gates in the order z, r, n. Equinox has cells without a batch, and no Elman
  cell: here it is two of its linear maps.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import harness
from jaxseq import GRUParams, LSTMParams, LSTMState, RNNParams

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it once, when it is imported

Function = Callable[..., Any]

PARAMS = {"rnn": RNNParams, "gru": GRUParams, "lstm": LSTMParams}
GATES = {"rnn": ("",), "gru": tuple("rzn"), "lstm": tuple("ifgo")}


def same(a: Any) -> Any:
    return a


def swapped(xs: jax.Array) -> jax.Array:
    """The batch first, or time first again."""
    return jnp.swapaxes(xs, 0, 1)


class Library(NamedTuple):
    """`run(params, carry, xs) -> (carry, ys)` in its own layout, and for each of these the ways (there, back).

    The way back is also that of gradients, and the way there that of cotangents. `with_gradient` is the harness's, or
    what does the same outside JAX.
    """

    run: Function
    params: tuple[Function, Function] = (same, same)
    carry: tuple[Function, Function] = (same, same)
    xs: tuple[Function, Function] = (same, same)
    with_gradient: Function = harness.with_gradient
    jit: bool = True


def in_flax(kind: str, D: int, H: int) -> Library | None:
    """Flax's sequence. Of its two LSTM cells it calls this one the faster up to H = 2048."""
    nn = harness.peer("flax.linen")
    if nn is None:
        return None
    cell = {"rnn": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}[kind](H)
    model = nn.RNN(cell, time_major=True, return_carry=True)

    def run(variables: Any, carry: Any, xs: jax.Array, lengths: jax.Array | None = None) -> tuple[Any, jax.Array]:
        return model.apply(variables, xs, initial_carry=carry, seq_lengths=lengths)

    c_and_h = (lambda s: (s.c, s.h)), (lambda s: LSTMState(s[1], s[0]))
    params = partial(to_flax, kind), partial(from_flax, kind)
    return Library(run, params, c_and_h if kind == "lstm" else (same, same))


def to_flax(kind: str, params: Any) -> Any:
    """An array for each map and gate; the bias goes with the input map, or in an LSTM with the recurrent one."""
    gates = GATES[kind]
    w_x, w_h, b = (jnp.split(a, len(gates), -1) for a in params[:3])
    near = {f"i{gate}": {"kernel": w} for gate, w in zip(gates, w_x, strict=True)}
    far = {f"h{gate}": {"kernel": w} for gate, w in zip(gates, w_h, strict=True)}
    for layer, bias in zip((far if kind == "lstm" else near).values(), b, strict=True):
        layer["bias"] = bias
    if kind == "gru":
        far["hn"]["bias"] = bias_of_n(params)
    return {"params": {"cell": near | far}}


def from_flax(kind: str, variables: Any) -> Any:
    """All gates put together again."""
    cell = variables["params"]["cell"]

    def joined(side: str, leaf: str) -> jax.Array:
        return jnp.concatenate([cell[side + gate][leaf] for gate in GATES[kind]], -1)

    b = joined("h" if kind == "lstm" else "i", "bias")
    b_h = (cell["hn"]["bias"],) if kind == "gru" else ()
    return PARAMS[kind](joined("i", "kernel"), joined("h", "kernel"), b, *b_h)


def in_equinox(kind: str, D: int, H: int) -> Library | None:
    """A scan of its cell, which takes one sequence, mapped over the batch."""
    eqx = harness.peer("equinox")
    if eqx is None:
        return None
    key = jax.random.key(0)
    if kind == "rnn":
        cell = (eqx.nn.Linear(D, H, key=key), eqx.nn.Linear(H, H, use_bias=False, key=key))
    else:
        cell = {"gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}[kind](D, H, key=key)

    def step(cell: Any, state: Any, x: jax.Array) -> Any:
        return jnp.tanh(cell[0](x) + cell[1](state)) if kind == "rnn" else cell(x, state)

    def run(cell: Any, carry: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
        def body(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            state = jax.vmap(step, (None, 0, 0))(cell, state, x)
            return state, jax.tree.leaves(state)[0]

        return lax.scan(body, carry, xs)

    def fields(cell: Any) -> tuple[Any, ...]:
        if kind == "rnn":
            return cell[0].weight, cell[1].weight, cell[0].bias
        return cell.weight_ih, cell.weight_hh, cell.bias, *((cell.bias_n,) if kind == "gru" else ())

    def there(params: Any) -> Any:
        w_x, w_h, b = params[:3]
        bias_n = (bias_of_n(params),) if kind == "gru" else ()
        return eqx.tree_at(fields, cell, (w_x.T, w_h.T, b, *bias_n))

    def back(cell: Any) -> Any:
        w_x, w_h, *biases = fields(cell)
        return PARAMS[kind](w_x.T, w_h.T, *biases)

    return Library(run, (there, back), (tuple, LSTMState._make) if kind == "lstm" else (same, same))


def in_haiku(kind: str, D: int, H: int) -> Library | None:
    """One map of x and h together, gates in the order i, g, f, o, and a forget bias of one that is not a parameter."""
    hk = harness.peer("haiku")
    if hk is None:
        return None
    one_on_f = np.repeat(np.array([0, 1, 0, 0], np.float32), H)

    def unroll(carry: Any, xs: jax.Array) -> Any:
        return hk.dynamic_unroll(hk.LSTM(H), xs, carry)

    apply = hk.without_apply_rng(hk.transform(unroll)).apply

    def run(params: Any, carry: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
        return apply(params, carry, xs)[::-1]

    def there(params: Any) -> Any:
        w = reordered(jnp.concatenate(params[:2]), 0, 2, 1, 3)
        return {"lstm/linear": {"w": w, "b": reordered(params.b - one_on_f, 0, 2, 1, 3)}}

    def back(gradient: Any) -> LSTMParams:
        w, b = (reordered(gradient["lstm/linear"][name], 0, 2, 1, 3) for name in "wb")
        return LSTMParams(w[:D], w[D:], b)

    return Library(run, (there, back), (lambda s: hk.LSTMState(*s), LSTMState._make))


def in_keras(kind: str, D: int, H: int) -> Library | None:
    """Keras's layer on JAX."""
    keras = harness.peer("keras")
    if keras is None:
        return None
    layers = {"rnn": keras.layers.SimpleRNN, "gru": keras.layers.GRU, "lstm": keras.layers.LSTM}
    layer = layers[kind](H, return_sequences=True, return_state=True)  # a GRU resets after the product unless told not
    layer.build((None, None, D))
    others = [variable.value for variable in layer.non_trainable_variables]  # the seed of a dropout that there is not

    def run(weights: Any, carry: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
        (ys, *carry), _ = layer.stateless_call(weights, others, xs, initial_state=carry)
        return carry, ys

    def there(params: Any) -> Any:
        if kind != "gru":
            return list(params)
        w_x, w_h, b_x, b_h = (reordered(a, 1, 0, 2) for a in params)
        return [w_x, w_h, jnp.stack([b_x, b_h])]

    def back(weights: Any) -> Any:
        if kind != "gru":
            return PARAMS[kind](*weights)
        w_x, w_h, b = (reordered(a, 1, 0, 2) for a in weights)
        return GRUParams(w_x, w_h, *b)

    return Library(run, (there, back), (jax.tree.leaves, state_of(kind)), (swapped, swapped))


def in_torch(kind: str, D: int, H: int) -> Library | None:
    """torch's layer; parameters are the layer itself, its weights in the layout (gates H, in)."""
    torch = harness.peer("torch")
    if torch is None:
        return None
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", *(["bias_hh_l0"] if kind == "gru" else [])]

    def tensor(a: jax.Array) -> Any:
        return torch.tensor(np.ascontiguousarray(a))

    def run(layer: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
        ys, end = layer(xs, tuple(carry) if kind == "lstm" else carry[0])
        return (list(end) if kind == "lstm" else [end]), ys

    def with_gradient(run: Function) -> Function:
        def both(cotangents: Any, layer: Any, carry: Any, xs: Any) -> Any:
            weights = [getattr(layer, name) for name in names]
            leaves = [leaf.requires_grad_() for leaf in (*weights, *carry, xs)]
            end, ys = run(layer, carry, xs)
            gradients = torch.autograd.grad([*end, ys], leaves, [*cotangents[0], cotangents[1]])
            n = len(weights)
            return (end, ys), (gradients[:n], gradients[n:-1], gradients[-1])

        return both

    def there(params: Any) -> Any:
        layer = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind](D, H).requires_grad_(False)
        layer.bias_hh_l0.zero_()
        for name, a in zip(names, params, strict=True):
            getattr(layer, name).copy_(tensor(a.T))
        return layer

    def array(a: Any) -> np.ndarray:
        return a.detach().numpy()

    return Library(
        run,
        (there, lambda gradients: PARAMS[kind](*(array(a).T for a in gradients))),
        (lambda s: [tensor(a)[None] for a in jax.tree.leaves(s)], lambda s: state_of(kind)([array(a)[0] for a in s])),
        (tensor, array),
        with_gradient,
        jit=False,
    )


LIBRARIES: dict[str, tuple[Function, tuple[str, ...]]] = {
    "flax": (in_flax, ("rnn", "gru", "lstm")),
    "equinox": (in_equinox, ("rnn", "gru", "lstm")),
    "haiku": (in_haiku, ("lstm",)),
    "keras": (in_keras, ("rnn", "gru", "lstm")),
    "torch": (in_torch, ("rnn", "gru", "lstm")),
}


def state_of(kind: str) -> Function:
    """Our state from its leaves."""
    return LSTMState._make if kind == "lstm" else lambda leaves: leaves[0]


def reordered(a: jax.Array, *order: int) -> jax.Array:
    """The gates, the parts of the last axis, in another order."""
    parts = jnp.split(a, len(order), -1)
    return jnp.concatenate([parts[i] for i in order], -1)


def bias_of_n(params: GRUParams) -> Any:
    """Of b_h the part that every library has: that in the gate n. It may be all there is."""
    assert params.b_h is not None
    return params.b_h[-len(params.w_h) :]
