"""Linear maps y = L(w, x) of a recurrence, each with its two pullbacks.

    to the input     x̄ = Lᵀ(w, ȳ)
    to the weight    w̄ = ȳ ⊗ x

They are the fields `input` and `recurrent` of `jaxseq.Cell`. x has any leading axes N, then the spatial axes of the map
if there are any, then D channels. y has H channels for each of G gates, gate after gate, to which a bias (G H,) is
added.

    Dense          y[N, (g i)]    = sum_d    x[N, d] w[d, (g i)]                     w (D, G H)
    Diagonal       y[N, (g i)]    =          x[N, i] w[g, i]                         w (G, H),  D = H
    BlockDiagonal  y[N, (g n i)]  = sum_d    x[N, (n d)] w[n, d, g, i]               w (n, D / n, G, H / n)
    Conv           y[N, p, (g i)] = sum_k,d  x[N, s p + δ k - lo, d] w[k, d, (g i)]  w (*kernel_size, D, G H)

Their pullbacks, except those of the convolution, which are in `_correlation/`, are

    Dense          x̄[N, d]       = sum_g,i  ȳ[N, (g i)] w[d, (g i)]
                   w̄[d, (g i)]   = sum_N    x[N, d] ȳ[N, (g i)]
    Diagonal       x̄[N, i]       = sum_g    ȳ[N, (g i)] w[g, i]
                   w̄[g, i]       = sum_N    x[N, i] ȳ[N, (g i)]
    BlockDiagonal  x̄[N, (n d)]   = sum_g,i  ȳ[N, (g n i)] w[n, d, g, i]
                   w̄[n, d, g, i] = sum_N    x[N, (n d)] ȳ[N, (g n i)]

Products are returned in the accumulator's dtype.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike

from jaxseq import _correlation, _dense, _geometry, _mesh, _precision
from jaxseq._mesh import Partitioning
from jaxseq.tuning import ConvTuning, used_for_convolutions

__all__ = ["BlockDiagonal", "Conv", "Dense", "Diagonal", "LinearMap"]

Space = tuple[int, ...]


class LinearMap(ABC):
    """Base class of linear maps. Static and hashable: the weights are arguments of its methods."""

    @abstractmethod
    def product(self, precision: PrecisionLike, w: jax.Array, x: jax.Array) -> jax.Array:
        """Return L(w, x)."""

    @abstractmethod
    def pull_input(self, precision: PrecisionLike, w: jax.Array, y_bar: jax.Array, space: Space) -> jax.Array:
        """Return x̄ = Lᵀ(w, ȳ), for an x of the spatial shape `space`."""

    @abstractmethod
    def pull_weight(self, precision: PrecisionLike, x: jax.Array, y_bar: jax.Array, w: jax.Array) -> jax.Array:
        """Return w̄ = ȳ ⊗ x, summed over all leading axes. Only the shape of `w` is used."""

    @abstractmethod
    def shape(self, inputs: int | str, gates: int, outputs: int | str) -> str:
        """Return the shape of a weight from `inputs` channels to `outputs` channels per gate, as text for messages."""

    @abstractmethod
    def channels(self, w: jax.Array, gates: int) -> tuple[int, int] | None:
        """Return (D, H), or None if `w` is not a weight of this map for that number of gates."""

    def apply(self, precision: PrecisionLike, w: jax.Array, b: jax.Array | None, x: jax.Array) -> jax.Array:
        """Return L(w, x) + b."""
        return _dense.add_bias(self.product(precision, w, x), b)

    def pull_in_a_loop(self, precision: PrecisionLike, w: jax.Array, space: Space) -> Callable[[jax.Array], jax.Array]:
        """Return `pull_input` as a function of ȳ. Work that depends on w only is done once, before the loop."""
        return lambda y_bar: self.pull_input(precision, w, y_bar, space)

    def with_partitioning(self, partitioning: Partitioning) -> "LinearMap":
        """Return the map for arrays that the compiler may partition as described, or `self` if that does not matter.

        A recurrence calls this once, for both its forward and its backward pass.
        """
        return self

    def dimensions(self, w: jax.Array) -> int:
        """Return the number of spatial axes of x and y."""
        return 0

    def space(self, w: jax.Array, space: Space) -> Space:
        """Return the spatial shape of y, given that of x."""
        return space

    def space_of(self, w: jax.Array, x: jax.Array) -> Space:
        """Return the spatial shape of x."""
        return x.shape[x.ndim - 1 - self.dimensions(w) : -1]


@dataclass(frozen=True)
class Dense(LinearMap):
    """A dense matrix w (D, G H).

    The sum for w̄ contracts all leading axes at once, without a reshape, so each of them may be sharded. If none can be
    sharded, they are merged into one axis first, which XLA's CPU backend contracts without a transposed copy: 107 ms
    instead of 135 ms for the backward pass of an LSTM at (B, T, D, H) = (64, 128, 256, 256).
    """

    partitioning: Partitioning | None = field(default=None, kw_only=True, repr=False)

    def product(self, precision: PrecisionLike, w: jax.Array, x: jax.Array) -> jax.Array:
        return _dense.contract(precision, x, w, (x.ndim - 1,), (0,))

    def pull_input(self, precision: PrecisionLike, w: jax.Array, y_bar: jax.Array, space: Space) -> jax.Array:
        return _dense.contract(precision, y_bar, w, (y_bar.ndim - 1,), (1,))

    def pull_weight(self, precision: PrecisionLike, x: jax.Array, y_bar: jax.Array, w: jax.Array) -> jax.Array:
        if not _partitioning_of(self, x, y_bar).implicit:
            x, y_bar = (a.reshape(prod(a.shape[:-1]), a.shape[-1]) for a in (x, y_bar))
        leading = tuple(range(x.ndim - 1))
        return _dense.contract(precision, x, y_bar, leading, leading)

    def pull_in_a_loop(self, precision: PrecisionLike, w: jax.Array, space: Space) -> Callable[[jax.Array], jax.Array]:
        # A transposed operand makes each step 1.2 times as slow in XLA's CPU backend: transpose once, before the loop.
        return partial(self.product, precision, lax.optimization_barrier(w.T))

    def with_partitioning(self, partitioning: Partitioning) -> "Dense":
        return replace(self, partitioning=partitioning)

    def shape(self, inputs: int | str, gates: int, outputs: int | str) -> str:
        return f"({inputs}, {_times(gates, outputs)})"

    def channels(self, w: jax.Array, gates: int) -> tuple[int, int] | None:
        return None if w.ndim != 2 or w.shape[1] % gates else (w.shape[0], w.shape[1] // gates)


@dataclass(frozen=True)
class Diagonal(LinearMap):
    """One weight for each channel and gate, w (G, H)."""

    def product(self, precision: PrecisionLike, w: jax.Array, x: jax.Array) -> jax.Array:
        y = _wide(x, w)[..., None, :] * _prepend_axes(_wide(w, x), x.ndim - 1)
        return y.reshape(*x.shape[:-1], w.size)

    def pull_input(self, precision: PrecisionLike, w: jax.Array, y_bar: jax.Array, space: Space) -> jax.Array:
        y_bar = y_bar.reshape(*y_bar.shape[:-1], *w.shape)
        return jnp.sum(_wide(y_bar, w) * _prepend_axes(_wide(w, y_bar), y_bar.ndim - 2), -2)

    def pull_weight(self, precision: PrecisionLike, x: jax.Array, y_bar: jax.Array, w: jax.Array) -> jax.Array:
        y_bar = y_bar.reshape(*y_bar.shape[:-1], *w.shape)
        return jnp.sum(_wide(x, y_bar)[..., None, :] * _wide(y_bar, x), range(x.ndim - 1))

    def shape(self, inputs: int | str, gates: int, outputs: int | str) -> str:
        return f"({gates}, {outputs})"

    def channels(self, w: jax.Array, gates: int) -> tuple[int, int] | None:
        return None if w.ndim != 2 or w.shape[0] != gates else (w.shape[1], w.shape[1])


@dataclass(frozen=True)
class BlockDiagonal(LinearMap):
    """A block-diagonal matrix of n independent heads, w (n, D / n, G, H / n)."""

    def product(self, precision: PrecisionLike, w: jax.Array, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:-1], *w.shape[:2])
        y = _einsum("...nd,ndgi->...gni", x, w, precision)
        return y.reshape(*y.shape[:-3], prod(y.shape[-3:]))

    def pull_input(self, precision: PrecisionLike, w: jax.Array, y_bar: jax.Array, space: Space) -> jax.Array:
        n, _, g, i = w.shape
        x_bar = _einsum("...gni,ndgi->...nd", y_bar.reshape(*y_bar.shape[:-1], g, n, i), w, precision)
        return x_bar.reshape(*x_bar.shape[:-2], prod(x_bar.shape[-2:]))

    def pull_weight(self, precision: PrecisionLike, x: jax.Array, y_bar: jax.Array, w: jax.Array) -> jax.Array:
        n, d, g, i = w.shape
        x, y_bar = x.reshape(*x.shape[:-1], n, d), y_bar.reshape(*y_bar.shape[:-1], g, n, i)
        leading = "stuvwxyz"[: x.ndim - 2]  # contracted without a reshape: each of them may be sharded
        return _einsum(f"{leading}nd,{leading}gni->ndgi", x, y_bar, precision)

    def shape(self, inputs: int | str, gates: int, outputs: int | str) -> str:
        return f"(n, {inputs} / n, {gates}, {outputs} / n)"

    def channels(self, w: jax.Array, gates: int) -> tuple[int, int] | None:
        return None if w.ndim != 4 or w.shape[2] != gates else (w.shape[0] * w.shape[1], w.shape[0] * w.shape[3])


@dataclass(frozen=True)
class Conv(LinearMap):
    """A convolution over 1, 2 or 3 spatial axes, w (*kernel_size, D, G H), with the options of `jaxseq.conv`."""

    stride: int | tuple[int, ...] = 1
    padding: str | int | tuple[tuple[int, int], ...] = "SAME"
    dilation: int | tuple[int, ...] = 1
    partitioning: Partitioning | None = field(default=None, kw_only=True, repr=False)
    tuning: ConvTuning | None = field(default=None, kw_only=True, repr=False)

    def product(self, precision: PrecisionLike, w: jax.Array, x: jax.Array) -> jax.Array:
        axes = w.ndim - 2
        geometry, outputs = self._geometry(w, x.shape[-axes - 1 : -1], w, x)
        y = _correlation.to_output(geometry, precision, _merge_leading(geometry, x), w, outputs)
        return _split_leading(geometry, y, x.shape[: -axes - 1])

    def pull_input(self, precision: PrecisionLike, w: jax.Array, y_bar: jax.Array, space: Space) -> jax.Array:
        geometry, _ = self._geometry(w, space, w, y_bar)
        x_bar = _correlation.to_input(geometry, precision, w, _merge_leading(geometry, y_bar), space)
        return _split_leading(geometry, x_bar, y_bar.shape[: 1 - w.ndim])

    def pull_weight(self, precision: PrecisionLike, x: jax.Array, y_bar: jax.Array, w: jax.Array) -> jax.Array:
        axes = w.ndim - 2
        geometry, _ = self._geometry(w, x.shape[-axes - 1 : -1], x, y_bar)
        return _correlation.to_kernel(
            geometry, precision, _merge_leading(geometry, x), _merge_leading(geometry, y_bar), w.shape[:axes]
        )

    def shape(self, inputs: int | str, gates: int, outputs: int | str) -> str:
        return f"(*kernel_size, {inputs}, {_times(gates, outputs)})"

    def channels(self, w: jax.Array, gates: int) -> tuple[int, int] | None:
        return (
            None if not 3 <= w.ndim <= 5 or w.shape[-1] % gates or not w.size else (w.shape[-2], w.shape[-1] // gates)
        )

    def dimensions(self, w: jax.Array) -> int:
        return w.ndim - 2

    def space(self, w: jax.Array, space: Space) -> Space:
        return self._geometry(w, space)[1]

    def with_partitioning(self, partitioning: Partitioning) -> "Conv":
        return replace(self, partitioning=partitioning, tuning=used_for_convolutions())

    def _geometry(self, w: jax.Array, space: Space, *operands: jax.Array) -> tuple[_geometry.Geometry, Space]:
        kernel_size = w.shape[:-2]
        geometry = _geometry.resolve(space, kernel_size, self.stride, self.padding, self.dilation, 1)
        geometry = geometry._replace(partitioning=_partitioning_of(self, *operands), tuning=self.tuning)
        return geometry, _geometry.output_sizes(geometry, space, kernel_size)


def _partitioning_of(linear_map: Dense | Conv, *operands: jax.Array) -> Partitioning:
    """Return the partitioning that the recurrence has set or, outside of a recurrence, that of the operands."""
    return _mesh.partitioning(operands) if linear_map.partitioning is None else linear_map.partitioning


def _merge_leading(geometry: _geometry.Geometry, x: jax.Array) -> jax.Array:
    """Merge all leading axes into one.

    Time precedes the batch, unless the compiler may partition the batch: axes are merged without communication only if
    all but the first are not sharded.
    """
    leading = x.ndim - len(geometry.stride) - 1
    if leading > 1 and geometry.partitioning.implicit:
        x = x.transpose(*reversed(range(leading)), *range(leading, x.ndim))
    return x.reshape(prod(x.shape[:leading]), *x.shape[leading:])


def _split_leading(geometry: _geometry.Geometry, y: jax.Array, leading: tuple[int, ...]) -> jax.Array:
    """Invert `_merge_leading`: split the first axis into the leading axes."""
    if len(leading) > 1 and geometry.partitioning.implicit:
        y = y.reshape(*leading[::-1], *y.shape[1:])
        return y.transpose(*reversed(range(len(leading))), *range(len(leading), y.ndim))
    return y.reshape(*leading, *y.shape[1:])


def _einsum(equation: str, a: jax.Array, b: jax.Array, precision: PrecisionLike) -> jax.Array:
    common = _precision.promote(a, b)
    return jnp.einsum(
        equation,
        a.astype(common),
        b.astype(common),
        precision=precision,
        preferred_element_type=_precision.accumulator(common),
    )


def _wide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cast `a` to the dtype in which its product with `b` accumulates."""
    return a.astype(_precision.accumulator(_precision.promote(a, b)))


def _prepend_axes(a: jax.Array, axes: int) -> jax.Array:
    """Return `a` with `axes` additional leading axes of size one."""
    return jnp.expand_dims(a, range(axes))


def _times(gates: int, channels: int | str) -> str:
    """Return the product as text: `channels` is a number or a symbol."""
    if isinstance(channels, int):
        return str(gates * channels)
    return channels if gates == 1 else f"{gates} {channels}"
