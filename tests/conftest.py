"""Test configuration: 64-bit types enabled, no implicit promotion of dtypes or ranks, and one device.

Most users have one device. On several devices the compiler may partition arrays that are not on any mesh, so the
library builds other programs, which would change what tests of compiled programs see. JAX cannot change the number of
CPU devices once its backend has started, and one process runs the tests of many files. Therefore each pytest process
that runs a test marked `eight_devices` starts a second process with eight devices, which runs all such tests. To run
them in the first process, for example under a debugger, set JAX_NUM_CPU_DEVICES=8 in the environment.
"""

import importlib.util
import os
import sys

from tests.support import flags

# The suite compiles some thousand programs and runs each once, so optimisation would not pay off. Examples and
# benchmarks, in tests/repository, run their programs many times and are optimised, as for users; so are the programs of
# tests/contract.py. Child processes inherit XLA_FLAGS from the first process.
if not (
    any(argument.startswith("tests/repository") for argument in sys.argv)
    or "PYTEST_XDIST_WORKER" in os.environ
    or "_level=0" in os.environ.get("XLA_FLAGS", "")
):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags.as_text(flags.UNOPTIMISED)}"

import jax
import pytest

# Libraries that are in no extra: they need older packages, or have a restrictive licence.
OTHERS = ("mlstm_kernels", "recurrentgemma")
collect_ignore = [f"test_{name}.py" for name in OTHERS if not importlib.util.find_spec(name)]

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
    """Restore JAX's default settings."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
