r"""Where gradients vanish, or explode: how a recurrence hands them from step to step.

Any step function `(state, x) -> (state, y)`, any loss. With J_t = ∂s_t/∂s_{t-1}, the gradient of a loss L flows as

    ∂L/∂s_{t-1} = J_tᵀ ∂L/∂s_t + what y_t says             `state_cotangents`: how much arrives at each step
    ∂s_T/∂s_{T-l} = J_T J_{T-1} ... J_{T-l+1}              `jacobian_products`: what l steps do to it, whatever the loss
    λ_i = lim 1/t log σ_i(J_t ... J_1)                     `lyapunov`: the rate at which they do
    |g_k - g| / |g|,  g_k cut every k steps                `truncation_bias`: what a window of k steps loses

and `plot_*` draw each, on the axes of matplotlib.
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
