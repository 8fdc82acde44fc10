r"""Sequences as probability: the chain rule as code.

    P(x_1, ..., x_T) = ∏_t P(x_t | x_<t)                                  `log_likelihood`, `log_probability`

and what each factor may look at:

    P(x_t | x_{t-τ}, ..., x_{t-1})          the last τ values: `lagged`, `histories`; linear ones: `fit`, `predict`
    P(x_t | h_t), h_t = f(h_{t-1}, x_{t-1})     a state that sums up all of the past: `latent`, any recurrence

Read the other way it makes sequences, one value after the other: `sample`, `stream`, `draw`.
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
