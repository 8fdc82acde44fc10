r"""Autoregressive models: factorize the probability of a sequence by the chain rule.

    P(x_1, ..., x_T) = ∏_t P(x_t | x_<t)                                  `log_likelihood`, `log_probability`

Each factor is conditioned on

    x_{t-τ}, ..., x_{t-1}                   the last τ values: `lagged`, `histories`; linear models: `fit`, `predict`
    h_t = f(h_{t-1}, x_{t-1})               a state that summarizes the past: `latent`, with any recurrence

`sample`, `stream` and `draw` generate sequences from a model, one value at a time.
"""

from jaxseq.autoregressive._latent import latent, shifted
from jaxseq.autoregressive._likelihood import log_likelihood, log_normal, log_probability
from jaxseq.autoregressive._linear import Linear, fit, forecast, predict
from jaxseq.autoregressive._sampling import draw, sample, stream
from jaxseq.autoregressive._windows import histories, lagged

__all__ = [
    "Linear",
    "draw",
    "fit",
    "forecast",
    "histories",
    "lagged",
    "latent",
    "log_likelihood",
    "log_normal",
    "log_probability",
    "predict",
    "sample",
    "shifted",
    "stream",
]
