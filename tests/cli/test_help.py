"""Every command's help fits a screen and ends with an example; shells complete what it lists."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quietstar.cli import app, completion
from quietstar.recipes.recipe import shipped_recipes

WIDTH, LINES = 80, 40
MODULES = {command.__name__.rpartition(".")[2]: command for command in app.COMMANDS}
(SUBPARSERS,) = (
    action for action in app.build_parser()._actions if isinstance(action, argparse._SubParsersAction)
)
NAMES = list(SUBPARSERS.choices)


@pytest.fixture(autouse=True)
def screen(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def help_of(*words: str) -> str:
    parser = app.build_parser()
    return (SUBPARSERS.choices[words[0]] if words else parser).format_help()


def test_every_module_is_a_command() -> None:
    assert sorted(NAMES) == sorted(MODULES)


@pytest.mark.parametrize("words", [[], *([name] for name in NAMES)], ids=lambda words: " ".join(words))
def test_help_fits_a_screen_and_ends_with_an_example(words: list[str]) -> None:
    lines = help_of(*words).splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= WIDTH
    last = " ".join(lines[len(lines) - lines[::-1].index("") :])
    example = re.fullmatch("example: quietstar (.*)", last)
    assert example, last
    given, *_ = example[1].split(" > ")  # what the shell does with it
    args = app.build_parser().parse_args(shlex.split(given))
    assert not words or args.command == words[0]
    assert not hasattr(args, "recipe") or args.recipe in shipped_recipes()


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_says_what_it_is(name: str) -> None:
    for action in SUBPARSERS.choices[name]._actions:
        assert action.help or action.choices, (name, action)


def completed(script: Path, *words: str, cwd: Path) -> set[str]:
    """What bash offers for the last of the words."""
    code = (
        f"source {script}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
        "complete -p quietstar; _shtab_quietstar; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    mark, *offered = done.stdout.splitlines()
    assert mark.endswith(" -F _shtab_quietstar quietstar")
    return set(offered) - {""}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(tmp_path) -> None:
    script = tmp_path / "quietstar.sh"
    script.write_text(completion.script(app.build_parser(), "bash"))
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / "notes.txt").touch()

    def offered(*words: str) -> set[str]:
        return completed(script, "quietstar", *words, cwd=here)

    assert set(NAMES) <= offered("")
    assert offered("tr") == {"train"}
    assert offered("demo", "te") == {"text"}
    assert offered("completion", "z") == {"zsh"}
    assert offered("eval", "--max-n") == {"--max-new-tokens"}
    assert offered("train", "mistral") == {"mistral-7b-lora", "mistral-7b-paper"}
    assert offered("train", "no") == {"notes.txt"}
    assert offered("inspect", "run", "no") == {"notes.txt"}
    assert offered("train", "tiny", "--output", "") == {"sub"}
    assert offered("info", "--j") == {"--json"}


def test_the_script_for_zsh(tmp_path) -> None:
    text = completion.script(app.build_parser(), "zsh")
    assert text.startswith("#compdef quietstar\n")
    for word in (*NAMES, *shipped_recipes(), "--show-thoughts", "_files"):
        assert word in text
    if shutil.which("zsh") is None:
        pytest.skip("there is no zsh to read the script")
    script = tmp_path / "_quietstar"
    script.write_text(text)
    assert subprocess.run(["zsh", "-n", script]).returncode == 0


def test_the_command_prints_the_script(capsys) -> None:
    assert app.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == (
        completion.script(app.build_parser(), "bash").rstrip("\n")
    )


def test_without_shtab(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert app.main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "quietstar: error: completion needs shtab, which is not installed:"
        " pip install 'quietstar[completion]'\n"
    )
