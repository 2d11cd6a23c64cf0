"""Which room may import which: only downwards (docs/architecture.md), and no circle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = Path(__file__).parents[2] / "python" / "quietstar"
# From the bottom. Rooms of one level do not import each other; what is in no room is at the bottom.
LEVELS = (
    {"thinking", "data"},
    {"losses"},
    {"modeling"},
    {"checkpoints"},
    {"training"},
    {"evaluation"},
    {"recipes"},
    {"inspect", "plan", "star"},
    {"demos"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS, 1) for room in rooms}
# Modules that stand for the whole package, and the one arrow that points upward: a public classmethod.
FRONT = {"__init__", "__main__", "moved"}
EXEMPT = {("modeling.model", "checkpoints.upstream")}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: set[str]) -> Iterator[tuple[str, bool]]:
    """The modules of the package that one imports, and whether at once; not for annotations alone."""
    tree = ast.parse(path.read_text())
    annotations = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in annotations or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}: a relative import"
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in targets:
            inside = target.removeprefix("quietstar.")
            if inside == target:
                continue
            while inside and inside not in known:
                inside = inside.rpartition(".")[0]
            if inside:
                yield inside, node in tree.body


def room(name: str) -> str:
    return name.partition(".")[0] if name.partition(".")[0] in LEVEL else ""


def test_arrows_point_downwards():
    known = modules()
    wrong = []
    for name, path in known.items():
        if name in FRONT:
            continue
        for target, _ in imported(name, path, set(known)):
            mine, theirs = room(name), room(target)
            if mine != theirs and LEVEL.get(mine, 0) <= LEVEL.get(theirs, 0):
                wrong.append((name, target))
    assert set(wrong) == EXEMPT


def test_there_is_no_circle():
    known = modules()
    graph = {
        name: {target for target, at_once in imported(name, path, set(known)) if at_once} - {name}
        for name, path in known.items()
        if name not in FRONT
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) >= len(graph) > 100


def test_tests_see_the_installed_package():
    """Not the sources in the repository's root, which have no native module where a test imports
    benchmarks by name, or starts Python there with the working folder on its path."""
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] == "benchmarks" for name in found), path
            if isinstance(node, ast.List | ast.Tuple):
                words = [ast.unparse(word) for word in node.elts[:3]]
                unsafe = ["sys.executable", "'-c'"], ["sys.executable", "'-m'", "'quietstar'"]
                assert words[:2] != unsafe[0] and words != unsafe[1], (path, words)
