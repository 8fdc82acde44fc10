"""Sunspot forecasting: four models predict each of 309 years from the previous years.

    naive          x̂_t = x_{t-1}
    AR(τ)          x̂_t = b + sum_{j=1..τ} a_j x_{t-j}          least squares: `autoregressive.fit`, `predict`
    convolution    x̂_t = b + sum_{k=0..τ-1} w_k x_{t-τ+k}      the same function, w_k = a_{τ-k}: `jaxseq.conv`
    latent AR      h_t = GRU(x_{t-1}; h_{t-1})                 a state instead of lags: `autoregressive.latent`
                   x̂_t = x_{t-1} + h_t w + b,  log σ_t = h_t u + c

    log P(x_1, ..., x_T) = sum_t log P(x_t | x_<t),    P(x_t | x_<t) = N(x̂_t, σ_t²),    σ constant except in latent AR

Gradient descent on the convolution converges to the least squares solution. A GRU overfits the 221 training years.
Therefore training stops at the best prediction of the last 60 of them, which are used for validation only, and the
predictive distributions of several GRUs with different initial parameters are mixed. AR has the lower error; the GRU
has the higher likelihood, because its σ_t increases with solar activity.

The training part ends in 1920. Scale, τ and the stopping step depend on this part only. Akaike's criterion selects τ,
up to slightly more than the solar cycle of eleven years. (The 60 validation years would select 2, the criterion up to
20 would select 18, with errors of 20.5 and 18.4. The upper limit and the sizes of the GRU were chosen with knowledge of
the later years.) The yearly means from 1700 to 2008 are included in statsmodels; Yule introduced the AR model in 1927
for the first three quarters of them.

    python examples/sunspots.py                 half a minute on two cores; writes out/sunspots.png
    python examples/sunspots.py --seed 1        other initial parameters of the GRUs
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from statsmodels.datasets import sunspots

import jaxseq
from jaxseq import autoregressive

Series = Float[Array, " T"]
Forecast = tuple[Series, Series]  # x̂ and log σ of each year

LAST = 1920  # last year of the training part
VALIDATION = 60  # last years of the training part, for early stopping of the GRU
LARGEST = 12  # largest candidate τ
DESCENT = 4000  # gradient descent steps for the convolution
HIDDEN, LEARNING_RATE, MODELS = 16, 2e-3, 5  # GRU: hidden size, learning rate, number of mixed models
TOLERANCE = 1e-10  # of `fit` against least squares on an explicit matrix of lags


# --- Data ---


def numbers() -> tuple[Int[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Return (years, sunspot numbers)."""
    table: Any = sunspots.load_pandas()
    return table.data["YEAR"].to_numpy(int), table.data["SUNACTIVITY"].to_numpy(float)


def scaled(x: Float[np.ndarray, " T"], train: int) -> tuple[Series, float, float]:
    """Return (standardized series, mean, scale), with mean and scale of the first `train` years only."""
    mean, scale = float(x[:train].mean()), float(x[:train].std())
    return jnp.asarray((x - mean) / scale), mean, scale


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


# --- Linear models: least squares and gradient descent ---


@partial(jax.jit, static_argnames=("order", "largest"))
def criterion(x: Series, *, order: int, largest: int) -> Float[Array, ""]:
    """Akaike's criterion log σ² + 2 (τ + 1) / N, for every τ on the same N years, those after the first `largest`."""
    variance = autoregressive.fit(x[largest - order :], order).variance
    return jnp.log(variance) + 2 * (order + 1) / (len(x) - largest)


def by_windows(x: Series, order: int) -> Float[np.ndarray, " order+1"]:
    """Return (a_1, ..., a_τ, b) by least squares on an explicit matrix of lags, which `fit` does not build."""
    lags, targets = autoregressive.lagged(np.asarray(x), order)
    latest_first = np.column_stack([lags[:, ::-1], np.ones(len(targets))])
    return np.linalg.lstsq(latest_first, targets, rcond=None)[0]


@partial(jax.jit, static_argnames=("order", "steps"))
def by_descent(x: Series, *, order: int, steps: int = DESCENT) -> Float[Array, " order+1"]:
    """Return (a_1, ..., a_τ, b), fitted as kernel and bias of a convolution by gradient descent from zero."""

    def loss(params: jaxseq.ConvParams) -> jax.Array:
        predicted = jaxseq.conv(x[:-1, None], *params)[:, 0]  # padding "VALID"
        return jnp.mean((predicted - x[order:]) ** 2)

    # Half the Hessian is the mean of w_t w_tᵀ with w_t = (x_{t-τ}, ..., x_{t-1}, 1). Its trace, about τ + 1 for
    # a series of variance 1, bounds its largest eigenvalue λ. Descent converges for a learning rate below 1 / λ.
    optimizer = optax.sgd(1 / (order + 1))

    def step(state: Any, _: None) -> tuple[Any, None]:
        params, inner = state
        updates, inner = optimizer.update(jax.grad(loss)(params), inner)
        return (optax.apply_updates(params, updates), inner), None

    params: Any = jaxseq.ConvParams(jnp.zeros((order, 1, 1), x.dtype), jnp.zeros(1, x.dtype))
    (params, _), _ = lax.scan(step, (params, optimizer.init(params)), None, steps)
    return jnp.concatenate([params.kernel[::-1, 0, 0], params.bias])


# --- Latent autoregressive model ---


class Latent(NamedTuple):
    """Parameters of the recurrence, and of the linear readout of x̂ and log σ."""

    gru: jaxseq.GRUParams
    W: Float[Array, "H 2"]
    b: Float[Array, " 2"]


def predict(model: Latent, x: Series) -> Forecast:
    """Return x̂ and log σ of each year. The readout predicts the change; the initial model repeats the previous year."""
    _, hs = autoregressive.latent(jaxseq.gru, model.gru, None, x[:, None])
    change, log_sigma = (hs @ model.W + model.b).T
    return autoregressive.shifted(x) + change, log_sigma


def density(x: Series, forecast: Forecast) -> Series:
    """Return log P(x_t | x_<t) of each year."""
    return autoregressive.log_normal(x[:, None], *(a[:, None] for a in forecast))


@partial(jax.jit, static_argnames="steps")
def learn(key: PRNGKeyArray, x: Series, *, steps: int) -> tuple[Latent, Int[Array, ""]]:
    """Train a GRU with early stopping. Return the model with the best validation likelihood, and its step."""
    optimizer = optax.adam(LEARNING_RATE)
    gru = jaxseq.gru_init(key, 1, HIDDEN, dtype=x.dtype)
    model: Any = Latent(gru, jnp.zeros((HIDDEN, 2), x.dtype), jnp.zeros(2, x.dtype))

    def cost(model: Latent) -> tuple[jax.Array, jax.Array]:
        steps = density(x, predict(model, x))
        training, validation = steps[:-VALIDATION], steps[-VALIDATION:]
        return -autoregressive.log_likelihood(training) / len(training), -autoregressive.log_likelihood(validation)

    def step(state: Any, n: Int[Array, ""]) -> tuple[Any, None]:
        model, inner, *best = state  # best: validation cost, model, step
        (_, validation), gradient = jax.value_and_grad(cost, has_aux=True)(model)
        best = jax.tree.map(partial(jnp.where, validation < best[0]), [validation, model, n], best)
        updates, inner = optimizer.update(gradient, inner)
        return (optax.apply_updates(model, updates), inner, *best), None

    first = (model, optimizer.init(model), jnp.full((), jnp.inf, x.dtype), model, jnp.zeros((), int))
    return lax.scan(step, first, jnp.arange(steps))[0][-2:]


# --- Plot ---


def draw(years: np.ndarray, x: np.ndarray, predicted: Any, ahead: Any, errors: Any, kernels: Any) -> Figure:
    """Plot the series, the predictions of the held-out part, the errors, and the coefficients."""
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    panels = list(figure.subplot_mosaic("AA;BB;CD", height_ratios=(1, 1.2, 1)).values())
    series, unseen, bars, kernel = panels
    later, order = years[years > LAST], len(kernels[0])
    lags = np.arange(1, order + 1)
    linear, recurrent = f"linear, last {order} years (AR)", f"mean of {MODELS} GRUs"
    names = "previous year", f"{linear},\nleast squares", f"{linear},\nas a convolution", recurrent

    series.plot(years, x, color="black", linewidth=0.9)
    series.plot(later, ahead, color="C0", linestyle="--", label=f"linear forecast (AR) from {LAST} on")
    series.axvspan(LAST + 0.5, years[-1], color="C1", alpha=0.12, linewidth=0, label="held out")
    series.set_title("Yearly sunspot numbers", loc="left")
    unseen.plot(later, x[years > LAST], "o-", color="black", linewidth=0.9, markersize=3.5, label="observed")
    for colour, name, x_hat in zip(("C0", "C3"), (linear, recurrent), predicted, strict=True):
        unseen.plot(later, x_hat, color=colour, linewidth=1.5, alpha=0.85, label=name)
    unseen.set_title("Held out: predicted one year ahead", loc="left")
    for axes, first in ((series, years[0]), (unseen, later[0])):
        axes.set(xlim=(first - 1, years[-1] + 1), ylim=(0, None), ylabel="sunspot number", xlabel="year")

    labels = bars.barh(names, list(errors.values()), color=("gray", "C0", "C0", "C3"), height=0.6)
    bars.bar_label(labels, fmt="%.1f", padding=3)
    bars.set(xlabel="error (sunspot number)", xlim=(0, 1.12 * max(errors.values())))
    bars.invert_yaxis()
    bars.set_title("Held out: root mean square error", loc="left")
    kernel.axhline(0, color="black", linewidth=0.8)
    kernel.bar(lags, kernels[0], color="C0", alpha=0.45, width=0.6, label="least squares")
    kernel.plot(lags, kernels[1], "x", color="black", label="convolution, gradient descent")
    kernel.set(xlabel="lag $j$ (years)", ylabel="coefficient $a_j$", xticks=lags)
    kernel.set_title("Linear model: weight of the year $j$ years before", loc="left")
    for axes in (series, unseen):  # next to the title, to not cover the curves
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=3, frameon=False, fontsize=9)
    kernel.legend(frameon=False)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# --- Main program ---


def run(seed: int, steps: int, out: Path) -> None:
    """Select the order, fit, train, and evaluate once."""
    started = time.perf_counter()
    years, x = numbers()
    train = int((years <= LAST).sum())
    z, mean, scale = scaled(x, train)
    past, unseen = z[:train], slice(train, None)
    print(f"{train} training years, {years[0]} to {LAST}; {len(x) - train} held out")

    order = min(range(1, LARGEST + 1), key=lambda order: float(criterion(past, order=order, largest=LARGEST)))
    model = autoregressive.fit(past, order)
    fitted, learnt = np.append(model.coefficients, model.intercept), np.asarray(by_descent(past, order=order))
    difference = np.abs(fitted - by_windows(past, order)).max()
    print(f"AR: order {order} by Akaike's criterion; largest difference to explicit least squares {difference:.1e}")
    if not difference <= TOLERANCE:  # also true for NaN
        raise ArithmeticError(f"`fit` does not match least squares: the coefficients differ by {difference:.1e}")
    print(f"convolution: largest difference to `fit` after {DESCENT} steps is {np.abs(fitted - learnt).max():.1e}")
    descended = model._replace(coefficients=jnp.asarray(learnt[:-1]), intercept=jnp.asarray(learnt[-1]))

    keys = jax.random.split(jax.random.key(seed), MODELS)
    latents, stops = jax.vmap(partial(learn, steps=steps), (0, None))(keys, past)
    print(f"GRU: best step of {steps} for the years {LAST - VALIDATION + 1} to {LAST}: {stops.tolist()}")

    def constant(x_hat: Series, variance: Any) -> Forecast:
        return x_hat[None], jnp.full((1, len(z)), jnp.log(variance) / 2)

    naive, ar = autoregressive.shifted(z), f"AR({order})"
    forecasts = {
        "naive": constant(naive, jnp.mean((past - naive[:train])[1:] ** 2)),
        f"{ar}, least squares": constant(autoregressive.predict(model, z), model.variance),
        f"{ar}, convolution": constant(autoregressive.predict(descended, z), model.variance),
        f"GRU, {MODELS} mixed": jax.vmap(predict, (0, None))(latents, z),
    }
    errors, predicted = {}, {}
    print("\nheld out                RMSE   log P per year, nats")
    for name, forecast in forecasts.items():
        x_hat = predicted[name] = mean + scale * np.asarray(forecast[0].mean(0))[unseen]
        errors[name] = rmse(x_hat, x[unseen])
        if not math.isfinite(errors[name]):
            raise FloatingPointError(f"the predictions of {name} are not finite")
        each = [rmse(mean + scale * np.asarray(one)[unseen], x[unseen]) for one in forecast[0]]
        mixed = jax.nn.logsumexp(jax.vmap(density, (None, 0))(z, forecast), 0) - math.log(len(each))
        nats = float(autoregressive.log_likelihood(mixed[unseen])) / len(x_hat) - math.log(scale)
        spread = f"   (single models: RMSE {min(each):.1f} to {max(each):.1f})" if len(each) > 1 else ""
        print(f"{name:20} {errors[name]:7.2f} {nats:9.3f}{spread}")

    ahead = mean + scale * np.asarray(autoregressive.forecast(model, past, len(x) - train))
    early, late = rmse(ahead[:11], x[unseen][:11]), rmse(ahead, x[unseen])
    print(f"\n{ar} forecast from {LAST}: RMSE {early:.1f} over 11 years, {late:.1f} over all years")
    shown = list(predicted.values())[1::2]
    figure = draw(years, x, shown, ahead, errors, (fitted[:-1], learnt[:-1]))
    figure.savefig(out, dpi=110, format="png", bbox_inches="tight")
    print(f"{out}; {time.perf_counter() - started:.0f} s including compilation")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("sunspots.py", description="Forecast sunspots. Defaults are in brackets.")
    parser.add_argument("--steps", type=int, default=300, help="maximal training steps of the GRU [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/sunspots.png"), metavar="FILE", help="[%(default)s]")
    options = parser.parse_args(argv)
    if options.steps < 1 or not 0 <= options.seed < 2**31:
        parser.error("expected --steps >= 1 and --seed from 0 to 2**31 - 1")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("ab").close()  # detect an unwritable path before training
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror}")
    try:
        with jax.enable_x64(True):  # the series is short, so float64 is cheap
            run(options.seed, options.steps, options.out)
    except ArithmeticError as error:
        print(f"sunspots.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
