"""What a release says of itself: one version everywhere, a changelog, a citation that tools can read."""

import datetime
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
# Of Keep a Changelog 1.1.0.
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_the_changelog_keeps_its_form() -> None:
    assert CHANGELOG.startswith("# Changelog\n")
    _, *versions = re.split(r"^## ", CHANGELOG, flags=re.M)
    dates, numbers = [], []
    for text in versions:
        heading, *lines = text.splitlines()
        found = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading)
        assert found, heading
        numbers.append(tuple(map(int, found[1].split("."))))
        dates.append(datetime.date.fromisoformat(found[2]))
        kinds = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
        assert kinds and kinds == [kind for kind in KINDS if kind in kinds], heading
        for kind in kinds:
            assert re.search(rf"^### {kind}\n\n- \S", text, flags=re.M), (heading, kind)
    assert numbers == sorted(set(numbers), reverse=True) and dates == sorted(dates, reverse=True)


def test_one_version_everywhere() -> None:
    newest = re.findall(r"^## \[(.*)\] - (.*)$", CHANGELOG, flags=re.M)[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == (citation["version"], citation["date-released"])
    assert citation["version"] == PROJECT["version"]


def test_the_citation_can_be_read() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    # What version 1.2.0 of the format requires; all that it has are texts, dates in quotes as well.
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["license"] == PROJECT["license"] and citation["title"] == PROJECT["name"]
    assert [author["name"] for author in citation["authors"]] == [a["name"] for a in PROJECT["authors"]]
    for name in ("message", "abstract", "version", "date-released"):
        assert isinstance(citation[name], str), name
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper) and paper["url"] == PROJECT["urls"]["Paper"]
    for author in paper["authors"]:
        assert set(author) == {"family-names", "given-names"}


def test_one_count_of_families_everywhere() -> None:
    """README and the changelog say what the last comparison of all families (docs/families.md) found."""
    page = (ROOT / "docs" / "families.md").read_text()
    line = r"\*\*(\d+) model types: (\d+) exact, (\d+) refused, .* (\d+) not built\.\*\*"
    (counts,) = re.findall(line, page)
    every, exact, refused, missing = counts
    readme, changes = " ".join((ROOT / "README.md").read_text().split()), " ".join(CHANGELOG.split())
    assert f"{every} model types: {exact} exact, {refused} refused, " in readme
    assert (
        f"{exact} of transformers' {every} causal model types are exact, {refused} are refused"
        in changes
    )
    assert f" {missing} not built." in readme and f", {missing} could not be built" in changes
