"""Each rule for the three contractions against NumPy, the choice of the rule, and the compiled programs."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, causal_conv, pullback, subjaxprs
from jax import lax

import jaxseq
from jaxseq import _geometry, linear_maps
from jaxseq._correlation import RULES, Contraction, Form, choose
from jaxseq._correlation._blocks import BLOCKS
from jaxseq._correlation._loop import LOOP
from jaxseq._correlation._patches import PATCHES
from jaxseq._correlation._planes import PLANES
from jaxseq._correlation._shifts import SHIFTS
from jaxseq._correlation._spectrum import SPECTRUM
from jaxseq._correlation._taps import TAPS
from jaxseq._correlation._xla import XLA
from jaxseq.tuning import CPU

RNG = np.random.default_rng(0)

# rule: (space, kernel_size, I', O', options) with different sizes; together they cover every option of a geometry
FORMS = {
    SHIFTS: [
        ((11,), (4,), 1, 1, {"groups": 3, "padding": ((3, -1),), "dilation": 2, "stride": 2}),
        ((9, 7), (2, 3), 1, 1, {"groups": 5, "padding": ((-1, 2), (1, 0)), "stride": (1, 2)}),
        ((10,), (3,), 2, 3, {"groups": 8, "padding": 1, "stride": 2}),
        ((6, 5, 7), (2, 1, 3), 1, 2, {"groups": 9, "padding": "SAME", "dilation": (2, 1, 1)}),
    ],
    SPECTRUM: [
        ((90,), (70,), 1, 1, {"groups": 3, "padding": ((69, 0),)}),
        ((300,), (300,), 1, 1, {"groups": 2, "padding": ((310, 300),), "stride": 2, "dilation": 2}),
        ((20, 21), (20, 20), 1, 1, {"groups": 3, "padding": ((19, -1), (10, 19)), "stride": (2, 1)}),
        ((460,), (450,), 2, 3, {"padding": "SAME", "groups": 2}),
        ((8, 8, 9), (6, 6, 7), 1, 1, {"groups": 2, "padding": "SAME"}),
    ],
    PATCHES: [
        ((7,), (1,), 3, 4, {}),
        ((8, 5), (1, 1), 3, 4, {"stride": (3, 2), "dilation": 4}),
        ((13,), (3,), 3, 4, {"padding": ((-1, 2),), "stride": 4}),  # a remainder; a stride above the kernel size
        ((8,), (3,), 2, 3, {"padding": ((2, 5),), "dilation": 5}),  # the outputs of the taps do not overlap
        ((1, 3), (3, 5), 2, 3, {"padding": "SAME"}),  # one output, most taps in the padding; an uncropped axis
        ((6, 5), (2, 4), 3, 2, {"padding": 1, "stride": 2}),  # XLA aborts while compiling the gradient of lax
        ((5, 7, 6), (2, 3, 2), 2, 3, {"padding": ((1, 0), (2, 1), (0, 3)), "stride": (2, 1, 3)}),
        ((9, 8), (2, 3), 2, 3, {"groups": 3, "stride": (2, 4), "padding": ((3, -2), (1, 0)), "method": "direct"}),
        ((13, 12), (6, 4), 1, 1, {"groups": 3, "stride": (7, 4), "padding": ((0, 3), (-1, 2))}),  # depthwise
        ((3, 2), (4, 2), 1, 1, {"groups": 3, "padding": ((1, 0), (0, 0))}),  # a kernel as large as the padded input
    ],
    BLOCKS: [
        ((9,), (4,), 5, 3, {"groups": 2, "padding": ((2, -1),), "stride": 2}),
        ((7, 6), (3, 2), 4, 2, {"groups": 6, "padding": "SAME", "dilation": (1, 2)}),
        ((140,), (1,), 4, 3, {"groups": 3}),
        ((5, 4, 6), (2, 3, 2), 2, 3, {"groups": 7, "padding": "SAME", "dilation": (2, 1, 1)}),
        ((9,), (3,), 20, 40, {"groups": 6}),
    ],
    LOOP: [
        ((16, 14), (12, 9), 1, 1, {"groups": 3, "padding": ((1, 0), (-1, 2)), "dilation": (1, 1)}),  # few outputs
        ((40,), (65,), 1, 1, {"groups": 2, "padding": ((60, 61),), "stride": 3, "dilation": 2, "method": "direct"}),
        ((7, 6), (3, 2), 4, 2, {"groups": 6, "padding": ((1, 2), (2, -1)), "stride": (1, 2), "method": "direct"}),
    ],
    PLANES: [
        ((6, 5, 7), (3, 2, 4), 3, 4, {"padding": ((1, 2), (-1, 3), (2, 1)), "stride": (2, 1, 3)}),
        ((7, 6, 5), (2, 3, 2), 2, 3, {"padding": "SAME", "dilation": (3, 1, 2)}),
        ((9, 6, 5), (4, 3, 2), 3, 2, {"padding": ((-1, 1), (0, 0), (1, -1)), "stride": (3, 2, 1)}),
    ],
    XLA: [
        ((11,), (4,), 3, 5, {"padding": ((4, -2),), "stride": 3, "dilation": 2}),
        ((8, 9), (3, 2), 2, 3, {"padding": ((1, 0), (-2, 3)), "stride": (1, 2), "dilation": (2, 3)}),
        ((4,), (3,), 2, 3, {"padding": ((-5, 9),)}),
    ],
}
TO_OUTPUT, TO_INPUT, TO_KERNEL = Contraction
# The contractions for which a rule is chosen, if not all three.
CHOSEN = {PATCHES: (TO_INPUT, TO_KERNEL), LOOP: (TO_OUTPUT, TO_INPUT), SHIFTS: (TO_OUTPUT,)}
GRID = [
    pytest.param(rule, *form, id=f"{rule.name}-{n}") for rule, forms in FORMS.items() for n, form in enumerate(forms)
]

# The first form of each rule. The others treat dtypes alike.
FIRST = [p if p.id.endswith("-0") else pytest.param(*p.values, id=p.id, marks=pytest.mark.long) for p in GRID]


def trilinear(space, kernel_size, in_channels, out_channels, options, dtype=jnp.float64):
    """Return (form, x, w, ȳ) with random arrays."""
    options = {"stride": 1, "padding": "VALID", "dilation": 1, "groups": 1, "method": "auto", **options}
    geometry = _geometry.resolve(space, kernel_size, *(options[n] for n in ("stride", "padding", "dilation", "groups")))
    geometry = geometry._replace(method=options["method"])
    outputs, g = _geometry.output_sizes(geometry, space, kernel_size), geometry.groups
    shapes = (
        (2, *space, in_channels * g),
        (*kernel_size, in_channels, out_channels * g),
        (2, *outputs, out_channels * g),
    )
    arrays = (jnp.asarray(RNG.normal(size=s), dtype) for s in shapes)
    return Form(geometry, None, space, outputs, kernel_size, in_channels, out_channels), *arrays


def tap_by_tap(form, x, w, y_bar):
    """Return (y, x̄, w̄), computed in NumPy for each tap from the positions within bounds."""
    x, w, y_bar = (np.asarray(a).astype(complex if jnp.iscomplexobj(a) else float) for a in (x, w, y_bar))
    g = form.geometry.groups
    xg, yg_bar = x.reshape(*x.shape[:-1], g, -1), y_bar.reshape(*y_bar.shape[:-1], g, -1)
    wg = w.reshape(*w.shape[:-1], g, -1)
    y, x_bar, w_bar = np.zeros_like(yg_bar), np.zeros_like(xg), np.zeros_like(wg)
    for tap in np.ndindex(*form.kernel_size):
        seen, by = [], []
        for k, (I, O, _, s, d, (lo, _)) in zip(tap, form.axes(), strict=True):
            m = s * np.arange(O) + d * k - lo
            inside = (m >= 0) & (m < I)
            seen.append(m[inside])
            by.append(np.flatnonzero(inside))
        seen, by = np.ix_(range(len(x)), *seen), np.ix_(range(len(x)), *by)
        y[by] += np.einsum("...gi,igo->...go", xg[seen], wg[tap])
        x_bar[seen] += np.einsum("...go,igo->...gi", yg_bar[by], wg[tap])
        w_bar[tap] = np.einsum("...gi,...go->...igo", xg[seen], yg_bar[by]).sum(tuple(range(x.ndim - 1)))
    return y.reshape(y_bar.shape), x_bar.reshape(x.shape), w_bar.reshape(w.shape)


@pytest.mark.parametrize(("rule", "space", "kernel_size", "in_channels", "out_channels", "options"), GRID)
def test_each_rule_is_the_form(rule, space, kernel_size, in_channels, out_channels, options):
    form, x, w, y_bar = trilinear(space, kernel_size, in_channels, out_channels, options)
    assert {choose(which, form, "cpu").rule for which in CHOSEN.get(rule, Contraction)} == {rule}
    y, x_bar, w_bar = tap_by_tap(form, x, w, y_bar)
    for which, a, b, expected in (
        (TO_OUTPUT, x, w, y),
        (TO_INPUT, w, y_bar, x_bar),
        (TO_KERNEL, x, y_bar, w_bar),
    ):
        actual = jax.jit(partial(rule.contract, which, form))(a, b)
        assert actual.dtype == jnp.float64
        assert_close(actual, expected, relative=1e-13)


@pytest.mark.parametrize(
    ("space", "kernel_size", "options", "outputs_in_reach", "taps_in_reach"),
    [
        ((5,), (40,), {"padding": ((39, 7),)}, (12,), (12,)),  # taps 28 to 39
        ((4,), (9,), {"padding": ((0, 30),), "stride": 2, "dilation": 3}, (2,), (2,)),  # outputs 0 and 1, taps 0 and 1
        ((3, 6), (7, 2), {"padding": ((1, 9), (3, 3)), "groups": 4}, (4, 7), (4, 2)),
    ],
)
def test_what_reads_padding_only_is_left_out(space, kernel_size, options, outputs_in_reach, taps_in_reach):
    """Values and both gradients are right, and outputs and taps that read only padding cause no work."""
    options = {"groups": 3, **options}
    form, x, w, y_bar = trilinear(space, kernel_size, 1, 2, options)
    y, x_bar, w_bar = tap_by_tap(form, x, w, y_bar)
    f = jax.jit(pullback(partial(jaxseq.conv, **options)))
    assert_close(f((x, w), y_bar), (y, (x_bar, w_bar)), relative=1e-13)
    smaller, *_ = form.in_reach()
    assert (smaller.outputs, smaller.kernel_size) == (outputs_in_reach, taps_in_reach)


def applicable(form):
    """Return the rules that apply to all three contractions."""
    return [rule for rule in RULES if all(rule.applies(which, form) for which in Contraction)]


def of_rule(rule, form, x, w, y_bar):
    """Return (y, x_bar, w_bar) computed by `rule`, even if another one would be chosen."""

    def run(x, w, y_bar):
        contractions = [(TO_OUTPUT, x, w), (TO_INPUT, w, y_bar), (TO_KERNEL, x, y_bar)]
        return tuple(rule.contract(which, form, a, b) for which, a, b in contractions)

    return jax.jit(run)(x, w, y_bar)


@pytest.mark.parametrize(
    ("rule", "space", "kernel_size", "in_channels", "out_channels", "options"), [p for p in FIRST if not p.marks]
)
def test_every_rule_that_applies_is_the_form(rule, space, kernel_size, in_channels, out_channels, options):
    """Not only the one that is chosen."""
    form, *arrays = trilinear(space, kernel_size, in_channels, out_channels, options)
    assert rule in applicable(form)
    results = jax.jit(lambda *arrays: [of_rule(other, form, *arrays) for other in applicable(form)])(*arrays)
    for result in results:
        assert_close(result, tap_by_tap(form, *arrays), relative=1e-12)


def test_the_rule_of_idle_mesh_axes_is_the_form():
    """This rule is never chosen on one device."""
    options = {"groups": 2, "padding": ((4, -2),), "stride": 3, "dilation": 2}
    form, *arrays = trilinear((11,), (4,), 2, 3, options)
    partitioning = form.geometry.partitioning._replace(implicit=True, idle_axes=True)
    idle = form._replace(geometry=form.geometry._replace(partitioning=partitioning))
    assert (choose(TO_INPUT, form, "default").rule, choose(TO_INPUT, idle, "default").rule) == (XLA, TAPS)
    assert_close(of_rule(TAPS, form, *arrays), tap_by_tap(form, *arrays), relative=1e-13)


def test_a_gradient_of_a_depthwise_kernel_in_blocks_of_rows():
    """Five rows of outputs in blocks of two."""
    form, x, w, y_bar = trilinear((11,), (2,), 1, 1, {"groups": 3, "stride": 2})
    form = form._replace(geometry=form.geometry._replace(tuning=replace(CPU.conv, cache=2 * w.size * len(x) * 4)))
    assert_close(of_rule(SHIFTS, form, x, w, y_bar), tap_by_tap(form, x, w, y_bar), relative=1e-13)


@pytest.mark.parametrize(("rule", "space", "kernel_size", "in_channels", "out_channels", "options"), FIRST)
def test_half_precision_accumulates_in_full(rule, space, kernel_size, in_channels, out_channels, options):
    form, x, w, y_bar = trilinear(space, kernel_size, in_channels, out_channels, options, jnp.bfloat16)
    y, x_bar, w_bar = tap_by_tap(form, x, w, y_bar)
    for which, a, b, expected in (
        (TO_OUTPUT, x, w, y),
        (TO_INPUT, w, y_bar, x_bar),
        (TO_KERNEL, x, y_bar, w_bar),
    ):
        actual = jax.jit(partial(rule.contract, which, form))(a, b)
        assert actual.dtype == jnp.float32
        assert_close(actual, expected.astype(np.float32), relative=1e-5)


@pytest.mark.parametrize(("rule", "space", "kernel_size", "in_channels", "out_channels", "options"), FIRST)
def test_through_the_public_functions_with_complex_numbers(
    rule, space, kernel_size, in_channels, out_channels, options
):
    """Convolution, its transpose and all pullbacks, none of which conjugates."""
    form, x, w, y_bar = trilinear(space, kernel_size, in_channels, out_channels, options)
    x, w, y_bar = lax.complex(x, jnp.flip(x)), lax.complex(w, -jnp.flip(w) / 2), lax.complex(y_bar, jnp.flip(y_bar))
    y, x_bar, w_bar = tap_by_tap(form, x, w, y_bar)
    assert_close(jax.jit(pullback(partial(jaxseq.conv, **options)))((x, w), y_bar), (y, (x_bar, w_bar)), relative=1e-12)
    extra = [(I - (O - 1) * s - _geometry.extent(K, d) + lo + hi) for I, O, K, s, d, (lo, hi) in form.axes()]
    f = partial(jaxseq.conv_transpose, **{**options, "padding": form.geometry.padding, "output_padding": extra})
    assert_close(jax.jit(pullback(f))((y_bar, w), x), (x_bar, (y, w_bar)), relative=1e-12)


@pytest.mark.parametrize("n", [2, 4, 5, 7, 8])
def test_second_order_of_patches(n):
    """d/dw <x_bar(w, y_bar), v> is the contraction (3) of v and y_bar. In float32, also where XLA would abort."""
    form, x, w, y_bar = trilinear(*FORMS[PATCHES][n], jnp.float32)
    conv, v = partial(jaxseq.conv, **FORMS[PATCHES][n][-1]), jnp.flip(x)
    gradient = jax.jit(jax.grad(lambda w: jnp.vdot(jax.vjp(lambda x: conv(x, w), x)[1](y_bar)[0], v)))
    expected = tap_by_tap(form, v, w, y_bar)[2].astype(np.float32)
    assert_close(gradient(w), jnp.asarray(expected), relative=1e-5)


@pytest.mark.parametrize(
    ("space", "kernel_size", "options"),
    [
        ((1, 6), (8, 9), {"padding": ((7, 7), (4, 4)), "dilation": (2, 1)}),  # taps at odd distances only
        ((6, 7), (2, 3), {"padding": ((-6, 9), (1, 1))}),  # the whole input is cropped
        ((3, 4), (2, 2), {"padding": ((2, -3), (0, 0))}),
    ],
)
def test_a_kernel_that_reaches_no_input_gives_exact_zeros(space, kernel_size, options):
    """Fourier transforms would leave rounding errors."""
    form, x, w, y_bar = trilinear(space, kernel_size, 1, 1, {**options, "groups": 3})
    assert form.in_reach() is None
    y, (x_bar, w_bar) = jax.jit(pullback(partial(jaxseq.conv, groups=3, **options)))((x, w), y_bar)
    assert not y.any()
    assert not x_bar.any()
    assert not w_bar.any()


# --- On both sides of each crossover ---

CROSSOVERS = {
    "taps of a depthwise kernel": lambda n: ((20,), (CPU.conv.terms + n,), 1, 1, {"groups": 2, "padding": 60}),
    "pairs of channels": lambda n: ((20,), (CPU.conv.terms // 4 + n,), 2, 2, {"groups": 8, "padding": 60}),
    "groups": lambda n: ((9,), (3,), 2, 3, {"groups": CPU.conv.lanes - 1 + n}),
    "a long kernel": lambda n: ((399,), (369 + n,), 2, 3, {"padding": "SAME"}),
    "one tap": lambda n: ((9,), (1 + n,), 3, 2, {}),
    "planes": lambda n: ((20, 3, 4), (CPU.conv.planes + n, 2, 2), 3, 2, {}),
}


@pytest.mark.parametrize("name", CROSSOVERS)
def test_both_sides_of_a_crossover(name):
    """The rules on both sides differ, and both are right."""
    rules = []
    for n in (0, 1):
        space, kernel_size, in_channels, out_channels, options = CROSSOVERS[name](n)
        form, x, w, y_bar = trilinear(space, kernel_size, in_channels, out_channels, options)
        rules.append(choose(TO_INPUT, form, "cpu").rule)
        y, x_bar, w_bar = tap_by_tap(form, x, w, y_bar)
        assert_close(
            jax.jit(pullback(partial(jaxseq.conv, **options)))((x, w), y_bar), (y, (x_bar, w_bar)), relative=1e-12
        )
    assert rules[0] is not rules[1]


# --- Compiled programs ---


def primitives(f, *args):
    return [e.primitive.name for e in subjaxprs(jax.make_jaxpr(f)(*args).jaxpr)]


def convolutions(platform, options, x, w, y_bar):
    """Return the types of the convolutions in the program of a convolution and its pullback, lowered for a platform."""
    f = jax.jit(pullback(partial(jaxseq.conv, **options)))
    text = jax.export.export(f, platforms=[platform])((x, w), y_bar).mlir_module()
    types = re.compile(r"stablehlo\.convolution.*: \(tensor<.*x(\w+)>, tensor<.*x(\w+)>\) -> tensor<.*x(\w+)>")
    return types.findall(text)


@pytest.mark.parametrize("rule", [SHIFTS, SPECTRUM, PATCHES])
def test_where_xla_has_no_part(rule):
    """On a CPU. Elsewhere, the kernel gradient by shifts would be a reduction for each tap."""
    *sizes, options = FORMS[rule][0]
    _, *arrays = trilinear(*sizes, options)
    assert not convolutions("cpu", options, *arrays)
    assert len(convolutions("cuda", options, *arrays)) == (rule is SHIFTS)


def test_on_a_gpu_bfloat16_is_not_converted():
    """For a result in float32, its convolutions would convert their operands."""
    *sizes, options = FORMS[XLA][0]
    _, *arrays = trilinear(*sizes, options, jnp.bfloat16)
    assert convolutions("cuda", options, *arrays) == [("bf16", "bf16", "bf16")] * 3
    assert convolutions("tpu", options, *arrays) == [("bf16", "bf16", "f32")] * 3
    assert convolutions("cpu", options, *arrays) == [("bf16", "bf16", "f32")] * 3


@pytest.mark.parametrize(("rule", "parts"), [(BLOCKS, 6), (PLANES, 3)])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_what_only_cpus_need_is_left_to_xla_elsewhere(rule, parts, platform):
    """On a GPU, whose libraries support groups and three axes, each contraction is one convolution."""
    forms = {BLOCKS: FORMS[BLOCKS][4], PLANES: FORMS[PLANES][0]}
    _, x, w, y_bar = trilinear(*forms[rule], jnp.float32)
    f = jax.jit(pullback(partial(jaxseq.conv, **forms[rule][-1])))
    text = jax.export.export(f, platforms=[platform])((x, w), y_bar).mlir_module()
    assert text.count("stablehlo.convolution") == 3 * (parts if platform == "cpu" else 1)


def test_spectra_are_shared_between_forward_and_backward():
    """One transform each for x, w and ȳ, and three inverse transforms."""
    _, x, w, y_bar = trilinear(*FORMS[SPECTRUM][0])
    compiled = jax.jit(pullback(partial(jaxseq.conv, **FORMS[SPECTRUM][0][-1]))).lower((x, w), y_bar).compile()
    assert compiled.as_text().count(" fft(") == 6


@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 1), (2, 3)])
def test_spectra_of_numbers_of_any_scale(in_channels, out_channels):
    """In float32, each batch entry and group is scaled separately. Sums of unscaled transforms would overflow."""
    form, x, w, y_bar = trilinear(
        (90,), (70,), in_channels, out_channels, {"groups": 4, "padding": "SAME"}, jnp.float32
    )
    by_group = lambda scales, channels: np.repeat(np.array(scales, np.float32), channels)  # noqa: E731
    x, w, y_bar = np.asarray(x), np.asarray(w), np.asarray(y_bar)
    x = 3 * x * by_group([1e37, 1e-33, 1e20, 1], in_channels) * np.array([1, 1e-15], np.float32)[:, None, None]
    w, y_bar = (
        w * by_group([1e-33, 1e37, 1e-20, 1e-30], out_channels),
        y_bar * by_group([1e-3, 1e-20, 1e-15, 1], out_channels),
    )
    contractions = [(TO_OUTPUT, x, w), (TO_INPUT, w, y_bar), (TO_KERNEL, x, y_bar)]
    for (which, a, b), expected in zip(contractions, tap_by_tap(form, x, w, y_bar), strict=True):
        actual = np.asarray(jax.jit(partial(SPECTRUM.contract, which, form))(a, b), np.float64)
        rest = tuple(range(which != TO_KERNEL, actual.ndim - 1))  # errors relative to channel and batch entry
        error, largest = (abs(v).max(rest) for v in (actual - expected, expected))
        assert (error <= 1e-5 * largest + 1e-37).all(), which


def test_derivatives_of_spectra_of_large_numbers():
    """The scale is treated as a constant at second order too."""
    form, x, w, y_bar = trilinear((90,), (70,), 1, 1, {"groups": 2, "padding": "SAME"}, jnp.float32)
    loss = lambda x, w: jnp.sum(jaxseq.conv(x, w, groups=2, padding="SAME") ** 2) / 2  # noqa: E731
    x, v = 1e17 * x, jnp.flip(w)
    actual = jax.jit(jax.grad(lambda x, w: jnp.vdot(jax.grad(loss, 1)(x, w), v), 1))(x, w)
    expected = tap_by_tap(form, x, w, tap_by_tap(form, x, v, y_bar)[0])[2]
    assert_close(actual, jnp.asarray(expected, jnp.float32), relative=1e-5)


def test_second_derivatives_of_spectra_at_zero():
    """Where the kernel is zero and its tangent is not, scaling by the kernel must not lose the tangent."""
    form, x, v, y_bar = trilinear((90,), (70,), 1, 1, {"groups": 2, "padding": "SAME"}, jnp.float32)
    w = jnp.zeros_like(v)
    loss = lambda w: jnp.sum(jaxseq.conv(x, w, groups=2, padding="SAME") ** 2) / 2  # noqa: E731
    expected = jnp.asarray(tap_by_tap(form, x, v, tap_by_tap(form, x, v, y_bar)[0])[2], jnp.float32)
    forward = jax.jit(lambda w: jax.jvp(jax.grad(loss), (w,), (v,))[1])(w)
    reverse = jax.jit(jax.grad(lambda w: jnp.vdot(jax.grad(loss)(w), v)))(w)
    for actual in (forward, reverse):
        assert_close(actual, expected, relative=1e-5)


# --- The method "direct" ---

DIRECT = {
    "conv": lambda x, w, **options: jaxseq.conv(x, w, groups=3, padding="SAME", **options),
    "transposed": lambda x, w, **options: jaxseq.conv_transpose(x, w, groups=3, padding="SAME", **options),
    "depthwise": lambda x, w, **options: jaxseq.depthwise_conv(x, w, padding="SAME", **options),
    "separable": lambda x, w, **options: jaxseq.separable_conv(x, w, jnp.eye(3)[None], padding="SAME", **options),
    "causal": lambda x, w, **options: causal_conv(None, x, w, groups=3, **options)[1],
}


@pytest.mark.parametrize("name", DIRECT)
def test_direct_takes_no_spectra(name):
    """Neither values nor gradients use Fourier transforms."""
    x, w = jnp.ones((1, 90, 3)), jnp.ones((70, 1, 3))
    for method, spectra in (("auto", True), ("direct", False)):
        f = pullback(partial(DIRECT[name], method=method))
        assert ("fft" in primitives(f, (x, w), x)) == spectra
    with pytest.raises(ValueError, match="`method`: expected one of 'auto', 'direct', got str 'fft'"):
        DIRECT[name](x, w, method="fft")


def test_direct_keeps_to_its_kernel_size(key):
    """A NaN reaches only the outputs that read it, and rounding errors are relative to each output."""
    x, w = jnp.asarray(RNG.uniform(1, 2, (1, 200, 3)), jnp.float32), jnp.ones((70, 1, 3), jnp.float32)
    conv = jax.jit(pullback(partial(jaxseq.depthwise_conv, method="direct")))
    y, _ = conv((x.at[0, 0].set(1e10), w), jnp.ones((1, 131, 3), jnp.float32))
    expected = np.lib.stride_tricks.sliding_window_view(np.asarray(x, np.float64), 70, 1).sum(-1)
    np.testing.assert_allclose(y[:, 1:], expected[:, 1:], rtol=1e-5)
    y, (x_bar, w_bar) = conv(
        (x.at[0, 100, 1].set(jnp.nan), w), jnp.ones((1, 131, 3), jnp.float32).at[0, 50, 2].set(jnp.nan)
    )
    nan = lambda a: [(int(c), int(p)) for p, c in np.argwhere(np.isnan(np.asarray(a)[0]))]  # noqa: E731
    assert set(nan(y)) == {(1, n) for n in range(31, 101)}
    assert set(nan(x_bar)) == {(2, n) for n in range(50, 120)}
    assert not jnp.isnan(w_bar[..., 0]).any()


@pytest.mark.parametrize("space", [(12, 12), (9, 12)], ids=["patches", "one axis"])
def test_gradients_of_patches_take_no_more_work_than_those_of_lax(space):
    """With more taps than outputs, the gradient does not compute a product for each position of the input."""
    kernel_size, stride = (4, 6), (4, 6) if space[0] == 12 else (1, 6)
    x, w = jnp.ones((1, *space, 3)), jnp.ones((*kernel_size, 3, 5))
    theirs = lambda x, w: lax.conv_general_dilated(  # noqa: E731
        x, w, stride, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jnp.ones(jax.eval_shape(theirs, x, w).shape)

    def flops(f):
        return jax.jit(f).lower(x, w, y).compile().cost_analysis()["flops"]

    limit = 2 * flops(lambda x, w, y: jax.vjp(lambda x: theirs(x, w), x)[1](y))
    assert flops(lambda x, w, y: jax.vjp(lambda x: jaxseq.conv(x, w, stride=stride), x)[1](y)) < limit
    assert flops(lambda x, w, y: jaxseq.conv_transpose(y, w, stride=stride)) < limit


def test_depthwise_sums_its_kernel_in_little_memory(key):
    """Memory does not hold one array for each tap."""
    x = jax.random.normal(key, (4, 512, 64), jnp.float32)
    form = trilinear((512,), (16,), 1, 1, {"groups": 64, "padding": ((15, 0),)})[0]
    f = jax.jit(partial(SHIFTS.to_kernel, form))
    assert f.lower(x, x).compile().memory_analysis().temp_size_in_bytes < 4 * x.nbytes


def test_an_unmerged_group_keeps_to_itself(key):
    """A NaN in one block of groups does not reach another."""
    x, w = jax.random.normal(key, (1, 9, 64)), jax.random.normal(key, (3, 32, 64))
    y = jaxseq.conv(x.at[..., 0].set(jnp.nan), w, groups=2)
    assert jnp.isnan(y[..., :32]).all()
    assert jnp.isfinite(y[..., 32:]).all()


def test_gradient_of_a_kernel_in_a_loop_has_the_letters_that_are_fast():
    """XLA CPU replaces slow dimension labels outside loops only. Inside, they made a convolution 27 times slower."""
    x, y_bar, w = jnp.ones((3, 2, 9, 8, 4)), jnp.ones((3, 2, 9, 8, 5)), jnp.ones((3, 3, 4, 5))
    conv = linear_maps.Conv()

    def run(x, y_bar, w):
        return lax.fori_loop(
            0, 3, lambda i, w_bar: w_bar + conv.pull_weight(None, x[i], y_bar[i], w), jnp.zeros_like(w)
        )

    labels = re.findall(r"dim_labels=(\S+?),", jax.jit(run).lower(x, y_bar, w).compile().as_text())
    assert set(labels) == {"b01f_01io->b01f"}
