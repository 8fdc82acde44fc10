"""What `import jaxseq` leaves out, and every way to reach it afterwards."""

import ast
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import jaxseq

ROOT = Path(__file__).parents[1]
LOADED = "loaded = {name for name in sys.modules if name.startswith('jaxseq.')}\n"


def run(code):
    """Run `code` in a new process after `import jaxseq`. The set `loaded` has the modules imported by then."""
    code = f"import sys\nimport jaxseq\n{LOADED}{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_leaves_modules_out_and_attributes_import_them():
    run(
        "assert loaded == {'jaxseq._serialization', 'jaxseq._types'}, loaded\n"
        "assert not {'scipy', 'matplotlib'} & {*sys.modules}\n"
        "for name in jaxseq._MODULES:\n"
        "    module = getattr(jaxseq, name)\n"
        "    assert module is sys.modules[f'jaxseq.{name}'] is getattr(jaxseq, name)\n"
        "assert callable(jaxseq.lstm) and 'lstm' in vars(jaxseq)\n"
        "assert not {'jaxseq._cases', 'jaxseq._verify', 'scipy', 'matplotlib'} & {*sys.modules}\n"
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
        "assert loaded == {'jaxseq._serialization', 'jaxseq._types'}, loaded"
    )


def test_unknown_names_are_errors():
    with pytest.raises(AttributeError, match="module 'jaxseq' has no attribute 'lstms'"):
        attrgetter("lstms")(jaxseq)
    with pytest.raises(ImportError, match="cannot import name 'lstms'"):
        exec("from jaxseq import lstms", {})
    assert not hasattr(jaxseq, "lstms")


def test_the_names_of_type_checkers_are_those_at_runtime():
    tree = ast.parse(Path(jaxseq.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {(node.module, name.name) for node in block.body for name in node.names}
    of_modules = {("jaxseq", name) for name in jaxseq._MODULES}
    assert imported == of_modules | {(f"jaxseq.{module}", name) for name, module in jaxseq._MODULE_OF.items()}
    eager = {"ConvParams", "GRUParams", "LSTMParams", "LSTMState", "MLSTMParams", "MLSTMState", "QRNNParams"}
    eager |= {"QRNNState", "RNNParams", "SeparableConvParams"}
    assert sorted(jaxseq.__all__) == sorted({name for _, name in imported} | eager)
    assert all(getattr(jaxseq, name) is not None for name in jaxseq.__all__)
