"""quietstar: language models that think before they speak (Quiet-STaR, arXiv 2403.09629).

config       QuietStarConfig: how a model thinks, talks and learns
modeling     QuietStarForCausalLM: a Hugging Face decoder with thoughts
layout       ThoughtLayout: which rows of a pass are text, which are slots, and what they see
attention    the attention function that lets an unmodified decoder think
think        rollout (sampling) and packed pass
talk         mixing head and losses
learn        reward and policy term
objective    rewards, advantages and the terms of the loss
arguments    QuietStarArguments: what training with thoughts adds to TrainingArguments
trainer      QuietStarTrainer on transformers.Trainer
reference    models from the reference implementation's state dicts
"""

from .arguments import QuietStarArguments
from .config import END_TOKEN, START_TOKEN, QuietStarConfig
from .layout import ThoughtLayout
from .modeling import QuietStarForCausalLM, QuietStarOutput
from .reference import load_reference
from .tokens import add_meta_tokens, check_tokenizer
from .trainer import QuietStarTrainer

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
