"""A function under judgement, on flat leaves, and its programs, each compiled once for all points and seeds.

Both modes are one thing here. With F the function on flat leaves, reverse mode maps a cotangent of the outputs to one
of the inputs, forward mode a tangent of the inputs to one of the outputs:

    vjp    seed c like F(x),  result F'(x)ᵀ c like x
    jvp    seed u like x,     result F'(x) u like F(x)

A check takes seeds and judges results, and needs to know the mode only where the two differ.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq.testing import _differences, _point, _surgery
from jaxseq.testing._point import Arrays
from jaxseq.testing._rounding import otherwise_rounded

Function = Callable[[Arrays], Arrays]


def derivative(mode: str, F: Function) -> Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]:
    """`(x, seed) -> (F(x), result)` in one of the two modes."""

    def vjp(x: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        outputs, pull = jax.vjp(F, x)
        return outputs, pull(like(outputs, seed))[0]

    def jvp(x: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        return jax.jvp(F, (x,), (like(x, seed),))

    return {"vjp": vjp, "jvp": jvp}[mode]


def like(primals: Arrays, seed: Arrays) -> Arrays:
    """The seed in the dtypes of its primals."""
    return [jnp.asarray(s).astype(p.dtype) for p, s in zip(primals, seed, strict=True)]


@cache
def _in_a_hurry() -> dict[str, Any]:
    """Compiler options for programs that run a few times: on a CPU compilation is nearly all that a check costs."""
    wanted = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
    known: dict[str, Any] = {}
    for name, value in wanted.items() if jax.default_backend() == "cpu" else ():
        try:
            jax.jit(lambda x: x + 1, compiler_options={name: value})(0)
        except Exception:  # this version of XLA does not know it
            continue
        known[name] = value
    return known


class Subject:
    """A function on flat leaves, what it is judged against, and its compiled programs.

    Attributes:
        f: the function.
        reference: what defines it, or None.
        judge: `args -> g`: the function of which differences are taken around args; None for f itself.
        mode: "vjp" or "jvp".
        dtype: in which it is judged: float64, or a lower one where f does not run in float64.
        rules: the names of the custom_vjp functions in it.
        ins, outs: the leaves of arguments and output; `seeds` and `results` are these two as the mode has them.
        source: what the derivative is held against, in words; None where there is nothing but differences.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        args: tuple[Any, ...],
        argnums: tuple[int, ...],
        *,
        reference: Callable[..., Any] | None = None,
        judge: Callable[[tuple[Any, ...]], Callable[..., Any]] | None = None,
        mode: str = "vjp",
        dtype: Any = np.float64,
    ):
        self.f, self.reference, self.judge, self.mode, self.dtype = f, reference, judge, mode, np.dtype(dtype)
        with self.context():
            shapes = jax.eval_shape(f, *args)
            self.rules = _surgery.rules(f, *args) if mode == "vjp" else []
        self.ins, self.outs = _point.input_leaves(f, args, argnums), _point.output_leaves(shapes)
        self.seeds, self.results = (self.outs, self.ins) if mode == "vjp" else (self.ins, self.outs)
        self.source = "the reference" if reference else "what f computes" if self.rules or judge else None
        self.programs: dict[str, Callable[..., Any]] = {}
        self.optimised = True

    @cached_property
    def unoptimised(self) -> "Subject":
        """The same, where the rule too is compiled in a hurry: for points that are not the first."""
        other = copy.copy(self)
        other.programs, other.optimised = {**self.programs}, False
        other.programs.pop("by hand", None)
        return other

    def context(self) -> AbstractContextManager[Any]:
        """In which the function runs in `dtype`."""
        return jax.enable_x64(self.dtype == np.float64)

    # --- Functions of flat leaves ---

    def flat(self, f: Callable[..., Any], rest: Arrays) -> Function:
        """f as a function of its differentiated leaves alone, to the differentiable leaves of its output."""
        return lambda x: self.outs.split(f(*self.ins.join(x, rest)))[0]

    def on(self, rest: Arrays) -> Function:
        """F."""
        return self.flat(self.f, rest)

    def judged(self, x: Arrays, rest: Arrays) -> Function:
        """The function of which differences are taken around x."""
        return self.flat(self.judge(self.ins.join(x, rest)) if self.judge else self.f, rest)

    def truth(self, x: Arrays, rest: Arrays) -> Function:
        """The function whose derivative by JAX the one by hand has to equal at x."""
        if self.reference is None and self.judge is not None:
            return self.judged(x, rest)
        return self.flat(self.reference or _surgery.plain(self.f), rest)

    # --- Programs ---

    def program(self, name: str, run: Callable[..., Any], optimised: bool = False, **options: Any) -> Any:
        """`run`, jitted; what was jitted under this name before serves again, at other points."""
        if name not in self.programs:
            self.programs[name] = jax.jit(run, compiler_options=None if optimised else _in_a_hurry(), **options)
        return self.programs[name]

    def by_hand(self, x: Arrays, rest: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        """`(outputs, result)` of the rule, compiled as its users compile it."""
        run = self.program(
            "by hand", lambda x, rest, seed: derivative(self.mode, self.on(rest))(x, seed), optimised=self.optimised
        )
        return run(x, rest, seed)

    def by_truth(self, x: Arrays, rest: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        """`(outputs, result)` of what the rule is held against."""
        run = self.program("truth", lambda x, rest, seed: derivative(self.mode, self.truth(x, rest))(x, seed))
        return run(x, rest, seed)

    def by_jax(self, x: Arrays, rest: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        """`by_truth`; where there is none, what JAX derives of f with its custom_jvp rules set aside."""
        if self.source:
            return self.by_truth(x, rest, seed)
        plain = _surgery.plain(self.f, jvps=True)
        run = self.program("by JAX", lambda x, rest, seed: derivative(self.mode, self.flat(plain, rest))(x, seed))
        return run(x, rest, seed)

    def value(self, x: Arrays, rest: Arrays) -> Arrays:
        """F(x), not differentiated, compiled as its users compile it."""
        return self.program("f", lambda x, rest: self.on(rest)(x), optimised=True)(x, rest)

    def rounded(self, x: Arrays, rest: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        """`by_truth`, or `by_hand` where there is none, with every number on the way rounded otherwise."""
        f = self.truth if self.source else lambda x, rest: self.on(rest)
        run = otherwise_rounded(lambda x, rest, seed: derivative(self.mode, f(x, rest))(x, seed))
        return self.program("rounded otherwise", run)(x, rest, seed)

    def eagerly(self, x: Arrays, rest: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        """`(outputs, result)` of the rule, one operation after the other."""
        with jax.disable_jit():
            return derivative(self.mode, self.on(rest))(x, seed)

    def differences(
        self, of: str, G: Callable[[Arrays, Any], Function], x: Arrays, rest: Any, directions: Any, onto: Any
    ) -> _differences.Differences:
        """<c, D_u g> for g = G(x, rest), each direction u and each c of `onto`; `of` names the program."""
        run = self.program(f"differences of {of}", lambda x, rest, u, c: _differences.quotients(G(x, rest), x, u, c))
        u, c = ([np.stack(leaves) for leaves in zip(*seeds, strict=True)] for seeds in (directions, onto))
        return _differences.extrapolated(*map(np.asarray, run(x, rest, u, c)))
