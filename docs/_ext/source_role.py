"""The role ``{source}``path``: a file of the repository, checked to exist."""

from __future__ import annotations

import pathlib
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


class SourceRole(SphinxRole):
    """Name a file of the repository."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the name as a literal, with an error where there is no such file."""
        messages = []
        if not (ROOT / self.text).exists():
            messages.append(
                self.inliner.reporter.error(
                    f"{self.text} is not in the repository", line=self.lineno
                )
            )
        return [nodes.literal(self.rawtext, self.text)], messages


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the role."""
    app.add_role("source", SourceRole())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
