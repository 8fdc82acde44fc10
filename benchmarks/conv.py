"""Convolutions of jaxseq against autodiff of lax, against Flax and against torch.

    python -m benchmarks.conv [--rounds N] [--json FILE] [--picture FILE] [--quick]

Each candidate computes the output and the gradient of the input, the kernel and the bias. Ratios are times relative to
`jaxseq`. Every library receives arrays in its native layout.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxseq
from benchmarks import harness
from benchmarks.harness import Candidate, Problem, with_gradient
from jaxseq import _geometry
from jaxseq._init import normal

Function = Callable[..., Any]


class Shape(NamedTuple):
    """One convolution of x (N, *I, C_in) with a kernel (*K, C_in / groups, C_out), or a transposed convolution."""

    name: str
    batch: int
    space: tuple[int, ...]
    kernel_size: tuple[int, ...]
    c_in: int
    c_out: int
    options: Mapping[str, Any] = {}
    transposed: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        """Return the shape of the kernel."""
        in_channels, out_channels = (self.c_out, self.c_in) if self.transposed else (self.c_in, self.c_out)
        return (*self.kernel_size, in_channels // self.options.get("groups", 1), out_channels)

    def small(self) -> "Shape":
        """Return a small version of this convolution."""
        limits = (self.space, 13), (self.kernel_size, 8)
        space, kernel_size = (tuple(min(n, limit) for n in sizes) for sizes, limit in limits)
        return self._replace(batch=1, space=space, kernel_size=kernel_size)


SHAPES = (
    Shape("depthwise 1-D", 8, (1024,), (4,), 256, 256, {"groups": 256, "padding": "CAUSAL"}),
    Shape("depthwise 1-D, dilated", 8, (1024,), (4,), 256, 256, {"groups": 256, "padding": "CAUSAL", "dilation": 4}),
    Shape("depthwise 2-D", 4, (56, 56), (3, 3), 64, 64, {"groups": 64, "padding": "SAME"}),
    Shape("groups of 8, 2-D", 4, (56, 56), (3, 3), 64, 64, {"groups": 8, "padding": "SAME"}),
    Shape("dense 1-D", 8, (1024,), (5,), 64, 64, {"padding": "SAME"}),
    Shape("dense 2-D", 4, (56, 56), (3, 3), 64, 64, {"padding": "SAME"}),
    Shape("dense 3-D", 2, (16, 16, 16), (3, 3, 3), 16, 32, {"padding": "SAME"}),
    Shape("strided 2-D", 4, (56, 56), (3, 3), 64, 64, {"padding": 1, "stride": 2}),
    Shape("dilated 1-D", 8, (1024,), (3,), 64, 64, {"padding": "CAUSAL", "dilation": 8}),
    Shape("transposed 1-D", 8, (256,), (4,), 64, 64, {"stride": 2}, transposed=True),
    Shape("transposed 1-D, stride 8", 8, (128,), (16,), 64, 32, {"stride": 8}, transposed=True),
    Shape("transposed 2-D", 4, (28, 28), (4, 4), 64, 32, {"stride": 2}, transposed=True),
    Shape("transposed 3-D", 2, (8, 8, 8), (4, 4, 4), 32, 16, {"stride": 2}, transposed=True),
    Shape("depthwise, 31 taps", 4, (1024,), (31,), 64, 64, {"groups": 64, "padding": "CAUSAL"}),
    Shape("depthwise, 128 taps", 4, (1024,), (128,), 64, 64, {"groups": 64, "padding": "CAUSAL"}),
    Shape("depthwise, 1024 taps", 2, (1024,), (1024,), 32, 32, {"groups": 32, "padding": "CAUSAL"}),
    Shape("1×1", 4, (56, 56), (1, 1), 64, 128),
    Shape("batch of 1", 1, (56, 56), (3, 3), 64, 64, {"padding": "SAME"}),
)


def problems(quick: bool) -> Iterator[Problem]:
    for whole in SHAPES:
        shape = whole.small() if quick else whole
        args, y_bar = data(shape)
        ours = partial(jaxseq.conv_transpose if shape.transposed else jaxseq.conv, **shape.options)
        flax = in_flax(shape)
        variables = {"params": {"kernel": args[1], "bias": args[2]}}
        sizes = f"{shape.batch}x{'x'.join(map(str, shape.space))}x{shape.c_in} to {shape.c_out}"
        title = f"{shape.name}: {sizes}, kernel {'x'.join(map(str, shape.kernel_size))}"
        yield Problem(
            f"forward, {title}",
            "jaxseq",
            [
                Candidate("jaxseq", ours, args),
                Candidate("lax", in_lax(shape), args),
                Candidate("flax", flax, (variables, args[0])),
                in_torch(shape, args, None),
            ],
        )
        yield Problem(
            f"forward + gradient, {title}",
            "jaxseq",
            [
                Candidate("jaxseq", with_gradient(ours), (y_bar, *args)),
                Candidate("lax", with_gradient(in_lax(shape)), (y_bar, *args)),
                Candidate("flax", flax and with_gradient(flax), (y_bar, variables, args[0]), from_flax),
                in_torch(shape, args, y_bar),
            ],
        )


def data(shape: Shape) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Return random (x, kernel, bias) and a random cotangent of y."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (shape.batch, *shape.space, shape.c_in), shape.kernel, (shape.c_out,)
    x, kernel, bias = (normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=False))
    y = jax.eval_shape(in_lax(shape), x, kernel, bias)
    return (x, kernel * kernel[..., 0].size ** -0.5, bias), normal(keys[3], y.shape, jnp.float32)


def geometry(shape: Shape) -> dict[str, Any]:
    """Return stride, padding and dilation per axis, as other libraries expect them."""
    axes = len(shape.kernel_size)
    options = {"stride": 1, "padding": "VALID", "dilation": 1, "groups": 1, **shape.options}
    found = _geometry.resolve(shape.space, shape.kernel_size, **options)
    return {**found._asdict(), "axes": axes}


def in_lax(shape: Shape) -> Function:
    """Return the convolution in plain JAX."""
    geometry_, letters = geometry(shape), "DHW"[-len(shape.kernel_size) :]
    dims = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def conv(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        if shape.transposed:
            strides = geometry_["stride"]
            y = lax.conv_transpose(x, kernel, strides, "VALID", dimension_numbers=dims, transpose_kernel=True)
        else:
            y = lax.conv_general_dilated(
                x,
                kernel,
                geometry_["stride"],
                geometry_["padding"],
                rhs_dilation=geometry_["dilation"],
                dimension_numbers=dims,
                feature_group_count=geometry_["groups"],
            )
        return y + bias

    return conv


def in_flax(shape: Shape) -> Function | None:
    """Return the layer of Flax as a function `(variables, x) -> y`."""
    nn = harness.peer("flax.linen")
    if nn is None:
        return None
    g = geometry(shape)
    if shape.transposed:
        layer = nn.ConvTranspose(shape.c_out, shape.kernel_size, g["stride"], "VALID", transpose_kernel=True)
    else:
        layer = nn.Conv(
            shape.c_out,
            shape.kernel_size,
            g["stride"],
            g["padding"],
            kernel_dilation=g["dilation"],
            feature_group_count=g["groups"],
        )
    return layer.apply


def from_flax(result: Any) -> Any:
    """Return output and gradients in the order of jaxseq."""
    y, (variables, x_bar) = result
    return y, (x_bar, variables["params"]["kernel"], variables["params"]["bias"])


def in_torch(shape: Shape, args: tuple[jax.Array, ...], y_bar: jax.Array | None) -> Candidate:
    """The convolution of torch in its layout, (N, C, *space) and (C_out, C_in, *K). With ȳ, also the gradient."""
    torch = harness.peer("torch")
    if torch is None:
        return Candidate("torch", None)
    g = geometry(shape)
    f = getattr(torch.nn.functional, f"conv{'_transpose' if shape.transposed else ''}{g['axes']}d")
    to_torch = [lambda a: np.moveaxis(a, -1, 1), lambda a: np.moveaxis(a, (-1, -2), (0, 1)), np.asarray]
    from_torch = [lambda a: np.moveaxis(a, 1, -1), lambda a: np.moveaxis(a, (0, 1), (-1, -2)), np.asarray]

    def tensor(change: Function, a: jax.Array) -> Any:
        return torch.tensor(np.ascontiguousarray(change(np.asarray(a))), requires_grad=y_bar is not None)

    leaves = [tensor(change, a) for change, a in zip(to_torch, args, strict=True)]
    y_bar_ = None if y_bar is None else tensor(to_torch[0], y_bar).detach()
    symmetric = all(lo == hi for lo, hi in g["padding"])

    def forward(x: Any, kernel: Any, bias: Any) -> Any:
        options = {"stride": g["stride"], "dilation": g["dilation"], "groups": g["groups"]}
        if symmetric:
            options["padding"] = tuple(lo for lo, _ in g["padding"])
        else:  # torch supports only symmetric padding in the convolution itself
            x = torch.nn.functional.pad(x, [n for pair in reversed(g["padding"]) for n in pair])
        return f(x, kernel, bias, **options)

    def run() -> Any:
        y = forward(*leaves)
        return y if y_bar_ is None else (y, torch.autograd.grad(y, leaves, y_bar_))

    def common(result: Any) -> Any:
        y, gradients = (result, ()) if y_bar_ is None else result
        y = from_torch[0](y.detach().numpy())
        found = tuple(change(a.numpy()) for change, a in zip(from_torch, gradients, strict=False))
        return y if y_bar_ is None else (y, found)

    return Candidate("torch", run, (), common, jit=False)


def main(argv: Any = None) -> None:
    about = "Convolutions of jaxseq against autodiff of lax, Flax and torch."
    harness.main(problems, about, ["flax", "torch"], argv)


if __name__ == "__main__":
    main()
