"""The site: `make docs` builds it, and a warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generated

import mtp_jax

project, author, release = "mtp_jax", "the authors of mtp_jax", mtp_jax.__version__
project_copyright = "the authors of mtp_jax, Apache-2.0"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
html_theme = "furo"
html_title = "mtp_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Notebooks show the outputs that they were saved with; a test executes them.
nb_execution_mode = "off"

# `name` in a docstring is code, as it is in a page.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": True}
napoleon_google_docstring = True

generated.write()
