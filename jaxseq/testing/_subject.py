"""Subject: the function under test, on flat leaves, with its programs, each compiled once for all points and seeds.

A subject treats both modes of differentiation alike. With F the function on flat leaves, reverse mode maps a cotangent
of the outputs to one of the inputs, and forward mode maps a tangent of the inputs to one of the outputs:

    vjp    seed c like F(x),  result F'(x)ᵀ c like x
    jvp    seed u like x,     result F'(x) u like F(x)

A check passes seeds and checks results. It depends on the mode only where the two differ.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, cached_property
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxseq.testing import _differences, _point, _surgery
from jaxseq.testing._point import Args, Arrays, Shapes, TreeFunction
from jaxseq.testing._rounding import otherwise_rounded

# A function on flat lists of leaves.
Function = Callable[[Arrays], Arrays]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def derivative(mode: str, F: Function) -> Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]:
    """Return the function `(x, seed) -> (F(x), result)` for the mode "vjp" or "jvp"."""

    def vjp(x: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        outputs, pull = jax.vjp(F, x)
        return outputs, pull(like(outputs, seed))[0]

    def jvp(x: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        return jax.jvp(F, (x,), (like(x, seed),))

    return {"vjp": vjp, "jvp": jvp}[mode]


def like(primals: Shapes, seed: Arrays) -> list[jax.Array]:
    """Cast the seed to the dtypes of its primals."""
    return [jnp.asarray(s).astype(p.dtype) for p, s in zip(primals, seed, strict=True)]


@cache
def _fast_compilation() -> dict[str, bool | int]:
    """Return compiler options for programs that run a few times: on CPUs, checks spend most of their time compiling."""
    wanted = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
    known: dict[str, bool | int] = {}
    for name, value in wanted.items() if jax.default_backend() == "cpu" else ():
        try:
            jax.jit(lambda x: x + 1, compiler_options={name: value})(0)
        except Exception:  # not an option of this version of XLA
            continue
        known[name] = value
    return known


class Subject:
    """A function on flat leaves, the functions that it is compared with, and its compiled programs.

    Attributes:
        f: the function.
        reference: a reference implementation, or None.
        judge: `args -> g`, where g is the function whose finite differences are taken at args; None for f itself.
        mode: "vjp" or "jvp".
        dtype: the dtype of the checks: float64, or float32 if f does not run in float64.
        rules: the names of the custom_vjp functions in f.
        ins, outs: the leaves of the arguments and of the output.
        seeds, results: `outs, ins` in reverse mode, `ins, outs` in forward mode.
        source: a description of the function whose derivative by JAX is expected; None if there are only finite
            differences.
    """

    def __init__(
        self,
        f: TreeFunction,
        args: Args,
        argnums: tuple[int, ...],
        *,
        reference: TreeFunction | None = None,
        judge: Callable[[Args], TreeFunction] | None = None,
        mode: str = "vjp",
        dtype: DTypeLike = np.float64,
    ):
        self.f, self.reference, self.judge, self.mode, self.dtype = f, reference, judge, mode, np.dtype(dtype)
        with self.context():
            shapes = jax.eval_shape(f, *args)
            self.rules = _surgery.rules(f, *args) if mode == "vjp" else []
        self.ins, self.outs = _point.input_leaves(f, args, argnums), _point.output_leaves(shapes)
        self.seeds, self.results = (self.outs, self.ins) if mode == "vjp" else (self.ins, self.outs)
        self.source = "the reference" if reference else "what f computes" if self.rules or judge else None
        self.programs: dict[str, TreeFunction] = {}
        self.optimised = True

    @cached_property
    def unoptimised(self) -> "Subject":
        """A copy that also compiles the rule without optimisation, for points other than the first."""
        other = copy.copy(self)
        other.programs, other.optimised = {**self.programs}, False
        other.programs.pop("by rule", None)
        return other

    def context(self) -> AbstractContextManager[object]:
        """Return the context manager in which the function runs in `dtype`."""
        return jax.enable_x64(self.dtype == np.float64)

    # --- Functions of flat leaves ---

    def flat(self, f: TreeFunction, rest: Arrays) -> Function:
        """Return f as a function from its differentiated leaves to the differentiable leaves of its output."""
        return lambda x: self.outs.split(f(*self.ins.join(x, rest)))[0]

    def on(self, rest: Arrays) -> Function:
        """Return F."""
        return self.flat(self.f, rest)

    def judged(self, x: Arrays, rest: Arrays) -> Function:
        """Return the function whose finite differences are taken at x."""
        return self.flat(self.judge(self.ins.join(x, rest)) if self.judge else self.f, rest)

    def truth(self, x: Arrays, rest: Arrays) -> Function:
        """Return the function whose derivative by JAX is the expected result at x."""
        if self.reference is None and self.judge is not None:
            return self.judged(x, rest)
        return self.flat(self.reference or _surgery.plain(self.f), rest)

    # --- Programs ---

    def program(
        self,
        name: str,
        run: Callable[P, R],
        *,
        optimised: bool = False,
        donate_argnums: tuple[int, ...] | None = None,
    ) -> Callable[P, R]:
        """Return `run`, jitted. A program that was jitted before under the same name is reused."""
        if name not in self.programs:
            options = None if optimised else _fast_compilation()
            self.programs[name] = jax.jit(run, compiler_options=options, donate_argnums=donate_argnums)
        return self.programs[name]

    def by_rule(self, x: Arrays, rest: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        """Return `(outputs, result)` of the rule, compiled with default options, as for users."""
        run = self.program(
            "by rule", lambda x, rest, seed: derivative(self.mode, self.on(rest))(x, seed), optimised=self.optimised
        )
        return run(x, rest, seed)

    def by_truth(self, x: Arrays, rest: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        """Return `(outputs, result)` by JAX of the function that the rule is compared with."""
        run = self.program("truth", lambda x, rest, seed: derivative(self.mode, self.truth(x, rest))(x, seed))
        return run(x, rest, seed)

    def by_jax(self, x: Arrays, rest: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        """Return `by_truth`, or without a source, the derivative by JAX of f without its custom rules."""
        if self.source:
            return self.by_truth(x, rest, seed)
        plain = _surgery.plain(self.f, jvps=True)
        run = self.program("by JAX", lambda x, rest, seed: derivative(self.mode, self.flat(plain, rest))(x, seed))
        return run(x, rest, seed)

    def value(self, x: Arrays, rest: Arrays) -> Arrays:
        """Return F(x) without its derivative, compiled with default options, as for users."""
        return self.program("f", lambda x, rest: self.on(rest)(x), optimised=True)(x, rest)

    def rounded(self, x: Arrays, rest: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        """Return `by_truth`, or `by_rule` without a source, with every intermediate value rounded differently."""
        f = self.truth if self.source else lambda x, rest: self.on(rest)
        run = otherwise_rounded(lambda x, rest, seed: derivative(self.mode, f(x, rest))(x, seed))
        return self.program("rounded otherwise", run)(x, rest, seed)

    def eagerly(self, x: Arrays, rest: Arrays, seed: Arrays) -> tuple[Arrays, Arrays]:
        """Return `(outputs, result)` of the rule under `jax.disable_jit`."""
        with jax.disable_jit():
            return derivative(self.mode, self.on(rest))(x, seed)

    def differences(
        self,
        of: str,
        G: Callable[[Arrays, T], Function],
        x: Arrays,
        rest: T,
        directions: Sequence[Arrays],
        onto: Sequence[Arrays],
    ) -> _differences.Differences:
        """Return <c, D_u g> for g = G(x, rest), each direction u and each c of `onto`; `of` names the program."""
        run = self.program(f"differences of {of}", lambda x, rest, u, c: _differences.quotients(G(x, rest), x, u, c))
        u, c = ([np.stack(leaves) for leaves in zip(*seeds, strict=True)] for seeds in (directions, onto))
        return _differences.extrapolated(*map(np.asarray, run(x, rest, u, c)))
