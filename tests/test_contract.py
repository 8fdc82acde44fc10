"""The contract of every op and variant; chunks and single steps equal the whole sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from contract import verify_contract
from helpers import GRID, OPS, arguments, assert_close, bound, cotangents_for, derived, long_where, pullback
from jax import lax

from jaxseq._cases import CASES


def dtypes_of(name, label):
    """Return all dtypes for convolutions, whose rules depend on them, and for the first variant of each op.

    For other variants, return float32.
    """
    all_of_them = "conv" in name or (name, label) in [p.values for p in OPS]
    return (jnp.float64, jnp.float32, jnp.bfloat16) if all_of_them else (jnp.float32,)


# Variants in the default suite. Time options take the same branches for every cell with a pullback, and lstm covers all
# of them. test_time.py covers pairs of options.
DEFAULT = {
    "rnn": ("plain", "no bias, zero carry", "relu"),
    "gru": ("plain",),
    "lstm": (
        "plain",
        "truncation, reverse",
        "lengths, resets, reverse",
        "batch first, lengths, checkpoint",
        "recurrent dropout, zoneout",
        "states, reset state, lengths",
    ),
    "scan": ("plain",),
    "linear_recurrence": ("lengths, resets, reverse", "batch first, resets, checkpoint"),
    "conv_lstm": ("1d",),
    "stack": ("gru",),
    "depthwise_conv": (),
    "causal_conv": ("plain", "depthwise", "dilated, beyond the chunk", "resets, depthwise, dilated"),
    "conv_transpose": ("1d", "strided, dilated, causal", "depthwise", "output padding, grouped", "3d"),
}
# Cells for which options take other branches: no pullback, a product within the step, two sizes.
OPTIONS = ("leaky", "twice", "projected_lstm")


# Convolutions whose rule is already covered by another variant.
SECOND = ("2d grouped, dilated", "2d depthwise, long", "3d, overlapping patches", "depthwise, depth multiplier 2")


def later(name, label):
    """Return whether the variant belongs to the long suite only."""
    if (name == "conv" and label in SECOND) or label == "twice, lengths, checkpoint":
        return True
    return label not in DEFAULT.get(name, (label,)) or derived(name, label)


def repeats(name, label):
    """Return whether lstm, conv_lstm or a cell of OPTIONS has a variant that takes the same branches."""
    if name in ("rnn", "gru"):
        return label not in ("plain", "no bias, zero carry", "relu")
    if name in ("conv_gru", "conv_gru_cell"):
        return label != "1d"
    return name == "recurrence" and ", " in label and label.partition(", ")[0] not in OPTIONS


VARIANTS = [p for p in GRID if not repeats(*p.values)]


@pytest.mark.parametrize(("name", "label"), long_where(VARIANTS, later))
def test_contract(name, label, key):
    verify_contract(name, label, key, dtypes_of(name, label))


# Ops that handle the carry in separate code.
CHUNKED = [("rnn", "plain"), ("gru", "plain"), ("lstm", "plain"), ("conv_lstm", "1d"), ("stack", "gru")]
CHUNKED += [("causal_conv", "plain"), ("causal_conv", "resets, depthwise, dilated")]


@pytest.mark.parametrize(("name", "label"), CHUNKED)
def test_chunks_equal_the_whole(name, label, key):
    """Chunks of one step, no step, four steps and two steps, with the carry passed from each to the next."""
    args, f = arguments(name, label, key), bound(name, label)
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 1))
    over_time = [2, *range(len(args) - len(CASES[name].variants[label].arrays), len(args))]

    def chunked(*args):
        carry, parts = args[1], []
        for start, end in ((0, 1), (1, 1), (1, 5), (5, 7)):
            chunk = [lax.slice_in_dim(a, start, end) if i in over_time else a for i, a in enumerate(args)]
            chunk[1] = carry
            carry, ys = f(*chunk)
            parts.append(ys)
        return carry, jnp.concatenate(parts)

    actual, expected = (jax.jit(pullback(g))(args, cotangents) for g in (chunked, f))
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "conv_lstm", "recurrence"])
def test_a_cell_in_a_scan_equals_the_sequence(name, key):
    label = next(iter(CASES[name].variants))
    args, f = arguments(name, label, key), bound(name, label)
    cotangents = cotangents_for(f, args, jax.random.fold_in(key, 1))
    variant = CASES[name].variants[label]
    cell = variant.bound(CASES[f"{name}_cell"].op)
    stepwise = lambda params, carry, xs: lax.scan(partial(cell, params), carry, xs)  # noqa: E731
    assert_close(*(jax.jit(pullback(g))(args, cotangents) for g in (stepwise, f)))


# Variants of recurrences and layers that the default suite runs in float32 only.
REST = [p for p in VARIANTS if len(dtypes_of(*p.values)) == 1 and not later(*p.values)]


@pytest.mark.long
@pytest.mark.parametrize(("name", "label"), REST)
def test_contract_in_other_dtypes(name, label, key):
    verify_contract(name, label, key, (jnp.float64, jnp.bfloat16))
