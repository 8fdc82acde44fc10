"""Functions of other libraries with correct gradients, for which `check_vjp` must not FAIL.

Run from the root of the repository as `python -m tests.fuzz.right_functions`; needs optax, Flax and Equinox. Arguments
select functions by parts of their names; `--seeds N` sets the number of seeds (default 3). The tests import `RIGHT` and
check a sample.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.scipy import special

from jaxseq.testing import Report, Verdict
from jaxseq.testing._check import Session


class Right(NamedTuple):
    """A function, its arguments for a key, and options of `check_vjp`."""

    f: Callable[..., Any]
    args: Callable[[jax.Array], tuple[Any, ...]]
    options: dict[str, Any] = {}  # noqa: RUF012

    def reports(self, seeds: Iterable[int], only: Collection[str] | None = None) -> Iterator[Report]:
        """Yield the report of `check_vjp` for each seed of arguments and cotangents, under JAX's default settings."""
        settings = jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
        with settings[0], settings[1], settings[2], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = None
            for seed in seeds:
                args = self.args(jax.random.key(seed))
                session = session or Session(self.f, args, argnums=self.options.get("argnums"))
                yield session.report(args, seed=seed, order=self.options.get("order", 2), only=only)


def normal(*shapes: tuple[int, ...], scale: float = 1.0) -> Callable[[jax.Array], tuple[Any, ...]]:
    """Return a function that draws normal numbers in these shapes."""

    def draw(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, len(shapes))
        return tuple(scale * jax.random.normal(k, shape, jnp.float32) for k, shape in zip(keys, shapes, strict=True))

    return draw


def uniform(*shapes: tuple[int, ...], low: float = 0.1, high: float = 0.9) -> Callable[[jax.Array], tuple[Any, ...]]:
    """Return a function that draws uniform numbers in these shapes."""

    def draw(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, len(shapes))
        return tuple(jax.random.uniform(k, s, jnp.float32, low, high) for k, s in zip(keys, shapes, strict=True))

    return draw


def both(first: Callable[[jax.Array], tuple[Any, ...]], *others: Any) -> Callable[[jax.Array], tuple[Any, ...]]:
    """Append fixed arguments to those of `first`."""
    return lambda key: (*first(key), *others)


def positive_definite(key: jax.Array) -> tuple[Any, ...]:
    a = jax.random.normal(key, (4, 4), jnp.float32)
    return (a @ a.T + jnp.eye(4, dtype=a.dtype),)


def symmetric(key: jax.Array) -> tuple[Any, ...]:
    a = jax.random.normal(key, (4, 4), jnp.float32)
    return (a + a.T,)


def of_symmetric(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Apply f to the symmetric part of its argument."""

    def run(a: Any) -> Any:
        return f((a + a.T) / 2)

    run.__name__ = f.__name__
    return run


def equinox_layer(make: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[jax.Array], Any]]:
    """Return `(f, parameters)` of an Equinox layer, where f takes the parameters as its first argument."""
    _, static = eqx.partition(make(key=jax.random.key(0)), eqx.is_inexact_array)

    def f(params: Any, *args: Any) -> Any:
        return eqx.combine(params, static)(*args)

    f.__name__ = f"eqx.nn.{type(static).__name__}"
    return f, lambda key: eqx.filter(make(key=key), eqx.is_inexact_array)


def equinox(make: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> Right:
    """Return an Equinox layer at normal arguments."""
    f, parameters = equinox_layer(make)
    return Right(f, lambda key: (parameters(key), *normal(*shapes)(jax.random.fold_in(key, 1))), options)


def flax(layer: nn.Module, *shapes: tuple[int, ...], **options: Any) -> Right:
    """Return a Flax layer at normal arguments. Batch statistics, if any, start from their initial values."""

    def f(params: Any, *args: Any) -> Any:
        return layer.apply({"params": params}, *args, mutable=["batch_stats"])[0]

    f.__name__ = f"flax.linen.{type(layer).__name__}"

    def args(key: jax.Array) -> tuple[Any, ...]:
        xs = normal(*shapes)(jax.random.fold_in(key, 1))
        return layer.init(key, *xs).get("params", {}), *xs

    return Right(f, args, options)


def of_input(f: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> Right:
    return Right(f, normal(*shapes), options)


def dropout(x: Any) -> Any:
    return jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, x.shape), x / 0.5, 0.0)


def noisy(x: Any) -> Any:
    return jnp.sin(x) + 0.1 * jax.random.normal(jax.random.key(1), x.shape)


def max_pool(x: Any) -> Any:
    return nn.max_pool(x[None, :, :, None], (2, 2))


def ctc(logits: Any) -> Any:
    labels, none = jnp.array([[1, 2, 2], [3, 1, 0]]), jnp.zeros((2, 6))
    return optax.ctc_loss(logits, none, labels, jnp.array([[0, 0, 0], [0, 0, 1]]))


LABELS = jnp.array([1, 4, 0, 2])
ONE_HOT = jax.nn.one_hot(LABELS, 5)
X = (4, 5)

RIGHT: dict[str, Right] = {
    # jax.nn
    **{
        f"jax.nn.{f.__name__}": of_input(f, (3, 4))
        for f in (
            jax.nn.relu,
            jax.nn.gelu,
            jax.nn.silu,
            jax.nn.softplus,
            jax.nn.elu,
            jax.nn.selu,
            jax.nn.celu,
            jax.nn.glu,
            jax.nn.softmax,
            jax.nn.log_softmax,
            jax.nn.logsumexp,
            jax.nn.standardize,
            jax.nn.leaky_relu,
            jax.nn.mish,
            jax.nn.hard_swish,
            jax.nn.relu6,
            jax.nn.squareplus,
            jax.nn.sparse_plus,
            jax.nn.log_sigmoid,
        )
    },
    "jax.nn.dot_product_attention": of_input(jax.nn.dot_product_attention, (5, 2, 3), (4, 2, 3), (4, 2, 3)),
    # jax.scipy.special
    **{
        f"special.{f.__name__}": of_input(f, (3, 4))
        for f in (
            special.erf,
            special.erfc,
            special.expit,
            special.ndtr,
            special.log_ndtr,
            special.i0,
            special.i0e,
            special.i1,
            special.i1e,
        )
    },
    **{
        f"special.{f.__name__}": Right(f, uniform((3, 4)))
        for f in (
            special.logit,
            special.ndtri,
            special.erfinv,
            special.entr,
            special.gammaln,
            special.digamma,
            special.spence,
        )
    },
    **{
        f"special.{f.__name__}": Right(f, uniform((3, 4), (3, 4)))
        for f in (special.xlogy, special.xlog1py, special.kl_div, special.rel_entr, special.betaln)
    },
    "special.gammainc": Right(special.gammainc, uniform((3,), (3,), low=0.5, high=2.0), {"order": 1}),
    # jax.numpy.linalg
    "linalg.solve": Right(jnp.linalg.solve, lambda key: (*positive_definite(key), *normal((4, 2))(key))),
    "linalg.inv": Right(jnp.linalg.inv, positive_definite),
    "linalg.det": of_input(jnp.linalg.det, (3, 3)),
    "linalg.slogdet": Right(lambda a: jnp.linalg.slogdet(a)[1], positive_definite),
    "linalg.cholesky": Right(jnp.linalg.cholesky, positive_definite),
    "linalg.eigh": Right(jnp.linalg.eigh, symmetric),
    "linalg.eigvalsh": Right(of_symmetric(jnp.linalg.eigvalsh), symmetric),
    "linalg.qr": of_input(jnp.linalg.qr, (4, 3)),
    "linalg.svd": of_input(partial(jnp.linalg.svd, compute_uv=False), (4, 3)),
    "linalg.norm": of_input(jnp.linalg.norm, (4, 3)),
    "linalg.pinv": of_input(jnp.linalg.pinv, (4, 3)),
    "linalg.matrix_power": of_input(partial(jnp.linalg.matrix_power, n=3), (3, 3)),
    "linalg.expm": of_input(jax.scipy.linalg.expm, (3, 3), order=1),
    # jax.numpy
    "fft.rfft": of_input(jnp.fft.rfft, (5,)),
    "fft.irfft": of_input(lambda x: jnp.fft.irfft(jax.lax.complex(x, x)), (5,)),
    "fft.fft2": of_input(lambda x: jnp.abs(jnp.fft.fft2(x)) ** 2, (3, 4)),
    "numpy.sort": of_input(jnp.sort, (3, 4)),
    "numpy.cumprod": of_input(jnp.cumprod, (5,)),
    "numpy.take": Right(lambda x, i: x[i], both(normal((6, 3)), jnp.array([1, 4, 2]))),
    "square of tiny numbers": Right(jnp.square, normal((3, 4), scale=1e-20)),
    "exp of large numbers": Right(
        lambda x: jnp.exp(x) / jnp.exp(x - 1).sum(), both(lambda key: (10.0 + normal((4,))(key)[0],))
    ),
    "dropout from a fixed key": of_input(dropout, (3, 4)),
    "noise from a fixed key": of_input(noisy, (3, 4)),
    # optax
    **{
        f"optax.{f.__name__}": of_input(f, X, X)
        for f in (
            optax.l2_loss,
            optax.squared_error,
            optax.huber_loss,
            optax.log_cosh,
            optax.cosine_distance,
            optax.hinge_loss,
        )
    },
    "optax.softmax_cross_entropy": Right(optax.softmax_cross_entropy, both(normal(X), ONE_HOT)),
    "optax.softmax_cross_entropy_with_integer_labels": Right(
        optax.softmax_cross_entropy_with_integer_labels, both(normal(X), LABELS)
    ),
    "optax.sigmoid_binary_cross_entropy": Right(optax.sigmoid_binary_cross_entropy, both(normal(X), ONE_HOT)),
    "optax.sigmoid_focal_loss": Right(optax.sigmoid_focal_loss, both(normal(X), ONE_HOT), {"argnums": 0}),
    "optax.poly_loss_cross_entropy": Right(
        optax.losses.poly_loss_cross_entropy, both(normal(X), ONE_HOT), {"argnums": 0}
    ),
    "optax.kl_divergence": Right(
        lambda x, y: optax.losses.kl_divergence(jax.nn.log_softmax(x), jax.nn.softmax(y)), normal(X, X)
    ),
    "optax.triplet_margin_loss": of_input(optax.losses.triplet_margin_loss, X, X, X),
    "optax.ntxent": Right(optax.losses.ntxent, both(normal(X), jnp.array([0, 0, 1, 1])), {"order": 1}),
    "optax.ctc_loss": of_input(ctc, (2, 6, 4)),
    "optax.multiclass_sparsemax_loss": Right(optax.losses.multiclass_sparsemax_loss, both(normal(X), LABELS)),
    "optax.projection_simplex": of_input(optax.projections.projection_simplex, (5,)),
    "optax.projection_l1_ball": of_input(optax.projections.projection_l1_ball, (5,)),
    "optax.projection_l2_ball": of_input(optax.projections.projection_l2_ball, (5,)),
    # Equinox
    "eqx.nn.Linear": equinox(partial(eqx.nn.Linear, 3, 4), (3,)),
    "eqx.nn.MLP": equinox(partial(eqx.nn.MLP, 3, 2, 5, 1), (3,)),
    "eqx.nn.LayerNorm": equinox(lambda key: eqx.nn.LayerNorm(5), (5,)),
    "eqx.nn.RMSNorm": equinox(lambda key: eqx.nn.RMSNorm(5), (5,)),
    "eqx.nn.GroupNorm": equinox(lambda key: eqx.nn.GroupNorm(2, 4), (4, 3)),
    "eqx.nn.GRUCell": equinox(partial(eqx.nn.GRUCell, 3, 4), (3,), (4,)),
    "eqx.nn.Conv1d": equinox(partial(eqx.nn.Conv1d, 2, 3, 3), (2, 7)),
    "eqx.nn.MaxPool1d": equinox(lambda key: eqx.nn.MaxPool1d(2, 2), (2, 6), argnums=1),
    "eqx.nn.MultiheadAttention": equinox(partial(eqx.nn.MultiheadAttention, 2, 4), (3, 4), (3, 4), (3, 4), order=1),
    # Flax
    "flax.Dense": flax(nn.Dense(4), (2, 3)),
    "flax.Conv": flax(nn.Conv(3, (3,)), (2, 7, 2)),
    "flax.LayerNorm": flax(nn.LayerNorm(), (3, 5)),
    "flax.GroupNorm": flax(nn.GroupNorm(2), (3, 4)),
    "flax.BatchNorm": flax(nn.BatchNorm(use_running_average=False), (4, 3)),
    "flax.max_pool": of_input(max_pool, X),
    "flax.avg_pool": of_input(lambda x: nn.avg_pool(x[None, :, :, None], (2, 2)), X),
    "flax.Embed": Right(
        lambda table, i: nn.Embed(6, 3).apply({"params": {"embedding": table}}, i), both(normal((6, 3)), LABELS)
    ),
}


def main() -> int:
    """Print the verdicts of each function; return 1 if any function fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; all functions by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="checks; all by default")
    options = parser.parse_args()
    failed = 0
    for name, right in RIGHT.items():
        if options.names and not any(part in name for part in options.names):
            continue
        start = time.process_time()
        reports = list(right.reports(range(options.seeds), options.only))
        verdicts = " ".join(report.verdict for report in reports)
        print(f"{name:50s} {verdicts} ({time.process_time() - start:.1f} s)", flush=True)
        for report in reports:
            unsure = sorted({r.check for r in report.results if r.verdict is Verdict.INCONCLUSIVE})
            print(f"    no power: {', '.join(unsure)}\n" if unsure else "", end="", flush=True)
            for failure in report.failures:
                print(f"    seed {failure.seed}, {failure.check}: {failure.message}", flush=True)
            failed += report.verdict is Verdict.FAIL
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
