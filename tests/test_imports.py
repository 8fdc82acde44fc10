"""Modules that `import jaxseq` leaves out, and every way to reach them afterwards."""

import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import jaxseq

ROOT = Path(__file__).parents[1]
LAZY = ("autoregressive", "convert", "diagnostics", "reference", "testing")
LOADED = "loaded = [name for name in sys.modules if name.startswith('jaxseq.') and name.split('.')[1] in LAZY]\n"


def run(code):
    """Run `code` in a new process after `import jaxseq`. The list `loaded` has the lazy modules imported by then."""
    code = f"import sys\nimport jaxseq\nLAZY = {LAZY}\n{LOADED}{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_leaves_lazy_modules_out_and_attributes_import_them():
    run(
        "assert not loaded, loaded\n"
        "assert not {'jaxseq._cases', 'jaxseq._verify', 'scipy', 'matplotlib'} & {*sys.modules}\n"
        "for name in LAZY:\n"
        "    module = getattr(jaxseq, name)\n"
        "    assert module is sys.modules[f'jaxseq.{name}'] is getattr(jaxseq, name)\n"
        "assert callable(jaxseq.testing.check_vjp)\n"
        "assert jaxseq.autoregressive.Linear(1, 2, 3) == (1, 2, 3)"
    )


@pytest.mark.parametrize(
    "code",
    [
        "from jaxseq import testing\nassert testing is jaxseq.testing",
        "import jaxseq.testing\nassert jaxseq.testing.check_vjp",
        "import jaxseq.diagnostics as module\nassert module is jaxseq.diagnostics",
        "from jaxseq import *\nassert testing is jaxseq.testing and lstm is jaxseq.lstm",
        "assert {*jaxseq.__all__} <= {*dir(jaxseq)}\nassert 'jaxseq.testing' not in sys.modules",
        "import pydoc\nassert '    testing' in pydoc.render_doc(jaxseq, renderer=pydoc.plaintext)",
    ],
    ids=["from", "import", "as", "star", "dir", "help"],
)
def test_ways_to_import_a_lazy_module(code):
    run(code)


def test_results_of_lazy_modules_are_registered_for_export_without_them():
    """A serialized function that returns them can be loaded after `import jaxseq`."""
    run(
        "from jaxseq._serialization import REGISTERED\n"
        "assert {'jaxseq.autoregressive.Linear', 'jaxseq.diagnostics.Lyapunov'} <= {*REGISTERED}\n"
        "assert not loaded, loaded"
    )


def test_unknown_names_are_errors():
    with pytest.raises(AttributeError, match="module 'jaxseq' has no attribute 'lstms'"):
        attrgetter("lstms")(jaxseq)
    with pytest.raises(ImportError, match="cannot import name 'lstms'"):
        exec("from jaxseq import lstms", {})
    assert not hasattr(jaxseq, "lstms")


def test_every_lazy_module_is_public():
    assert set(LAZY) == set(jaxseq._LAZY_MODULES) <= set(jaxseq.__all__)
    assert len(set(jaxseq.__all__)) == len(jaxseq.__all__)
