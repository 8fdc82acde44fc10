"""`recurrence` and `recurrence_cell`: the recurrence of any `jaxseq.Cell`."""

from typing import Unpack

from jax.lax import PrecisionLike
from jaxtyping import Array, Float, PyTree

from jaxseq import _checks, _recurrence, linear_maps
from jaxseq._op import op
from jaxseq._recurrence import Cell, LinearCell, check_linear_cell
from jaxseq._time_options import TimeOptions
from jaxseq._types import AnyArray


@op
def recurrence(
    cell: Cell | LinearCell,
    params: PyTree,
    carry: PyTree | None,
    xs: Float[AnyArray, "*time_batch_and_space D"] | tuple[PyTree, PyTree],
    **time: Unpack[TimeOptions],
) -> tuple[PyTree, Float[Array, "*time_batch_and_outputs H"]]:
    r"""Apply a cell to a sequence: a user-defined cell, or one of `jaxseq.cells`.

    $$u_t = L_x(x_t) + b_x, \qquad r_t = L_h(h_{t-1}) + b_h, \qquad
    s_t = \varphi(u_t, r_t, s_{t-1}), \qquad y_t = h_t$$

    where $L$ are the linear maps and $\varphi$ the step of the cell, and $h$ is the first leaf of its state $s$. The
    gradient of the maps is hand-derived. JAX differentiates the step, unless the cell has a hand-derived pullback. In
    both cases the gradients of the weights are computed outside the loop, and all time options are supported. A
    `jaxseq.LinearCell` has no recurrent map: it is a linear recurrence between functions of the input.

    Args:
        cell: the equations of one step and the maps around it, a `jaxseq.Cell` or a `jaxseq.LinearCell`. It is static
            under jit: create it once.
        params: the parameters of the cell, a `cell.params`.
        carry: the initial state, a `cell.state` or the array h, each leaf `(*batch, H)`, or None for zeros.
        xs: the sequence `(T, *batch, D)`, or `(T, *batch, *space, C)` if the input map is a convolution. For a cell
            with `side_inputs=True`, the pair of this sequence and a pytree of arrays `(T, *batch, ...)` of any dtypes,
            which reach the step as they are. Gradients flow to those that are floats.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carry, ys)`: the final state in the dtypes of `carry` (at least float32 for None), and h of all steps, or the
            outputs of a linear cell, in the dtype of `xs`.

    Raises:
        TypeError: if `cell` is not a Cell, `params` belongs to another cell, an array is not a float array, or an
            option has the wrong type.
        ValueError: if a rank or size does not match, an option is out of range, or the step or pullback returns an
            unexpected structure, shape or dtype. The message names the cell and the function.

    Example:
        >>> from typing import NamedTuple
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> class LeakyParams(NamedTuple):
        ...     w_x: jax.Array
        ...     w_h: jax.Array
        ...     b: jax.Array
        ...     rate: jax.Array  # one per unit
        >>> def step(a, h, p):
        ...     return (1 - p.rate) * h + p.rate * jnp.tanh(a[0])
        >>> leaky = jaxseq.Cell("leaky", gates="h", step=step, params=LeakyParams)
        >>> params = LeakyParams(*jaxseq.rnn_init(jax.random.key(0), 3, 5), rate=jnp.full(5, 0.1))
        >>> h, ys = jaxseq.recurrence(leaky, params, None, jnp.ones((7, 2, 3)), truncation=4)
        >>> ys.shape
        (7, 2, 5)

    Reference:
        P. J. Werbos, Backpropagation through time: what it does and how to do it (1990).
    """
    return _recurrence.sequence(checked_cell(cell), params, carry, xs, **time)


@op
def recurrence_cell(
    cell: Cell | LinearCell,
    params: PyTree,
    carry: PyTree | None,
    x: Float[AnyArray, "*batch_and_space D"] | tuple[PyTree, PyTree],
    *,
    precision: PrecisionLike = None,
) -> tuple[PyTree, Float[Array, "*batch_and_outputs H"]]:
    """Apply one step of `recurrence`. `partial(recurrence_cell, cell, params)` is a body for `jax.lax.scan`.

    Args:
        cell: the equations of one step and the maps around it, a `jaxseq.Cell` or a `jaxseq.LinearCell`.
        params: the parameters of the cell, a `cell.params`.
        carry: the previous state, a `cell.state` or the array h, each leaf `(*batch, H)`, or None for zeros.
            The new state has the dtype of `carry` (at least float32 for None). In bfloat16 it is rounded at every step.
        x: one input `(*batch, D)`, or the pair of it and the side inputs of the step.
        precision: the precision of matrix products, as in `jax.lax.dot_general`.

    Returns:
        `(carry, y)`: the new state, and its h or the output of a linear cell.

    Raises:
        TypeError: if `cell` is not a Cell, `params` belongs to another cell, or an array is not a float array.
        ValueError: if a rank or size does not match, or the step or pullback returns an unexpected structure.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.mgu_init(jax.random.key(0), 3, 5)
        >>> h, y = jaxseq.recurrence_cell(jaxseq.cells.mgu, params, None, jnp.ones((2, 3)))
        >>> y.shape
        (2, 5)

    Reference:
        P. J. Werbos, Backpropagation through time: what it does and how to do it (1990).
    """
    return _recurrence.one_step(checked_cell(cell), params, carry, x, precision=precision)


def checked_cell(cell: object) -> Cell | LinearCell:
    """Return `cell` if its fields are consistent. The results of its functions are checked when they are traced."""
    if isinstance(cell, LinearCell):
        return check_linear_cell(cell)
    if not isinstance(cell, Cell):
        hint = ", such as jaxseq.cells.gru; `jaxseq.scan` runs a step function" if callable(cell) else ""
        _checks.bad_type("cell", "a jaxseq.Cell" + hint, _checks.describe(cell))
    gates, split_gates, input_only_gates = cell.gates, cell.split_gates, cell.input_only_gates
    if not isinstance(gates, str) or not gates or len(set(gates)) < len(gates):
        _checks.bad_value(f"{cell.name}.gates", "a distinct letter for each gate", repr(gates))
    if not set(split_gates) <= set(gates) - set(input_only_gates):
        _checks.bad_value(
            f"{cell.name}.split_gates", f"some of the gates {gates!r} that are not input-only", repr(split_gates)
        )
    if not gates.endswith(input_only_gates) or input_only_gates == gates:
        _checks.bad_value(
            f"{cell.name}.input_only_gates", f"the last of the gates {gates!r}, not all of them", repr(input_only_gates)
        )
    fields = getattr(cell.params, "_fields", ())
    if not {"w_x", "w_h"} <= set(fields) or ("b" in fields and {"b_x", "b_h"} & set(fields)):
        expected = "a NamedTuple with the fields w_x and w_h, and either b or b_x and b_h"
        _checks.bad_value(f"{cell.name}.params", expected, f"{cell.params.__name__}({', '.join(fields)})")
    if cell.state is not None and not getattr(cell.state, "_fields", ()):
        _checks.bad_type(
            f"{cell.name}.state", "a NamedTuple whose first field is h, or None", _checks.describe(cell.state)
        )
    _checks.boolean(f"{cell.name}.side_inputs", cell.side_inputs)
    for name in ("input", "recurrent"):
        if not isinstance(getattr(cell, name), linear_maps.LinearMap):
            _checks.bad_type(
                f"{cell.name}.{name}", "a linear map from jaxseq.linear_maps", _checks.describe(getattr(cell, name))
            )
    return cell
