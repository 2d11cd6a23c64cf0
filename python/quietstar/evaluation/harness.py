"""lm-evaluation-harness with Quiet-STaR models (optional: ``pip install 'quietstar[eval]'``).

Importing this module registers the model type ``quietstar``. The harness finds no plug-ins by itself,
so its command line is reached through this module:

    python -m quietstar.evaluation.harness run --model quietstar --model_args pretrained=DIR --tasks ...
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quietstar.data.hub import NotOnHub, cached_if_unreachable
from quietstar.errors import blaming, reason
from quietstar.evaluation.perplexity import spread
from quietstar.evaluation.table import grid

# Registers the architecture with transformers, so that the harness can load it by name.
from quietstar.modeling.model import QuietStarForCausalLM
from quietstar.thinking.slots import depth_of_end

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register_model("quietstar")
class QuietStarLM(HFLM):  # type: ignore[misc, unused-ignore]
    """A Quiet-STaR model in the harness: thinks before every token that is scored or generated.

    ``thoughts=False`` measures the same weights without thinking. All other arguments are HFLM's.
    """

    def __init__(self, pretrained: Any, thoughts: bool = True, **arguments: Any):
        # transformers loads the decoder with its own attention; nothing to choose from.
        super().__init__(pretrained, backend="causal", **arguments)
        if not isinstance(self.model, QuietStarForCausalLM):
            raise ValueError(
                f"pretrained is a {type(self.model).__name__}; expected a Quiet-STaR model (others:"
                " --model hf)"
            )
        if not thoughts:
            self.model.config.thought_kind = "none"

    @property
    def max_length(self) -> int:
        """Tokens of text: the last of them still needs positions for its thought."""
        config = self.model.config
        return int(super().max_length) - (depth_of_end(config) if config.thinks else 0)


class Tasks(TaskManager):  # type: ignore[misc, unused-ignore]
    """The harness's tasks, with the task files of a folder if one is given.

    Their data are read once, so that what is missing can be said before a model is opened.
    """

    def __init__(self, include: Path | None = None):
        super().__init__(include_path=None if include is None else str(include))
        self._loaded: dict[tuple[str, ...], Any] = {}

    def load(self, task_list: Sequence[str]) -> Any:
        """The tasks of these names, with their data.

        Raises:
            UserError: for a task that cannot be read, and data that are not to be had.
        """
        names = tuple(task_list)
        if names not in self._loaded:
            what = f"cannot load {'task' if len(names) == 1 else 'tasks'} {', '.join(names)}"
            with blaming(what), cached_if_unreachable() as why_not:
                try:
                    self._loaded[names] = super().load(list(names))
                except ConnectionError as error:
                    raise NotOnHub(
                        f"{what}: {reason(error)}; the Hugging Face Hub cannot be reached ({why_not})"
                        if why_not
                        else f"{what}: {reason(error)}"
                    ) from error
        return self._loaded[names]


def run_tasks(
    model: QuietStarForCausalLM | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    manager: Tasks,
    *,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Run tasks of the harness; per task its metrics and their standard errors, as plain numbers."""
    import lm_eval

    kind = QuietStarLM if isinstance(model, QuietStarForCausalLM) else HFLM
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of arguments that it would read from a model's name
    try:
        lm = kind(model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        logger.setLevel(level)
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    # "acc,none" and "acc_stderr,none": metric and filter; "alias" and the like are text.
    return {
        task: {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }


def render(name: str, result: dict[str, float]) -> str:
    """One task's result as a table."""
    rows = []
    for key, value in result.items():
        metric, _, kind = key.partition(",")
        if metric != "sample_len" and not metric.endswith("_stderr"):
            error = result.get(f"{metric}_stderr,{kind}")
            rows.append([metric, spread({"mean": value, "standard_error": error}, ".4f")])
    return grid(f"{name} (lm-evaluation-harness)", ["", "value ± standard error"], rows)


def main() -> None:
    """The harness's own command line, with the model type ``quietstar`` known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
