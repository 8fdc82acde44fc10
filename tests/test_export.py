"""Export with symbolic sizes, values and gradients, at several sizes and for several platforms; serialization."""

import importlib
import inspect
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import causal_conv, draw
from jax import export

import jaxseq
from jaxseq import _serialization, autoregressive, cells, diagnostics

pytestmark = pytest.mark.usefixtures("as_users_have_jax")
ROOT = Path(__file__).parents[1]
KEY = jax.random.key(0)


def lengths_of(x, axis=0):
    """Return lengths for the sequences of x."""
    T = x.shape[axis]
    return jnp.arange(x.shape[1 - axis], dtype=jnp.int32) % (T + 1)


def resets_of(x):
    return x[..., 0] > 0.5


LSTM, GRU, RNN = (draw(3, 16), draw(4, 16), draw(16)), (draw(3, 12), draw(4, 12), draw(12), draw(12)), draw(4, 4)
LSTM, GRU = jaxseq.LSTMParams(*LSTM), jaxseq.GRUParams(*GRU)
CONV_LSTM = jaxseq.LSTMParams(draw(3, 3, 2, 12), draw(3, 3, 3, 12), draw(12))
CONV_GRU = jaxseq.GRUParams(draw(3, 2, 9), draw(3, 3, 9), draw(9), draw(9))
DROPOUT = {"dropout": 0.1, "recurrent_dropout": 0.1, "zoneout": 0.1, "key": KEY}


def scan(x, **options):
    return jaxseq.scan(lambda s, x: (jnp.tanh(s @ RNN + x), s), jnp.zeros(x.shape[1:]), x, **options)


# A symbolic shape, and a function of an array of that shape.
CASES = {
    "conv": ("b, t, 3", lambda x: jaxseq.conv(x, draw(3, 3, 4))),
    "conv SAME, stride": ("b, h, w, 3", lambda x: jaxseq.conv(x, draw(3, 3, 3, 4), padding="SAME", stride=2)),
    "conv CAUSAL, stride": ("b, t, 3", lambda x: jaxseq.conv(x, draw(3, 3, 4), padding="CAUSAL", stride=3)),
    "conv, cropped": ("b, t, 3", lambda x: jaxseq.conv(x, draw(3, 3, 4), padding=((5, -1),))),
    "conv, no batch": ("t, 3", lambda x: jaxseq.conv(x, draw(3, 3, 4), padding="SAME", dilation=2)),
    "conv, batch": ("a, b, 6, w, 3", lambda x: jaxseq.conv(x, draw(3, 3, 3, 4), padding="SAME")),
    "conv, 3-D": ("b, h, w, d, 3", lambda x: jaxseq.conv(x, draw(2, 2, 2, 3, 4), padding="SAME")),
    "conv, 3-D, batch": ("b, 4, 4, 4, 3", lambda x: jaxseq.conv(x, draw(2, 2, 2, 3, 4))),
    "conv, groups": ("b, t, 4", lambda x: jaxseq.conv(x, draw(3, 2, 6), groups=2, padding=1)),
    "conv, groups, batch": ("b, 9, 4", lambda x: jaxseq.conv(x, draw(3, 2, 6), groups=2)),
    "conv, one tap": ("b, t, 3", lambda x: jaxseq.conv(x, draw(1, 3, 4), stride=2)),
    "conv, patches, batch": ("b, 8, 8, 3", lambda x: jaxseq.conv(x, draw(4, 4, 3, 5), stride=4)),
    "conv, patches": ("b, 4*h, 4*w, 3", lambda x: jaxseq.conv(x, draw(4, 4, 3, 5), stride=4)),
    "depthwise_conv": ("b, t, 4", lambda x: jaxseq.depthwise_conv(x, draw(3, 1, 8), padding="CAUSAL")),
    "depthwise_conv, batch": ("b, 9, 4", lambda x: jaxseq.depthwise_conv(x, draw(3, 1, 8))),
    "depthwise_conv, long": ("b, 200, 2", lambda x: jaxseq.depthwise_conv(x, draw(90, 1, 2))),
    "separable_conv": ("b, h, w, 4", lambda x: jaxseq.separable_conv(x, draw(3, 3, 1, 8), draw(1, 1, 8, 5), padding=1)),
    "conv_transpose": ("b, t, 3", lambda x: jaxseq.conv_transpose(x, draw(4, 5, 3), stride=2, padding=1)),
    "conv_transpose SAME": (
        "b, h, w, 3",
        lambda x: jaxseq.conv_transpose(x, draw(4, 4, 5, 3), stride=2, padding="SAME"),
    ),
    "causal_conv": ("a, b, t, 3", lambda x: causal_conv(None, x, draw(3, 3, 4), dilation=2)),
    "causal_conv, resets": ("b, t, 3", lambda x: causal_conv(None, x, draw(3, 3, 4), resets=resets_of(x))),
    "rnn": ("t, b, 3", lambda x: jaxseq.rnn(jaxseq.RNNParams(draw(3, 4), RNN, draw(4)), None, x)),
    "gru, batch": ("40, b, 3", lambda x: jaxseq.gru(GRU, None, x)),
    "gru, time": ("t, 1, 3", lambda x: jaxseq.gru(GRU, None, x)),
    "lstm": (
        "2*t + 1, b, 3",
        lambda x: jaxseq.lstm(LSTM, None, x, lengths=lengths_of(x), reverse=True, resets=resets_of(x)),
    ),
    "lstm, time_axis": ("b, t, 3", lambda x: jaxseq.lstm(LSTM, None, x, time_axis=1, lengths=lengths_of(x, 1))),
    "lstm, truncation": ("t, b, 3", lambda x: jaxseq.lstm(LSTM, None, x, truncation=4)),
    "lstm, overlapping windows": (
        "t, b, 3",
        lambda x: jaxseq.lstm(LSTM, None, x, truncation=(3, 5), lengths=lengths_of(x), reverse=True),
    ),
    "lstm, batch, truncation, checkpoint": (
        "30, b, 3",
        lambda x: jaxseq.lstm(LSTM, None, x, truncation=4, checkpoint=8),
    ),
    "lstm_cell": ("b, 3", lambda x: jaxseq.lstm_cell(LSTM, None, x)),
    "conv_lstm": ("t, b, h, w, 2", lambda x: jaxseq.conv_lstm(CONV_LSTM, None, x)),
    "conv_gru": ("t, b, h, 2", lambda x: jaxseq.conv_gru(CONV_GRU, None, x, stride=2)),
    "bidirectional": (
        "t, b, 3",
        lambda x: jaxseq.bidirectional(jaxseq.lstm, [LSTM, LSTM], None, x, lengths=lengths_of(x)),
    ),
    "stack": ("t, b, 3", lambda x: jaxseq.stack(jaxseq.gru, [GRU, GRU._replace(w_x=GRU.w_h)], None, x, **DROPOUT)),
    "scan": ("t, b, 4", partial(scan, truncation=3)),
    "scan, batch": ("20, b, 4", partial(scan, truncation=(3, 4), checkpoint=2)),
    "latent": ("t, b, 3", lambda x: autoregressive.latent(jaxseq.gru, GRU, None, x)),
    "log_likelihood": (
        "t, b, 3",
        lambda x: autoregressive.log_likelihood(autoregressive.log_normal(x, 2 * x, x), lengths=lengths_of(x)),
    ),
    "histories": ("t, 3", lambda x: autoregressive.histories(x, 2)[0]),
}
for name in ("classic_gru", "indrnn", "layer_norm_gru", "layer_norm_lstm", "mgu", "peephole_lstm", "slstm"):
    shapes = jax.eval_shape(lambda: getattr(cells, f"{name}_init")(KEY, 4, 4))  # noqa: B023
    params = jax.tree.map(lambda a: draw(*a.shape), shapes)
    CASES[name] = ("t, b, 4", partial(jaxseq.recurrence, getattr(cells, name), params, None))
CASES["projected_lstm"] = (
    "t, b, 4",
    partial(jaxseq.recurrence, cells.projected_lstm, cells.projected_lstm_init(KEY, 4, 4, 3), None),
)
# Cases that the default suite runs (RUN) or only exports (EXPORTED). The others are similar.
RUN = ("conv SAME, stride", "lstm")
EXPORTED = (
    "conv",
    "conv, no batch",
    "conv, 3-D, batch",
    "conv, groups",
    "depthwise_conv, batch",
    "conv_transpose SAME",
)
EXPORTED += (
    "causal_conv, resets",
    "gru, batch",
    "lstm, overlapping windows",
    "conv_lstm",
    "stack",
    "scan",
    "slstm",
)
# Ordinary sizes, and small ones.
SIZES = {"a": 3, "b": 2, "t": 7, "h": 5, "w": 6, "d": 4}, {"a": 1, "b": 1, "t": 3, "h": 4, "w": 3, "d": 3}


def value_and_gradient(f):
    def both(x):
        out, pull = jax.vjp(f, x)
        return out, pull(jax.tree.map(jnp.sin, out))

    return jax.jit(both)


def exported(f, shape, **options):
    return export.export(f, **options)(jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32))


@pytest.mark.other_types
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in RUN else [pytest.mark.long]) for name in CASES]
)
def test_values_and_gradients_of_symbolic_sizes_are_those_of_known_ones(name):
    shape, f = CASES[name]
    both = value_and_gradient(f)
    program = exported(both, shape)
    x = draw(*(eval(size, {}, SIZES[name not in RUN]) for size in shape.split(",")))
    got, expected = program.call(x), both(x)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.other_types
@pytest.mark.parametrize("name", EXPORTED)
def test_values_and_gradients_of_symbolic_sizes_are_exported(name):
    shape, f = CASES[name]
    exported(value_and_gradient(f), shape)


@pytest.mark.other_types
@pytest.mark.parametrize("name", ["conv, groups, batch", "gru, batch"])
def test_one_export_serves_several_platforms(name):
    shape, f = CASES[name]
    platforms = ("cpu", "cuda", "tpu")
    assert exported(value_and_gradient(f), shape, platforms=platforms).platforms == platforms


@pytest.mark.other_types
@pytest.mark.parametrize(
    ("f", "words"),
    [
        (jax.grad(lambda x: jaxseq.lstm(LSTM, None, x, checkpoint=4)[1].sum()), "`checkpoint`: expected None, since"),
        (partial(scan, checkpoint="auto"), "`checkpoint`: expected None, since"),
        (partial(scan, truncation=(2, 3)), "`truncation`: expected an integer, since"),
    ],
    ids=["checkpoint", "checkpoint of scan", "truncation of scan"],
)
def test_what_needs_known_sizes_is_refused_by_its_name(f, words):
    with pytest.raises(ValueError, match=words):
        exported(jax.jit(f), "t, b, 4" if isinstance(f, partial) else "t, b, 3")


# --- Serialization ---


def public_namedtuples():
    """Yield the public NamedTuples of arrays that a function may take or return, with their public names."""
    others = jaxseq.Cell, jaxseq.LinearCell, jaxseq.StepResult, jaxseq.Pullback, jaxseq.Decision, jaxseq.Explanation
    for module in (jaxseq, autoregressive, cells, diagnostics):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) and hasattr(value, "_fields") and value not in others:
                yield f"{module.__name__}.{name}", value


def test_every_public_namedtuple_is_registered_under_its_public_name():
    assert dict(public_namedtuples()) == _serialization.REGISTERED
    for name, kind in _serialization.REGISTERED.items():
        with pytest.raises(ValueError, match=r"Duplicate|already"):
            export.register_namedtuple_serialization(kind, serialized_name=f"another.{name}")


def test_reload_registers_nothing_twice():
    importlib.reload(_serialization)


@pytest.mark.other_types
def test_serialized_functions_take_and_return_namedtuples():
    f = jax.jit(jaxseq.lstm)
    state = jaxseq.LSTMState(draw(2, 4), draw(2, 4))
    xs = jax.ShapeDtypeStruct(export.symbolic_shape("t, 2, 3"), jnp.float32)
    loaded = export.deserialize(export.export(f)(LSTM, state, xs).serialize(vjp_order=1))
    args = LSTM, state, draw(5, 2, 3)
    for run in (lambda f: f(*args), lambda f: jax.grad(lambda *args: f(*args)[1].sum(), argnums=(0, 1))(*args)):
        got, expected = run(loaded.call), run(f)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.other_types
@pytest.mark.long
def test_code_of_the_page_runs():
    text = (ROOT / "docs" / "export.md").read_text("utf-8")
    blocks = re.findall(r"```py(?:thon)?\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})
