"""Functions of JAX, optax, Equinox and Flax have correct gradients, so none fails at any point."""

import pytest

pytest.importorskip("optax", reason="needs optax, Equinox and Flax, whose functions are checked")
pytest.importorskip("equinox", reason="needs optax, Equinox and Flax, whose functions are checked")
pytest.importorskip("flax", reason="needs optax, Equinox and Flax, whose functions are checked")

from jaxseq.testing import Verdict

# The checks that have raised false alarms: `primal`, and those at points chosen by the checker.
OTHER_POINTS = ("primal", "contract", "linearity", "dtypes", "integers", "sizes")


# Functions that have raised false alarms. `python -m tests.fuzz.right_functions` checks all functions at three seeds.
SAMPLE = (
    "jax.nn.logsumexp",
    "linalg.solve",
    "linalg.det",
    "linalg.eigh",
    "linalg.svd",
    "fft.rfft",
    "numpy.cumprod",
    "optax.softmax_cross_entropy_with_integer_labels",
    "optax.sigmoid_focal_loss",
    "optax.ctc_loss",
    "optax.projection_l1_ball",
    "flax.max_pool",
)


@pytest.mark.long
@pytest.mark.parametrize("name", SAMPLE)
def test_right_functions_do_not_fail(name):
    from fuzz.right_functions import RIGHT  # slow to import

    reports = list(RIGHT[name].reports([0], OTHER_POINTS))
    assert reports
    for report in reports:
        assert report.verdict is not Verdict.FAIL, report
