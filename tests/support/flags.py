"""XLA compiler options: the defaults, and options for programs that run once.

Without LLVM's optimisation and, for jaxlib 0.10, without the emitters that lower each fusion through MLIR, a program
compiles in half the time.
"""

from importlib.metadata import version

OPTIMISED: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
UNOPTIMISED: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if version("jaxlib").startswith("0.10."):  # jaxlib aborts the process over an unknown option
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True
    UNOPTIMISED["xla_cpu_use_fusion_emitters"] = False


def as_text(options: dict[str, int | bool]) -> str:
    """Return the options in the form of the environment variable XLA_FLAGS."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
