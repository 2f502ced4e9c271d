"""The settings of the site: ``sphinx-build -W docs build/site``."""

from __future__ import annotations

import os
import warnings
from typing import Any

# Keras reads this when it is imported, and would ask for TensorFlow.
os.environ.setdefault("KERAS_BACKEND", "torch")

# The frameworks warn about versions and machines when they are imported, which says nothing about the site.
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

import convsv_core

project = "convsv"
author = "The convsv authors"
project_copyright = author
version = release = convsv_core.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["gallery/*.md5", "gallery/*.ipynb", "gallery/*.py", "gallery/*.json", "gallery/*.zip"]
suppress_warnings = ["config.cache"]  # the order of the gallery is a function

# ---- docstrings

default_role = "py:obj"
autodoc_typehints = "none"  # the docstrings name the types
autosummary_generate = True
autosummary_filename_map = {"convsv_core.SVD": "convsv_core.SVD-class"}  # beside svd, where names have no case
templates_path = ["_templates"]
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
autodoc_default_options = {"members": True}


def skip_member(app: Any, what: str, name: str, found: object, skip: bool, options: object) -> bool | None:
    """Leave out the fields of named tuples, which the section Attributes of their classes describes."""
    return True if (getattr(found, "__doc__", None) or "").startswith("Alias for field number") else None


def visit_inline_math(translator: Any, node: Any) -> None:
    """Write a formula in a line of text as MathML, which browsers draw without a script."""
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise SkipNode


def visit_block_math(translator: Any, node: Any) -> None:
    """Write a formula of its own as MathML."""
    translator.body.append(f'<div class="math-block">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def setup(app: Any) -> None:
    """Connect what decides about members and draws formulas."""
    app.connect("autodoc-skip-member", skip_member)
    app.add_html_math_renderer("mathml", (visit_inline_math, None), (visit_block_math, None))


html_math_renderer = "mathml"


# ---- Markdown

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

# ---- the gallery

sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "reset_modules": ("matplotlib",),
    "plot_gallery": "True",
}

# ---- the pages

html_theme = "pydata_sphinx_theme"
html_title = "convsv"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "convsv"},
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "navbar_end": ["theme-switcher"],
    "navigation_depth": 2,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": [], "install": [], "exactness": [], "comparison": [], "paper": []}
