"""Fuzz every op over meshes: values and gradients in float32 against the reference implementation in float64.

Each case draws an op with its options, a mesh of up to 8 CPU devices whose axes are explicit, automatic or of both
types, and for every array the mesh axes that shard it, in any order, some of them idle. An error that states why the
arrays cannot be sharded in this way is accepted. Wrong results, other errors and an abort of the process are faults.

    python tests/fuzz/meshes.py --count 200            # cases 0 to 199
    python tests/fuzz/meshes.py --first 17 --count 1   # case 17 again, with its traceback

Each subprocess runs several cases, since XLA may abort.
"""

import argparse
import json
import os
import subprocess
import sys
import traceback
from math import prod
from pathlib import Path

SIZES = (2, 2), (2, 2), (4, 2), (2, 4), (2, 2, 2), (8,)
KINDS = "explicit", "automatic", "mixed"
# Accepted errors on explicit meshes: outputs that cannot be sharded like the inputs (jaxseq), indivisible sizes (JAX).
REFUSALS = "expected along a spatial axis sharded over", "does not evenly divide"
TOLERANCE = 2e-4  # relative to the largest element of an array
PER_PROCESS = 10


def draw_op(rng):
    """Return a description, a function of a namespace and arrays, and the arrays."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxseq

    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    scaled = lambda *shape: normal(*shape) / prod(shape[:-1]) ** 0.5  # noqa: E731
    name = pick(
        *["conv"] * 4, *["conv_transpose"] * 3, *["causal_conv"] * 2, "depthwise_conv", "separable_conv",
        "rnn", "gru", "lstm", "lstm", *["conv_lstm"] * 2, "conv_gru", "bidirectional", "stack", "scan",
    )  # fmt: skip
    B, C = pick(4, 8), pick(4, 8)
    if name.endswith(("conv", "conv_transpose")):
        axes = 1 if name == "causal_conv" else pick(1, 1, 2)
        space = (pick(16, 16, 12), 8)[:axes]
        kernel_size = tuple(pick(1, 2, 3, 4, 5) if axes == 1 else pick(1, 2, 3) for _ in range(axes))
        groups = pick(1, 1, 2, 4, C)
        options = {"dilation": pick(1, 1, 2)}
        if name != "causal_conv":
            options |= {"stride": pick(1, 1, 2), "padding": pick("SAME", "SAME", "VALID", 1)}
        if rng.random() < 0.1 and axes == 1 and name != "causal_conv":
            options["padding"], options["stride"], options["dilation"] = "SAME", kernel_size[0], 1
        if rng.random() < 0.1 and axes == 1:  # a long kernel, for `_spectrum`
            kernel_size, groups, space = (pick(70, 90),), C, (128,)
        if name == "causal_conv":
            x, w, b = normal(B, *space, C), scaled(*kernel_size, C // groups, 8), normal(8)
            carry = normal(B, (kernel_size[0] - 1) * options["dilation"], C)
            resets = jnp.asarray(rng.random((B, *space)) < 0.2) if rng.random() < 0.5 else None
            lengths = jnp.asarray(rng.integers(0, space[0] + 1, B)) if rng.random() < 0.3 else None
            run = lambda ns, carry, x, w, b, resets, lengths: ns.causal_conv(  # noqa: E731
                jaxseq.ConvParams(w, b), carry, x, resets=resets, lengths=lengths, groups=groups, time_axis=1, **options
            )
            return f"causal_conv {kernel_size} {groups} {options}", run, (carry, x, w, b, resets, lengths)
        if name in ("conv", "conv_transpose"):
            c_out = 8
            kernel = (*kernel_size, C // groups, c_out) if name == "conv" else (*kernel_size, c_out // groups, C)
            arrays = normal(B, *space, C), scaled(*kernel), normal(c_out) if rng.random() < 0.7 else None
            options["groups"] = groups
            if rng.random() < 0.1:  # several batch axes
                arrays = (normal(2, 4, *space, C), *arrays[1:])
        else:
            arrays = normal(B, *space, C), scaled(*kernel_size, 1, C * pick(1, 2))
            if name == "separable_conv":
                arrays = (*arrays, scaled(*(1,) * axes, arrays[1].shape[-1], 8))
            arrays = (*arrays, normal(arrays[-1].shape[-1]))
        run = lambda ns, *arrays: getattr(ns, name)(*arrays, **options)  # noqa: E731
        return f"{name} {kernel_size} {options} {arrays[0].shape}", run, arrays
    T, H = pick(8, 16), pick(4, 8)
    key = jax.random.key(rng.integers(1000))
    if name == "scan":
        arrays = scaled(C, H), scaled(H, H), normal(B, H), normal(T, B, C)
        truncation = pick(None, 4)

        def run(ns, w_x, w_h, h, xs):
            step = lambda h, x: (jnp.tanh(x @ w_x + h @ w_h),) * 2  # noqa: E731
            return ns.scan(step, h, xs, truncation=truncation)

        return f"scan {truncation}", run, arrays
    options = {"truncation": pick(None, None, 4, (4, 8)), "checkpoint": pick(None, None, 4)}
    if name != "bidirectional":
        options["reverse"] = pick(False, True)
    lengths = jnp.asarray(rng.integers(0, T + 1, B), jnp.int32) if rng.random() < 0.4 else None
    resets = jnp.asarray(rng.random((T, B)) < 0.2) if rng.random() < 0.4 else None
    masks = {k: v for k, v in {"lengths": lengths, "resets": resets}.items() if v is not None}
    xs = normal(T, B, C)
    if name.startswith("conv_"):
        space = (pick(8, 12), 4)[: pick(1, 1, 2)]
        kernel_size = tuple(pick(2, 3) for _ in space)
        params = getattr(jaxseq, f"{name}_init")(key, kernel_size, C, H)
        xs = normal(T // 2, B, *space, C)
        masks = {k: v if k == "lengths" else v[: T // 2] for k, v in masks.items()}
        masks = {k: jnp.minimum(v, T // 2) if k == "lengths" else v for k, v in masks.items()}
        options |= {"stride": pick(1, 1, 2)}
        call = lambda ns, *args, **options: getattr(ns, name)(*args, **options)  # noqa: E731
    elif name == "bidirectional":
        params = tuple(jaxseq.gru_init(k, C, H) for k in jax.random.split(key))
        call = lambda ns, params, carry, xs, **options: ns.bidirectional(ns.gru, params, carry, xs, **options)  # noqa: E731
    elif name == "stack":
        params = jaxseq.lstm_init(key, C, H), jaxseq.lstm_init(jax.random.key(7), H, H)
        call = lambda ns, params, carry, xs, **options: ns.stack(ns.lstm, params, carry, xs, **options)  # noqa: E731
    else:
        params = getattr(jaxseq, f"{name}_init")(key, C, H)
        call = lambda ns, *args, **options: getattr(ns, name)(*args, **options)  # noqa: E731
    carry = None
    if rng.random() < 0.5:
        shape = jax.eval_shape(lambda params, xs: call(jaxseq, params, None, xs, **options, **masks)[0], params, xs)
        carry = jax.tree.map(lambda a: normal(*a.shape), shape)
    run = lambda ns, params, carry, xs, masks: call(ns, params, carry, xs, **options, **masks)  # noqa: E731
    return f"{name} {options} {[*masks]} {np.shape(xs)}", run, (params, carry, xs, masks)


def draw_spec(rng, shape, mesh):
    """Return a random spec of mesh axes that divide the axes of an array, in any order."""
    from jax.sharding import PartitionSpec

    names, parts = list(rng.permutation(mesh.axis_names)), [None] * len(shape)
    for axis in rng.permutation(len(shape)):
        count = rng.choice([0, 1, 1, 2])
        taken = tuple(map(str, names[:count]))
        divides = shape[axis] and shape[axis] % prod(mesh.shape[name] for name in taken) == 0
        if count and len(taken) == count and divides and rng.random() < 0.5:
            parts[axis], names = taken, names[count:]
    return PartitionSpec(*parts)


def one(index):
    """Run a case. Return None if it is right, "refused" for an accepted error, or a description of the fault."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding

    import jaxseq

    rng = np.random.default_rng([20, index])
    name, run, arrays = draw_op(rng)
    sizes = SIZES[rng.integers(len(SIZES))]
    kind = KINDS[rng.integers(len(KINDS))]
    types = [AxisType.Explicit if kind == "explicit" else AxisType.Auto for _ in sizes]
    if kind == "mixed":
        types[rng.integers(len(sizes))] = AxisType.Explicit
    mesh = jax.make_mesh(sizes, ("a", "b", "c")[: len(sizes)], tuple(types), devices=jax.devices()[: prod(sizes)])
    specs = jax.tree.map(lambda a: draw_spec(rng, a.shape, mesh), arrays)
    leaves = jax.tree.leaves(specs)
    label = f"{name}; {kind} {sizes} {[t.name for t in types] if kind == 'mixed' else ''} {leaves}"
    print(json.dumps({"label": label}), flush=True)

    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float64) if is_float(a) else a, tree)  # noqa: E731

    def pullback(ns):
        def both(arrays, cotangents):
            outputs, vjp = jax.vjp(lambda *arrays: run(ns, *arrays), *arrays)
            return outputs, [g for g in jax.tree.leaves(vjp(cotangents)) if g.dtype != jax.dtypes.float0]

        return both

    shapes = jax.eval_shape(lambda *arrays: run(jaxseq.reference, *arrays), *wide(arrays))
    cotangents = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)
    expected = jax.jit(pullback(jaxseq.reference))(wide(arrays), wide(cotangents))

    def placed(a, spec):
        return jax.device_put(a, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        args = jax.tree.map(placed, arrays, specs)
        try:
            out_specs = []

            def note(*args):
                types = map(jax.typeof, jax.tree.leaves(run(jaxseq, *args)))
                out_specs[:] = [t.sharding.spec for t in types]
                return ()

            jax.eval_shape(note, *args)
            if kind == "automatic":
                out_specs = [draw_spec(rng, a.shape, mesh) for a in jax.tree.leaves(cotangents)]
            leaves, structure = jax.tree.flatten(cotangents)
            cotangents = structure.unflatten(map(placed, leaves, out_specs))
            got = jax.jit(pullback(jaxseq))(args, cotangents)
        except Exception as error:
            # A user-defined step has to follow JAX's rules for explicit meshes.
            of_step = name.startswith("scan") and type(error).__name__ in ("TypeError", "ShardingTypeError")
            if kind != "automatic" and (of_step or any(words in str(error) for words in REFUSALS)):
                return "refused"
            raise
    for part, (a, e) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)):
        off = np.abs(np.asarray(a, np.float64) - np.asarray(e)).max(initial=0) / np.abs(e).max(initial=1e-30)
        if not off < TOLERANCE:
            return f"output {part} of shape {e.shape} has the error {off:.3g}, relative to its largest element"
    return None


def child(first, count):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    import jax

    jax.config.update("jax_enable_x64", True)
    for index in range(first, first + count):
        try:
            fault = one(index)
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:300]}"
            traceback.print_exc()
        print(json.dumps({"index": index, "fault": fault}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.first, args.count)
        return
    index, end, faults, refused = args.first, args.first + args.count, [], 0
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root, "TF_CPP_MIN_LOG_LEVEL": "3"}
    while index < end:
        count = min(PER_PROCESS, end - index)
        command = [sys.executable, __file__, "--child", "--first", str(index), "--count", str(count)]
        quiet = subprocess.DEVNULL if args.count > 1 else None
        label, done = "", 0
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=quiet, text=True) as process:
            for line in map(json.loads, process.stdout):
                label, fault = line.get("label", label), line.get("fault")
                done += "index" in line
                if fault == "refused":
                    refused += 1
                elif fault:
                    faults.append(line["index"])
                    print(f"{line['index']}: {fault}\n    {label}", flush=True)
        index += done
        if done < count:
            print(f"{index}: the process exited with {process.returncode}\n    {label}", flush=True)
            faults.append(index)
            index += 1
        print(f"{index - args.first} of {args.count} cases done", file=sys.stderr)
    print(f"{args.count} cases, {refused} refused, {len(faults)} faults: {faults}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
