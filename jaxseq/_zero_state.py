"""`zero_state`: the initial state of a cell or of several layers, where None is not possible.

The carry of `jax.lax.scan` has to have the structure of the state, and so has a buffer of states.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxseq import _checks, _mlstm, _precision, _qrnn, cells
from jaxseq._annotations import check_annotated
from jaxseq._any_cell import checked_cell
from jaxseq._op import with_hints
from jaxseq._recurrence import AnyCell, Cell, LinearCell
from jaxseq._recurrence._arguments import check_params, zero_leaves
from jaxseq._types import MLSTMParams, QRNNParams
from jaxseq.linear_maps import Conv, Dense


@with_hints
def zero_state(
    params: PyTree,
    batch_shape: int | Sequence[int] = (),
    *,
    cell: Cell | LinearCell | Sequence[PyTree] | None = None,
    dtype: DTypeLike | None = None,
) -> PyTree:
    """Return the initial state of zeros: what a carry of None stands for.

    `jax.lax.scan` needs a carry with the structure of the state, where None is not possible. Its dtype is that of the
    parameters; the dtype of None is that of `xs`. Both are float32 at least.

    Args:
        params: the parameters of a cell, of `mlstm` or of `qrnn`, or a list or tuple of the parameters of several
            layers or directions, nested as `stack` and `bidirectional` take them.
        batch_shape: the batch axes, an integer for one. For a convolutional recurrence the spatial axes of the state
            follow, `(*batch, *outputs)`.
        cell: a cell of your own (`jaxseq.Cell` or `jaxseq.LinearCell`). None finds a cell of jaxseq by the type of
            `params`. For several layers, one cell for all of them, or a sequence.
        dtype: floating dtype of the state. None is that of the parameters, float32 at least.

    Returns:
        The state of the cell: an array `(*batch, H)`, or a NamedTuple of such arrays. For several layers, a tuple of
        states.

    Raises:
        TypeError: if `params` belongs to no cell of jaxseq and `cell` is None, or to another cell than `cell`.
        ValueError: if a size is negative, the weights do not match each other, or `cell` has another length than
            `params`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.lstm_init(jax.random.key(0), 3, 5)
        >>> step = lambda carry, x: jaxseq.lstm_cell(params, carry, x)
        >>> (h, c), ys = jax.lax.scan(step, jaxseq.zero_state(params, 2), jnp.ones((7, 2, 3)))
        >>> c.shape, ys.shape
        ((2, 5), (7, 2, 5))
        >>> [state.h.shape for state in jaxseq.zero_state([params, params], 2)]
        [(2, 5), (2, 5)]

    Reference:
        The state before the first step of every recurrence, as in S. Hochreiter and J. Schmidhuber, Long short-term
        memory (1997).
    """
    if not isinstance(batch_shape, int | np.integer | Sequence):
        _checks.bad_type("batch_shape", "an integer or a sequence of integers", _checks.describe(batch_shape))
    sizes = batch_shape if isinstance(batch_shape, Sequence) else (batch_shape,)
    batch = tuple(_checks.integer("batch_shape", size, at_least=0) for size in sizes)
    return _zeros(params, batch, cell, None if dtype is None else _checks.dtype("dtype", dtype))


def _zeros(params: PyTree, batch: tuple[int, ...], cell: PyTree, dtype: np.dtype | None) -> PyTree:
    if isinstance(params, list | tuple) and not hasattr(params, "_fields"):
        of_layers = _cells(cell, len(params))
        return tuple(_zeros(p, batch, c, dtype) for p, c in zip(params, of_layers, strict=True))
    if cell is None and isinstance(params, MLSTMParams | QRNNParams):
        return _zeros_of_layer(params, batch, dtype)
    found = cell_of(params) if cell is None else checked_cell(cell)
    if found is None:
        expected = "the parameters of a cell of jaxseq, or of your own if you pass `cell=`"
        _checks.bad_type("params", expected, _checks.describe(params))
    maps = check_params(found, params)
    leaves = zero_leaves(found, maps, batch, dtype)
    return leaves[0] if found.state is None else found.state(*leaves)


def _zeros_of_layer(params: MLSTMParams | QRNNParams, batch: tuple[int, ...], dtype: np.dtype | None) -> PyTree:
    """Return a state of zeros of a layer that is no cell."""
    if dtype is None:
        dtype = _precision.accumulator(_precision.promote(*jax.tree.leaves(params)))
    if isinstance(params, MLSTMParams):
        state = _mlstm.state_of(check_annotated("params", params, MLSTMParams))
    else:
        state = _qrnn.state_of(check_annotated("params", params, QRNNParams))
    return state.zeros(batch, dtype)


def _cells(cell: PyTree, count: int) -> list[PyTree]:
    """Return the cell of each of `count` layers."""
    if cell is None or isinstance(cell, AnyCell):
        return [cell] * count
    if not isinstance(cell, list | tuple) or len(cell) != count:
        got = f"{len(cell)}" if isinstance(cell, list | tuple) else _checks.describe(cell)
        _checks.bad_value("cell", f"None, a jaxseq.Cell, or a sequence of {count}, one for each layer", got)
    return [*cell]


def cell_of(params: PyTree) -> AnyCell | None:
    """Return the cell of jaxseq with these parameters, with convolutions as maps if the weights are kernels."""
    known = (cell for name in cells.__all__ if isinstance(cell := getattr(cells, name), AnyCell))
    found = next((cell for cell in known if isinstance(params, cell.params)), None)
    if isinstance(found, Cell) and isinstance(found.recurrent, Dense) and jnp.ndim(params.w_h) > 2:
        return found._replace(name=f"conv_{found.name}", input=Conv(), recurrent=Conv())
    return found
