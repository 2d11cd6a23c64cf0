"""Every block of code of README and docs is run, or has a stand-in in ``stand_ins.py``."""

import ast
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from evaluation_cases import CSQA_ROWS, GSM_ROWS
from markdown_it import MarkdownIt
from small_recipes import CONTENT, run_cli

from quietstar import QuietStarForCausalLM
from quietstar.recipes.recipe import SECTIONS, load_recipe, parse_recipe
from quietstar.values import load_yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from stand_ins import ELSEWHERE, NAMES, OTHER, SHORT, Elsewhere, Other  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SVAMP_ROWS = [
    {"Body": f"Tom has {n} eggs.", "Question": "How many?", "Answer": n, "Equation": f"( {n} + 0 )"}
    for n in (3, 4)
]
NOTES = "import sys\n\n\ndef main(argv):\n    for name in argv:\n        print(name)\n    return 0\n" * 4


class Block(NamedTuple):
    """A block of code of a page; ``line``: where it begins."""

    page: str
    line: int
    language: str
    code: str


def blocks() -> Iterator[Block]:
    """All blocks; what Sphinx itself reads (``{directive}``) is not one."""
    for path in PAGES:
        for token in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8")):
            if token.type in ("fence", "code_block") and not token.info.startswith("{"):
                assert token.map is not None
                yield Block(path.name, token.map[0] + 1, token.info, token.content)


def commands(code: str) -> list[str]:
    """The commands of a block for a shell, each on one line and without its comment."""
    lines = code.replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+# .*$", "", line).strip() for line in lines if line.strip()]


def find(kinds: tuple[Any, ...], page: str, text: str) -> Any:
    """The one stand-in for a command, by its beginning, or for another block, by what it holds."""
    where = [k for k in kinds if k.page == page]
    fits = [k for k in where if text.startswith(k.block)] or [
        k for k in where if "\n" in text and k.block in text
    ]
    assert len(fits) <= 1, f"{page}: several stand-ins for {text!r}: {fits}"
    return fits[0] if fits else None


def short(command: str) -> list[str]:
    """A command's words after ``quietstar``, with small models and those that make it short."""
    words = shlex.split(command.partition(" > ")[0])  # where the output goes is the shell's business
    if words[0] != "quietstar":
        raise ValueError(f"{command!r} is not run here; expected a stand-in for it in stand_ins.py")
    words = [NAMES.get(word, word) for word in words[1:]]
    words = [re.sub(r"^(model.name=)(.*)$", lambda m: m[1] + NAMES.get(m[2], m[2]), w) for w in words]
    return words + SHORT.get(words[0], [])


BLOCKS = list(blocks())
IDS = [f"{block.page}-{block.line}" for block in BLOCKS]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, stdlib_tokenizer_once) -> Path:
    """What a reader of the pages has: a run, a plain decoder, texts and questions."""
    folder = tmp_path_factory.mktemp("reader")

    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for name in ("gsm8k", "csqa"):
        lines(f"{name}.jsonl", GSM_ROWS if name == "gsm8k" else CSQA_ROWS)
    for name in ("test.jsonl", "svamp/train.jsonl"):
        lines(name, SVAMP_ROWS)
    kept = [{"prompt": f"Q: {n}?\nA:", "completion": f" {n}\n"} for n in range(8)]
    lines("quietstar-runs/star-svamp/iteration-01/kept.jsonl", kept)
    (folder / "my").mkdir()
    for name in ("notes.txt", "text.txt", "my/own.txt"):
        (folder / name).write_text(NOTES, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "papers", folder / "docs" / "papers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_cli(*short("quietstar train tiny max_steps=50"))
    model = QuietStarForCausalLM.from_pretrained(folder / "quietstar-runs" / "tiny")
    model.base.save_pretrained(folder / "plain")
    for path in (folder / "quietstar-runs" / "tiny").glob("token*"):
        shutil.copy(path, folder / "plain")
    return folder


@pytest.fixture
def reader(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(workplace, tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    return tmp_path / "reader"


@pytest.mark.parametrize("block", BLOCKS, ids=IDS)
def test_block(block: Block, reader: Path):
    page = block.page
    if block.language == "bash":
        for command in commands(block.code):
            if find(ELSEWHERE, page, command) is None:
                for old, new in getattr(find(OTHER, page, command), "words", ()):
                    assert old in command
                    command = command.replace(old, new)
                run_cli(*short(command))
    elif find(ELSEWHERE, page, block.code) is not None:
        pass
    elif block.language == "python":
        code = block.code
        for name, small in NAMES.items():
            code = code.replace(f'"{name}"', f'"{small}"')
        exec(compile(code, f"{page}:{block.line}", "exec"), {"__name__": "__main__"})
    elif block.language == "yaml":
        given = load_yaml(block.code, page)
        recipe = parse_recipe({**CONTENT, **given}, page)
        assert all(key in SECTIONS or key == "name" for key in given)
        assert load_yaml(recipe.to_yaml(), page) == recipe.to_dict()
    else:
        pytest.fail(f"a block of kind {block.language or 'none'!r} is neither run nor in stand_ins.py")


@pytest.mark.parametrize("entry", [*OTHER, *ELSEWHERE], ids=lambda e: f"{e.page}: {e.block[:40]}")
def test_stand_ins_stand_for_something(entry: Other | Elsewhere):
    """Their blocks are on the pages, and the tests that they name exist."""
    on_page = [block for block in BLOCKS if block.page == entry.page]
    texts = [c for block in on_page if block.language == "bash" for c in commands(block.code)]
    texts += [block.code for block in on_page if block.language != "bash"]
    assert any(find((entry,), entry.page, text) for text in texts)
    if isinstance(entry, Elsewhere):
        file, _, name = entry.test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {getattr(node, "name", None) for node in ast.walk(tree)}, entry.test


def test_an_unlisted_block_would_fail():
    """Neither a command that is not ours nor a language without a runner passes."""
    with pytest.raises(ValueError, match="'make install' is not run here; expected a stand-in"):
        short("make install")
    assert find(ELSEWHERE, "scaling.md", "torchrun --nproc-per-node 16 x") is None
    assert {block.language for block in BLOCKS} <= {"bash", "python", "yaml", "json", "console", "text"}


def test_extras_exist():
    """Extras that pages name are those of the package, and the table of the first page has all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        extra
        for path in PAGES
        for extras in re.findall(r"(?:quietstar|\"\.)\[([\w,]+)\]", path.read_text("utf-8"))
        for extra in extras.split(",")
    }
    assert {"gguf", "completion"} <= named <= set(project["optional-dependencies"])
    table = (
        (ROOT / "docs" / "index.md").read_text("utf-8").partition("| extra |")[2].partition("\n\n")[0]
    )
    cells = " ".join(line.split(" | ")[0] for line in table.splitlines())
    assert set(re.findall(r"`([\w]+)`", cells)) == set(project["optional-dependencies"])


def test_ci_runs_the_line_of_the_readme():
    """What CI runs is the first line after README's mark, which is the one that stands there alone."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = commands(text.partition("<!-- ci -->\n```bash\n")[2].partition("```")[0])
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert line.endswith("pytest --slow -n auto") and "<!-- ci -->" in script and "README.md" in script


def test_recipes_of_the_pages_are_shipped():
    """Names behind ``quietstar train``, ``plan`` and ``star``, but those for the reader's own."""
    for block in BLOCKS:
        for command in commands(block.code) if block.language == "bash" else ():
            found = re.search(r"quietstar (?:train|plan|star) (\S+)", command)
            if found and found[1] not in NAMES and not found[1].startswith("docs/"):
                assert load_recipe(found[1]).name == found[1]
