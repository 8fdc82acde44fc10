"""Fuzz convolutions: values and gradients of random geometries in float32 and bfloat16, against NumPy.

    python tests/fuzz/geometries.py --count 500

Each trial draws an op, sizes, stride, dilation, padding of both signs and groups. It compares with NumPy in float64, as
one matrix product for each tap, forward and backward. It also compares flops and temporary bytes with those of
`lax.conv_general_dilated` under `jax.vjp`.
"""

from functools import partial
from itertools import product
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import runner
from comparison import problems, rounded

import jaxseq

# Limits on flops and temporary bytes relative to lax, and the excess that is ignored.
FLOPS, FEW_FLOPS, BYTES, FEW_BYTES = 2.0, 1e5, 12.0, 2**20


class Drawn(NamedTuple):
    """A convolution of x (N, *space, C_in), with the parameters of `jaxseq.conv`."""

    space: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    c_in: int
    c_out: int
    batch: int

    @property
    def outputs(self) -> tuple[int, ...]:
        """The size of the output. The convolution is invalid if a size is below one."""
        return tuple(
            (n + lo + hi - d * (k - 1) - 1) // s + 1
            for n, (lo, hi), d, k, s in zip(
                self.space, self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )


def draw(rng: np.random.Generator) -> Drawn:
    """Draw a random convolution with at least one output and fewer than 3e7 multiplications."""
    while True:
        axes = int(rng.choice([1, 1, 2, 2, 3]))
        longest = (90, 24, 10)[axes - 1]
        space = tuple(int(n) for n in rng.integers(1, longest, axes))
        kernel_size = tuple(int(rng.choice([1, 2, 3, 4, 5, 7, 16, n])) for n in space)
        stride = tuple(int(rng.choice([1, 1, 2, 3, 4, k])) for k in kernel_size)
        dilation = tuple(int(rng.choice([1, 1, 1, 2, 3])) for _ in kernel_size)
        kind = rng.choice(["valid", "same", "any", "any"])
        if kind == "valid":
            padding: Any = ((0, 0),) * axes
        else:
            pads = [
                rng.integers(-3, d * k + 3, 2) if kind == "any" else (d * k // 2,) * 2
                for d, k in zip(dilation, kernel_size, strict=True)
            ]
            padding = tuple((int(lo), int(hi)) for lo, hi in pads)
        groups = int(rng.choice([1, 1, 2, 4, 16]))
        per_in, per_out = (int(n) for n in rng.choice([1, 1, 2, 3, 16], 2))
        found = Drawn(
            space,
            kernel_size,
            stride,
            dilation,
            padding,
            groups,
            groups * per_in,
            groups * per_out,
            int(rng.integers(1, 4)),
        )
        products = prod(kernel_size) * per_in * found.c_out * found.batch * prod(found.outputs)
        if min(found.outputs) >= 1 and products < 3e7:
            return found


# --- The oracle: tap by tap, in float64 ---


def taps(c: Drawn) -> Any:
    """Yield each tap with the positions of the padded input that it reads."""
    for tap in product(*map(range, c.kernel_size)):
        yield (
            tap,
            (
                slice(None),
                *(
                    slice(d * k, d * k + s * (o - 1) + 1, s)
                    for k, d, s, o in zip(tap, c.dilation, c.stride, c.outputs, strict=True)
                ),
            ),
        )


def padded(c: Drawn, x: np.ndarray) -> np.ndarray:
    """Pad x, or crop it where the padding is negative."""
    for axis, (n, (lo, hi)) in enumerate(zip(c.space, c.padding, strict=True), 1):
        x = np.take(x, range(min(n, max(0, -lo)), max(0, n - max(0, -hi))), axis)
        missing = n + lo + hi - (x.shape[axis] + max(0, lo) + max(0, hi))  # nonzero if it crops beyond the other edge
        x = np.pad(x, [(max(0, lo), max(0, hi)) if a == axis else (0, 0) for a in range(x.ndim)])
        if missing:
            x = (
                np.take(x, range(max(0, -missing), x.shape[axis]), axis)
                if lo < 0
                else np.take(x, range(n + lo + hi), axis)
            )
    return x


def unpadded(c: Drawn, z: np.ndarray) -> np.ndarray:
    """Apply the transpose of `padded`."""
    index = padded(c, np.broadcast_to(1 + np.arange(prod(c.space)).reshape(1, *c.space, 1), (1, *c.space, 1)))[
        0, ..., 0
    ]
    x = np.zeros((z.shape[0], 1 + prod(c.space), z.shape[-1]))
    np.add.at(x, (slice(None), index.reshape(-1)), z.reshape(z.shape[0], -1, z.shape[-1]))
    return x[:, 1:].reshape(z.shape[0], *c.space, z.shape[-1])


def grouped(c: Drawn, a: np.ndarray) -> np.ndarray:
    """Split the last axis into (groups, channels of a group)."""
    return a.reshape(*a.shape[:-1], c.groups, -1)


def oracle(c: Drawn, x: np.ndarray, w: np.ndarray, y_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (y, x_bar, w_bar) of a convolution without bias."""
    z = grouped(c, padded(c, x))
    ct = grouped(c, y_bar)
    y, z_bar, w_bar = (
        np.zeros(ct.shape),
        np.zeros(z.shape),
        np.zeros((*c.kernel_size, w.shape[-2], c.groups, ct.shape[-1])),
    )
    for tap, seen in taps(c):
        kernel = w[tap].reshape(w.shape[-2], c.groups, -1)
        y += np.einsum("n...gi,igo->n...go", z[seen], kernel, optimize=True)
        z_bar[seen] += np.einsum("n...go,igo->n...gi", ct, kernel, optimize=True)
        w_bar[tap] = np.einsum(
            "ngi,ngo->igo", z[seen].reshape(-1, *z.shape[-2:]), ct.reshape(-1, *ct.shape[-2:]), optimize=True
        )
    return y.reshape(y_bar.shape), unpadded(c, z_bar.reshape(*z_bar.shape[:-2], -1)), w_bar.reshape(w.shape)


# --- The trials ---


def trial(seed: int) -> tuple[str, list[str]]:
    """Compare one geometry of one of three ops."""
    rng = np.random.default_rng(seed)
    return causal_trial(rng) if rng.random() < 0.15 else conv_trial(rng)


def low(*arrays: np.ndarray) -> list[np.ndarray]:
    """Round the arrays to bfloat16, so that every dtype starts from the same numbers."""
    return [np.asarray(jnp.asarray(a, jnp.bfloat16)).astype(np.float64) for a in arrays]


def conv_trial(rng: np.random.Generator) -> tuple[str, list[str]]:
    """Compare `conv` or `conv_transpose` in both dtypes with NumPy, and the cost of `conv` with that of lax."""
    c, transposed = draw(rng), bool(rng.integers(2))
    x, y_bar = (rng.normal(size=(c.batch, *size, n)) for size, n in ((c.space, c.c_in), (c.outputs, c.c_out)))
    w = rng.normal(size=(*c.kernel_size, c.c_in // c.groups, c.c_out)) / np.sqrt(prod(c.kernel_size))
    b = rng.normal(size=c.c_in if transposed else c.c_out)
    x, w, b, y_bar = low(x, w, b, y_bar)
    options: dict[str, Any] = {"stride": c.stride, "dilation": c.dilation, "padding": c.padding, "groups": c.groups}
    value, back, w_bar = oracle(c, x, w, y_bar)
    if transposed:  # map the output size of the convolution to its input size
        options["output_padding"] = tuple(
            n - ((o - 1) * s + d * (k - 1) + 1 - lo - hi) for n, o, k, s, d, (lo, hi) in axes_of(c)
        )
        value, back, source, cotangent = back, value, y_bar, x
    else:
        source, cotangent = x, y_bar
    expected = value + b, (back, w_bar, cotangent.sum(tuple(range(cotangent.ndim - 1))))
    op = jaxseq.conv_transpose if transposed else jaxseq.conv

    def both(x: Any, w: Any, b: Any, cotangent: Any) -> Any:
        y, pull = jax.vjp(lambda *args: op(*args, **options), x, w, b)
        return y, pull(cotangent)

    found, args = [], (source, w, b, cotangent)
    for dtype in ("float32", "bfloat16"):
        given = rounded(args, dtype)
        program = jax.jit(both).lower(*given).compile()
        found += problems(program(*given), expected, dtype)
        if dtype == "float32" and not transposed:
            found += work(program, c, given)
    return f"{op.__name__} {c}", found


def axes_of(c: Drawn) -> Any:
    """Iterate over (I, O, K, s, d, (lo, hi)) of each axis."""
    return zip(c.space, c.outputs, c.kernel_size, c.stride, c.dilation, c.padding, strict=True)


def work(program: Any, c: Drawn, args: Any) -> list[str]:
    """Return the limits relative to lax that the program exceeds."""
    letters = "DHW"[-len(c.kernel_size) :]
    numbers = f"N{letters}C", f"{letters}IO", f"N{letters}C"

    def both(x: Any, w: Any, b: Any, cotangent: Any) -> Any:
        conv = partial(
            jax.lax.conv_general_dilated,
            window_strides=c.stride,
            padding=c.padding,
            rhs_dilation=c.dilation,
            dimension_numbers=numbers,
            feature_group_count=c.groups,
        )
        y, pull = jax.vjp(lambda x, w, b: conv(x, w) + b, x, w, b)
        return y, pull(cotangent)

    # XLA may abort over jax.vjp of lax if receptive fields do not overlap along one axis, and another has more taps
    # than outputs.
    gaps = any(1 < s >= k for s, k in zip(c.stride, c.kernel_size, strict=True))
    if gaps and any(k > o for k, o in zip(c.kernel_size, c.outputs, strict=True)):
        return []
    lax = jax.jit(both).lower(*args).compile()
    flops = [p.cost_analysis()["flops"] for p in (program, lax)]
    sizes = [p.memory_analysis().temp_size_in_bytes for p in (program, lax)]
    found = []
    if flops[0] > FLOPS * flops[1] + FEW_FLOPS and c.groups == 1:  # merged groups take more flops, less time
        found.append(f"{flops[0] / flops[1]:.1f} times the flops of lax")
    if sizes[0] > BYTES * sizes[1] + FEW_BYTES:
        found.append(f"{sizes[0] / 2**20:.1f} MiB of temporaries, lax {sizes[1] / 2**20:.1f}")
    return found


def causal_trial(rng: np.random.Generator) -> tuple[str, list[str]]:
    """Compare `causal_conv` with a carry and resets; the oracle masks, for each step, the taps before a boundary."""
    T, K, d, g, B = (
        int(n) for n in (rng.integers(1, 60), rng.integers(1, 7), rng.integers(1, 4), rng.choice([1, 4]), 2)
    )
    per_in, per_out = (int(n) for n in rng.choice([1, 3, 16], 2))
    P = d * (K - 1)
    carry, x = rng.normal(size=(B, P, g * per_in)), rng.normal(size=(B, T, g * per_in))
    w, b = rng.normal(size=(K, per_in, g * per_out)) / np.sqrt(K), rng.normal(size=g * per_out)
    resets = rng.random((B, T)) < 0.1 if rng.random() < 0.7 else np.zeros((B, T), bool)
    y_bar, carry_bar = rng.normal(size=(B, T, g * per_out)), rng.normal(size=(B, P, g * per_in))
    carry, x, w, b, y_bar, carry_bar = low(carry, x, w, b, y_bar, carry_bar)

    z = np.concatenate([carry, x], 1)
    since = np.maximum.accumulate(np.where(resets, np.arange(T), -P - 1), 1)  # the step of the last reset
    time = np.arange(-P, T)
    y, z_bar, w_bar = np.zeros(y_bar.shape), np.zeros(z.shape), np.zeros(w.shape)
    grouped_w = w.reshape(K, per_in, g, per_out)
    for t in range(T):
        for k in range(K):
            row = t + d * k
            seen = (time[row] >= since[:, t])[:, None, None]
            part, ct = z[:, row].reshape(B, g, per_in) * seen, y_bar[:, t].reshape(B, g, per_out)
            y[:, t] += np.einsum("ngi,igo->ngo", part, grouped_w[k]).reshape(B, -1)
            z_bar[:, row] += (seen * np.einsum("ngo,igo->ngi", ct, grouped_w[k])).reshape(B, -1)
            w_bar[k] += np.einsum("ngi,ngo->igo", part, ct).reshape(per_in, -1)
    kept = (time[T:] >= since[:, -1:])[..., None]
    z_bar[:, T:] += kept * carry_bar
    expected = (kept * z[:, T:], y + b), (z_bar[:, :P], z_bar[:, P:], w_bar, y_bar.sum((0, 1)))

    def both(carry: Any, x: Any, w: Any, b: Any, cotangents: Any) -> Any:
        marks = jnp.asarray(resets) if resets.any() else None
        options = {"dilation": d, "groups": g, "resets": marks, "time_axis": 1}
        f = lambda carry, x, w, b: jaxseq.causal_conv(jaxseq.ConvParams(w, b), carry, x, **options)  # noqa: E731
        out, pull = jax.vjp(f, carry, x, w, b)
        return out, pull(cotangents)

    found = []
    for dtype in ("float32", "bfloat16"):
        found += problems(jax.jit(both)(*rounded((carry, x, w, b, (carry_bar, y_bar)), dtype)), expected, dtype)
    return f"causal_conv T={T} K={K} dilation={d} groups={g} {per_in} to {per_out} resets={resets.sum()}", found


if __name__ == "__main__":
    runner.main(trial, count=500)
