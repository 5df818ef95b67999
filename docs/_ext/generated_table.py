"""The directive ``{generated-table} name``: a table that a program wrote, if it exists.

Includes ``docs/_generated/<name>.md``. Where nobody has generated it, the page says so
and the content of the directive, if any, takes its place: a manual built from a bare
checkout is complete, and never shows stale or invented figures.
"""

from __future__ import annotations

import pathlib
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class GeneratedTable(SphinxDirective):
    """Include a generated Markdown fragment, or say that there is none."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the fragment's nodes."""
        name = self.arguments[0]
        path = pathlib.Path(self.env.srcdir) / "_generated" / f"{name}.md"
        # Noted even when absent, so that an incremental build sees it appear.
        self.env.note_dependency(str(path))
        container = nodes.container()
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            self.state.nested_parse(_string_list(lines, str(path)), 0, container)
        elif self.content:
            self.state.nested_parse(self.content, self.content_offset, container)
        else:
            text = f"No results are stored here yet ({name}.md)."
            container += nodes.paragraph("", "", nodes.emphasis("", text))
        return list(container.children)


def _string_list(lines: list[str], source: str) -> Any:
    from docutils.statemachine import StringList

    return StringList(lines, source)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("generated-table", GeneratedTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
