r"""Diagnostics of vanishing and exploding gradients in recurrences.

They apply to any step function `(state, x) -> (state, y)` and any loss L. With J_t = ∂s_t/∂s_{t-1}:

    ∂L/∂s_{t-1} = J_tᵀ ∂L/∂s_t + (∂y_t/∂s_{t-1})ᵀ ∂L/∂y_t  `state_cotangents`: the gradient at each step
    ∂s_T/∂s_{T-l} = J_T J_{T-1} ... J_{T-l+1}              `jacobian_products`: its growth over l steps, for any loss
    λ_i = lim 1/t log σ_i(J_t ... J_1)                     `lyapunov`: its rate of growth
    |g_k - g| / |g|,  g_k cut every k steps                `truncation_bias`: the error of truncation with windows of k

`plot_norms`, `plot_spectrum` and `plot_bias` plot the results with matplotlib.
"""

from jaxseq.diagnostics._cotangents import norms, state_cotangents
from jaxseq.diagnostics._jacobians import JacobianProducts, jacobian_products
from jaxseq.diagnostics._lyapunov import Lyapunov, lyapunov
from jaxseq.diagnostics._pictures import plot_bias, plot_norms, plot_spectrum
from jaxseq.diagnostics._truncation import TruncationBias, suggest_truncation, truncation_bias

__all__ = [
    "JacobianProducts",
    "Lyapunov",
    "TruncationBias",
    "jacobian_products",
    "lyapunov",
    "norms",
    "plot_bias",
    "plot_norms",
    "plot_spectrum",
    "state_cotangents",
    "suggest_truncation",
    "truncation_bias",
]
