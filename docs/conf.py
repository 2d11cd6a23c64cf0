"""How Sphinx builds the documentation: ``python -m sphinx -W -n --keep-going docs OUTPUT``.

Everything comes from this repository; nothing is asked of the network. Notebooks are shown as they are
committed (``tests/docs`` runs them).
"""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "_ext"))

from quietstar.versions import package_versions  # noqa: E402

project = "quietstar"
author = "the quietstar authors"
release = version = package_versions()["quietstar"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "module_list",
    "recipe_reference",
]
exclude_patterns = ["_ext", "_build", "**/.ipynb_checkpoints"]
templates_path: list[str] = []

html_theme = "furo"
html_title = f"quietstar {release}"
html_theme_options = {"navigation_with_keys": True}

# The docstrings of both packages: Google's sections, and single backticks for code.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# Types of other packages: their inventories are on the network. Of ours every reference must resolve.
nitpick_ignore_regex = [("py:.*", r"(?!quietstar).*")]

nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]


def take_changelog(app: Any, page: str, source: list[str]) -> None:
    """The page of changes is the repository's own file, whose links begin at the root."""
    changes = ROOT / "CHANGELOG.md"
    if page == "changelog" and changes.is_file():
        source[0] = changes.read_text(encoding="utf-8").replace("](docs/", "](")


def setup(app: Any) -> None:
    app.connect("source-read", take_changelog)
