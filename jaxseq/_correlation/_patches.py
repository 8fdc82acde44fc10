"""Axes along which windows do not overlap: patches of the input, and a smaller form.

Along one axis the form reads the input at m = s n + d k - lo. If

    s >= d (K - 1) + 1    (the windows of the outputs are disjoint)    or
    d >= s (O - 1) + 1    (the outputs of the taps are disjoint)

no two pairs (n, k) read the same m. The axis of x is then cut into two, one for n and one for k,

    x^[n, k] = x[s n + d k - lo],    zero where that is out of bounds,

and the form has no shifted sum along it: n joins the batch and k the input channels. With n and k the indices of all
axes cut so, ν, κ and μ those of the other axes, and C the form over the other axes,

    y[(b, n), ν, o]     = C(x^[(b, n), μ, (k, i)], w[κ, (k, i), o])                            (1)
    x^_bar              = C^T(w, y_bar[(b, n), ν, o]),    x_bar[s n + d k - lo] = x^_bar[n, k]    (2)
    w_bar[κ, (k, i), o] = the contraction (3) of C, of x^ and y_bar

x_bar is zero where no pair (n, k) reads. If every axis is cut, C is a matrix product in each group; with one channel in
each group it is a product and a sum. Windows of one tap (s >= 1) and windows with one output (d >= 1) are of this kind,
and patch embeddings (s = K).

The cut itself. Write a position as a p + c q - lo with a >= c (Q - 1) + 1: in the first case p = n, a = s, q = k and
c = d, in the second the roles are exchanged. x, padded to the a P positions from -lo on, is reshaped to (P, a), and
every c-th column is kept, Q in all. Outputs that read padding only, and taps that fall on padding only, are left out
first: a small input beside much padding has many of them.

XLA aborts the process over some convolutions whose taps do not meet along one axis of an input stretched by the stride
(jax 0.10 to 0.12). All such axes are cut here, so XLA's convolution never sees one.
"""

from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxseq import _precision
from jaxseq._correlation._form import Contraction, Form, padded
from jaxseq._geometry import extent

# Letters of the axes of outputs, of taps, and of inputs that are not cut. b is the batch, g the groups, i and o are the
# channels of a group.
_N, _K, _M = "uvw", "xyz", "rst"


def disjoint(form: Form) -> list[bool]:
    """For each axis: True if no two pairs of an output and a tap read the same input position."""
    return [s >= extent(K, d) or d >= extent(O, s) for _, O, K, s, d, _ in form.axes()]


def xla_differentiates(form: Form) -> bool:
    """False if XLA may abort the process over a derivative that JAX makes of its convolution (1).

    That was seen where taps do not meet along an axis with several of them, and the derivative has no padding there.
    """
    paddings = form.input_padding()
    return not any(
        cut and K > 1 and pads == (0, 0) for cut, K, pads in zip(disjoint(form), form.window, paddings, strict=True)
    )


def to_output(again: Contraction, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y of (1)."""
    plan = _plan(form, x.shape[0])
    y = _contract("xwy", again, plan, _extract_patches(plan, x), _split_axes(plan, kernel))
    return y.reshape(*y.shape[:-2], -1)


def to_input(again: Contraction, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
    """x_bar of (2)."""
    plan = _plan(form, y_bar.shape[0])
    return _merge_patches(plan, _contract("wyx", again, plan, _split_axes(plan, kernel), _split_axes(plan, y_bar)))


def to_kernel(again: Contraction, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
    """w_bar of (3)."""
    plan = _plan(form, x.shape[0])
    w_bar = _contract("xyw", again, plan, _extract_patches(plan, x), _split_axes(plan, y_bar))
    return w_bar.reshape(*w_bar.shape[:-2], -1)


# --- What is cut, and how ---


class _Cut(NamedTuple):
    """An axis of x as pairs (p, q) that read position a p + c q - lo, with a >= c (Q - 1) + 1."""

    a: int
    P: int
    c: int
    Q: int
    lo: int

    def size(self) -> int:
        """Positions that are reshaped to (P, a); if Q is 1, those up to the last that is read."""
        return self.a * self.P if self.Q > 1 else self.a * (self.P - 1) + 1


class _Plan(NamedTuple):
    """How the smaller form is made."""

    form: Form
    cuts: list[_Cut | None]
    sizes: dict[str, int]  # of each letter
    apart: dict[str, str]  # letters of x^, w and y
    merged: dict[str, list[str]]  # for each axis of the smaller form's arrays, or of the product's, its letters
    rest: Form | None  # the smaller form; None for a product


def _plan(form: Form, batch: int) -> _Plan:
    cuts: list[_Cut | None] = []
    sizes = {"b": batch, "g": form.geometry.groups, "i": form.in_channels, "o": form.out_channels}
    x, cut, kept = "", [], []
    for axis, (disjoint_, (I, O, K, s, d, (lo, _)), n, k, m) in enumerate(
        zip(disjoint(form), form.axes(), _N, _K, _M, strict=False)
    ):
        sizes |= {n: O, k: K, m: I}
        (cut if disjoint_ else kept).append(axis)
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
    apart = {"x": f"b{x}gi", "w": f"{_K[:axes]}igo", "y": f"b{_N[:axes]}go"}
    if kept:
        merged = {
            "x": ["b" + n_, *(_M[axis] for axis in kept), f"g{k_}i"],
            "w": [*(_K[axis] for axis in kept), k_ + "i", "go"],
            "y": ["b" + n_, *(_N[axis] for axis in kept), "go"],
        }
        rest = _over(form, kept)._replace(in_channels=form.in_channels * prod(sizes[k] for k in k_))
    else:
        # Leading axes that the compiler may partition are contracted where they stand: a reshape would gather them.
        rows = ["b", *n_] if form.geometry.partitioning.implicit else ["b" + n_]
        merged, rest = {"x": [*rows, "g", k_ + "i"], "w": [k_ + "i", "g", "o"], "y": [*rows, "g", "o"]}, None
    return _Plan(form, cuts, sizes, apart, merged, rest)


def _over(form: Form, axes: list[int]) -> Form:
    """The form over some of the axes."""
    g = form.geometry
    stride, padding, dilation = (tuple(option[axis] for axis in axes) for option in (g.stride, g.padding, g.dilation))
    space, outputs, window = ([sizes[axis] for axis in axes] for sizes in (form.space, form.outputs, form.window))
    geometry = g._replace(stride=stride, padding=padding, dilation=dilation)
    return form._replace(geometry=geometry, space=tuple(space), outputs=tuple(outputs), window=tuple(window))


# --- The cut, and its inverse ---


def _extract_patches(plan: _Plan, x: jax.Array) -> jax.Array:
    """x (N, *I, g I') to x^, every axis apart."""
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
    """x^ to x (N, *I, g I'): zero where no pair reads."""
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
    """w or y, every axis apart."""
    return a.reshape(*a.shape[:-1], plan.sizes["g"], -1)


# --- The contraction ---


def _contract(names: str, again: Contraction, plan: _Plan, a: jax.Array, b: jax.Array) -> jax.Array:
    """A contraction of two of x^, w and y to the third, every axis of all three apart."""
    letters = [plan.apart[name] for name in names]
    if plan.rest is None and plan.form.in_channels * plan.form.out_channels == 1:
        return _products(plan, letters, a, b)
    groups = [plan.merged[name] for name in names]
    a, b = _merged(a, letters[0], groups[0]), _merged(b, letters[1], groups[1])
    if plan.rest is not None:
        c = again(plan.rest, a, b)
    else:
        firsts = ["".join(letter[0] for letter in group) for group in groups]
        wide = _precision.accumulator(a.dtype)
        equation = f"{firsts[0]},{firsts[1]}->{firsts[2]}"
        c = jnp.einsum(equation, a, b, precision=plan.form.precision, preferred_element_type=wide)
    order = "".join(groups[2])
    c = c.reshape([plan.sizes[letter] for letter in order])
    return c.transpose([order.index(letter) for letter in letters[2]])


def _products(plan: _Plan, letters: list[str], a: jax.Array, b: jax.Array) -> jax.Array:
    """The same for one channel in each group: a product of arrays, and a sum. The last axis is that of the groups."""
    joint, *bare = ("".join(letter for letter in of if letter not in "io") for of in (plan.apart["x"], *letters))
    a, b = _spread(plan, a, bare[0], joint), _spread(plan, b, bare[1], joint)
    c = jnp.sum(a * b, [axis for axis, letter in enumerate(joint) if letter not in bare[2]])
    order = [letter for letter in joint if letter in bare[2]]
    c = c.transpose([order.index(letter) for letter in bare[2]])
    return c.reshape([plan.sizes[letter] for letter in letters[2]])


def _merged(a: jax.Array, letters: str, groups: list[str]) -> jax.Array:
    sizes = dict(zip(letters, a.shape, strict=True))
    a = a.transpose([letters.index(letter) for letter in "".join(groups)])
    return a.reshape([prod(sizes[letter] for letter in group) for group in groups])


def _spread(plan: _Plan, a: jax.Array, letters: str, joint: str) -> jax.Array:
    """a with the axes of `joint`: those that it has in their order, the others of size one."""
    a = a.reshape([plan.sizes[letter] for letter in letters]).astype(_precision.accumulator(a.dtype))
    a = a.transpose([letters.index(letter) for letter in joint if letter in letters])
    return jnp.expand_dims(a, [axis for axis, letter in enumerate(joint) if letter not in letters])
