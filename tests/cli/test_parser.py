"""What cannot be read on a command line: one sentence, with the nearest word that is known."""

import pytest

from quietstar.cli import app


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line that ends at once says, without the beginning."""
    with pytest.raises(SystemExit) as stop:
        app.main(words)
    out, err = capsys.readouterr()
    assert stop.value.code == app.USER_ERROR and out == "" and err.count("\n") == 1, err
    start, end = "quietstar: error: ", " --help)\n"
    assert err.startswith(start) and err.endswith(end), err
    return err[len(start) : -len(end)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("pln", "no command 'pln'; did you mean plan? (quietstar"),
        ("trian tiny", "no command 'trian'; did you mean train? (quietstar"),
        ("plan tiny --gpu-memroy 24G", "has no option --gpu-memroy; did you mean --gpu-memory?"),
        ("eval m --task=gsm8k --tsks x", "quietstar eval has no option --tsks; did you mean --tasks?"),
        ("--verson", "quietstar has no option --verson; did you mean --version? (quietstar"),
        ("demo txt", "expected one of task, text, words, star; did you mean text? (quietstar demo"),
        ("completion sh", "no 'sh'; expected one of bash, zsh"),
        ("plan", "quietstar plan needs RECIPE (quietstar plan"),
        ("eval", "quietstar eval needs MODEL (quietstar eval"),
        ("info foo", "quietstar info takes no 'foo' (quietstar info"),
        ("generate m --seed x", "--seed is 'x'; expected a whole number (quietstar generate"),
        ("generate m --temperature x", "--temperature is 'x'; expected a number (quietstar generate"),
        ("--json info", "--json belongs behind the command, as in quietstar info --json (quietstar"),
        (
            "--output x train tiny a=1",
            "--output belongs behind the command, as in quietstar train tiny a=1 --output x (quietstar",
        ),
        (
            "--quiet --output=x star tiny",
            "--quiet belongs behind the command, as in quietstar star tiny --quiet --output=x (",
        ),
        # The value is a command's name, too.
        ("--output plan train tiny", "as in quietstar train tiny --output plan (quietstar train"),
        (
            "--seed 3 generate m",
            "--seed belongs behind the command, as in quietstar generate m --seed 3",
        ),
        (
            "--max-steps 50 train tiny",
            "quietstar train has no option --max-steps; what a recipe sets is",
        ),
        ("--foo bar", "quietstar has no option --foo (quietstar"),
        ("-q train tiny", "quietstar train has no option -q (quietstar train"),
        ("help", "no command 'help'; did you mean --help? (quietstar"),
        ("version", "no command 'version'; did you mean --version? (quietstar"),
        ("train tiny --output", "--output needs a value (quietstar train"),
        ("train tiny --output --quiet", "--output needs a value (quietstar train"),
        ("train tiny --resume --overwrite", "--resume and --overwrite cannot be combined (quietstar"),
        # As transformers' scripts are called.
        ("train tiny --max-steps 50", "; what a recipe sets is changed without dashes: max_steps=50 ("),
        ("train tiny a=1 --learning_rate=1e-4", " without dashes: learning_rate=1e-4 (quietstar train"),
        ("star tiny --bf16 --quiet", "quietstar star has no option --bf16; what a recipe sets is"),
        (
            "train tiny --output_dir x",
            "quietstar train has no option --output_dir; did you mean --output?",
        ),
    ],
)
def test_one_sentence(words: str, sentence: str, capsys):
    assert sentence in said(words.split(), capsys)


@pytest.mark.parametrize("words", ["--version", "--vers", "--help", "-h", "--help train"])
def test_what_stands_before_a_command(words: str, capsys):
    with pytest.raises(SystemExit) as stop:
        app.main(words.split())
    assert stop.value.code == 0 and capsys.readouterr().out


def test_without_a_near_word_all_are_named(capsys):
    sentence = said(["xyz"], capsys)
    assert all(command.__name__.rpartition(".")[2] in sentence for command in app.COMMANDS)


def test_without_a_command_the_help(capsys):
    assert app.main([]) == app.USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err == app.build_parser().format_help()
