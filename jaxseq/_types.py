"""Types of annotations, and the public containers that more than one part of the library uses.

Parameters and states are here because the reference implementations import no op. Results of `jaxseq.autoregressive`
and `jaxseq.diagnostics` are here because `import jaxseq` registers them with `jax.export`, but does not import these
modules.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

# --- Types of annotations ---

# The arrays that public functions accept, as in `Float[AnyArray, "*batch D"]`. Unlike `jax.typing.ArrayLike` this
# excludes Python numbers. Not shown in annotations: public functions also convert objects with `__jax_array__`, and
# mappings passed as parameters.
AnyArray = jax.Array | np.ndarray

# The results of NumPy functions. For zero-dimensional arrays these are scalars, which the type stubs declare as arrays.
if TYPE_CHECKING:
    ArrayOrScalar = np.ndarray
else:
    ArrayOrScalar = np.ndarray | np.generic


# --- Parameters and states ---


class ConvParams(NamedTuple):
    """Parameters of a convolution, in the order of the arguments of `conv`: `conv(x, *params)`."""

    kernel: Inexact[Array, "*kernel_size c_in_per_group c_out"]
    bias: Inexact[Array, " c_out"] | None


class SeparableConvParams(NamedTuple):
    """Parameters of a separable convolution, in the order of the arguments: `separable_conv(x, *params)`."""

    depthwise: Inexact[Array, "*kernel_size 1 c_middle"]
    pointwise: Inexact[Array, "*ones c_middle c_out"]
    bias: Inexact[Array, " c_out"] | None


class RNNParams(NamedTuple):
    """Parameters of an Elman network with input size D and hidden size H."""

    w_x: Float[Array, "D H"]
    w_h: Float[Array, "H H"]
    b: Float[Array, " H"] | None


class GRUParams(NamedTuple):
    """Parameters of a GRU with input size D and hidden size H, gates in the order r, z, n."""

    w_x: Float[Array, "D 3*H"]
    w_h: Float[Array, "H 3*H"]
    b_x: Float[Array, " 3*H"] | None
    b_h: Float[Array, " 3*H"] | None


class LSTMParams(NamedTuple):
    """Parameters of an LSTM with input size D and hidden size H, gates in the order i, f, g, o."""

    w_x: Float[Array, "D 4*H"]
    w_h: Float[Array, "H 4*H"]
    b: Float[Array, " 4*H"] | None


class LSTMState(NamedTuple):
    """State of an LSTM: the output h and the memory c."""

    h: Float[Array, "*batch H"]
    c: Float[Array, "*batch H"]


# --- Parameters and states of `jaxseq.cells` ---


class ClassicGRUParams(NamedTuple):
    """Parameters of a classic GRU. `w_x` and `b` have the gates r, z, n; `w_h` has r, z; `w_q` belongs to n."""

    w_x: Float[Array, "D 3*H"]
    w_h: Float[Array, "H 2*H"]
    b: Float[Array, " 3*H"] | None
    w_q: Float[Array, "H H"]


class IndRNNParams(NamedTuple):
    """Parameters of an independently recurrent network with input size D and hidden size H."""

    w_x: Float[Array, "D H"]
    w_h: Float[Array, "1 H"]
    b: Float[Array, " H"] | None


class LayerNormLSTMParams(NamedTuple):
    """Parameters of a layer-normalized LSTM: maps without bias, gains and shifts of the gates and of the memory."""

    w_x: Float[Array, "D 4*H"]
    w_h: Float[Array, "H 4*H"]
    gain_x: Float[Array, " 4*H"]
    gain_h: Float[Array, " 4*H"]
    shift: Float[Array, " 4*H"]
    gain_c: Float[Array, " H"]
    shift_c: Float[Array, " H"]


class LayerNormGRUParams(NamedTuple):
    """Parameters of a layer-normalized GRU: maps without bias, gains and shifts of the outputs of both maps."""

    w_x: Float[Array, "D 3*H"]
    w_h: Float[Array, "H 3*H"]
    gain_x: Float[Array, " 3*H"]
    gain_h: Float[Array, " 3*H"]
    shift_x: Float[Array, " 3*H"]
    shift_h: Float[Array, " 3*H"]


class MGUParams(NamedTuple):
    """Parameters of a minimal gated unit with input size D and hidden size H, gates in the order f, n."""

    w_x: Float[Array, "D 2*H"]
    w_h: Float[Array, "H 2*H"]
    b_x: Float[Array, " 2*H"] | None
    b_h: Float[Array, " 2*H"] | None


class PeepholeLSTMParams(NamedTuple):
    """Parameters of an LSTM with peepholes: those of `jaxseq.LSTMParams`, and the weights p_i, p_f and p_o."""

    w_x: Float[Array, "D 4*H"]
    w_h: Float[Array, "H 4*H"]
    b: Float[Array, " 4*H"] | None
    p_i: Float[Array, " H"]
    p_f: Float[Array, " H"]
    p_o: Float[Array, " H"]


class ProjectedLSTMParams(NamedTuple):
    """Parameters of an LSTM with input size D, hidden size H and projection size P."""

    w_x: Float[Array, "D 4*H"]
    w_h: Float[Array, "P 4*H"]
    b: Float[Array, " 4*H"] | None
    w_q: Float[Array, "H P"]


class SLSTMParams(NamedTuple):
    """Parameters of an sLSTM with N heads, gates in the order i, f, z, o."""

    w_x: Float[Array, "D 4*H"]
    w_h: Float[Array, "N H/N 4 H/N"]
    b: Float[Array, " 4*H"] | None


class SLSTMState(NamedTuple):
    """State of an sLSTM: the output h, the memory c, its normalizer n >= 0, and the stabilizer m of both."""

    h: Float[Array, "*batch H"]
    c: Float[Array, "*batch H"]
    n: Float[Array, "*batch H"]
    m: Float[Array, "*batch H"]


class QRNNParams(NamedTuple):
    """Parameters of a QRNN with K taps, gates in the order z, f, o."""

    kernel: Float[Array, "K D 3*H"]
    bias: Float[Array, " 3*H"] | None


class QRNNState(NamedTuple):
    """State of a QRNN with K taps: the last K - 1 inputs, the latest last, and the state of its recurrence."""

    past: Float[Array, "*batch P D"]
    c: Float[Array, "*batch H"]


class MLSTMParams(NamedTuple):
    """Parameters of an mLSTM with N heads: queries, keys and values, and the input, forget and output gates."""

    w_q: Float[Array, "D N K"]
    w_k: Float[Array, "D N K"]
    w_v: Float[Array, "D N V"]
    w_i: Float[Array, "D N"]
    w_f: Float[Array, "D N"]
    w_o: Float[Array, "D N V"]
    b_i: Float[Array, " N"] | None
    b_f: Float[Array, " N"] | None
    b_o: Float[Array, "N V"] | None


class MLSTMState(NamedTuple):
    """State of an mLSTM: the memory c, its normalizer n, and the stabilizer m of both."""

    c: Float[Array, "*batch N K V"]
    n: Float[Array, "*batch N K"]
    m: Float[Array, "*batch N"]


class MinGRUParams(NamedTuple):
    """Parameters of a minGRU with input size D and hidden size H, gates in the order z, n."""

    w_x: Float[Array, "D 2*H"]
    b: Float[Array, " 2*H"] | None


class MinLSTMParams(NamedTuple):
    """Parameters of a minLSTM with input size D and hidden size H, gates in the order f, i, n."""

    w_x: Float[Array, "D 3*H"]
    b: Float[Array, " 3*H"] | None


class LRUParams(NamedTuple):
    """Parameters of an LRU with D features and H complex states. Real and imaginary parts are blocks of w_x and w_y."""

    nu: Float[Array, " H"]
    theta: Float[Array, " H"]
    gamma: Float[Array, " H"]
    w_x: Float[Array, "D 2*H"]
    w_y: Float[Array, "2*H D"]
    skip: Float[Array, " D"] | None


class S5Params(NamedTuple):
    """Parameters of an S5 layer with D features and H complex states, one of each conjugate pair."""

    real: Float[Array, " H"]
    imag: Float[Array, " H"]
    log_step: Float[Array, " H"]
    w_x: Float[Array, "D 2*H"]
    w_y: Float[Array, "2*H D"]
    skip: Float[Array, " D"] | None


class RGLRUParams(NamedTuple):
    """Parameters of an RG-LRU with D features and N blocks, gates in the order r, i."""

    rate: Float[Array, " D"]
    w_x: Float[Array, "N D/N 2 D/N"]
    b: Float[Array, " 2*D"] | None


class SelectiveSSMParams(NamedTuple):
    """Parameters of a selective state space model with D features, N states for each, and step sizes of rank R."""

    w_step: Float[Array, "D R"]
    w_up: Float[Array, "R D"]
    b: Float[Array, " D"]
    w_in: Float[Array, "D N"]
    w_out: Float[Array, "D N"]
    log_rate: Float[Array, "D N"]
    skip: Float[Array, " D"] | None


# --- Results ---


class Linear(NamedTuple):
    """A linear AR(τ) model of one variable, or of K variables.

    Attributes:
        coefficients: `(τ,)`, a_1 to a_τ: the coefficient of the most recent value first. For K variables `(τ, K, K)`:
            x_{t-j} is multiplied from the right by A_j.
        intercept: `()`, b, or `(K,)`.
        variance: `()`, the mean squared residual of the fit, or the covariance `(K, K)` of the residuals.
    """

    coefficients: Float[Array, "order *variables"]
    intercept: Float[Array, "*variable"]
    variance: Float[Array, "*variables"]


class JacobianProducts(NamedTuple):
    r"""Singular values of the products $P_l = \partial s_T / \partial s_{T-l}$.

    Attributes:
        lags: `(L,)`, the lags l.
        singular_values: `(L, k)`, the singular values of each product in descending order. The first is the spectral
            norm $\lVert P_l \rVert_2$.
    """

    lags: Int[Array, " L"]
    singular_values: Float[Array, "L k"]

    @property
    def norms(self) -> Float[Array, " L"]:
        """Spectral norms `(L,)`: the largest factor by which a gradient can grow over each lag."""
        return self.singular_values[:, 0]


class Lyapunov(NamedTuple):
    """Lyapunov exponents.

    Attributes:
        exponents: `(k,)`, in descending order, in units of 1 / dt.
        history: `(steps / every, k)`, the running estimates, which show whether the exponents have converged.
        final: the state after the last step.
    """

    exponents: Float[Array, " k"]
    history: Float[Array, "n k"]
    final: PyTree[Array]


class ParallelReport(NamedTuple):
    """How the iterations of `jaxseq.parallel` ended, for each example of the batch.

    Attributes:
        iterations: `(*batch,)`, the number of iterations.
        residual: `(*batch,)`, the largest difference between a state and the step from the state before it, relative to
            the largest element of the states.
        converged: `(*batch,)`, True if the residual is within the tolerance. Otherwise, the states are NaN.
    """

    iterations: Int[Array, "*batch"]
    residual: Float[Array, "*batch"]
    converged: Bool[Array, "*batch"]


class TruncationBias(NamedTuple):
    r"""Errors of the truncated gradient for several windows.

    Attributes:
        windows: `(W,)`, the windows k.
        relative_error: `(W,)`, $\lVert g_k - g \rVert / \lVert g \rVert$ over all parameters.
        cosine: `(W,)`, the cosine of the angle between $g_k$ and g.
    """

    windows: Int[Array, " W"]
    relative_error: Float[Array, " W"]
    cosine: Float[Array, " W"]
