"""The directive ``module-list``: every module of a package with the first sentence of its docstring.

It makes a target of each, so that references in docstrings lead somewhere: those to a class or function
that no page describes lead to its module, if that has it.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"quietstar": ROOT / "python" / "quietstar", "quietstar_ext": ROOT / "quietstar_ext"}


@functools.cache
def modules(package: str) -> dict[str, tuple[Path, str]]:
    """Name, file and docstring of a package's modules, itself first; nothing is imported.

    Raises:
        ValueError: if a module has no docstring.
    """
    folder = PACKAGES[package]
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join((package, *(part for part in parts if part != "__init__")))
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not docstring:
            raise ValueError(f"{path} has no docstring; expected a sentence on what is inside")
        found[name] = path, docstring
    return dict(sorted(found.items()))


class ModuleList(SphinxDirective):
    """``.. module-list:: PACKAGE``"""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        lines = []
        exported = modules(self.arguments[0])[self.arguments[0]][0].read_text(encoding="utf-8")
        for name, (path, docstring) in modules(self.arguments[0]).items():
            self.env.note_dependency(str(path))
            first = " ".join(docstring.partition("\n\n")[0].split())
            # An operator's folder has the name of its function, which is the one to refer to.
            if f'"{name.rpartition(".")[2]}"' not in exported:
                lines += [f".. py:module:: {name}", ""]
            lines += [f"``{name}``", f"    {first}", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def to_its_module(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element
) -> nodes.Element | None:
    """The module of a class or function; None, which warns, where there is no such thing."""
    module, _, name = str(node.get("reftarget", "")).rpartition(".")
    package = module.partition(".")[0]
    if node.get("refdomain") != "py" or package not in PACKAGES or module not in modules(package):
        return None
    tree = ast.parse(modules(package)[module][0].read_text(encoding="utf-8"))
    if name not in {getattr(defined, "name", None) for defined in tree.body}:
        return None
    inside = pending_xref("", reftype="mod", reftarget=module, refdomain="py", refdoc=node["refdoc"])
    python = env.domains.python_domain
    return python.resolve_xref(env, node["refdoc"], app.builder, "mod", module, inside, shown)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("module-list", ModuleList)
    app.connect("missing-reference", to_its_module)
    return {"parallel_read_safe": True}
