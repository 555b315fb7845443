"""The site: pages in Markdown, docstrings of the installed package, tables of bench/results."""

import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("KERAS_BACKEND", "torch")  # that takes every argument of adamax_ext.keras

project, author = "adamax_ext", "The adamax_ext authors"
project_copyright = author
version = release = version_of("adamax_ext")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "measured"]
exclude_patterns = ["_build", "plots"]
nitpicky = True
# Exceptions of Python, parameters in single backticks, and types in words are nothing to link to.
nitpick_ignore_regex = [
    ("py:exc", ".*"),
    ("py:obj", ".*"),
    ("py:class", "callable|.*arrays? .*|trees"),
]
default_role = "py:obj"  # single backticks in docstrings: a link where there is such a name

autodoc_typehints = "none"  # the docstrings say types in words
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = False
napoleon_use_param = napoleon_use_rtype = False  # words, not classes to link to

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"adamax_ext {release}"
html_show_sphinx = False
html_static_path, html_css_files = ["site.css"], ["site.css"]
toc_object_entries_show_parents = "hide"
