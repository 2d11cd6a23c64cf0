"""docs/tutorial.ipynb runs from top to bottom, and the model in it learns to think."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
# Of processor time, on one thread, which hardly depends on what else the machine does; by the clock the
# test may take ten times as long.
MAX_SECONDS = 180


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that its cells print."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """What its cells show, of one kind."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return [o.data[kind] for o in outputs if kind in o.get("data", {})]


def check(notebook: nbformat.NotebookNode) -> None:
    """Thoughts solve what nothing else does, and are shown."""
    rows = re.findall(r"^(\S.*\S) +accuracy (\S+)", printed(notebook), flags=re.M)
    accuracy = {name: float(value) for name, value in rows}
    assert accuracy.pop("with its thoughts") >= 0.8
    assert len(accuracy) == 3 and max(accuracy.values()) <= 0.35
    assert len(shown(notebook, "image/png")) == 3
    before, after, gains = shown(notebook, "text/html")
    assert "A B D A C" in after and "Thinking gained" in before and gains.startswith("<svg")
    assert re.search(r"^always +C\b.*^truth +C$", printed(notebook), flags=re.S | re.M)


def test_what_is_shown_on_the_site():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check(notebook)
    assert "WARNING" not in printed(notebook)


@pytest.mark.slow
@pytest.mark.timeout(10 * MAX_SECONDS)
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import run_notebook

    seconds = run_notebook.run(NOTEBOOK, tmp_path / "run.ipynb")
    assert seconds < MAX_SECONDS
    check(nbformat.read(tmp_path / "run.ipynb", as_version=4))
