"""Names of other libraries: hints of errors, the tables of the documentation, and frames in tracebacks."""

import inspect
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxseq
from jaxseq import _names, cells

ROOT = Path(__file__).parents[1]
PARAMS = jaxseq.LSTMParams(jnp.ones((3, 20)), jnp.ones((5, 20)), jnp.ones(20))
XS = jnp.ones((7, 2, 3))
CONV = jaxseq.ConvParams(jnp.ones((3, 3, 4)), jnp.ones(4))
OPS = [jaxseq.lstm, jaxseq.stack, jaxseq.conv, jaxseq.conv_transpose, jaxseq.scan, jaxseq.rnn, jaxseq.lstm_init]
OPS += [jaxseq.conv_init, jaxseq.bidirectional, jaxseq.causal_conv, cells.mgu_init]
OPS += [jaxseq.autoregressive.sample, jaxseq.autoregressive.lagged]

# A call with a habit of another library, and what the error says.
HABITS = {
    "seq_lengths": (jaxseq.lstm, r"use `lengths=`"),
    "mask": (jaxseq.gru, r"use `lengths=` for padding at the end; `zoneout=` with booleans"),
    "batch_first": (jaxseq.rnn, r"use `time_axis=1`"),
    "time_major": (jaxseq.recurrence, r"use `time_axis=0` or `1`"),
    "strides": (jaxseq.conv, r"use `stride`"),
    "kernel_size": (jaxseq.conv, r"use the shape of `kernel`, which `\*_init` returns"),
    "deterministic": (jaxseq.stack, r"use a rate of 0 for evaluation"),
    "initial_state": (jaxseq.conv_lstm, r"use `carry`"),
    "hx": (jaxseq.lstm, r"use `carry`"),
    "reset_mask": (jaxseq.gru, r"use `resets`"),
    "done": (jaxseq.lstm, r"use `resets`"),
    "num_layers": (jaxseq.lstm, r"use `jaxseq\.stack\(jaxseq\.lstm, \[params_0"),
    "feature_group_count": (jaxseq.conv, r"use `groups`"),
    "lhs_dilation": (jaxseq.conv, r"use `jaxseq\.conv_transpose`"),
    "units": (jaxseq.lstm_init, r"use `hidden_size`"),
    "filters": (jaxseq.conv_init, r"use `c_in` and `c_out`"),
    "param_dtype": (cells.mgu_init, r"use `dtype`"),
    "kernel_init": (jaxseq.lstm_init, r"use `w_x_init`"),
    "recurrent_initializer": (cells.mgu_init, r"use `w_h_init`"),
    "lenghts": (jaxseq.lstm, r"use `lengths`"),
    "reset_carry": (jaxseq.gru, r"use `reset_state`"),
    "eos_token_id": (jaxseq.autoregressive.sample, r"use `stop`"),
    "max_new_tokens": (jaxseq.autoregressive.sample, r"use `length`"),
    "window": (jaxseq.autoregressive.lagged, r"use `order`"),
}


@pytest.mark.parametrize("habit", HABITS)
def test_an_argument_of_another_library_is_answered(habit):
    op, expected = HABITS[habit]
    module = op.__module__.split(".")[1]
    module = "" if module.startswith("_") else rf"{module}\."
    message = rf"jaxseq\.{module}{op.__name__}: got an unexpected keyword argument '{habit}'; {expected}"
    with pytest.raises(TypeError, match=message):
        op(**{habit: 1})


def test_options_of_other_functions_have_no_near_match():
    with pytest.raises(TypeError, match=r"jaxseq\.scan: got an unexpected .* 'lengths'\. Options: truncation,"):
        jaxseq.scan(lambda s, x: (s, x), 0.0, XS, lengths=3)
    with pytest.raises(TypeError, match=r"'nothing_like_it'\. Options: "):
        jaxseq.lstm(PARAMS, None, XS, nothing_like_it=3)


def test_a_missing_argument_shows_the_arguments():
    expected = (
        r"missing a required argument: 'xs'; the arguments are \(params, carry, xs\), where a carry of None is zeros"
    )
    with pytest.raises(TypeError, match=rf"jaxseq\.lstm: {expected}\. Options: lengths,"):
        jaxseq.lstm(PARAMS, XS)
    with pytest.raises(
        TypeError, match=r"jaxseq\.conv: too many positional .* are \(x, kernel, bias\)\. Options: stride"
    ):
        jaxseq.conv(XS, XS, None, 2)


@pytest.mark.other_types
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda: jaxseq.conv(CONV, XS),
            r"`x`: .*, got ConvParams; pass its arrays after `x`, as in conv\(x, \*params\)",
        ),
        (lambda: jaxseq.conv(XS, CONV), r"`kernel`: .*, got ConvParams; pass its arrays after `x`"),
        (
            lambda: jaxseq.causal_conv(None, XS, CONV.kernel),
            r"`params`: expected ConvParams\(kernel, bias\), got NoneType None; the order is \(params, carry, xs\)",
        ),
        (
            lambda: jaxseq.lstm_init(0, 3, 5),
            r"`key`: expected a JAX random key, such as jax\.random\.key\(0\), got int 0",
        ),
        (lambda: jaxseq.stack(jaxseq.lstm, [PARAMS], None, XS, key=3), r"`key`: .*, got int 3"),
    ],
)
def test_arguments_in_the_order_of_others(call, expected):
    with pytest.raises(TypeError, match=expected):
        call()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("LSTM", "jaxseq.lstm"), ("Conv2d", "jaxseq.conv"), ("ConvLSTM2D", "conv_lstm"), ("gradcheck", "jaxseq.testing")],
)
def test_a_class_of_another_library_is_answered(name, expected):
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'; use `{expected}"):
        getattr(jaxseq, name)


def test_every_hint_is_of_one_row_and_for_no_argument_of_ours():
    for op in OPS:
        parameters = inspect.signature(op).parameters
        rows = [n for n in (*_names.NAMES, *_names.OTHERS) if not n.option or n.option in parameters]
        counts = Counter(argument for row in rows for argument in row.arguments)
        assert max(counts.values()) == 1, (op, counts.most_common(3))
    options = {option for op in OPS for option in inspect.signature(op).parameters}
    assert {row.option for row in (*_names.NAMES, *_names.OTHERS)} - {""} <= options
    answered = {*_names.ATTRIBUTES, *(a for row in _names.NAMES for a in row.attributes)}
    assert not answered & {*dir(jaxseq)}


def test_the_tables_of_the_page_are_those_of_the_list():
    code = "from names import PAGE, page; assert page(PAGE.read_text()) == PAGE.read_text()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "docs" / "site", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + "\nRun `python docs/site/names.py`."


# --- Tracebacks ---


def bad_call():
    jaxseq.lstm(PARAMS, None, XS[..., :2])


def bad_step(s, x):
    raise RuntimeError("in the step of the caller")


def frames(f):
    try:
        f()
    except Exception as error:
        return [Path(frame.filename).name + ":" + frame.name for frame in traceback.extract_tb(error.__traceback__)][1:]
    raise AssertionError("no error")


@pytest.mark.other_types  # checks of annotations have frames of their own
def test_tracebacks_have_the_frames_of_the_caller():
    assert frames(bad_call) == ["test_names.py:bad_call", "_op.py:public"]
    assert frames(lambda: jaxseq.scan(bad_step, 0.0, XS))[-1] == "test_names.py:bad_step"
    assert frames(lambda: jaxseq.gru_init(jax.random.key(0), 3, 0)) == ["test_names.py:<lambda>", "_op.py:public"]


def test_all_frames_are_kept_where_jax_keeps_its_own():
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        assert "_checks.py:bad_value" in frames(bad_call)
    finally:
        jax.config.update("jax_traceback_filtering", before)
