"""Sphinx configuration of the manual."""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

from sphinx.application import Sphinx

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

project = "subquad"
author = "The subquad developers"
copyright = "The subquad developers"  # noqa: A001

version_text = (HERE.parent / "python/subquad/_version.py").read_text("utf-8")
version_match = re.search(r'__version__[^"\n]*"([^"]+)"', version_text)
assert version_match is not None
release = version = version_match[1]

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "generated_table",
    "source_role",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_generated"]
root_doc = "index"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

nitpicky = True
autodoc_member_order = "bysource"
autosummary_generate = False
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

html_theme = "furo"
html_title = f"subquad {release}"
html_static_path: list[str] = []
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def escape_bars(*event: Any) -> None:
    """In docstrings ``|x|`` is a norm, never a substitution of reStructuredText."""
    lines: list[str] = event[-1]
    for i, line in enumerate(lines):
        if "`" not in line and not line.lstrip().startswith((">>>", "...")):
            lines[i] = line.replace("|", r"\|")


def setup(app: Sphinx) -> None:
    """Register the hook, to run before numpydoc's."""
    app.connect("autodoc-process-docstring", escape_bars, priority=400)
