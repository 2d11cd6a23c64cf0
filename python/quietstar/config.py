"""Configuration of a Quiet-STaR model: the thought settings around a nested decoder configuration."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import logging
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from quietstar.errors import UserError, did_you_mean
from quietstar.think_rules import parse_rule

logger = logging.getLogger("quietstar")

START_TOKEN = "<|startthought|>"
END_TOKEN = "<|endthought|>"

ACTIVATIONS = ("identity", "sigmoid")
# Of the first mixing weight with "identity": beyond, a thought has more to say than any model does.
LARGEST_WEIGHT = 100
THOUGHT_KINDS = ("sampled", "pause", "none")
# What tools look for in a model's configuration and the decoder's own answers.
DECODER_FIELDS = {
    *("bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range"),
    *("intermediate_size", "layer_types", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "pad_token_id", "rope_parameters", "sliding_window"),
    *("use_cache", "vocab_size"),
}
REWARDS = ("mixture-gain", "base-gain", "information-gain", "probability-gain")
ADVANTAGES = ("mean", "leave-one-out", "normalized")
POLICY_MEANS = ("rewarded", "paper")


# What single settings must be: their names, a check, and its words.
_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("thought_length", "talk_length", "num_rationales"),
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        "a whole number >= 1",
    ),
    (("reinforce_temperature", "embedding_scale"), lambda value: value > 0, "a number > 0"),
    (
        ("thought_temperature", "policy_weight", "nll_weight", "entropy_bonus"),
        lambda value: 0 <= value < math.inf,
        "a number >= 0, not infinite",
    ),
    (("base_loss_weight", "mixing_floor"), lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    (("mixing_activation",), ACTIVATIONS.__contains__, f"one of {ACTIVATIONS}"),
    (("thought_kind",), THOUGHT_KINDS.__contains__, f"one of {THOUGHT_KINDS}"),
    (("reward",), REWARDS.__contains__, f"one of {REWARDS}"),
    (("advantage",), ADVANTAGES.__contains__, f"one of {ADVANTAGES}"),
    (("policy_mean",), POLICY_MEANS.__contains__, f"one of {POLICY_MEANS}"),
    (
        ("clamp_advantage", "disable_dropout", "self_check"),
        lambda value: isinstance(value, bool),
        "True or False",
    ),
)


class QuietStarConfig(PretrainedConfig):
    """How a model thinks, talks and learns. All fields but the token ids may change between steps.

    The defaults suit small models; :meth:`from_reference` gives the constants of the paper's code.

    Args:
        text_config: configuration of the decoder that is wrapped (any causal language model); None:
            the settings alone, of which no model can be made.
        thought_length: T, sampled tokens in a thought; the two meta tokens are not counted.
        talk_length: K, true tokens predicted after a thought.
        num_rationales: R, thoughts sampled per position while training.
        thought_temperature: temperature at which thoughts are sampled while training.
        reinforce_temperature: temperature of the log-probabilities in the policy term.
        policy_weight: weight of the policy term in the loss; 0 turns REINFORCE off.
        nll_weight: weight of the language-model loss in the sum; 0 leaves REINFORCE alone.
        base_loss_weight: share of the base prediction's cross entropy in the language-model loss; the
            talk steps share the rest.
        reward: what a thought earns, summed over the talk steps: the loss without it less the loss with
            it. ``"mixture-gain"`` (the paper's code): of the mixed prediction, against the base
            prediction; ``"base-gain"``: of the thought's own prediction (mixing weight 1), against the
            base prediction; ``"information-gain"`` (RLP): the same, against a slowly following copy of
            the model that does not think. Or ``"probability-gain"``: the probability of all these tokens
            with the thought (the mixed prediction) less that without.
        advantage: the baseline within the rationales of a position: ``"mean"`` (reward less the mean),
            ``"leave-one-out"`` (less the mean of the others, RLP's) or ``"normalized"`` (less the mean,
            over the standard deviation, GRPO's).
        clamp_advantage: set negative advantages to 0.
        policy_mean: the thoughts that the means of the policy term and the entropy bonus are over:
            ``"rewarded"`` (those of text positions with at least one token to be rewarded for: padding
            changes nothing) or ``"paper"`` (the paper's code: all N - 1 - talk_length positions of a
            row, zeros and padding included; a thought with fewer than talk_length tokens ahead of it
            earns nothing), which a folder saved before there was this field keeps.
        entropy_bonus: weight of the mean entropy (nats) of the distributions that thought tokens are
            sampled from, taken off the loss.
        embedding_scale: the start and end embeddings are stored divided by this, so that Adam moves
            them that much faster than the rest.
        mixing_activation: ``"identity"`` (the paper: an unbounded weight) or ``"sigmoid"``.
        mixing_floor: f, from 0 to 1: a sigmoid weight s becomes f + (1 - f) s; with 1 the thought's
            prediction stands alone.
        think_at: which positions think: ``"all"``, ``"stride:k"`` (every k-th of a document),
            ``"random:p"`` (a share p of a row's text tokens, drawn anew each step),
            ``"entropy-share:p"`` (the share p with the highest base entropy; ``"entropy:p"`` for short),
            ``"completion"`` (before the first token of each completion that is not blank) or
            ``"loss:x:y"`` (where the base prediction's loss of the true next token is from x to y nats).
            The grammar is that of ``thinking`` in generation (:mod:`quietstar.think_rules`).
        thought_kind: ``"sampled"``; ``"pause"`` (a control: the start embedding stands in every thought
            slot, nothing is sampled); ``"none"`` (a control: plain language modelling).
        disable_dropout: switch off, in training mode, what the decoder and its adapters draw at random
            (dropout, layer drop, a router's jitter; :mod:`quietstar.thinking.noise`), because a thought
            has to be scored by the network that sampled it. With False, only ``thought_kind="none"``
            can be trained while there is such noise.
        start_token_id, end_token_id: the meta tokens' ids; they are never sampled.
        self_check: before the first thoughts, compare a few tokens of a thought with the decoder's own
            run of them, and reject a decoder whose thoughts would be wrong.
    """

    model_type = "quietstar"
    sub_configs = {"text_config": AutoConfig}

    thought_length: int = 5
    talk_length: int = 1
    num_rationales: int = 2
    thought_temperature: float = 1.0
    reinforce_temperature: float = 1.0
    policy_weight: float = 10.0
    nll_weight: float = 1.0
    base_loss_weight: float = 0.5
    reward: str = "mixture-gain"
    advantage: str = "mean"
    clamp_advantage: bool = True
    policy_mean: str = "rewarded"
    entropy_bonus: float = 0.0
    embedding_scale: float = 100.0
    mixing_activation: str = "identity"
    mixing_floor: float = 0.0
    think_at: str = "all"
    thought_kind: str = "sampled"
    disable_dropout: bool = True
    start_token_id: int | None = None
    end_token_id: int | None = None
    self_check: bool = True

    def __init__(
        self, text_config: PretrainedConfig | dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ):
        # The fields may be given by position, in the order in which they stand above.
        for name, value in zip(settings(), args, strict=False):
            if name in kwargs:
                raise TypeError(f"{name} was given by position and by name")
            kwargs[name] = value
        if len(args) > len(settings()):
            raise TypeError(f"{len(args) + 1} settings were given by position; expected fewer")
        check_fields(kwargs)
        if isinstance(text_config, dict):
            if "model_type" not in text_config:
                raise ValueError("text_config has no model_type; expected that of a decoder")
            text_config = AutoConfig.for_model(**text_config)
        decoder: Any = text_config
        for name in DECODER_FIELDS & kwargs.keys() if decoder is not None else ():
            setattr(decoder.get_text_config(decoder=True), name, kwargs.pop(name))
        for name in settings():
            setattr(self, name, kwargs.pop(name, getattr(type(self), name)))
        kwargs.setdefault("tie_word_embeddings", getattr(text_config, "tie_word_embeddings", False))
        chosen = {
            n: kwargs[n] for n in ("attn_implementation", "experts_implementation") if kwargs.get(n)
        }
        super().__init__(**kwargs)
        # Behind the base class, which would set these two to None in every part that it finds.
        self.text_config = text_config
        for name, value in chosen.items():
            setattr(self, f"_{name}", value)
        self.check_thoughts()

    def __getattr__(self, name: str) -> Any:
        """The decoder's own answer to what tools look for (:data:`DECODER_FIELDS`); not stored here."""
        if name not in DECODER_FIELDS or self.__dict__.get("text_config") is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            return getattr(self.get_text_config(decoder=True).get_text_config(decoder=True), name)
        except RuntimeError as error:  # a field that differs from layer to layer
            raise AttributeError(f"{type(self).__name__} has no single {name!r}: {error}") from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DECODER_FIELDS and self.__dict__.get("text_config") is not None:
            setattr(self.get_text_config(decoder=True).get_text_config(decoder=True), name, value)
            return
        # transformers sets attributes of its own on a configuration; a misspelt field is an error.
        if not hasattr(self, name) and not hasattr(self.__dict__.get("text_config"), name):
            _check_misspelt(name)
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; a field of a newer version is kept as it is, with a warning.

        Raises:
            TypeError: for a keyword that is a misspelt field.
            ValueError: for the settings of another kind of model.
        """
        check_model_type(config_dict, cls.model_type)
        for name in kwargs:
            _check_misspelt(name)
        newer = {name: value for name, value in config_dict.items() if not _is_known(name)}
        if newer:
            logger.warning(
                "the configuration has %s, which this version of quietstar does not know and makes no"
                " use of",
                ", ".join(newer),
            )
        known = {k: v for k, v in config_dict.items() if k not in newer}
        # Version 0.1.0 had no such field, and counted every thought; its folders give the same losses.
        known.setdefault("policy_mean", "paper")
        made = super().from_dict(known, **kwargs)
        (made[0] if isinstance(made, tuple) else made).__dict__.update(newer)
        return made

    @classmethod
    def from_reference(
        cls, *, n_ahead: int, n_ahead_talk: int, n_passes: int, **fields: Any
    ) -> QuietStarConfig:
        """The reference code's counting and constants (Zelikman et al. 2024).

        ``n_ahead`` counts the text pass, both meta tokens and the sampled tokens, so T = n_ahead - 3;
        ``n_ahead_talk`` is K and ``n_passes`` is R. ``fields`` override anything.
        """
        if n_ahead < 4:
            raise ValueError(
                f"n_ahead is {n_ahead}; expected at least 4 (text pass, start, one token, end)"
            )
        # The other constants are the defaults.
        preset: dict[str, Any] = {
            "thought_length": n_ahead - 3,
            "talk_length": n_ahead_talk,
            "num_rationales": n_passes,
            "reinforce_temperature": 3.0,
            "policy_weight": 1e6,
            "policy_mean": "paper",
        }
        return cls(**{**preset, **fields})

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The text decoder's, also where that is a part of ``text_config``."""
        decoder: Any = vars(self).get("text_config")  # the base class asks before it is set
        return self if decoder is None else decoder.get_text_config(*args, **kwargs)

    def validate(self) -> None:
        """Have the decoder's configuration check itself, as before it is saved.

        By its own class: transformers 5.17 renames the types of layers in one that it does not know,
        and LFM2's code then has no mask for them.
        """
        decoder: Any = vars(self).get("text_config")
        if decoder is not None:
            decoder.validate()

    @property
    def num_slots(self) -> int:
        """S, slots in a column: start, T sampled, end, and K - 1 talk tokens."""
        return self.thought_length + 2 + self.talk_length - 1

    @property
    def thinks(self) -> bool:
        """Whether this model has thoughts at all."""
        return self.thought_kind != "none"

    def parse_think_at(self) -> tuple[str, float]:
        """``think_at`` as (rule, number); the number is 1 for ``"all"``."""
        return parse_rule("think_at", self.think_at)

    def check_thoughts(self) -> None:
        """Raise ``ValueError`` naming the first field that cannot work. Cheap; run before each pass."""
        for names, holds, expected in _RULES:
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"{name} is {value!r}; expected {expected}")
        if self.mixing_floor and self.mixing_activation != "sigmoid":
            raise ValueError(
                f"mixing_floor is {self.mixing_floor!r} and mixing_activation"
                f" {self.mixing_activation!r}; expected 'sigmoid': an unbounded weight has no floor"
            )
        if self.advantage != "mean" and self.num_rationales < 2 and self.thought_kind == "sampled":
            raise ValueError(
                f"advantage is {self.advantage!r} and num_rationales {self.num_rationales}; expected at"
                " least 2 thoughts to compare"
            )
        self.parse_think_at()


def check_mixing_weight(weight: Any, activation: str) -> None:
    """Require a first mixing weight that an activation can give, or none.

    Raises:
        ValueError: for what is no number, or with ``"sigmoid"`` is not between 0 and 1.
    """
    if weight is None:
        return
    number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
    sigmoid = activation == "sigmoid"
    if not (number and (0 < weight < 1 if sigmoid else abs(weight) <= LARGEST_WEIGHT)):
        expected = "a number between 0 and 1" if sigmoid else f"a number of at most {LARGEST_WEIGHT}"
        raise ValueError(
            f"init_mixing_weight is {weight!r} with mixing_activation {activation!r}; expected"
            f" {expected}"
        )


# Names of configurations in general, beside those that PretrainedConfig declares, those for generation
# and those that begin with an underscore.
_GENERAL = {
    *("model_type", "name_or_path", "num_labels", "torch_dtype", "tie_word_embeddings", "use_cache"),
    *("attn_implementation", "experts_implementation", "output_attentions", "per_layer_config"),
    *("quantization_config", "auto_map", "custom_pipelines", "is_decoder", "add_cross_attention"),
    *("finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "sep_token_id"),
    *("torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads", "cross_attention_hidden_size"),
}


@functools.cache
def settings() -> dict[str, Any]:
    """The fields of :class:`QuietStarConfig` beside ``text_config``, and their types."""
    return inspect.get_annotations(QuietStarConfig, eval_str=True)


# What help() and editors show.
QuietStarConfig.__signature__ = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (
            ("text_config", None),
            *((name, getattr(QuietStarConfig, name)) for name in settings()),
        )
    ]
    + [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
)


def _fields() -> tuple[str, ...]:
    return ("text_config", *settings())


@functools.cache
def _general() -> frozenset[str]:
    declared = [field.name for field in dataclasses.fields(PretrainedConfig)]
    return frozenset({*_GENERAL, *declared, *GenerationConfig().to_dict()})


def _is_known(name: str) -> bool:
    return (
        name in _fields() or name in _general() or name.startswith("_") or hasattr(QuietStarConfig, name)
    )


def check_fields(names: Iterable[str]) -> None:
    """Check that every name is a field of :class:`QuietStarConfig`.

    Raises:
        TypeError: names the nearest field.
    """
    for name in names:
        if not _is_known(name):
            hint = did_you_mean(name, _fields()) or f"; expected any of {', '.join(_fields())}"
            raise TypeError(f"QuietStarConfig has no field {name!r}{hint}")


def _check_misspelt(name: str) -> None:
    """As :func:`check_fields`, where transformers' own names occur, too: only near misses count."""
    if not _is_known(name) and difflib.get_close_matches(name, _fields(), n=1, cutoff=0.85):
        check_fields([name])


def check_model_type(settings: Mapping[str, Any], expected: str) -> None:
    """Check that a configuration is of the expected kind of model, before anything is built from it.

    Raises:
        UserError: says what opens a model of that kind.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"the configuration is a {type(settings).__name__}; expected a JSON object")
    found = settings.get("model_type", expected)
    if found == expected:
        return
    if "max_thoughts" in settings:
        remedy = "QuietStarForCausalLM.from_reference opens checkpoints of the reference code"
    else:
        remedy = "QuietStarForCausalLM.from_base gives thoughts to a decoder without"
    raise UserError(f"model_type is {found!r}; expected {expected!r} ({remedy})")
