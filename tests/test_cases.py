"""The list of cases is complete, and its reference implementations match the signatures and use no custom rule."""

import inspect

import jax
import pytest
from helpers import GRID, OPS, arguments, bound, derived, long_where, subjaxprs

import jaxseq
from jaxseq._cases import CASES
from jaxseq._op import signature_with_time_options


def test_every_public_op_has_a_case():
    functions = {name for name in jaxseq.__all__ if inspect.isfunction(getattr(jaxseq, name))}
    no_op = {name for name in functions if name.endswith("_init")}
    # A move between shards, a function of functions, and two that compute nothing.
    no_op |= {"carry_across_shards", "both_modes", "explain", "parallel", "zero_state"}
    assert functions - no_op == set(CASES)


def test_every_reference_belongs_to_an_op():
    assert set(jaxseq.reference.__all__) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_reference_has_the_signature_of_its_op(name):
    case = CASES[name]
    assert case.op is getattr(jaxseq, name)
    assert case.reference is getattr(jaxseq.reference, name)
    op, reference = (
        signature_with_time_options(f).parameters.values() for f in (inspect.unwrap(case.op), case.reference)
    )
    assert [(p.name, p.kind, p.default) for p in op] == [(p.name, p.kind, p.default) for p in reference]


@pytest.mark.parametrize(("name", "label"), long_where(GRID, derived))
def test_no_custom_rule_below_a_reference_and_both_modes_below_an_op(name, label, key):
    args = arguments(name, label, key)

    def rules(f):
        return [e for e in subjaxprs(jax.make_jaxpr(f)(*args).jaxpr) if e.primitive.name.startswith("custom_")]

    assert not rules(bound(name, label, reference=True))
    found = {e.primitive.name for e in rules(bound(name, label))}
    if name == "scan":  # JAX differentiates it in either mode, window by window
        assert found == ({"custom_jvp_call"} if "truncation" in CASES[name].variants[label].options else set())
    else:
        assert found == {"custom_jvp_call", "custom_vjp_call"}


@pytest.mark.parametrize(("name", "label"), OPS)
def test_ops_have_a_name_in_profiles(name, label, key):
    lowered = jax.jit(bound(name, label)).lower(*arguments(name, label, key))
    assert f"jaxseq.{name}/" in lowered.as_text(debug_info=True)
