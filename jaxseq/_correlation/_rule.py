"""The protocol of the rules, and the path of a contraction to its rule."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxseq import _mesh, _precision
from jaxseq._correlation._form import Backend, Contraction, Form, padded
from jaxseq._explain import RECORDED, Decision

if TYPE_CHECKING:
    from jaxseq._correlation._choose import Choice


class Rule(ABC):
    """One way to compute the three contractions of a form. Each rule is a frozen object without fields.

    x is (N, *I, g I'), the kernel (*K, I', g O') and y (N, *O, g O'), and both operands have the same dtype. The result
    has the accumulator's dtype. A rule that reduces a form to smaller forms contracts these with `by_chosen_rule`.
    """

    name: ClassVar[str]
    # The platforms where the rule is a candidate.
    backends: ClassVar[frozenset[Backend]] = frozenset({"cpu", "default"})

    @abstractmethod
    def applies(self, which: Contraction, form: Form) -> bool:
        """Return True if the rule can compute this contraction, however fast. The form must read an input."""

    @abstractmethod
    def to_output(self, form: Form, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return y of (1)."""

    @abstractmethod
    def to_input(self, form: Form, kernel: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return x̄ of (2)."""

    @abstractmethod
    def to_kernel(self, form: Form, x: jax.Array, y_bar: jax.Array) -> jax.Array:
        """Return w̄ of (3)."""

    def contract(self, which: Contraction, form: Form, a: jax.Array, b: jax.Array) -> jax.Array:
        """Return one of the three contractions of its two operands, in the order above."""
        if which is Contraction.TO_OUTPUT:
            return self.to_output(form, a, b)
        if which is Contraction.TO_INPUT:
            return self.to_input(form, a, b)
        return self.to_kernel(form, a, b)


def by_chosen_rule(which: Contraction, form: Form, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return one contraction of a form in which outer outputs and taps read an input. Both operands have one dtype.

    If the rule depends on the platform, the program has a branch for CPUs and one for the others.
    """
    from jaxseq._correlation._choose import choose  # noqa: PLC0415  # it imports every rule, and rules this function

    recorded = RECORDED.get()
    if form.backend is not None:
        choice = choose(which, form, form.backend)
        if recorded is not None:
            recorded.append(_explained(which, choice, f" of a smaller form, on {PLATFORMS[form.backend]}"))
        return choice.rule.contract(which, form, a, b)
    on_cpu, elsewhere = form._replace(backend="cpu"), form._replace(backend="default")
    choice, other = choose(which, on_cpu, "cpu"), choose(which, elsewhere, "default")
    same = choice.rule is other.rule and on_cpu.tuning == elsewhere.tuning
    if recorded is not None:
        recorded.append(_explained(which, choice, "" if same else f" on {PLATFORMS['cpu']}"))
        if not same:
            recorded.append(_explained(which, other, f" on {PLATFORMS['default']}"))
    if same:
        return choice.rule.contract(which, form, a, b)
    cpu, default = partial(choice.rule.contract, which, on_cpu), partial(other.rule.contract, which, elsewhere)
    return lax.platform_dependent(a, b, cpu=cpu, default=default)


PLATFORMS = {"cpu": "a CPU", "default": "another platform"}
SUBJECTS = ("convolution", "transposed convolution", "kernel gradient")  # of each `Contraction`


def _explained(which: Contraction, choice: "Choice", where: str) -> Decision:
    """Explain a choice, for `jaxseq.explain`."""
    return Decision(SUBJECTS[which] + where, f"rule {choice.rule.name!r}", choice.reason)


def contract(
    which: Contraction,
    form: Form,
    a: jax.Array,
    b: jax.Array,
    *,
    by: Callable[[Contraction, Form, jax.Array, jax.Array], jax.Array] = by_chosen_rule,
) -> jax.Array:
    """Return one contraction of a form, by the rule for the form and the platform.

    `by` computes it without the outputs and taps that read padding only. They are cropped from the operands, and
    the result is padded with zeros. It is zero if no tap of any output reads an input.
    """
    common, g = _precision.promote(a, b), form.geometry.groups
    reach = None if a.size == 0 or b.size == 0 else form.in_reach()
    if reach is None:
        shape = (
            (a.shape[0], *form.outputs, g * form.out_channels),
            (b.shape[0], *form.space, g * form.in_channels),
            (*form.kernel_size, form.in_channels, g * form.out_channels),
        )[which]
        return _mesh.align_varying((jnp.zeros(shape, _precision.accumulator(common)), a, b))[0]
    form, outputs, taps = reach
    # A cotangent may be on a mesh that the arguments of its op do not show.
    known = form.geometry.partitioning
    known = known._replace(idle_axes=_mesh.may_have_idle_axis(known, a, b))
    form = form._replace(geometry=form.geometry._replace(partitioning=known))
    a, b = a.astype(common), b.astype(common)
    if not any(map(any, (*outputs, *taps))):
        return by(which, form, a, b)
    x, w, y = ([], 1), (taps, 0), (outputs, 1)
    first, second, result = ((x, w, y), (w, y, x), (x, y, w))[which]
    c = by(which, form, _resize(a, *first, sign=-1), _resize(b, *second, sign=-1))
    return _resize(c, *result, sign=1)


def _resize(a: jax.Array, sides: Sequence[tuple[int, int]], first: int, *, sign: int) -> jax.Array:
    """Pad (sign 1) or crop (sign -1) the axes from `first` on by (before, after)."""
    if not any(map(any, sides)):
        return a
    return padded(a, [(sign * before, sign * after, 0) for before, after in sides], first)
