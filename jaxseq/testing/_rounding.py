"""The effect of rounding on a result, measured by running the same program with every intermediate value perturbed.

Two correct ways to compute a gradient differ by rounding, usually by about 1e-15. If f is chaotic, or so saturated that
1 - tanh² cancels, the difference may be as large as the gradient. `otherwise_rounded` measures it at a point: it moves
each arithmetic result, at any depth of the program, up or down by one eps. A hash of the bits of the value selects the
direction.

Source: D. S. Parker, Monte Carlo arithmetic: exploiting randomness in floating-point arithmetic (1997).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.typing import ArrayLike
from jaxtyping import PyTree

from jaxseq.testing import _surgery
from jaxseq.testing._point import TreeFunction

# Primitives that do not round: they move, select or compare numbers.
_EXACT = """
abs broadcast_in_dim complex concatenate cond copy device_put dynamic_slice dynamic_update_slice expand_dims gather imag
iota max min neg pad real reduce_max reduce_min reshape rev scan scatter select_n sign slice split squeeze stop_gradient
transpose while
"""
EXACT = frozenset(_EXACT.split())


def otherwise_rounded(f: TreeFunction) -> TreeFunction:
    """Return f with each argument and intermediate value moved by one eps, in a direction that its bits determine."""

    def run(*args: PyTree) -> PyTree:
        program, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
        moved = jax.tree.map(_nudged, args)
        return jax.tree.unflatten(jax.tree.structure(shapes), _evaluate(program, jax.tree.leaves(moved)))

    return run


def _evaluate(program: _surgery.Program, args: Sequence[ArrayLike]) -> list[ArrayLike]:
    jaxpr, consts = _surgery.opened(program)
    known: dict[core.Var, ArrayLike] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: core.Var | core.Literal) -> ArrayLike:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        outs = _apply(eqn, [read(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: core.JaxprEqn, values: list[ArrayLike]) -> list[ArrayLike]:
    called = next((eqn.params[name] for name in ("call_jaxpr", "jaxpr") if name in eqn.params), None)
    if called is not None and eqn.primitive.name not in ("scan", "shard_map"):
        return _evaluate(called, values)  # jit, remat, custom rules: inline the call
    params = _surgery.with_inner(eqn.params, _retraced)
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    outs = outs if eqn.primitive.multiple_results else [outs]
    return outs if eqn.primitive.name in EXACT else [_nudged(out) for out in outs]


def _retraced(program: _surgery.Program) -> core.ClosedJaxpr:
    """Return the jaxpr of a loop body or a branch with its values perturbed."""
    jaxpr, _ = _surgery.opened(program)
    shapes = [v.aval for v in jaxpr.invars]
    return jax.make_jaxpr(lambda *args: _evaluate(program, args))(*shapes)


def _nudged(a: Any) -> Any:
    """Return a (1 ± eps)."""
    if not hasattr(a, "dtype") or not jnp.issubdtype(a.dtype, jnp.inexact):
        return a
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        return lax.complex(_nudged(lax.real(a)), _nudged(lax.imag(a)))
    info = jnp.finfo(a.dtype)
    unsigned = jnp.dtype(f"uint{info.bits}")
    bits = lax.bitcast_convert_type(a, unsigned)
    tossed = (bits * jnp.array(0x9E3779B97F4A7C15 % 2**info.bits, unsigned)) >> jnp.array(info.bits - 1, unsigned)
    eps = jnp.array(info.eps, a.dtype)
    return a + a * jnp.where(tossed == 0, eps, -eps)
