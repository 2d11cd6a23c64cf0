"""Links of pages to files of the repository that are no pages: shown as the file's name.

On a forge such a link opens the file; the site, which may be read anywhere, has no address for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parents[2]


def plain_file(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element
) -> nodes.Element | None:
    """A file of the repository as its name; None, which warns, where there is no such file."""
    page = Path(env.doc2path(node["refdoc"])).resolve()
    target = str(node.get("reftarget", "")).partition("#")[0]
    path = (page.parent / target).resolve()
    if target and path.exists() and path.is_relative_to(ROOT):
        return nodes.literal(text=str(path.relative_to(ROOT)))
    return None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("missing-reference", plain_file)
    return {"parallel_read_safe": True}
