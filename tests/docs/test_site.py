"""The documentation builds without a warning, and what it shows is what the code says."""

import re
import sys
from pathlib import Path

import pytest
from small_recipes import run_python

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

from recipe_reference import argument_meanings, section_keys, type_words  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors, references to what does not exist among them."""
    output = tmp_path_factory.mktemp("site")
    words = ["-W", "-n", "--keep-going", "-q", "-E", "-d", output / "doctrees"]
    run_python("-m", "sphinx", *words, DOCS, output / "html", cwd=ROOT)
    return output / "html"


def test_every_page_is_reached(site: Path):
    built = {path.stem for path in site.glob("*.html")}
    pages = {path.stem for path in DOCS.iterdir() if path.suffix in (".md", ".ipynb")}
    assert pages <= built
    index = (site / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{page}.html"' in index for page in pages - {"index"})


def test_nothing_is_asked_of_the_network(site: Path):
    """Scripts, styles and pictures are files of the site."""
    for path in site.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"', text), path


def test_operators_have_their_arguments(site: Path):
    """Docstrings became lists of parameters, not paragraphs."""
    page = (site / "operators.html").read_text(encoding="utf-8")
    for operator in ("thought_attention", "sample_tokens", "linear_cross_entropy", "mixing_head"):
        body = page.partition(f'id="quietstar_ext.{operator}"')[2].partition("</dl>\n</section>")[0]
        assert "Parameters" in body and "Returns" in body and "Raises" in body, operator


@pytest.mark.parametrize("section", ["model", "data", "thoughts", "training", "adapter", "star"])
def test_recipe_reference(site: Path, section: str):
    """Every key of every section is on its page, with its default."""
    page = (site / "recipes.html").read_text(encoding="utf-8")
    keys = section_keys(section)
    assert keys and all(key.meaning for key in keys)
    assert all(f'id="confval-{section}.{key.name}"' in page for key in keys)


def test_keys_of_the_reference():
    """What a key is said to be; known values of each kind."""
    keys = {f"{s}.{key.name}": key for s in ("model", "thoughts", "training") for key in section_keys(s)}
    assert keys["thoughts.thought_length"][1:3] == ("whole number", "5")
    assert keys["model.name"][1:3] == ("text or null", "null")
    assert keys["model.fused_layers"].type == "auto, compile, liger, off"
    assert keys["model.init_embedding_from"].default == '"---"'
    assert keys["training.thought_schedule"].type == "list of mapping or text or null"
    assert keys["thoughts.clamp_advantage"].default == "true"
    assert "thoughts.start_token_id" not in keys and "training.learning_rate" not in keys


def test_meanings_are_taken_from_docstrings():
    docstring = (
        "It.\n\nArgs:\n    one, two: both\n        of them.\n    three: ``a: b``.\n\nRaises:\n    X."
    )
    both = "both of them."
    assert argument_meanings(docstring) == {"one": both, "two": both, "three": "``a: b``."}
    assert type_words(list[str] | None) == "list of text or null"


def test_a_key_without_a_meaning_is_an_error(monkeypatch: pytest.MonkeyPatch):
    from quietstar.recipes.sections import ModelSection

    monkeypatch.setattr(
        ModelSection, "__doc__", (ModelSection.__doc__ or "").replace("dtype:", "other:")
    )
    with pytest.raises(ValueError, match="ModelSection does not describe dtype"):
        section_keys("model")


def test_figures_are_up_to_date():
    run_python(ROOT / "scripts" / "figures.py", "--check", cwd=ROOT)


def test_rooms_of_the_figure(monkeypatch: pytest.MonkeyPatch):
    """The figure of the architecture has the levels that the import contract holds."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.syspath_prepend(ROOT / "tests" / "house")
    import figures
    import test_import_contract as contract

    levels = tuple({"data", "thinking"} if "thinking" in row else set(row) for row in figures.ROOMS)
    assert levels[::-1] == contract.LEVELS
