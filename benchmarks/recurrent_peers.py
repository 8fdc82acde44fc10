"""Adapters for the recurrences of other libraries, with conversions between their layout and that of jaxseq.

Each `in_*` takes the kind ("rnn", "gru" or "lstm") and the sizes D and H, and returns None if the library is not
installed. `jaxseq.convert` converts parameters; its pullback converts their gradients back.

Layers of the same name differ between libraries. `LIBRARIES` lists those that compute the same function as jaxseq:

- The RNN of Haiku always uses relu, and its GRU applies the reset gate before the recurrent product. Both differ from
  jaxseq and are not measured.
- torch always has a second bias. Where jaxseq has only one, the second is zero and its gradient is not computed.
- Keras is batch major. Equinox has cells without a batch axis and no Elman cell, which is built from two linear layers.
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

os.environ.setdefault("KERAS_BACKEND", "jax")  # read by Keras when it is imported

Function = Callable[..., Any]

PARAMS = {"rnn": RNNParams, "gru": GRUParams, "lstm": LSTMParams}


def same(a: Any) -> Any:
    return a


def swapped(xs: jax.Array) -> jax.Array:
    """Swap the time axis and the batch axis."""
    return jnp.swapaxes(xs, 0, 1)


class Library(NamedTuple):
    """`run(params, carry, xs) -> (carry, ys)` in the layout of the library, with conversions (to, from) that layout.

    The second conversion of `params` is for gradients. For `carry` and `xs`, the first also converts cotangents, and
    the second gradients. `with_gradient` is that of the harness, or an equivalent for a library outside JAX.
    """

    run: Function
    params: tuple[Function, Function] = (same, same)
    carry: tuple[Function, Function] = (same, same)
    xs: tuple[Function, Function] = (same, same)
    with_gradient: Function = harness.with_gradient
    jit: bool = True


def conversions(kind: str, D: int, H: int, convert_params: Function) -> tuple[Function, Function]:
    """Return the conversion of the parameters, and its pullback, which converts their gradient back."""
    G = {"rnn": 1, "gru": 3, "lstm": 4}[kind]
    biases = [jnp.zeros(G * H)] * (2 if kind == "gru" else 1)
    zeros = PARAMS[kind](jnp.zeros((D, G * H)), jnp.zeros((H, G * H)), *biases)
    return convert_params, lambda gradient: jax.vjp(convert_params, zeros)[1](gradient)[0]


def in_flax(kind: str, D: int, H: int) -> Library | None:
    """`nn.RNN` of Flax. Its documentation recommends this LSTM cell up to H = 2048."""
    nn = harness.peer("flax.linen")
    if nn is None:
        return None
    cell = {"rnn": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}[kind](H)
    model = nn.RNN(cell, time_major=True, return_carry=True)

    def run(variables: Any, carry: Any, xs: jax.Array, lengths: jax.Array | None = None) -> tuple[Any, jax.Array]:
        return model.apply(variables, xs, initial_carry=carry, seq_lengths=lengths)

    c_and_h = (lambda s: (s.c, s.h)), (lambda s: LSTMState(s[1], s[0]))
    params = conversions(kind, D, H, lambda params: {"params": {"cell": convert.to_flax(kind, params)}})
    return Library(run, params, c_and_h if kind == "lstm" else (same, same))


def in_equinox(kind: str, D: int, H: int) -> Library | None:
    """Scan over a cell of Equinox, mapped over the batch by `jax.vmap`."""
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

    def convert_params(params: Any) -> Any:
        if kind != "rnn":
            return convert.to_equinox(kind, params, cell)
        fields = lambda cell: (cell[0].weight, cell[1].weight, cell[0].bias)  # noqa: E731
        return eqx.tree_at(fields, cell, (params.w_x.T, params.w_h.T, params.b))

    carry = (tuple, LSTMState._make) if kind == "lstm" else (same, same)
    return Library(run, conversions(kind, D, H, convert_params), carry)


def in_haiku(kind: str, D: int, H: int) -> Library | None:
    """LSTM of Haiku."""
    hk = harness.peer("haiku")
    if hk is None:
        return None

    def unroll(carry: Any, xs: jax.Array) -> Any:
        return hk.dynamic_unroll(hk.LSTM(H), xs, carry)

    apply = hk.without_apply_rng(hk.transform(unroll)).apply

    def run(params: Any, carry: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
        return apply(params, carry, xs)[::-1]

    params = conversions(kind, D, H, partial(convert.to_haiku, kind))
    return Library(run, params, (lambda s: hk.LSTMState(*s), LSTMState._make))


def in_keras(kind: str, D: int, H: int) -> Library | None:
    """Layer of Keras with the JAX backend."""
    keras = harness.peer("keras")
    if keras is None:
        return None
    layers = {"rnn": keras.layers.SimpleRNN, "gru": keras.layers.GRU, "lstm": keras.layers.LSTM}
    layer = layers[kind](H, return_sequences=True, return_state=True)  # a GRU has reset_after=True by default
    layer.build((None, None, D))
    others = [variable.value for variable in layer.non_trainable_variables]  # the seed of the unused dropout

    def run(weights: Any, carry: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
        (ys, *carry), _ = layer.stateless_call(weights, others, xs, initial_state=carry)
        return carry, ys

    params = conversions(kind, D, H, partial(convert.to_keras, kind))
    return Library(run, params, (jax.tree.leaves, state_of(kind)), (swapped, swapped))


def in_torch(kind: str, D: int, H: int) -> Library | None:
    """Layer of torch. Its `params` are the layer itself."""
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

    def convert_params(params: Any) -> Any:
        layer = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind](D, H).requires_grad_(False)
        layer.load_state_dict({name: tensor(a) for name, a in convert.to_torch(kind, params).items()})
        return layer

    def array(a: Any) -> np.ndarray:
        return a.detach().numpy()

    _, back = conversions(kind, D, H, partial(convert.to_torch, kind))

    def of_all(gradients: Any) -> dict[str, Any]:
        converted = {name: jnp.asarray(array(a)) for name, a in zip(names, gradients, strict=True)}
        return {"bias_hh_l0": jnp.zeros_like(converted["bias_ih_l0"])} | converted

    return Library(
        run,
        (convert_params, lambda gradients: back(of_all(gradients))),
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
    """Return the function that builds a state of jaxseq from its leaves."""
    return LSTMState._make if kind == "lstm" else lambda leaves: leaves[0]
