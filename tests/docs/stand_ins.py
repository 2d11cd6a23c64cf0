"""What stands in for the examples of README and docs that cannot run as written, or take too long.

Every block of code is run by ``test_blocks.py`` in a folder with a small model and small files, unless
it is listed here. A command is named by its page and its beginning, any other block by a part of it.
"""

from __future__ import annotations

from typing import NamedTuple

# Words put behind every command of these, so that it takes seconds.
SHORT = {
    "train": [
        *("--quiet", "max_steps=2", "block_size=64", "max_train_blocks=8", "use_cpu=true"),
        *("eval_blocks=0", "eval_strategy=no"),
        *("per_device_train_batch_size=2", "gradient_accumulation_steps=1", "num_rationales=2"),
    ],
    "generate": ["--device", "cpu", "--max-new-tokens", "4"],
    "eval": ["--device", "cpu", "--quiet", "--limit", "2", "--block-size", "32"],
    "inspect": ["--device", "cpu", "--samples", "1"],
}
# Names that pages use for what the reader has, and what the test's folder has.
NAMES = {
    "MODEL": "quietstar-runs/tiny",
    "RECIPE": "tiny",
    "SmolLM2-135M-Instruct.Q4_1.gguf": "plain",
    "model.gguf": "plain",
}


class Other(NamedTuple):
    """The same with other words: hub names, which no test asks for, have local files instead."""

    page: str
    block: str
    words: tuple[tuple[str, str], ...]


class Elsewhere(NamedTuple):
    """What a test of its own runs or compares, or something as near to it as can be had."""

    page: str
    block: str
    test: str


QUESTIONS = "--data gsm8k=gsm8k.jsonl --data csqa=csqa.jsonl"
LOCAL = ("lora", "lora model.name=plain")
OTHER = (
    Other("models.md", "quietstar eval SmolLM2", (("gsm8k,csqa", f"gsm8k,csqa {QUESTIONS}"),)),
    Other("models.md", "quietstar eval quietstar-runs", (("gsm8k,csqa", f"gsm8k,csqa {QUESTIONS}"),)),
    Other(
        "star.md", "quietstar train smollm2", (("data.name=null", "model.name=plain data.name=null"),)
    ),
    Other(
        "results.md",
        "quietstar train smollm2",
        (("data.name=null", "model.name=plain data.name=null"), ("train.txt", "notes.txt")),
    ),
    Other("scaling.md", "quietstar plan mistral-7b-lora", (LOCAL,)),
    Other("troubleshooting.md", "quietstar plan mistral-7b-lora", (LOCAL,)),
    # The test's folder has a run of this name already.
    Other("README.md", "quietstar train tiny", (("tiny", "tiny --overwrite"),)),
    Other("recipes.md", "quietstar train tiny", (("tiny", "tiny --overwrite"),)),
    Other(
        "troubleshooting.md",
        "quietstar train tiny thoughts",
        (("train tiny", "train tiny --overwrite"),),
    ),
)
BUILD = "tests/native/test_build_backend.py"
INSTALLED = "tests/native/test_build.py::test_the_installed_package_is_tested"
DEMO = "tests/data/test_lookup.py::test_thoughts_learn_what_nothing_else_does"
TWO = "tests/training/test_distributed.py"
README = "tests/house/test_readme.py"
WORDS = "tests/demos/test_demo_words.py::test_a_whole_demo_and_its_continuation"
EVALUATION = "tests/evaluation/test_command.py::test_two_processes_share_the_items"
TERMS = "tests/losses/test_objective.py"
LOG = "tests/operators/test_call_log.py::test_every_operator_is_logged"
HERE = "tests/docs/test_blocks.py"
ELSEWHERE = (
    # Installing: these tests run against what was installed; others build with and without a toolkit.
    Elsewhere("README.md", "pip install -c", INSTALLED),
    Elsewhere("index.md", "pip install -c", INSTALLED),
    Elsewhere("README.md", "QUIETSTAR_CUDA=on", f"{BUILD}::test_kernels_compile_with_nothing_but_pip"),
    Elsewhere("models.md", "pip install 'quietstar[gguf]'", f"{HERE}::test_extras_exist"),
    # The demo, with the thoughts that README shows; the line that runs all tests.
    Elsewhere("README.md", "python3 -m venv .venv &&", DEMO),
    Elsewhere("README.md", "$ quietstar generate", DEMO),
    Elsewhere("README.md", "python3 -m venv .venv-test", f"{HERE}::test_ci_runs_the_line_of_the_readme"),
    # Several processes: two on this machine.
    Elsewhere("scaling.md", "torchrun --nproc-per-node 8", f"{TWO}::test_the_command_in_two_processes"),
    Elsewhere("scaling.md", '"zero_optimization"', f"{TWO}::test_deepspeed_ends_where_one_process_does"),
    # Hours of measuring, with small sizes.
    Elsewhere("results.md", "quietstar eval SmolLM2", EVALUATION),
    Elsewhere(
        "results.md", "python -m benchmarks", f"{README}::test_the_tables_are_those_of_the_results"
    ),
    Elsewhere("results.md", "python scripts/words_experiment.py", WORDS),
    # Python with sizes to look at.
    Elsewhere("README.md", "linear_cross_entropy", f"{README}::test_operators_from_plain_pytorch"),
    Elsewhere("api.md", "QuietStarTrainer(", f"{README}::test_training"),
    # Formulas and a listing.
    Elsewhere("objectives.md", "language_loss = nll_weight", f"{TERMS}::test_weights_of_the_terms"),
    Elsewhere("how_it_works.md", "mixed prediction = ", f"{TERMS}::test_mixing_floor"),
    Elsewhere("architecture.md", "linear_sample fused", LOG),
    # The recipe from local files; its loop is run with a smaller model.
    Elsewhere("results.md", "quietstar star star", "tests/star/test_recipes.py::test_svamp_s_problems"),
    Elsewhere("star.md", "run/iteration-03/written.jsonl", "tests/star/test_loop.py::test_the_command"),
)
