"""Axes along which receptive fields do not overlap: patches of the input, and a smaller form.

Along one axis the form reads the input at m = s n + d k - lo. If

    s >= d (K - 1) + 1    (different outputs read disjoint positions)    or
    d >= s (O - 1) + 1    (different taps read disjoint positions)

no two pairs (n, k) read the same m. The axis of x is then cut into two axes, one for n and one for k,

    x^[n, k] = x[s n + d k - lo],    zero out of bounds,

and the form has no shifted sum along it: n joins the batch and k the input channels. With n and k the indices of all
cut axes, ν, κ and μ those of the other axes, and C the form over the other axes,

    y[(b, n), ν, o]     = C(x^[(b, n), μ, (k, i)], w[κ, (k, i), o])                            (1)
    x^_bar              = C^T(w, y_bar[(b, n), ν, o]),    x_bar[s n + d k - lo] = x^_bar[n, k]    (2)
    w_bar[κ, (k, i), o] = the contraction (3) of C, of x^ and y_bar

x_bar is zero where no pair (n, k) reads. If every axis is cut, C is one matrix product per group. With one channel per
group it is an elementwise product and a sum. Kernels of one tap (s >= 1), kernels with one output (d >= 1) and patch
embeddings (s = K) are of this kind.

The cut. Write a position as a p + c q - lo with a >= c (Q - 1) + 1. In the first case p = n, a = s, q = k and c = d. In
the second case the roles are exchanged. x is padded to the a P positions from -lo on and reshaped to (P, a), of which
every c-th column is taken, Q in all. Outputs and taps that read padding only are removed before the cut: a small input
with much padding has many of them.

XLA aborts the process over some convolutions of an input dilated by the stride whose taps read disjoint positions along
an axis (jax 0.10 to 0.12). All such axes are cut here, so XLA's convolution never gets one.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxseq import _precision
from jaxseq._correlation._form import Contraction, Form, padded
from jaxseq._correlation._rule import Rule, by_chosen_rule
from jaxseq._geometry import extent

# Letters of the axes of outputs, of taps, and of inputs that are not cut. b is the batch, g the groups, i and o are the
# input and output channels of a group.
_N, _K, _M = "uvw", "xyz", "rst"


def disjoint(form: Form) -> list[bool]:
    """Return, for each axis, True if no two pairs of an output and a tap read the same input position."""
    return [s >= extent(K, d) or d >= extent(O, s) for _, O, K, s, d, _ in form.axes()]


def xla_differentiates(form: Form) -> bool:
    """Return False if XLA may abort the process over a derivative that JAX takes of XLA's convolution (1).

    This was observed where several taps read disjoint positions along an axis on which the derivative has no padding.
    """
    paddings = form.padding(Contraction.TO_INPUT)
    return not any(
        cut and K > 1 and pads == (0, 0)
        for cut, K, pads in zip(disjoint(form), form.kernel_size, paddings, strict=True)
    )


@dataclass(frozen=True)
class _Patches(Rule):
    """Patches of the input, and a smaller form or a product."""

    name = "patches"

    def applies(self, which: Contraction, form: Form) -> bool:
        return form.is_known() and any(disjoint(form))

    def to_output(self, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return y of (1)."""
        plan = _plan(form, x.shape[0])
        y = _contract(Contraction.TO_OUTPUT, plan, _extract_patches(plan, x), _split_axes(plan, kernel))
        return y.reshape(*y.shape[:-2], -1)

    def to_input(self, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return x_bar of (2)."""
        plan = _plan(form, y_bar.shape[0])
        return _merge_patches(
            plan, _contract(Contraction.TO_INPUT, plan, _split_axes(plan, kernel), _split_axes(plan, y_bar))
        )

    def to_kernel(self, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return w_bar of (3)."""
        plan = _plan(form, x.shape[0])
        w_bar = _contract(Contraction.TO_KERNEL, plan, _extract_patches(plan, x), _split_axes(plan, y_bar))
        return w_bar.reshape(*w_bar.shape[:-2], -1)


PATCHES = _Patches()


# --- The plan: which axes are cut ---


class _Cut(NamedTuple):
    """An axis of x as pairs (p, q), which read position a p + c q - lo, with a >= c (Q - 1) + 1."""

    a: int
    P: int
    c: int
    Q: int
    lo: int

    def size(self) -> int:
        """Return the number of positions reshaped to (P, a) or, if Q is 1, of those up to the last one read."""
        return self.a * self.P if self.Q > 1 else self.a * (self.P - 1) + 1


class _Plan(NamedTuple):
    """How to reduce a form to the smaller form or to a product."""

    form: Form
    cuts: list[_Cut | None]
    sizes: dict[str, int]  # of the axis of each letter
    split: dict[str, str]  # letters of x^, w and y with every axis separate
    merged: dict[str, list[str]]  # letters that each axis of the operands of the smaller form or product merges
    smaller: Form | None  # None for a product


def _plan(form: Form, batch: int) -> _Plan:
    cuts: list[_Cut | None] = []
    sizes = {"b": batch, "g": form.geometry.groups, "i": form.in_channels, "o": form.out_channels}
    x, cut, uncut = "", [], []
    for axis, (disjoint_, (I, O, K, s, d, (lo, _)), n, k, m) in enumerate(
        zip(disjoint(form), form.axes(), _N, _K, _M, strict=False)
    ):
        sizes |= {n: O, k: K, m: I}
        (cut if disjoint_ else uncut).append(axis)
        if not disjoint_:
            cuts.append(None)
            x += m
        elif s >= extent(K, d):
            cuts.append(_Cut(s if O > 1 else extent(K, d), O, d, K, lo))
            x += n + k
        else:
            cuts.append(_Cut(d if K > 1 else extent(O, s), K, s, O, lo))
            x += k + n
    axes = len(cuts)
    n_, k_ = "".join(_N[axis] for axis in cut), "".join(_K[axis] for axis in cut)
    split = {"x": f"b{x}gi", "w": f"{_K[:axes]}igo", "y": f"b{_N[:axes]}go"}
    if uncut:
        merged = {
            "x": ["b" + n_, *(_M[axis] for axis in uncut), f"g{k_}i"],
            "w": [*(_K[axis] for axis in uncut), k_ + "i", "go"],
            "y": ["b" + n_, *(_N[axis] for axis in uncut), "go"],
        }
        smaller = _restrict(form, uncut)._replace(in_channels=form.in_channels * prod(sizes[k] for k in k_))
    else:
        # Leading axes that the compiler may partition are contracted without a reshape, which would gather them.
        rows = ["b", *n_] if form.geometry.partitioning.implicit else ["b" + n_]
        merged, smaller = {"x": [*rows, "g", k_ + "i"], "w": [k_ + "i", "g", "o"], "y": [*rows, "g", "o"]}, None
    return _Plan(form, cuts, sizes, split, merged, smaller)


def _restrict(form: Form, axes: list[int]) -> Form:
    """Return the form over some of the axes."""
    g = form.geometry
    stride, padding, dilation = (tuple(option[axis] for axis in axes) for option in (g.stride, g.padding, g.dilation))
    space, outputs, kernel_size = (
        [sizes[axis] for axis in axes] for sizes in (form.space, form.outputs, form.kernel_size)
    )
    geometry = g._replace(stride=stride, padding=padding, dilation=dilation)
    return form._replace(geometry=geometry, space=tuple(space), outputs=tuple(outputs), kernel_size=tuple(kernel_size))


# --- The cut, and its inverse ---


def _extract_patches(plan: _Plan, x: jax.Array) -> jax.Array:
    """Return x^, with every axis separate, from x (N, *I, g I')."""
    axes = list(zip(plan.cuts, plan.form.space, strict=True))
    x = padded(x, [(cut.lo, cut.size() - I - cut.lo, 0) if cut else (0, 0, 0) for cut, I in axes])
    steps = [slice(None, None, cut.a) if cut and cut.Q == 1 else slice(None) for cut, _ in axes]
    x = x[(slice(None), *steps)]
    shape, columns = [], []
    for cut, I in axes:
        shape += [cut.P, cut.a if cut.Q > 1 else 1] if cut else [I]
        columns += [slice(None), slice(0, cut.c * (cut.Q - 1) + 1, cut.c)] if cut else [slice(None)]
    return x.reshape(x.shape[0], *shape, plan.sizes["g"], plan.sizes["i"])[(slice(None), *columns)]


def _merge_patches(plan: _Plan, x: jax.Array) -> jax.Array:
    """Return x (N, *I, g I') from x^, with zeros where no pair reads."""
    places, shape, back = [], [], []
    for cut, I in zip(plan.cuts, plan.form.space, strict=True):
        if cut is None:
            places, shape, back = [*places, (0, 0, 0)], [*shape, I], [*back, (0, 0, 0)]
            continue
        places += [(0, 0, 0), (0, cut.a - cut.c * (cut.Q - 1) - 1 if cut.Q > 1 else 0, cut.c - 1)]
        shape.append(cut.size() if cut.Q > 1 else cut.P)
        back.append((-cut.lo, I + cut.lo - cut.size(), cut.a - 1 if cut.Q == 1 else 0))
    x = padded(x, places)
    return padded(x.reshape(x.shape[0], *shape, plan.sizes["g"] * plan.sizes["i"]), back)


def _split_axes(plan: _Plan, a: jax.Array) -> jax.Array:
    """Return w or y with every axis separate."""
    return a.reshape(*a.shape[:-1], plan.sizes["g"], -1)


# --- The contraction ---


def _contract(which: Contraction, plan: _Plan, a: jax.Array, b: jax.Array) -> jax.Array:
    """Contract two of x^, w and y to the third. All three have every axis separate."""
    names = ("xwy", "wyx", "xyw")[which]  # of the two operands and the result
    letters = [plan.split[name] for name in names]
    if plan.smaller is None and plan.form.in_channels * plan.form.out_channels == 1:
        return _products(plan, letters, a, b)
    groups = [plan.merged[name] for name in names]
    a, b = _merge_axes(a, letters[0], groups[0]), _merge_axes(b, letters[1], groups[1])
    if plan.smaller is not None:
        c = by_chosen_rule(which, plan.smaller, a, b)
    else:
        firsts = ["".join(letter[0] for letter in group) for group in groups]
        wide = _precision.accumulator(a.dtype)
        equation = f"{firsts[0]},{firsts[1]}->{firsts[2]}"
        c = jnp.einsum(equation, a, b, precision=plan.form.precision, preferred_element_type=wide)
    order = "".join(groups[2])
    c = c.reshape([plan.sizes[letter] for letter in order])
    return c.transpose([order.index(letter) for letter in letters[2]])


def _products(plan: _Plan, letters: list[str], a: jax.Array, b: jax.Array) -> jax.Array:
    """Contract for one channel per group: an elementwise product and a sum. The last axis is that of the groups."""
    joint, *bare = ("".join(letter for letter in of if letter not in "io") for of in (plan.split["x"], *letters))
    a, b = _broadcast_axes(plan, a, bare[0], joint), _broadcast_axes(plan, b, bare[1], joint)
    c = jnp.sum(a * b, [axis for axis, letter in enumerate(joint) if letter not in bare[2]])
    order = [letter for letter in joint if letter in bare[2]]
    c = c.transpose([order.index(letter) for letter in bare[2]])
    return c.reshape([plan.sizes[letter] for letter in letters[2]])


def _merge_axes(a: jax.Array, letters: str, groups: list[str]) -> jax.Array:
    sizes = dict(zip(letters, a.shape, strict=True))
    a = a.transpose([letters.index(letter) for letter in "".join(groups)])
    return a.reshape([prod(sizes[letter] for letter in group) for group in groups])


def _broadcast_axes(plan: _Plan, a: jax.Array, letters: str, joint: str) -> jax.Array:
    """Return `a` with the axes of `joint` in that order, with size one for those that `a` does not have."""
    a = a.reshape([plan.sizes[letter] for letter in letters]).astype(_precision.accumulator(a.dtype))
    a = a.transpose([letters.index(letter) for letter in joint if letter in letters])
    return jnp.expand_dims(a, [axis for axis, letter in enumerate(joint) if letter not in letters])
