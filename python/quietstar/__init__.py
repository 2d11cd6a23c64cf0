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

import sys
from typing import TYPE_CHECKING

from quietstar import moved

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

# The command line shows its help without torch and transformers, which take seconds, and imports the
# model before it runs. Whoever else imports the package has it whole; transformers knows the type then.
_IS_COMMAND = "quietstar_command" in sys.modules or ("-m", __name__) in zip(
    sys.orig_argv, sys.orig_argv[1:], strict=False
)

if TYPE_CHECKING or not _IS_COMMAND:
    from quietstar.checkpoints.upstream import load_reference
    from quietstar.config import END_TOKEN, START_TOKEN, QuietStarConfig
    from quietstar.modeling.meta_tokens import add_meta_tokens, check_tokenizer
    from quietstar.modeling.model import QuietStarForCausalLM, QuietStarOutput
    from quietstar.thinking.layout import ThoughtLayout
    from quietstar.training.arguments import QuietStarArguments
    from quietstar.training.trainer import QuietStarTrainer

moved.install()
__getattr__ = moved.package_attributes(
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
    }
)
