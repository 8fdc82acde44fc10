"""Any cell through time: `recurrence`, and one step of it."""

from typing import Any, Unpack

from jaxtyping import Array, Float

from jaxseq import _checks, _recurrence, linear_maps
from jaxseq._op import op
from jaxseq._recurrence import Cell
from jaxseq._time_options import TimeOptions
from jaxseq._types import AnyArray


@op
def recurrence(
    cell: Cell,
    params: Any,
    carry: Any | None,
    xs: Float[AnyArray, "*time_batch_and_space D"],
    **time: Unpack[TimeOptions],
) -> tuple[Any, Float[Array, "*time_batch_and_outputs H"]]:
    r"""Any cell over a sequence: the user's own, or one of `jaxseq.cells`.

    $$u_t = L_x(x_t) + b_x, \qquad r_t = L_h(h_{t-1}) + b_h, \qquad
    s_t = \varphi(u_t, r_t, s_{t-1}), \qquad y_t = h_t$$

    with the linear maps $L$ and the step $\varphi$ of the cell, and $h$ the first leaf of its state $s$. The gradient
    of the maps is derived by hand, that of the step by hand or by JAX, as the cell has it: weights are contracted
    outside of the loop in either case, and every option of time is on the fast path.

    Args:
        cell: the equations of one step and the maps around it, a `jaxseq.Cell`. Static under jit: make it once.
        params: the cell's parameters, a `cell.params`.
        carry: the first state, a `cell.state` or the array h alone, each leaf `(*batch, H)`, or None for zeros.
        xs: the sequence `(T, *batch, D)`; behind a convolution `(T, *batch, *space, C)`.
        **time: time options, `jaxseq.TimeOptions`.

    Returns:
        `(carry, ys)`: the last state in the dtypes of `carry` (None: float32 at least), and h of every step in the
            dtype of `xs`.

    Raises:
        TypeError: no cell, parameters of another one, an array that is not of floats, an option of the wrong kind.
        ValueError: a rank or size that does not fit; a step or a pullback that returns another structure, shape or
            dtype than it should: the message names the cell and the part.

    Example:
        >>> from typing import NamedTuple
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> class LeakyParams(NamedTuple):
        ...     w_x: jax.Array
        ...     w_h: jax.Array
        ...     b: jax.Array
        ...     rate: jax.Array  # of each unit
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
    return _recurrence.sequence(_cell(cell), params, carry, xs, **time)


@op
def recurrence_cell(
    cell: Cell, params: Any, carry: Any | None, x: Float[AnyArray, "*batch_and_space D"], *, precision: Any = None
) -> tuple[Any, Float[Array, "*batch_and_outputs H"]]:
    """One step of `recurrence`: `partial(recurrence_cell, cell, params)` is a body for `jax.lax.scan`.

    Args:
        cell: the equations of one step and the maps around it, a `jaxseq.Cell`.
        params: the cell's parameters, a `cell.params`.
        carry: the previous state, a `cell.state` or the array h alone, each leaf `(*batch, H)`, or None for zeros.
            The new state has its dtype: one in bfloat16 is rounded at every step. From None it is in float32 at least.
        x: one input `(*batch, D)`.
        precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
        `(carry, y)`: the new state, and its h.

    Raises:
        TypeError: no cell, parameters of another one, an array that is not of floats.
        ValueError: a rank or size that does not fit; a step or a pullback that returns another structure.

    Example:
        >>> import jax, jax.numpy as jnp, jaxseq
        >>> params = jaxseq.cells.mgu_init(jax.random.key(0), 3, 5)
        >>> h, y = jaxseq.recurrence_cell(jaxseq.cells.mgu, params, None, jnp.ones((2, 3)))
        >>> y.shape
        (2, 5)

    Reference:
        P. J. Werbos, Backpropagation through time: what it does and how to do it (1990).
    """
    return _recurrence.one_step(_cell(cell), params, carry, x, precision=precision)


def _cell(cell: Any) -> Cell:
    """A cell that hangs together; what its functions return is looked at when they are traced."""
    if not isinstance(cell, Cell):
        _checks.bad_type("cell", "a jaxseq.Cell", _checks.describe(cell))
    gates, split_gates, input_only_gates = cell.gates, cell.split_gates, cell.input_only_gates
    if not isinstance(gates, str) or not gates or len(set(gates)) < len(gates):
        _checks.bad_value(f"{cell.name}.gates", "a letter for each gate, each another", repr(gates))
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
        expected = "a NamedTuple with the fields w_x and w_h, and b or else b_x and b_h"
        _checks.bad_value(f"{cell.name}.params", expected, f"{cell.params.__name__}({', '.join(fields)})")
    if cell.state is not None and not getattr(cell.state, "_fields", ()):
        _checks.bad_type(f"{cell.name}.state", "a NamedTuple, h first, or None", _checks.describe(cell.state))
    for name in ("input", "recurrent"):
        if not isinstance(getattr(cell, name), linear_maps.LinearMap):
            _checks.bad_type(f"{cell.name}.{name}", "one of jaxseq.linear_maps", _checks.describe(getattr(cell, name)))
    return cell
