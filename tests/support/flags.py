"""Options of XLA's compiler: as users have them, and for programs that run once.

Without LLVM's optimisation and, where jaxlib 0.10 has a choice, without the emitters that lower each fusion through
MLIR, a program compiles in half the time.
"""

from importlib.metadata import version

OPTIMISED: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
UNOPTIMISED: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if version("jaxlib").startswith("0.10."):  # an option that jaxlib does not know ends the process
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True
    UNOPTIMISED["xla_cpu_use_fusion_emitters"] = False


def as_text(options: dict[str, int | bool]) -> str:
    """Return the options in the form of the environment variable XLA_FLAGS."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
