"""All that the site needs lies in the site: it is read from a disk as from a server, and asks nobody.

MathJax, one file, comes from the package django-static-mathjax, of which nothing else is used. The search of the theme
runs in a worker, and from file:// browsers start one only from text that they have already.
"""

import json
from importlib.metadata import distribution

from mkdocs.structure.files import File

MATHJAX = "mathjax/static/mathjax/es5/tex-svg.js"
WORKER = "site/worker.js"

START = """if (location.protocol === "file:") {
  const text = %s
  const Native = window.Worker
  window.Worker = function () {
    return new Native(URL.createObjectURL(new Blob([text], { type: "text/javascript" })))
  }
}
"""


def on_config(config):
    """In place of the script for the same purpose that the theme's plugin would load from elsewhere."""
    config.extra["polyfills"] = [WORKER]
    return config


def on_files(files, config):
    """Adds both scripts."""
    mathjax = str(distribution("django-static-mathjax").locate_file(MATHJAX))
    files.append(File.generated(config, "site/mathjax.js", abs_src_path=mathjax))
    (worker,) = (f for f in files if f.src_uri.startswith("assets/javascripts/workers/") and f.src_uri.endswith(".js"))
    # "</" would end the script early, were it ever inlined in a page
    text = json.dumps(worker.content_string)
    files.append(File.generated(config, WORKER, content=START % text))
    return files
