"""How Sphinx builds the site of these pages: ``sphinx-build -W --keep-going -b html docs DIR``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
# The docstrings are those of this tree; the compiled module is not needed to read them.
sys.path[:0] = [str(DOCS / "_site"), str(DOCS.parent / "python")]

project = "broadhead"
author = "The broadhead authors"
copyright = author
_pyproject = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
version = release = re.search(r'^version = "(.+)"$', _pyproject, re.MULTILINE)[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "repository_pages"]
root_doc = "index"
exclude_patterns = ["_site"]
html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"broadhead {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# A reader of the site has no use for the source of a page.
html_copy_source = False
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#0b6b63", "color-brand-content": "#0b6b63"},
    "dark_css_variables": {"color-brand-primary": "#4cc4b6", "color-brand-content": "#4cc4b6"},
}

# The anchors of headings are those of GitHub, so that one link serves the repository and the site.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# Docstrings say shapes and types in words. Signatures are long: one argument a line.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# External links are a check of their own (-b linkcheck): a host that is down says nothing about these pages.
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors = False

copybutton_exclude = ".linenos, .gp, .go"
