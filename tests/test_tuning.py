"""`jaxseq.tuning` and `jaxseq.explain`: numbers change plans and never results, and an explanation states both."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, draw

import jaxseq
from jaxseq import tuning

B, T, D, H = 3, 40, 6, 5


def gradient(op, *args, **options):
    return jax.grad(lambda *args: jnp.sum(op(*args, **options)[1] ** 2), argnums=(0, 2))(*args)


def gru():
    params = jaxseq.GRUParams(draw(D, 3 * H), draw(H, 3 * H), draw(3 * H), draw(3 * H))
    return params, draw(B, H), draw(T, B, D)


def explained(subject, *args, **options):
    found = jaxseq.explain(*args, **options)
    return [decision for decision in found.decisions if decision.subject == subject]


@pytest.mark.parametrize(
    ("change", "subject", "choice"),
    [
        ({"parts": 4, "least_rows": 1, "least_steps": 1}, "backward pass", "40 steps, in chunks of 10"),
        ({"parts": 1, "rows": 24}, "backward pass", "40 steps, in chunks of 40"),  # least_rows: 43 steps of 3 examples
        ({"parts": 1, "rows": 24, "least_rows": 30}, "backward pass", "40 steps, in chunks of 14"),  # least_steps: 16
        ({"recompute_gates": 4}, "residuals of the cell", "stored at every step"),
        ({"recompute_products": 10}, "residuals of the cell", "stored at every step"),  # D + H = 11
    ],
    ids=str,
)
def test_numbers_change_the_plan_and_not_the_result(change, subject, choice):
    args = gru()
    expected = gradient(jaxseq.gru, *args)
    (before,) = explained(subject, jaxseq.gru, *args)
    recurrence = dataclasses.replace(tuning.CPU.recurrence, **change)
    with tuning.use(dataclasses.replace(tuning.CPU, recurrence=recurrence)):
        (after,) = explained(subject, jaxseq.gru, *args)
        assert_close(gradient(jaxseq.gru, *args), expected, relative=1e-5)
    assert after.choice == choice
    assert explained(subject, jaxseq.gru, *args) == [before], "the numbers are those of before after the context"


def test_windows_of_scan_run_in_parallel_or_one_by_one():
    def loops(limit):
        with tuning.use(tuning.Tuning(scan=tuning.ScanTuning(parallel_state=limit))):
            f = jax.make_jaxpr(lambda s, x: jaxseq.scan(lambda s, x: (s + x, s), s, x, truncation=2))
            return str(f(jnp.ones(10), jnp.ones(5)))

    assert "custom_jvp" in loops(10)
    assert "custom_jvp" not in loops(9)


@pytest.mark.other_types
def test_numbers_are_a_tuning():
    message = r"`tuning`: expected a jaxseq\.tuning\.Tuning, got \{'rows': 3\}"
    with pytest.raises(TypeError, match=message), tuning.use({"rows": 3}):
        pass


def test_explains_a_recurrence():
    params = jaxseq.RNNParams(draw(D, H), draw(H, H), draw(H))
    found = jaxseq.explain(jaxseq.rnn, params, None, draw(T, B, D), truncation=9, reverse=True)
    assert [d.choice for d in found.decisions[:2]] == [
        "4 windows of 9 steps in parallel, in chunks of 9 steps",
        "4 steps, in chunks of 4",
    ]
    assert "truncation (9, 9)" in found.decisions[0].reason
    # The parameters, the carry, xs and ys, and the state at the start of each of 4 + 1 chunks.
    sizes = D * H + H * H + H, B * H, T * B * (D + H), 5 * B * H
    assert found.residual_bytes == 4 * sum(sizes)
    text = str(found)
    assert text.startswith("rnn\n  backward pass: 4 windows")
    assert f"kept for the gradient: {4 * sum(sizes):,} bytes in 7 arrays" in text
    assert f"1 x float32[{T}, {B}, {D}]" in text


def test_a_checkpoint_keeps_less_and_is_the_reason():
    params = jaxseq.LSTMParams(draw(D, 4 * H), draw(H, 4 * H), draw(4 * H))
    args = params, None, draw(T, B, D)
    whole, less = (jaxseq.explain(jaxseq.lstm, *args, checkpoint=n) for n in (None, 8))
    assert whole.residual_bytes - less.residual_bytes == 4 * (4 * T - 2 * 4) * B * H  # gates less states of chunks
    assert {"checkpoint=8", "no truncation; checkpoint=8"} <= {d.reason for d in less.decisions}


def test_explains_a_model_without_computing_it():
    params = jaxseq.lstm_init(jax.random.key(0), 64, 1000)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)

    def model(params, xs):
        return jaxseq.lstm(params, None, xs)[1].sum()

    found = jaxseq.explain(model, shapes, jax.ShapeDtypeStruct((10**6, 64, 64), jnp.float32))
    assert found.op == "model"
    assert found.residual_bytes > 10**12


def test_explains_what_jit_has_traced_and_arguments_that_are_no_arrays():
    params = jaxseq.RNNParams(draw(D, H), draw(H, H), None)
    jitted = jax.jit(lambda params, xs: jaxseq.rnn(params, None, xs)[1])
    jitted(params, draw(T, B, D))
    plain = jaxseq.explain(jaxseq.rnn, params, None, draw(T, B, D)).decisions
    assert jaxseq.explain(jitted, params, draw(T, B, D)).decisions == plain
    assert jaxseq.explain(jaxseq.stack, jaxseq.rnn, [params], None, draw(T, B, D)).decisions == plain
    scanned = jaxseq.explain(partial(jaxseq.scan, lambda s, x: (s + x, s)), 0.0, draw(T))
    assert scanned.op == "scan"


@pytest.mark.other_types
@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("RecurrenceTuning", "rows", 0), ("ConvTuning", "loop_work", 3), ("ScanTuning", "parallel_state", 2.5)],
)
def test_numbers_are_positive(kind, field, value):
    with pytest.raises(ValueError, match=rf"`{field}`: expected .*positive .*got {value}"):
        getattr(tuning, kind)(**{field: value})


@pytest.mark.other_types
def test_errors_are_those_of_the_op():
    with pytest.raises(TypeError, match="`op`: expected a function"):
        jaxseq.explain("lstm")
    with pytest.raises(ValueError, match="`xs`: expected 6 features"):
        jaxseq.explain(jaxseq.rnn, jaxseq.RNNParams(draw(D, H), draw(H, H), None), None, draw(T, B, D + 1))
