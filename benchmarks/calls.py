"""How much of the library one call runs: files, functions, closures, and the depth of frames, counted by a profiler.

    python -m benchmarks.calls

Each op is traced once with its gradient, on one device. Counted are the Python functions of the package that run, each
once, however often it is called, and the largest number of frames of the package on the stack at the same time.
"""

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxseq

PACKAGE = str(Path(jaxseq.__file__).parent)


class Calls(NamedTuple):
    """What ran: the names of files, the code of functions, those of them that are closures, and the depth."""

    files: int
    functions: int
    closures: int
    depth: int
    codes: frozenset[CodeType]


def measure(f: Any, *args: Any) -> Calls:
    """Return what `jax.value_and_grad` of the sum of `f(*args)` runs while it is traced."""
    codes: set[CodeType] = set()
    depth, deepest = 0, 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth, deepest
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        depth += 1 if event == "call" else -1
        deepest = max(deepest, depth)
        codes.add(frame.f_code)

    def total(*args: Any) -> jax.Array:
        return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(f(*args))), jnp.zeros(()))

    gradient = jax.value_and_grad(total, argnums=tuple(range(len(args))))
    sys.setprofile(profile)
    try:
        jax.make_jaxpr(gradient)(*args)
    finally:
        sys.setprofile(None)
    functions = [code for code in codes if not code.co_name.startswith("<") or code.co_name == "<lambda>"]
    closures = [code for code in functions if "<locals>" in code.co_qualname]
    files = {code.co_filename for code in functions}
    return Calls(len(files), len(functions), len(closures), deepest, frozenset(functions))


def problems() -> dict[str, tuple[Any, ...]]:
    """Return (function, *arguments) by name."""
    keys, lstm = jax.random.split(jax.random.key(0), 3), jaxseq.lstm  # the first use of a name imports its module
    params = jaxseq.lstm_init(keys[0], 16, 32)
    kernel, bias = jaxseq.conv_init(keys[1], 3, 16, 32, groups=4)
    dense, _ = jaxseq.conv_init(keys[1], 3, 16, 32)
    x = jax.random.normal(keys[2], (8, 20, 16))
    return {
        "lstm": (lambda params, xs: lstm(params, None, xs), params, x),
        "conv": (jaxseq.conv, x, dense, bias),
        "conv(groups=4)": (lambda *args: jaxseq.conv(*args, groups=4), x, kernel, bias),
    }


def main() -> None:
    """Print one row for each op."""
    print(f"{'':16}{'files':>8}{'functions':>11}{'closures':>10}{'depth':>7}")
    for name, (f, *args) in problems().items():
        calls = measure(f, *args)
        print(f"{name:16}{calls.files:8}{calls.functions:11}{calls.closures:10}{calls.depth:7}")
        if "--list" in sys.argv:
            for code in sorted(calls.codes, key=lambda c: (c.co_filename, c.co_firstlineno)):
                print(f"    {Path(code.co_filename).relative_to(PACKAGE)}:{code.co_firstlineno} {code.co_qualname}")


if __name__ == "__main__":
    main()
