"""Signatures that one can read: at most eight parameters behind the public names."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_PARAMETERS = 8
# Public operators and a public constructor, and what transformers prescribes.
EXEMPT = {
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "linear_sample",
    "mixing_head",
    "sample_tokens",
    "thought_attention",
    "QuietStarForCausalLM.forward",
}


def too_wide(node: ast.AST, inside: str = "") -> list[str]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            found += too_wide(child, f"{child.name}.")
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = child.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            if len(names) - (names[:1] in (["self"], ["cls"])) > MAX_PARAMETERS:
                found.append(inside + child.name)
        found += too_wide(child, inside)
    return found


def test_no_function_has_more_parameters():
    found = set()
    for folder in (ROOT / "python" / "quietstar", ROOT / "quietstar_ext"):
        for path in folder.rglob("*.py"):
            found |= set(too_wide(ast.parse(path.read_text())))
    assert found == EXEMPT
