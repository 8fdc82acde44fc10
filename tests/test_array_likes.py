"""Accepted array-likes and parameters: any byte order, objects with `__jax_array__`, mappings from field names."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import causal_conv

import jaxseq
from jaxseq import autoregressive, cells

pytestmark = pytest.mark.usefixtures("as_users_have_jax")
rng = np.random.default_rng(0)


def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)


LSTM = jaxseq.LSTMParams(draw(3, 20), draw(5, 20), draw(20))
STATE = jaxseq.LSTMState(draw(2, 5), draw(2, 5))
PEEPHOLE = cells.PeepholeLSTMParams(*LSTM, *(draw(5) for _ in range(3)))
XS, LENGTHS, RESETS = draw(7, 2, 3), np.array([7, 4], np.int32), rng.random((7, 2)) < 0.2
X, KERNEL, PAST = draw(2, 9, 4), draw(3, 4, 6), draw(2, 2, 4)

# A function of one pytree of float arrays, and that pytree.
OPS = {
    "conv": (lambda a: jaxseq.conv(*a), (X, KERNEL, draw(6))),
    "depthwise_conv": (lambda a: jaxseq.depthwise_conv(*a), (X, draw(3, 1, 8))),
    "conv_transpose": (lambda a: jaxseq.conv_transpose(*a, stride=2), (X, draw(3, 6, 4))),
    "causal_conv": (lambda a: causal_conv(*a), (PAST, X, KERNEL)),
    "lstm": (lambda a: jaxseq.lstm(*a, lengths=LENGTHS, resets=RESETS), (LSTM, STATE, XS)),
    "lstm_cell": (lambda a: jaxseq.lstm_cell(*a), (LSTM, STATE, XS[0])),
    "cell parameters": (
        lambda a: jaxseq.recurrence(cells.peephole_lstm, *a),
        (PEEPHOLE, STATE, XS),
    ),
    "stack": (lambda a: jaxseq.stack(jaxseq.lstm, a[0], a[1], a[2]), ([LSTM], [STATE], XS)),
    "bidirectional": (lambda a: jaxseq.bidirectional(jaxseq.lstm, *a), ([LSTM, LSTM], (STATE, STATE), XS)),
    "latent": (lambda a: autoregressive.latent(jaxseq.lstm, *a), (LSTM, STATE, XS)),
}
EACH = pytest.mark.parametrize(("f", "args"), OPS.values(), ids=OPS)
SOME = pytest.mark.parametrize(("f", "args"), [OPS["conv"], OPS["lstm"]], ids=["conv", "lstm"])


def assert_same(got, expected):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_traced_alike(f, args, expected):
    """Compare shapes and dtypes without compiling. Tracing fails if `args` has a leaf that is not an array."""
    assert jax.eval_shape(lambda: f(args)) == jax.eval_shape(lambda: f(expected))


def total(f):
    return lambda args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(f(args)))


# --- Byte order ---


def swapped(a):
    return a.astype(a.dtype.newbyteorder(">"))


@EACH
def test_every_op_takes_arrays_of_the_other_byte_order(f, args):
    assert_traced_alike(f, jax.tree.map(swapped, args), args)


@SOME
def test_arrays_of_the_other_byte_order_are_the_same_numbers(f, args):
    assert_same(f(jax.tree.map(swapped, args)), f(args))


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", ">c8"])
def test_every_dtype_of_the_other_byte_order(dtype):
    native = np.dtype(dtype).newbyteorder("=")
    x, kernel = X.astype(native), KERNEL.astype(native)
    y = jaxseq.conv(X.astype(dtype), KERNEL.astype(dtype))
    assert y.dtype == jaxseq.conv(x, kernel).dtype
    assert_same(y, jaxseq.conv(x, kernel))


def test_masks_and_integers_of_the_other_byte_order():
    at_rest = jax.tree.map(lambda a: np.full((7, *a.shape), 0.5, np.float32), STATE)
    options = {"lengths": LENGTHS, "zoneout": at_rest, "recurrent_dropout_mask": draw(2, 5)}
    run = lambda options: jaxseq.lstm(LSTM, STATE, XS, **options)  # noqa: E731
    assert_same(run(jax.tree.map(swapped, options)), run(options))
    tokens, logits = np.array([1, 0, 2]), draw(3, 4)
    assert_same(
        autoregressive.log_probability(swapped(tokens), logits=swapped(logits)),
        autoregressive.log_probability(tokens, logits=logits),
    )
    series, order = draw(9), np.array([2, 1, 3] * 3)
    assert_same(autoregressive.histories(swapped(series), swapped(order)), autoregressive.histories(series, order))


# --- Objects with __jax_array__ ---


class Variable:
    """An array type of another library, as in the documentation of JAX."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return jnp.asarray(self.value)


@pytest.mark.other_types
@EACH
def test_every_op_takes_objects_with_jax_array(f, args):
    assert_traced_alike(f, jax.tree.map(Variable, args), args)


@pytest.mark.other_types
@SOME
def test_objects_with_jax_array_are_the_same_numbers(f, args):
    assert_same(f(jax.tree.map(Variable, args)), f(args))


@pytest.mark.other_types
def test_masks_and_integers_with_jax_array():
    expected = jaxseq.lstm(LSTM, STATE, XS, lengths=LENGTHS, resets=RESETS)
    assert_same(jaxseq.lstm(LSTM, STATE, XS, lengths=Variable(LENGTHS), resets=Variable(RESETS)), expected)


@pytest.mark.other_types
@EACH
def test_every_op_takes_parameters_of_flax_nnx_and_gives_them_gradients(f, args):
    nnx = pytest.importorskip("flax.nnx")
    args = jax.tree.map(jnp.asarray, args)
    wrapped = jax.tree.map(nnx.Param, args)
    assert_traced_alike(f, wrapped, args)
    assert jax.tree.structure(jax.eval_shape(jax.grad(total(f)), wrapped)) == jax.tree.structure(wrapped)


class Named:
    """An object with shape and dtype, but without values."""

    shape, dtype = (2, 9, 4), np.dtype(np.float32)


@pytest.mark.other_types
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (jax.ShapeDtypeStruct((2, 9, 4), np.float32), r"jax\.ShapeDtypeStruct float32\[2, 9, 4\], .*`jax\.eval_shape`"),
        (Named(), r"\w+\.Named float32\[2, 9, 4\]"),
        (Variable(np.arange(3)), r"Variable"),
        (np.arange(3), r"int64\[3\]"),
    ],
    ids=["ShapeDtypeStruct", "unknown type", "integers behind __jax_array__", "integers"],
)
def test_what_is_no_array_is_refused_by_the_name_of_its_type(value, words):
    with pytest.raises(TypeError, match=rf"`x`: expected a float or complex array, got {words}"):
        jaxseq.conv(value, KERNEL)
    with pytest.raises(TypeError, match=rf"`xs`: expected a float array, got {words}"):
        jaxseq.lstm(LSTM, None, value)
    with pytest.raises(TypeError, match=rf"`params.w_x`: expected a float array, got {words}"):
        jaxseq.lstm(LSTM._replace(w_x=value), None, XS)
    with pytest.raises(TypeError, match=rf"`resets`: expected a boolean array, got {words}"):
        jaxseq.lstm(LSTM, None, XS, resets=value)


def test_integers_that_have_no_numbers_are_refused_by_the_name_of_their_type():
    with pytest.raises(
        TypeError, match=r"`lengths`: expected an array of integers, got jax\.ShapeDtypeStruct int32\[2\]"
    ):
        jaxseq.lstm(LSTM, None, XS, lengths=jax.ShapeDtypeStruct((2,), np.int32))


def test_shapes_alone_go_through_eval_shape():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (LSTM, STATE, XS))
    assert jax.eval_shape(jaxseq.lstm, *shapes)[1].shape == (7, 2, 5)


# --- Mappings from fields ---


def as_restored(tree):
    """Replace every NamedTuple by a dict in another order, and every tuple by a list."""
    if hasattr(tree, "_asdict"):
        return {field: as_restored(part) for field, part in sorted(tree._asdict().items())}
    return [as_restored(part) for part in tree] if isinstance(tree, list | tuple) else tree


RESTORED = {name: OPS[name] for name in ("lstm", "lstm_cell", "cell parameters", "stack", "bidirectional")}


@pytest.mark.other_types
@pytest.mark.parametrize(("f", "args"), RESTORED.values(), ids=RESTORED)
def test_mappings_from_the_fields_are_parameters_and_states(f, args):
    args = jax.tree.map(jnp.asarray, args)
    restored = as_restored(args)
    assert_traced_alike(f, restored, args)
    assert jax.tree.structure(jax.eval_shape(jax.grad(total(f)), restored)) == jax.tree.structure(restored)


@pytest.mark.other_types
def test_gradients_come_in_what_holds_the_parameters():
    nnx = pytest.importorskip("flax.nnx")
    grad = jax.grad(lambda args: jnp.sum(jaxseq.lstm(*args)[1] ** 2))
    args = jax.tree.map(jnp.asarray, (LSTM, STATE, XS))
    expected = grad(args)
    for given, wanted in (
        (jax.tree.map(nnx.Param, args), jax.tree.map(nnx.Param, expected)),
        (as_restored(args), as_restored(expected)),
    ):
        got = grad(given)
        assert jax.tree.structure(got) == jax.tree.structure(wanted)
        assert_same(got, wanted)


@pytest.mark.other_types
def test_a_restored_bias_of_none_and_restored_zoneout():
    params = LSTM._replace(b=None)
    at_rest = jax.tree.map(lambda a: np.full((7, *a.shape), 0.5, np.float32), STATE)
    got = jaxseq.lstm(params._asdict(), None, XS, zoneout=at_rest._asdict())
    assert_same(got, jaxseq.lstm(params, None, XS, zoneout=at_rest))


@pytest.mark.other_types
def test_what_orbax_restores_without_a_target(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    tree = {"params": [LSTM, jaxseq.LSTMParams(draw(5, 20), draw(5, 20), None)], "carry": (STATE, None)}
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "checkpoint")
    run = partial(jaxseq.stack, jaxseq.lstm)
    assert_same(run(found["params"], found["carry"], XS), run(tree["params"], tree["carry"], XS))


@pytest.mark.other_types
@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"w_x": 0, "w_h": 0}, r"a mapping without b$"),
        (LSTM._asdict() | {"w_q": 0}, r"a mapping with unknown fields 'w_q'$"),
        ({"kernel": 0}, r"a mapping without w_x, w_h, b and with unknown fields 'kernel'$"),
    ],
    ids=["missing", "unknown", "both"],
)
def test_a_mapping_from_other_fields_is_refused_by_their_names(params, words):
    expected = r"`params`: expected LSTMParams\(w_x, w_h, b\), or a mapping with exactly these fields, got "
    with pytest.raises(TypeError, match=expected + words):
        jaxseq.lstm(params, None, XS)


@pytest.mark.other_types
def test_a_mapping_of_another_cell_is_refused_by_its_sizes():
    gru = jaxseq.gru_init(jax.random.key(0), 3, 5)
    with pytest.raises(ValueError, match=r"`params\.w_h`"):
        jaxseq.lstm({"w_x": gru.w_x, "w_h": gru.w_h, "b": gru.b_x}, None, XS)
