"""The recurrences of other libraries: how each one runs, and the way from our arrays to its layout and back.

Each `in_*` takes the kind ("rnn", "gru" or "lstm") and the sizes D and H, and gives None where it is not installed.
Weights go there by `jaxseq.convert`, and their gradient comes back by the pullback of that.

What they mean by the same name differs, and `LIBRARIES` says who computes what we do:

- Haiku's RNN is that of a relu without a choice, and its GRU resets before the recurrent product: neither is ours, and
  neither is measured.
- torch has a second bias everywhere. Where we have one, that is zero, and no gradient of it is taken.
- Keras has batches first. Equinox has cells without a batch, and no Elman cell: here it is two of its linear maps.
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
from jaxseq import GRUParams, LSTMParams, LSTMState, RNNParams, convert

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it once, when it is imported

Function = Callable[..., Any]

PARAMS = {"rnn": RNNParams, "gru": GRUParams, "lstm": LSTMParams}


def same(a: Any) -> Any:
    return a


def swapped(xs: jax.Array) -> jax.Array:
    """The batch first, or time first again."""
    return jnp.swapaxes(xs, 0, 1)


class Library(NamedTuple):
    """`run(params, carry, xs) -> (carry, ys)` in its own layout, and for each of these the ways (there, back).

    That of parameters back is for their gradient; of the others the way there is also that of cotangents, and the way
    back that of gradients. `with_gradient` is the harness's, or what does the same outside JAX.
    """

    run: Function
    params: tuple[Function, Function] = (same, same)
    carry: tuple[Function, Function] = (same, same)
    xs: tuple[Function, Function] = (same, same)
    with_gradient: Function = harness.with_gradient
    jit: bool = True


def ways(kind: str, D: int, H: int, there: Function) -> tuple[Function, Function]:
    """The way of the parameters there, and its pullback, by which the gradient comes back."""
    G = {"rnn": 1, "gru": 3, "lstm": 4}[kind]
    biases = [jnp.zeros(G * H)] * (2 if kind == "gru" else 1)
    zeros = PARAMS[kind](jnp.zeros((D, G * H)), jnp.zeros((H, G * H)), *biases)
    return there, lambda gradient: jax.vjp(there, zeros)[1](gradient)[0]


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
    params = ways(kind, D, H, lambda params: {"params": {"cell": convert.to_flax(kind, params)}})
    return Library(run, params, c_and_h if kind == "lstm" else (same, same))


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

    def there(params: Any) -> Any:
        if kind != "rnn":
            return convert.to_equinox(kind, params, cell)
        fields = lambda cell: (cell[0].weight, cell[1].weight, cell[0].bias)  # noqa: E731
        return eqx.tree_at(fields, cell, (params.w_x.T, params.w_h.T, params.b))

    return Library(run, ways(kind, D, H, there), (tuple, LSTMState._make) if kind == "lstm" else (same, same))


def in_haiku(kind: str, D: int, H: int) -> Library | None:
    """Its LSTM."""
    hk = harness.peer("haiku")
    if hk is None:
        return None

    def unroll(carry: Any, xs: jax.Array) -> Any:
        return hk.dynamic_unroll(hk.LSTM(H), xs, carry)

    apply = hk.without_apply_rng(hk.transform(unroll)).apply

    def run(params: Any, carry: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
        return apply(params, carry, xs)[::-1]

    params = ways(kind, D, H, partial(convert.to_haiku, kind))
    return Library(run, params, (lambda s: hk.LSTMState(*s), LSTMState._make))


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

    params = ways(kind, D, H, partial(convert.to_keras, kind))
    return Library(run, params, (jax.tree.leaves, state_of(kind)), (swapped, swapped))


def in_torch(kind: str, D: int, H: int) -> Library | None:
    """torch's layer; parameters are the layer itself."""
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
        layer.load_state_dict({name: tensor(a) for name, a in convert.to_torch(kind, params).items()})
        return layer

    def array(a: Any) -> np.ndarray:
        return a.detach().numpy()

    _, back = ways(kind, D, H, partial(convert.to_torch, kind))

    def of_all(gradients: Any) -> dict[str, Any]:
        own = {name: jnp.asarray(array(a)) for name, a in zip(names, gradients, strict=True)}
        return {"bias_hh_l0": jnp.zeros_like(own["bias_ih_l0"])} | own

    return Library(
        run,
        (there, lambda gradients: back(of_all(gradients))),
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
