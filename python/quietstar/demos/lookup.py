"""``quietstar demo``: Quiet-STaR learns to reason where nothing else does, in minutes on two cores.

The task is in :mod:`quietstar.data.lookup`. Stages, each an ordinary recipe run in a folder of its own,
so that a second call continues where one stopped:

1. ``skill``: a small Llama is trained on the corpus, in which derivations are frequent;
2. ``base``: it is trained on, a little, on the same corpus with few derivations: now it seldom reasons;
3. the arms, all from that base, same steps, same data in the same order, on text without derivations:
   ``full`` Quiet-STaR; no thoughts; and (without ``--quick``) pause tokens in the slots, and thoughts
   without REINFORCE;
4. every arm on held-out problems, and the full one also with shuffled thoughts and with none.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from quietstar.data import lookup
from quietstar.data.lookup import LookupLanguage, TextMix
from quietstar.demos.side_by_side import at_most_threads, side_by_side
from quietstar.errors import UserError
from quietstar.evaluation.perplexity import estimate
from quietstar.evaluation.scores import Thoughts, TokenScores, token_scores
from quietstar.files import METRICS_FILE, read_json, write_json
from quietstar.recipes.recipe import Recipe, load_recipe
from quietstar.versions import package_versions

if TYPE_CHECKING:
    from quietstar.modeling.model import QuietStarForCausalLM

logger = logging.getLogger("quietstar")

# A derivation step's loss on held-out problems that shows that the skill is there; chance is 1.79.
SKILL_NLL = 0.05
SWEEP = (1, 2, 3, 5, 6)
CURVE_FILE = "curve.json"
# Evaluation text: held-out problems, without asides.
EVAL_MIX, EVAL_SEED, EVAL_ROWS, EVAL_LENGTH = TextMix(held_out=True), 10_000, 96, 48


def heldout_rows(language: LookupLanguage, count: int, draw: int = 0) -> lookup.Ints:
    """``count`` rows of held-out problems, [count, EVAL_LENGTH]; each ``draw`` is another text."""
    return language.blocks(count, EVAL_LENGTH, EVAL_MIX, EVAL_SEED + draw)


@dataclass(frozen=True)
class Arm:
    """A row of the table: a run, and with which thoughts it is evaluated."""

    label: str
    run: str
    thoughts: Thoughts = "own"
    quick: bool = False


ARMS = (
    Arm("full Quiet-STaR", "full", quick=True),
    Arm("no thoughts", "no-thoughts", quick=True),
    Arm("full, thoughts of another position", "full", "shuffled", quick=True),
    Arm("full, thoughts switched off", "full", "none", quick=True),
    Arm("thoughts, no REINFORCE", "no-reinforce"),
    Arm("pause tokens in the slots", "pause"),
)
_ARM_SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-thoughts": {"thought_kind": "none"},
    "pause": {"thought_kind": "pause"},
    "no-reinforce": {"policy_weight": 0.0},
}


def stage_recipes(output: Path, seed: int) -> dict[str, Recipe]:
    """The recipe of every run, by the name of its folder."""
    skill = load_recipe("lookup-base")
    corpus = {**(skill.data.lookup or {}), "language": seed}
    skill = skill.changed(data={"lookup": corpus}, training={"seed": seed})
    base = skill.changed(
        name="lookup-base-seldom",
        model={"name": str(output / "skill"), "config": None, "tokenizer": None},
        data={"lookup": {**corpus, "work": 0.03, "seed": 2}, "max_train_blocks": 6400},
        training={"max_steps": 100, "learning_rate": 1e-3, "warmup_steps": 0},
    )
    full = load_recipe("lookup")
    full = full.changed(
        model={"name": str(output / "base"), "base_only": True},
        data={"lookup": {**(full.data.lookup or {}), "language": seed}},
        training={"seed": seed},
    )
    arms = {
        name: full.changed(name=f"lookup-{name}", thoughts=settings)
        for name, settings in _ARM_SETTINGS.items()
    }
    lengths = {
        f"length-{length}": full.changed(
            name=f"lookup-length-{length}", thoughts={"thought_length": length}
        )
        for length in SWEEP
        if length != full.thoughts["thought_length"]
    }
    return {"skill": skill, "base": base, **arms, **lengths}


class SkillCheck(TrainerCallback):
    """Stops pre-training once held-out derivations are predicted nearly surely, and not before."""

    def __init__(self, language: LookupLanguage, first: int = 600, every: int = 50) -> None:
        self.rows = language.derivations(256, EVAL_SEED)
        self.first, self.every = first, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.first and state.global_step % self.every == 0:
            loss = derivation_nll(kwargs["model"], self.rows)
            logger.info("step %d: derivation steps on held-out problems %.3f", state.global_step, loss)
            if loss < SKILL_NLL:
                control.should_training_stop = True


def derivation_nll(model: QuietStarForCausalLM, rows: torch.Tensor | lookup.Ints) -> float:
    """Mean loss of the four derived states in :meth:`LookupLanguage.derivations` rows."""
    scores = token_scores(model, rows, thoughts="none", batch_size=64)
    # Tokens 0-6 are the problem, `?` and the dash, 7 repeats s0, 8-11 are s1-s4.
    return float(scores.nll[:, 7:11].mean())


class Progress(TrainerCallback):
    """Accuracy on a few held-out problems while training, for the figure."""

    def __init__(
        self,
        language: LookupLanguage,
        every: int = 10,
        report: Callable[[int], None] | None = None,
    ) -> None:
        self.rows = heldout_rows(language, 32, draw=1)
        self.every, self.report = every, report
        self.curve: list[tuple[int, float]] = []

    def _look(self, step: int, model: QuietStarForCausalLM) -> None:
        scores = token_scores(model, self.rows, batch_size=32)
        hard = lookup.is_answer(self.rows)[:, 1:]
        self.curve.append((step, float(scores.correct[hard].mean())))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._look(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.report is not None:
            self.report(state.global_step)
        if state.global_step % self.every == 0:
            self._look(state.global_step, kwargs["model"])


def evaluate(
    model: QuietStarForCausalLM, language: LookupLanguage, thoughts: Thoughts = "own"
) -> dict[str, Any]:
    """Score a model on held-out problems: one row of the table, as plain data."""
    rows = heldout_rows(language, EVAL_ROWS)
    scores = token_scores(model, rows, thoughts=thoughts)
    hard = lookup.is_answer(rows)[:, 1:]
    easy = ~lookup.behind_question(rows)[:, 1:]
    return {
        "hard_nll": estimate(scores.nll, hard).to_dict(),
        "accuracy": estimate(scores.correct.astype(float), hard).to_dict(),
        "easy_nll": estimate(scores.nll, easy).to_dict(),
        "correct_chains": _correct_chains(language, rows, scores),
        "mixing_weight_at_question": float(scores.mixing_weight[hard].mean()),
        "mixing_weight_elsewhere": float(scores.mixing_weight[easy].mean()),
    }


def _correct_chains(language: LookupLanguage, rows: lookup.Ints, scores: TokenScores) -> float | None:
    """Share of questions whose thought is exactly the derivation s0 .. s4."""
    if scores.thought_ids is None or scores.thought_ids.shape[2] < lookup.STEPS + 1:
        return None
    place = np.argwhere(lookup.is_answer(rows)[:, 1:])
    row, at = place[:, 0], place[:, 1]  # `?` stands at `at`
    operators = np.stack(
        [rows[row, at - lookup.STEPS + t] - lookup.FIRST_OPERATOR for t in range(lookup.STEPS)], 1
    )
    trace = language.derive(rows[row, at - lookup.STEPS - 1], operators)
    thought = scores.thought_ids[row, at][:, : lookup.STEPS + 1]
    return float((thought == trace).all(1).mean())


def run_arms(
    output: Path,
    *,
    seed: int = 4,
    quick: bool = False,
    sweep: bool = False,
    fresh: bool = False,
    progress: bool = True,
    show: Any = None,
) -> dict[str, Any]:
    """Run and evaluate what is not done yet; returns the content of ``metrics.json``.

    The arms run side by side where there are several processors.

    Args:
        show: called with the metrics so far whenever a row of the table is there.
    """
    from quietstar.modeling.model import QuietStarForCausalLM

    recipes = stage_recipes(output, seed)
    language = LookupLanguage(seed)
    # A second thread saves a quarter of the time, and nothing else runs meanwhile. Sums in another order
    # differ in their last digits, so the table does, too.
    with at_most_threads(2):
        for name in ("skill", "base"):
            _announce(name, recipes[name], output, fresh)
            train(name, output, seed, fresh, progress)
    start = QuietStarForCausalLM.from_pretrained(output / "base")
    skill_nll = derivation_nll(start, language.derivations(256, EVAL_SEED))
    metrics: dict[str, Any] = {"seed": seed, "arms": {}, "by_thought_length": {}, "skill_nll": skill_nll}
    if skill_nll > 4 * SKILL_NLL:
        raise UserError(
            f"the base model did not learn the derivations (loss {skill_nll:.2f} per step on held-out"
            f" problems, expected below {4 * SKILL_NLL}); try another --seed"
        )
    arms = [arm for arm in ARMS if arm.quick or not quick]
    swept = {f"length-{length}" if f"length-{length}" in recipes else "full": length for length in SWEEP}
    names = [*dict.fromkeys([*(arm.run for arm in arms), *(swept if sweep else ())])]
    steps = {}
    for name in names:
        if _announce(name, recipes[name], output, fresh):
            steps[name] = recipes[name].training["max_steps"]
        else:
            train(name, output, seed, fresh, progress)  # which looks whether it is the same
    settings = str(output), seed, fresh, progress
    with (
        side_by_side(train, steps, *settings, logs=output, progress=progress) as wait_for,
        at_most_threads(1),
    ):
        for arm in arms:
            wait_for(arm.run)
            model = QuietStarForCausalLM.from_pretrained(output / arm.run)
            metrics["arms"][arm.label] = evaluate(model, language, arm.thoughts)
            if arm.run == "full" and "thoughts" not in metrics:
                metrics["thoughts"] = some_thoughts(model, language)
            if show is not None:
                show(metrics)
        for name, length in swept.items() if sweep else ():
            wait_for(name)
            model = QuietStarForCausalLM.from_pretrained(output / name)
            metrics["by_thought_length"][length] = evaluate(model, language)
    files = {name: output / name / CURVE_FILE for name in names}
    metrics["accuracy_by_step"] = {
        name: read_json(file)["accuracy_by_step"] for name, file in files.items() if file.is_file()
    }
    metrics["versions"] = package_versions()
    write_json(output / METRICS_FILE, metrics)
    return metrics


def _announce(name: str, recipe: Recipe, output: Path, fresh: bool) -> bool:
    """Say what will be done, and return whether there is anything to do."""
    done = (output / name / METRICS_FILE).is_file() and not fresh
    if done:
        logger.info("%s: done before", name)
    else:
        logger.info("%s: training, %d steps at most", name, recipe.training["max_steps"])
    return not done


def train(
    name: str,
    output: Path | str,
    seed: int,
    fresh: bool,
    progress: bool,
    report: Callable[[int], None] | None = None,
) -> None:
    """One run of :func:`stage_recipes`, and for an arm its accuracy by step.

    Args:
        progress: whether to show a bar.
        report: is told of every step that is done, instead of a bar.
    """
    from quietstar.recipes.run import run_recipe

    transformers_logging.disable_progress_bar()  # its bars for loading files; the Trainer's stays
    folder, language = Path(output) / name, LookupLanguage(seed)
    watch = Progress(language, report=report)
    before = {"skill": [SkillCheck(language)], "base": []}
    result = run_recipe(
        stage_recipes(Path(output), seed)[name],
        folder,
        overwrite=fresh and folder.is_dir(),
        progress=progress and report is None,
        log_lines=False,
        callbacks=before.get(name, [watch]),
    )
    if watch.curve and not result.continued:
        write_json(folder / CURVE_FILE, {"accuracy_by_step": watch.curve})


def some_thoughts(
    model: QuietStarForCausalLM, language: LookupLanguage, count: int = 5
) -> list[dict[str, Any]]:
    """What the model thinks at a few held-out questions, as text."""
    rows = heldout_rows(language, 8, draw=2)
    scores = token_scores(model, rows)
    assert scores.thought_ids is not None
    tokenizer = lookup.build_tokenizer()
    places = np.argwhere(lookup.is_answer(rows)[:, 1:])[:count]
    return [
        {
            "question": tokenizer.decode(rows[row, at - lookup.STEPS - 1 : at + 1]),
            "thought": tokenizer.decode(scores.thought_ids[row, at]),
            "answer": tokenizer.decode(rows[row, at + 1 : at + 2]),
            "correct": bool(scores.correct[row, at]),
            "mixing_weight": float(scores.mixing_weight[row, at]),
        }
        for row, at in places
    ]


def save_page(output: Path, language: LookupLanguage) -> Path:
    """The thoughts of the full arm at held-out problems, as ``thoughts.html``."""
    from quietstar.inspect.page import write_run_page

    return write_run_page(
        output / "full",
        heldout_rows(language, 6, draw=2).tolist(),
        title="Look-up problems: what thinking gained",
        source="held-out rows of the demo; full Quiet-STaR",
        tokenizer=lookup.build_tokenizer(),
    )


def run_demo(
    output: Path,
    *,
    seed: int = 4,
    quick: bool = False,
    sweep: bool = False,
    fresh: bool = False,
) -> None:
    """Run the demo, print the table as it fills, then the outcome."""
    from rich.console import Console

    from quietstar.demos.lookup_report import print_row, print_summary, save_figure

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        "Problems like [b]A u x w z ?[/b] need four look-ups in a row; a model of two layers cannot do"
        " them in one step.\nIt has seen such derivations in its corpus, seldom; the text that it"
        " now trains on has none."
    )
    metrics = run_arms(
        output,
        seed=seed,
        quick=quick,
        sweep=sweep,
        fresh=fresh,
        show=functools.partial(print_row, console),
    )
    figure = save_figure(metrics, output)
    print_summary(console, metrics)
    page = save_page(output, LookupLanguage(seed))
    console.print(f"\nmetrics: {output / METRICS_FILE}\nfigure:  {figure}\npage:    {page}")
    console.print(
        f'model:   AutoModelForCausalLM.from_pretrained("{output / "full"}") after import quietstar',
        soft_wrap=True,
    )
