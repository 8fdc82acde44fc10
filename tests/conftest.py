"""Strict settings: float64 where it is asked for, no silent promotion of dtypes or ranks, eight devices."""

import os
import sys

# The suite compiles some thousand programs and runs each once: LLVM's optimisation would not pay. The long tests, which
# run theirs again and again, have it, as users do. (Workers inherit what the first process has set.)
if "long" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest

from jaxseq import _sharding

pytest_plugins = ["pytester", "tests.support.usage", "tests.support.compilation"]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def undivided(request, monkeypatch):
    """Rules are those of one device, where most users are; these files see the eight that there are."""
    if request.path.name not in ("test_sharding.py", "test_stretches.py", "test_scale.py"):
        monkeypatch.setattr(_sharding, "undivided", lambda: True)


@pytest.fixture
def key():
    return jax.random.key(20)


@pytest.fixture(scope="module")
def as_users_have_jax():
    """Undoes the strict settings."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
