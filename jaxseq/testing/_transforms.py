"""Checks under transformations: jit, vmap, remat, scan, cond, shard_map, and single arguments or outputs.

Each check compares the result with the one without the transformation. A gradient that is wrong in any case therefore
fails only in the numerical checks, not here again.
"""

import gc
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import PyTree

from jaxseq._mesh import align_varying
from jaxseq._types import ArrayOrScalar
from jaxseq.testing import _point
from jaxseq.testing._compare import largest
from jaxseq.testing._point import Arrays, TreeFunction, wide
from jaxseq.testing._report import Failure, Result, Verdict, explain
from jaxseq.testing._subject import Function, derivative, like
from jaxseq.testing._trial import Trial

# Maximum number of subsets of the arguments on which vmap is checked.
SUBSETS = 15


def _compared(
    trial: Trial,
    check: str,
    run: Callable[[], Arrays],
    expected: Arrays,
    message: str,
    *,
    without: Callable[[], object] | None = None,
    rounding: Callable[[int], float] | None = None,
) -> Iterator[Result]:
    """Compare the result of `run` with what is expected, leaf by leaf.

    If `run` raises, the result is FAIL, or SKIP if `without()`, f without its derivative, raises too.
    """
    try:
        got = run()
    except Exception as error:
        yield _fail_or_skip(check, f"{message.partition(',')[0]}, it raises", error, without)
    else:
        yield from trial.agree(check, got, expected, message, rounding)


def _fail_or_skip(check: str, complaint: str, error: Exception, without: Callable[[], object] | None) -> Result:
    """Return FAIL for a derivative that raises, or SKIP if f without its derivative raises too."""
    try:
        if without is not None:
            without()
    except Exception:
        where = complaint.partition(",")[0].rstrip(":")
        return Result(check, None, Verdict.SKIP, f"{where}, f itself also raises: {explain(error)}")
    return Result(check, None, Verdict.FAIL, failure=Failure(check, f"{complaint} {explain(error)}"))


# --- jit and its settings ---


def jit(trial: Trial) -> Iterator[Result]:
    """Check jit against disable_jit, donated arguments, leaks, debug_nans, and strict promotion."""
    s, check, seed = trial.subject, "jit", trial.patterns["joint"]
    if trial.eager is not None:
        message = "compiled, the result differs from that under disable_jit"
        yield from trial.agree(check, trial.by_rule["joint"], trial.eager[1], message)

    def donated() -> Arrays:
        run = s.program("donating", lambda x, rest, c: derivative(s.mode, s.on(rest))(x, c)[1], donate_argnums=(0, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns of donated buffers that are not usable
            return run([jnp.array(a) for a in trial.x], trial.rest, [jnp.array(c) for c in seed])

    message = "with donated arguments, the result differs"
    yield from _compared(trial, check, donated, trial.by_rule["joint"], message)

    F, typed = s.on(trial.rest), like(trial.primals, seed)

    def traced(f: TreeFunction, *args: PyTree) -> None:
        with _frozen_heap():
            jax.make_jaxpr(f)(*args)

    def one_by_one(f: TreeFunction, *args: PyTree) -> None:
        with jax.disable_jit():
            jax.block_until_ready(f(*args))

    settings = [
        ("the derivative leaks a tracer:", jax.checking_leaks(), traced),
        ("the derivative fails under strict dtype promotion:", jax.numpy_dtype_promotion("strict"), traced),
        ("the derivative fails if rank promotion raises:", jax.numpy_rank_promotion("raise"), traced),
    ]
    if trial.eager is not None:
        settings.append(("the derivative produces an intermediate NaN:", jax.debug_nans(True), one_by_one))
    for complaint, setting, run in settings:
        with setting:
            try:
                run(derivative(s.mode, F), trial.x, typed)
                yield Result(check, None, Verdict.PASS)
            except Exception as error:
                yield _fail_or_skip(check, complaint, error, lambda run=run: run(F, trial.x))


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Exclude existing objects from garbage collection.

    JAX searches all objects that the garbage collector tracks for references to leaked tracers, which takes minutes in
    a large process. A leak involves new objects, apart from the one that holds the reference.
    """
    freeze = gc.get_freeze_count() == 0
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()


# --- vmap ---


def vmap(trial: Trial) -> Iterator[Result]:
    """Compare vmap of the derivative, the derivative of vmap, and vmap over seeds only with one example at a time."""
    s, check = trial.subject, "vmap"
    try:
        jax.eval_shape(jax.vmap(s.on(trial.rest)), [jnp.stack([a, a]) for a in trial.x])
    except Exception as error:
        yield Result(check, None, Verdict.SKIP, f"f itself can't be vmapped: {explain(error)}")
        return
    # The number of examples differs from the size of every axis: equal sizes hide a sum over the wrong axis.
    size = next(n for n in itertools.count(2) if all(n not in a.shape for a in (*trial.x, *trial.primals)))
    examples = [trial.x, *(like(trial.x, _point.varied(trial.rng, wide(trial.x))) for _ in range(size - 1))]
    seeds = [trial.random_seed() for _ in range(size)]
    cs = _stack(seeds)

    run = s.program(
        "vmap over seeds", lambda x, rest, cs: jax.vmap(lambda c: derivative(s.mode, s.on(rest))(x, c)[1])(cs)
    )
    each = _stack([s.by_rule(trial.x, trial.rest, seed)[1] for seed in seeds])
    message = "vmapped over seeds only, the result differs from that for one seed at a time"
    rounding = partial(_rounding_of_all, trial, [trial.x] * size, seeds, each)
    yield from _compared(trial, check, lambda: run(trial.x, trial.rest, cs), each, message, rounding=rounding)

    for subset in _subsets(trial):
        batched = [group in subset for group in s.ins.groups]
        axes = [0 if b else None for b in batched]
        mixed = [[e if b else a for b, e, a in zip(batched, example, trial.x, strict=True)] for example in examples]
        stacked = [leaf if b else trial.x[n] for n, (b, leaf) in enumerate(zip(batched, _stack(mixed), strict=True))]
        each = _stack([s.by_rule(x, trial.rest, seed)[1] for x, seed in zip(mixed, seeds, strict=True)])
        which = " and ".join(trial.arguments[group] for group in sorted(subset))

        def inside(x: Arrays, rest: Arrays, cs: Arrays, axes: list[int | None] = axes) -> Arrays:
            one = lambda x, c: derivative(s.mode, s.on(rest))(x, c)[1]  # noqa: E731
            return jax.vmap(one, in_axes=(axes, 0))(x, cs)

        def outside(x: Arrays, rest: Arrays, cs: Arrays, axes: list[int | None] = axes) -> Arrays:
            return derivative(s.mode, jax.vmap(s.on(rest), in_axes=(axes,)))(x, cs)[1]

        message = f"vmapped over {which}, the derivative differs from that for one example at a time"
        ways = [(f"vmap of the derivative, {subset}", inside, each, message)]
        if s.mode == "vjp":
            summed = [e if b else e.sum(0) for b, e in zip(batched, each, strict=True)]
            message = f"f vmapped over {which}, its derivative differs from that of single examples, summed if shared"
            ways.append((f"derivative of the vmap, {subset}", outside, summed, message))
        rounding = partial(_rounding_of_all, trial, mixed, seeds, each)
        for name, way, expected, message in ways:
            run = s.program(name, way)
            yield from _compared(
                trial, check, lambda r=run, x=stacked: r(x, trial.rest, cs), expected, message, rounding=rounding
            )


def _rounding_of_all(trial: Trial, points: Sequence[Arrays], seeds: Sequence[Arrays], each: Arrays, leaf: int) -> float:
    """Return the change of a leaf of the result by rounding, summed over several points."""
    sizes = [largest(np.asarray(e)) for e in each[leaf]]
    at = (trial.rounding_at(x, seed)[1][leaf] for x, seed in zip(points, seeds, strict=True))
    return sum(size * moved for size, moved in zip(sizes, at, strict=True))


def _subsets(trial: Trial) -> list[tuple[int, ...]]:
    """Return the nonempty subsets of the differentiated arguments, at most SUBSETS of them, drawn at random."""
    groups = sorted(trial.arguments)
    subsets = [c for k in range(1, len(groups) + 1) for c in itertools.combinations(groups, k)]
    if len(subsets) > SUBSETS:
        trial.notes.append(f"vmap: {SUBSETS} of the {len(subsets)} subsets of the arguments, chosen at random")
        # A fixed seed: programs are shared between the seeds of the check.
        chosen = np.random.default_rng(0).permutation(len(subsets) - 1)[: SUBSETS - 1]
        subsets = [*(subsets[k] for k in chosen), subsets[-1]]
    return subsets


def _stack(several: Sequence[Arrays]) -> list[jax.Array]:
    return [jnp.stack(leaves) for leaves in zip(*several, strict=True)]


# --- remat, scan, cond, jit inside, shard_map ---


def composition(trial: Trial) -> Iterator[Result]:
    """Check remat with and without a policy, scan and cond, a jitted f, and shard_map if there are two devices."""
    s, check, seed, joint = trial.subject, "composition", trial.patterns["joint"], trial.by_rule["joint"]
    for name, transform in COMPOSITIONS.items():
        run = s.program(name, lambda x, rest, c, t=transform: derivative(s.mode, t(s.on(rest)))(x, c)[1])
        yield from _compared(
            trial,
            check,
            lambda r=run: r(trial.x, trial.rest, seed),
            joint,
            f"{name}, the result differs",
            without=lambda t=transform: jax.eval_shape(t(s.on(trial.rest)), trial.x),
        )
    of_jit = derivative(s.mode, lambda x: s.value(x, trial.rest))
    message = "the derivative of the jitted function, not jitted itself, differs from the jitted one"
    yield from _compared(trial, check, lambda: of_jit(trial.x, seed)[1], joint, message)
    if s.mode == "vjp":
        if len(jax.devices()) < 2:
            yield Result(check, None, Verdict.SKIP, "shard_map needs two devices, there is one")
        else:
            yield from _sharded(trial, check)


def _in_scan_and_cond(F: Function) -> Function:
    """Return F(x) as half the difference between the two branches of a cond, taken in the two steps of a scan."""

    def run(x: Arrays) -> Arrays:
        def step(carry: ArrayLike, flag: ArrayLike) -> tuple[ArrayLike, Arrays]:
            return carry, lax.cond(flag, F, lambda x: [-y for y in F(x)], x)

        _, ys = lax.scan(step, 0, jnp.array([True, False]))
        return [(y[0] - y[1]) / 2 for y in ys]

    return run


COMPOSITIONS: dict[str, Callable[[Function], Function]] = {
    "under remat": jax.checkpoint,
    "under remat with the policy dots_saveable": lambda F: jax.checkpoint(
        F, policy=jax.checkpoint_policies.dots_saveable
    ),
    "inside scan and cond": _in_scan_and_cond,
}


def _sharded(trial: Trial, check: str) -> Iterator[Result]:
    """Check two examples on two devices: the last argument is sharded, cotangents of the others are summed."""
    s = trial.subject
    sharded = [group == max(s.ins.groups) for group in s.ins.groups]
    nearby = like(trial.x, _point.varied(trial.rng, wide(trial.x)))
    second = [b if o else a for o, a, b in zip(sharded, trial.x, nearby, strict=True)]
    seeds = [trial.random_seed(), trial.random_seed()]
    each = [wide(s.by_rule(x, trial.rest, seed)[1]) for x, seed in zip((trial.x, second), seeds, strict=True)]
    expected = [np.stack([a, b]) if o else a + b for o, a, b in zip(sharded, *each, strict=True)]

    mesh = jax.make_mesh((2,), ("examples",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split, shared = PartitionSpec("examples"), PartitionSpec()
    specs = [split if o else shared for o in sharded]

    def local(x: Arrays) -> Arrays:
        return [a[0] if o else a for o, a in zip(sharded, x, strict=True)]

    def gradient(x: Arrays, rest: Arrays, c: Arrays) -> Arrays:
        seed = [a[0] for a in c]

        def as_seeds(x: Arrays) -> Arrays:
            # An output of shared arguments only does not vary over devices, but its seed does.
            return [align_varying((y, a))[0] for y, a in zip(s.on(rest)(x), seed, strict=True)]

        result = derivative("vjp", as_seeds)(local(x), seed)[1]
        return [r[None] if o else r for o, r in zip(sharded, result, strict=True)]

    def value(x: Arrays, rest: Arrays) -> Arrays:
        return [y[None] for y in s.on(rest)(local(x))]

    of_rest, of_c = [shared] * len(trial.rest), [split] * len(trial.primals)
    inside = jax.shard_map(gradient, mesh=mesh, in_specs=(specs, of_rest, of_c), out_specs=specs)
    unchecked = jax.shard_map(value, mesh=mesh, in_specs=(specs, of_rest), out_specs=of_c, check_vma=False)

    def around(x: Arrays, rest: Arrays, c: Arrays) -> Arrays:
        return derivative("vjp", lambda x: unchecked(x, rest))(x, c)[1]

    stacked = [both if o else a for o, a, both in zip(sharded, trial.x, _stack([trial.x, second]), strict=True)]
    at = stacked, trial.rest, like(trial.primals, _stack(seeds))
    without = partial(jax.eval_shape, unchecked, stacked, trial.rest)
    message = "in shard_map over two devices, the result differs from that on one device"
    try:
        got = s.program("shard_map", inside)(*at)
    except Exception as error:
        # A rule that ignores devices returns the sum over the examples of each device. JAX rejects that by default.
        # With check_vma=False, and differentiated from outside of the shard_map, JAX itself sums over devices.
        trial.notes.append(f"in shard_map the gradient needs check_vma=False, otherwise it raises {explain(error)}")
        yield from _compared(trial, check, lambda: s.program("around", around)(*at), expected, message, without=without)
    else:
        yield from trial.agree(check, got, expected, message)


# --- One argument, one output ---


def alone(trial: Trial) -> Iterator[Result]:
    """Differentiate with respect to each argument and each output separately; the rest is a symbolic zero."""
    s, check = trial.subject, "alone"
    for group, name in trial.arguments.items():
        message = f"differentiated with respect to {name} only, the result differs from the joint one"
        try:
            yield from _argument_alone(trial, group, message)
        except Exception as error:
            yield Result(check, None, Verdict.FAIL, failure=Failure(check, f"{message}: it raises {explain(error)}"))
    seed = trial.patterns["joint"]
    for n, name in enumerate(s.outs.names) if s.mode == "vjp" and len(s.outs.names) > 1 else ():

        def only(x: Arrays, n: int = n) -> Arrays:
            return [s.on(trial.rest)(x)[n]]

        expected = s.by_rule(trial.x, trial.rest, [c if m == n else 0 * c for m, c in enumerate(seed)])[1]
        message = f"for {name} only, the result differs from that with zero cotangents for the other outputs"
        yield from _compared(trial, check, lambda F=only, c=seed[n]: _run(trial, F, trial.x, [c]), expected, message)


def _argument_alone(trial: Trial, group: int, message: str) -> Iterator[Result]:
    s, seed = trial.subject, trial.patterns["joint"]
    at = [n for n, g in enumerate(s.ins.groups) if g == group]

    def F(part: Arrays) -> Arrays:
        whole = list(trial.x)
        for n, leaf in zip(at, part, strict=True):
            whole[n] = leaf
        return s.on(trial.rest)(whole)

    x = [trial.x[n] for n in at]
    if s.mode == "vjp":
        places, got, expected = at, _run(trial, F, x, seed), [trial.by_rule["joint"][n] for n in at]
    else:
        tangent = [a if g == group else np.zeros_like(a) for g, a in zip(s.ins.groups, seed, strict=True)]
        got, expected = _run(trial, F, x, [seed[n] for n in at]), wide(s.by_rule(trial.x, trial.rest, tangent)[1])
        places = list(range(len(expected)))
    for n, a, e in zip(places, got, expected, strict=True):
        yield trial.agree_on(n, "alone", a, e, message)


def _run(trial: Trial, F: Function, x: Arrays, seed: Arrays) -> list[ArrayOrScalar]:
    """Return the result for F, under disable_jit if f supports it, which saves compilation."""
    run = derivative(trial.subject.mode, F)
    if trial.eager is None:
        return wide(jax.jit(run)(x, seed)[1])
    with jax.disable_jit():
        return wide(run(x, seed)[1])
