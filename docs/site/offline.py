"""MkDocs hook that makes the site self-contained: it works from file:// and loads nothing from the network.

MathJax is a single file of the package django-static-mathjax. The search of the theme runs in a web worker. On file://,
browsers cannot start a worker from a file, so the hook adds a script that starts it from a string.
"""

import json
from importlib.metadata import distribution

from mkdocs.structure.files import File

MATHJAX = {"site/mathjax.js": "es5/tex-svg.js", "site/mathjax-license.txt": "LICENSE"}
WORKER = "site/worker.js"

# %s is the source of the worker.
START = """if (location.protocol === "file:") {
  const text = %s
  const Native = window.Worker
  window.Worker = function () {
    return new Native(URL.createObjectURL(new Blob([text], { type: "text/javascript" })))
  }
}
"""


def on_config(config):
    """Replace the polyfill script of the theme, which is loaded from the network, after its plugin has run."""
    config.extra["polyfills"] = [WORKER]
    return config


def on_files(files, config):
    """Add MathJax and the worker script."""
    package = distribution("django-static-mathjax")
    for place, name in MATHJAX.items():
        path = package.locate_file(f"mathjax/static/mathjax/{name}")
        files.append(File.generated(config, place, abs_src_path=str(path)))
    (worker,) = (f for f in files if f.src_uri.startswith("assets/javascripts/workers/") and f.src_uri.endswith(".js"))
    files.append(File.generated(config, WORKER, content=START % json.dumps(worker.content_string)))
    return files
