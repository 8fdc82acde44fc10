"""MkDocs hook that shows the version of jaxseq in the footer of every page."""

import jaxseq


def on_config(config):
    """Set the text of the footer."""
    config.copyright = f"jaxseq {jaxseq.__version__}"
    return config
