"""All that the site needs lies in the site: it reads from a disk as from a server, and asks nobody.

MathJax, one file, comes from the package django-static-mathjax, of which nothing else is used. The search of the theme
runs in a worker, and on file:// browsers start one from text that they have already, not from a file.
"""

import json
from importlib.metadata import distribution

from mkdocs.structure.files import File

MATHJAX = {"site/mathjax.js": "es5/tex-svg.js", "site/mathjax-license.txt": "LICENSE"}
WORKER = "site/worker.js"

# %s is the text of the worker.
START = """if (location.protocol === "file:") {
  const text = %s
  const Native = window.Worker
  window.Worker = function () {
    return new Native(URL.createObjectURL(new Blob([text], { type: "text/javascript" })))
  }
}
"""


def on_config(config):
    """Runs after the theme's plugin, which for the same purpose names a script that stands elsewhere."""
    config.extra["polyfills"] = [WORKER]
    return config


def on_files(files, config):
    """Adds both scripts."""
    package = distribution("django-static-mathjax")
    for place, name in MATHJAX.items():
        path = package.locate_file(f"mathjax/static/mathjax/{name}")
        files.append(File.generated(config, place, abs_src_path=str(path)))
    (worker,) = (f for f in files if f.src_uri.startswith("assets/javascripts/workers/") and f.src_uri.endswith(".js"))
    files.append(File.generated(config, WORKER, content=START % json.dumps(worker.content_string)))
    return files
