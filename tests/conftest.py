"""Strict settings: float64 where it is asked for, no silent promotion of dtypes or ranks; and one device.

Most users have one device. On several devices the compiler may partition arrays that no mesh describes, so the library
makes other programs of them, and tests of programs would see these. JAX cannot change the number of CPU devices once
its backend has started, and one process runs the tests of many files. Therefore each process of pytest that has to run
a test marked `eight_devices` starts a second process, with eight devices, which runs such tests. To run them in the
first process, for example under a debugger, set JAX_NUM_CPU_DEVICES=8 in the environment.
"""

import os
import sys

from tests.support import flags

# The suite compiles some thousand programs and runs each once: optimisation would not pay. Examples and benchmarks, in
# tests/repository, run theirs again and again and have it, as users do; so do the programs of tests/contract.py. (Other
# processes inherit what the first one has set.)
if not (
    any(argument.startswith("tests/repository") for argument in sys.argv)
    or "PYTEST_XDIST_WORKER" in os.environ
    or "_level=0" in os.environ.get("XLA_FLAGS", "")
):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags.as_text(flags.UNOPTIMISED)}"

import jax
import pytest

pytest_plugins = [
    "pytester",
    *(f"tests.support.{name}" for name in ("usage", "compilation", "annotations", "eight_devices")),
]

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(20)


@pytest.fixture(scope="module")
def as_users_have_jax():
    """Undoes the strict settings."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
