"""Everyday tasks, each written as the habit of a framework suggests: it works, or the error names the right call.

A task that works is traced and not compiled. Other tests check values.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jaxseq
from jaxseq import autoregressive, cells, convert

pytestmark = pytest.mark.usefixtures("as_users_have_jax")

B, T, D, H, V = 2, 7, 3, 5, 11
KEY = jax.random.key(0)


class LeakyParams(NamedTuple):
    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array
    rate: jax.Array


def lstm(**options):
    return jaxseq.lstm(jaxseq.lstm_init(KEY, D, H), None, jnp.ones((B, T, D)), **{"time_axis": 1, **options})


def gru(**options):
    return jaxseq.gru(jaxseq.gru_init(KEY, D, H), None, jnp.ones((T, B, D)), **options)


# --- Tasks that work: the shape of the last result ---


def carry_of_a_rollout():
    params = jaxseq.lstm_init(KEY, D, H)
    return lax.scan(partial(jaxseq.lstm_cell, params), jaxseq.zero_state(params, B), jnp.ones((T, B, D)))


def stacked_bidirectional_gru():
    params = jaxseq.stack_init(partial(jaxseq.bidirectional_init, jaxseq.gru_init), KEY, D, [H, H])
    layer = partial(jaxseq.bidirectional, jaxseq.gru)
    return jaxseq.stack(layer, params, None, jnp.ones((B, T, D)), dropout=0.1, key=KEY, time_axis=1)


def text_after_a_prompt():
    params, table, out = jaxseq.gru_init(KEY, D, H), jnp.ones((V, D)), jnp.ones((H, V))

    def step(h, x):
        h, y = jaxseq.gru_cell(params, h, table[x])
        return h, y @ out

    return autoregressive.sample(KEY, step, None, None, 20, prompt=jnp.zeros((4, B), jnp.int32), stop=2, top_k=3)


def stream_in_chunks():
    params = jaxseq.conv_init(KEY, 3, D, H)
    carry, _ = jaxseq.causal_conv(params, None, jnp.ones((T, B, D)))
    return jaxseq.causal_conv(params, carry, jnp.ones((1, B, D)))


def upsampling():
    params = jaxseq.conv_transpose_init(KEY, 4, D, H, stride=2)
    return jaxseq.conv_transpose(jnp.ones((B, T, D)), *params, stride=2, padding="same")


def conv_lstm_of_a_video():
    return jaxseq.conv_lstm(jaxseq.conv_lstm_init(KEY, (3, 3), 1, H), None, jnp.ones((B, T, 8, 6, 1)), time_axis=1)


def cell_of_your_own():
    step = lambda a, h, p: h + p.rate * (jnp.tanh(a[0]) - h)  # noqa: E731
    leaky = jaxseq.Cell("leaky", "h", step, LeakyParams)
    params = LeakyParams(*jaxseq.rnn_init(KEY, D, H), rate=jnp.full(H, 0.1))
    return jaxseq.stack(leaky, [params], None, jnp.ones((B, T, D)), time_axis=1)


def cell_of_irregular_times():
    def step(a, h, dt):
        keep = jnp.exp(-dt)[..., None]
        return keep * h + (1 - keep) * jnp.tanh(a[0])

    irregular = jaxseq.Cell("irregular", "h", step, jaxseq.RNNParams, side_inputs=True)
    return jaxseq.recurrence(irregular, jaxseq.rnn_init(KEY, D, H), None, (jnp.ones((T, B, D)), jnp.ones((T, B))))


def every_state_of_a_policy_with_a_learned_initial_state():
    first = jaxseq.LSTMState(jnp.zeros(H), jnp.zeros(H))
    states, ys = jaxseq.lstm(
        jaxseq.lstm_init(KEY, D, H),
        None,
        jnp.ones((T, B, D)),
        resets=jnp.zeros((T, B), bool),
        reset_state=first,
        return_states=True,
    )
    return ys, states.c


def convolution_of_a_padded_batch():
    params = jaxseq.conv_init(KEY, 3, D, H)
    return None, jaxseq.conv(jnp.ones((B, T, D)), *params, padding="CAUSAL", lengths=jnp.array([7, 3]))


def layers_of_cells():
    params = jaxseq.stack_init(cells.mgu_init, KEY, D, [H, 4])
    return jaxseq.stack(cells.mgu, params, None, jnp.ones((B, T, D)), time_axis=1)


def half_precision():
    params = jaxseq.lstm_init(KEY, D, H, dtype=jnp.bfloat16)
    return jaxseq.lstm(params, None, jnp.ones((T, B, D), jnp.bfloat16))


def exported_program():
    params = jaxseq.gru_init(KEY, D, H)
    program = export.export(jax.jit(partial(jaxseq.gru, params, None)))(jax.ShapeDtypeStruct((T, B, D), jnp.float32))
    return program.call(jnp.ones((T, B, D)))


def ensemble():
    params = jax.vmap(lambda key: jaxseq.lstm_init(key, D, H))(jax.random.split(KEY, 4))
    return jax.vmap(lambda params: jaxseq.lstm(params, None, jnp.ones((T, B, D))))(params)


def parameters_of_a_checkpoint():
    return jaxseq.lstm(jaxseq.lstm_init(KEY, D, H)._asdict(), None, jnp.ones((T, B, D)))


def weights_of_another_library():
    rng = np.random.default_rng(0)
    shapes = {"weight_ih_l0": (4 * H, D), "weight_hh_l0": (4 * H, H), "bias_ih_l0": (4 * H,), "bias_hh_l0": (4 * H,)}
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return jaxseq.lstm(convert.from_torch("lstm", state), None, jnp.ones((T, B, D)))


def activation_and_initializer():
    params = jaxseq.rnn_init(KEY, D, H, use_bias=False, w_x_init=jax.nn.initializers.glorot_uniform())
    return jaxseq.rnn(params, None, jnp.ones((T, B, D)), activation=jax.nn.gelu)


def forecast_of_several_variables():
    model = autoregressive.fit(jax.random.normal(KEY, (60, D)), 2, horizon=3)
    return None, autoregressive.predict(model, jnp.ones((T, D)))


def jacobian_in_forward_mode():
    params = jaxseq.gru_init(KEY, D, H)
    return jax.jacfwd(lambda xs: jaxseq.gru(params, None, xs)[1])(jnp.ones((T, B, D)))


WORKS = {
    carry_of_a_rollout: (T, B, H),
    stacked_bidirectional_gru: (B, T, 2 * H),
    text_after_a_prompt: (20, B),
    stream_in_chunks: (1, B, H),
    upsampling: (B, 2 * T, H),
    conv_lstm_of_a_video: (B, T, 8, 6, H),
    cell_of_your_own: (B, T, H),
    cell_of_irregular_times: (T, B, H),
    every_state_of_a_policy_with_a_learned_initial_state: (T, B, H),
    convolution_of_a_padded_batch: (B, T, H),
    layers_of_cells: (B, T, 4),
    half_precision: (T, B, H),
    jacobian_in_forward_mode: (T, B, H, T, B, D),
    exported_program: (T, B, H),
    ensemble: (4, T, B, H),
    parameters_of_a_checkpoint: (T, B, H),
    weights_of_another_library: (T, B, H),
    activation_and_initializer: (T, B, H),
    forecast_of_several_variables: (T, D),
}


MARKED = {parameters_of_a_checkpoint: pytest.mark.other_types}  # annotations name the NamedTuple


@pytest.mark.parametrize("task", [pytest.param(t, marks=MARKED.get(t, ()), id=t.__name__) for t in WORKS])
def test_the_first_guess_works(task):
    found = task() if task is exported_program else jax.eval_shape(task)
    assert (found[1] if isinstance(found, tuple) else found).shape == WORKS[task]


# --- Tasks whose error names the right call ---

ANSWERED = {
    "Flax: a padded batch": (lambda: lstm(seq_lengths=jnp.array([7, 3])), r"use `lengths=`"),
    "torch: batch first": (lambda: lstm(batch_first=True), r"use `time_axis=1`"),
    "torch: layers": (lambda: lstm(num_layers=2), r"use `jaxseq\.stack\("),
    "torch: without a carry": (
        lambda: jaxseq.lstm(jaxseq.lstm_init(KEY, D, H), jnp.ones((T, B, D))),
        r"missing a required argument: 'xs'; .* a carry of None is zeros",
    ),
    "PPO: done": (lambda: gru(done=jnp.zeros((T, B), bool)), r"use `resets`"),
    "PPO: episode starts as floats": (lambda: gru(resets=jnp.zeros((T, B))), r"convert it with `\.astype\(bool\)`"),
    "Keras: a mask": (lambda: lstm(mask=jnp.ones((B, T), bool)), r"use `lengths=` for padding at the end"),
    "Keras: strides": (lambda: jaxseq.conv(jnp.ones((B, T, D)), jnp.ones((3, D, H)), strides=2), r"use `stride`"),
    "Flax: the carry (c, h)": (
        lambda: jaxseq.lstm(jaxseq.lstm_init(KEY, D, H), (0, 0), jnp.ones((T, B, D))),
        r"h=\.\.\.",
    ),
    "Flax: remat": (lambda: lstm(checkpoint=True), r"\"auto\" \(about sqrt\(T\)\)"),
    "modules": (lambda: jaxseq.LSTM(D, H), r"use `jaxseq\.lstm`"),
    "lax: arrays of a kernel": (
        lambda: jaxseq.causal_conv(jnp.ones((T, B, D)), jnp.ones((3, D, H))),
        r"the arguments are \(params, carry, xs\), where a carry of None is zeros",
    ),
}


@pytest.mark.other_types
@pytest.mark.parametrize("label", ANSWERED)
def test_the_error_names_the_right_call(label):
    call, expected = ANSWERED[label]
    with pytest.raises((TypeError, ValueError, AttributeError), match=f"(?s){expected}"):
        call()
