"""quietstar: language models that think before they speak (Quiet-STaR, arXiv 2403.09629).

thinking      layout, attention, rollout and packed pass: the method up to the thoughts
losses        language-model losses, rewards, policy term
modeling      QuietStarForCausalLM: a Hugging Face decoder with thoughts; forward and generate
data          from text to rows of tokens
checkpoints   folders: saved whole, opened, adapters, the reference implementation's
training      QuietStarTrainer and its arguments
evaluation    what thoughts are worth: perplexity, questions, controls
recipes       a run as YAML, built and run
inspect, plan, demos, cli    what the commands show
"""

from typing import TYPE_CHECKING

from quietstar import moved, registration
from quietstar.lazy import lazy_attributes

__all__ = [
    "END_TOKEN",
    "START_TOKEN",
    "QuietStarArguments",
    "QuietStarConfig",
    "QuietStarForCausalLM",
    "QuietStarOutput",
    "QuietStarTrainer",
    "ThoughtLayout",
    "add_meta_tokens",
    "check_tokenizer",
    "load_reference",
]

# Nothing of this is imported before it is asked for: torch and transformers take seconds.
if TYPE_CHECKING:
    from quietstar.checkpoints.upstream import load_reference
    from quietstar.config import END_TOKEN, START_TOKEN, QuietStarConfig
    from quietstar.modeling.meta_tokens import add_meta_tokens, check_tokenizer
    from quietstar.modeling.model import QuietStarForCausalLM, QuietStarOutput
    from quietstar.thinking.layout import ThoughtLayout
    from quietstar.training.arguments import QuietStarArguments
    from quietstar.training.trainer import QuietStarTrainer
else:
    __getattr__ = lazy_attributes(
        __name__,
        {
            "END_TOKEN": "config",
            "START_TOKEN": "config",
            "QuietStarArguments": "training.arguments",
            "QuietStarConfig": "config",
            "QuietStarForCausalLM": "modeling.model",
            "QuietStarOutput": "modeling.output",
            "QuietStarTrainer": "training.trainer",
            "ThoughtLayout": "thinking.layout",
            "add_meta_tokens": "modeling.meta_tokens",
            "check_tokenizer": "modeling.meta_tokens",
            "load_reference": "checkpoints.upstream",
        },
        modules=("checkpoints", "config", "data", "losses", "modeling", "thinking", "training"),
    )


def __dir__() -> list[str]:
    return list(__all__)


moved.install()
registration.install()
