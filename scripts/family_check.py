"""Whether one family of decoders thinks rightly: an independent check, which knows of the wrapper only
what its users do.

The mixing weight is forced to 1, and the start and end embeddings are those of two ordinary tokens.
Then the prediction at an anchor has to be the plain decoder's at the end of one ordinary sequence:
the text up to the anchor, start, the thought, end.
"""

from __future__ import annotations

import copy
import math
import tempfile
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from family_configs import ORDINARY, switched_on, tiny_config
from torch import Tensor
from torch.nn import functional
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

import quietstar
from quietstar import QuietStarForCausalLM

LENGTH, THOUGHT, TALK, NEW_TOKENS, PADDING = 14, 3, 2, 2, 3
START, END = 97, 98
TOLERANCE = 1e-4

EXACT, REFUSED, WRONG, CRASH, NOT_BUILT = "exact", "refused", "wrong", "crash", "not built"


@dataclass(frozen=True)
class Verdict:
    """What became of a family.

    ``difference`` is the largest one relative to the largest value that it is compared with (exact and
    wrong ones); ``text`` a sentence of refusal, an error, or which comparison failed.
    """

    family: str
    kind: str
    difference: float | None = None
    text: str = ""
    features: str = ""


def check(family: str) -> Verdict:
    """Build the family's tiny decoder and check it."""
    try:
        decoder = tiny_decoder(tiny_config(family))
    except Exception as error:
        return Verdict(family, NOT_BUILT, text=_described(error))
    features = switched_on(decoder)
    try:
        text = torch.arange(3, 3 + LENGTH)[None]
        with torch.no_grad():
            finite = decoder(input_ids=text, use_cache=False).logits.isfinite().all()
        problem = "" if finite else "its logits are not finite"
    except Exception as error:
        problem = f"it does not run on tokens alone: {_described(error)}"
    verdict = judge(family, decoder, features)
    if problem and verdict.kind != REFUSED:
        return Verdict(family, NOT_BUILT, text=problem)
    return verdict


def judge(family: str, decoder: PreTrainedModel, features: str = "") -> Verdict:
    """Make every comparison with ``decoder``, which is wrapped in place."""
    stage, worst = "from_base", 0.0
    try:
        comparisons = Comparisons(decoder)
        for stage in STAGES:
            with torch.set_grad_enabled(stage == "training"):
                difference = getattr(comparisons, stage)()
            if not difference < TOLERANCE:
                return Verdict(family, WRONG, difference, stage, features)
            worst = max(worst, difference)
    except Exception as error:
        if isinstance(error, (ValueError, NotImplementedError)) and _is_refusal(error):
            early = stage in ("from_base", "thoughts")
            said = str(error) if early else f"{stage}: {error}"
            return Verdict(family, REFUSED, text=said, features=features)
        return Verdict(family, CRASH, text=f"{stage}: {_described(error)}", features=features)
    return Verdict(family, EXACT, worst, features=features)


def tiny_decoder(whole: PretrainedConfig) -> PreTrainedModel:
    """A random decoder in fp32 whose weights are large enough for everything in it to matter."""
    torch.manual_seed(0)
    # Some types are registered with the configuration of a whole of which they are a part.
    config = getattr(whole, "decoder", whole)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        decoder = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        decoder = MODEL_FOR_CAUSAL_LM_MAPPING[type(whole)]._from_config(config, dtype=torch.float32)
    decoder.eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return decoder


class Comparisons:
    """A wrapped decoder, a plain copy of it, and two rows of text, the first with padding before it.

    ``ids``, ``mask``: [2, LENGTH]; ``texts``: each row's tokens without padding.
    """

    def __init__(self, decoder: PreTrainedModel):
        config = copy.deepcopy(decoder.config)
        # Plain products: torch's fused attention leaves out what some families do to their logits.
        self.plain = type(decoder)._from_config(config, attn_implementation="eager", dtype=torch.float32)
        self.plain.load_state_dict(decoder.state_dict())
        self.plain.eval()
        self.model = QuietStarForCausalLM.from_base(
            decoder,
            start_token_id=START,
            end_token_id=END,
            thought_length=THOUGHT,
            talk_length=TALK,
            mixing_activation="sigmoid",
            mixing_floor=1.0,  # the thought's prediction stands alone
        ).eval()
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, ORDINARY, (2, LENGTH), generator=generator)
        self.forced = torch.randint(3, ORDINARY, (2, 1, LENGTH, THOUGHT), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :PADDING] = 0
        self.ids[0, :PADDING] = 0
        self.texts = [row[seen.bool()] for row, seen in zip(self.ids, self.mask, strict=True)]
        with torch.no_grad():
            embedded = decoder.get_input_embeddings()(torch.tensor([START, END]))
            for meta, parameter in zip(embedded, self._meta_embeddings(), strict=True):
                parameter.copy_(meta / self.model.config.embedding_scale)

    def _meta_embeddings(self) -> tuple[Tensor, Tensor]:
        embedding = self.model.thought_embedding
        return embedding.start, embedding.end

    def after(self, text: Tensor, thought: Tensor) -> Tensor:
        """The plain decoder's logits [V] behind ``text`` [n], start, ``thought`` [T] and end."""
        sequence = torch.cat([text, torch.tensor([START]), thought, torch.tensor([END])])
        return self.plain(input_ids=sequence[None], use_cache=False).logits[0, -1]

    def thoughts(self) -> float:
        """Given thoughts at every position, in one packed pass."""
        logits = self.model(self.ids[1:], thought_ids=self.forced[1:]).logits[0]
        text, thoughts = self.texts[1], self.forced[1, 0]
        return _largest((logits[at], self.after(text[: at + 1], thoughts[at])) for at in range(LENGTH))

    def padding(self) -> float:
        """The same where the row begins with padding."""
        logits = self.model(self.ids, attention_mask=self.mask, thought_ids=self.forced).logits[0]
        text, thoughts = self.texts[0], self.forced[0, 0]
        return _largest(
            (logits[at + PADDING], self.after(text[: at + 1], thoughts[at + PADDING]))
            for at in range(len(text))
        )

    def rollout(self) -> float:
        """Thoughts that the model samples itself, slot by slot."""
        found = self.model(self.ids[1:])
        thoughts = found.thought_ids[0, 0]
        return _largest(
            (found.logits[0, at], self.after(self.texts[1][: at + 1], thoughts[at]))
            for at in range(LENGTH)
        )

    def losses(self) -> float:
        """The losses without thoughts are the decoder's own, read from token ids."""
        text = self.ids[1:]
        own = functional.cross_entropy(
            self.plain(input_ids=text, use_cache=False).logits[0, :-1], text[0, 1:], reduction="none"
        )
        return _difference(self.model(text, labels=text).base_losses[0], own)

    def generation(self) -> float:
        """Every new token's logits, of rows of two lengths, against the thought that came before it."""
        found = self.model.generate(
            self.ids,
            attention_mask=self.mask,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        spoken = {(t.row, t.step): torch.tensor(t.ids) for t in self.model.thoughts}
        pairs = []
        for row, text in enumerate(self.texts):
            for step in range(NEW_TOKENS):
                so_far = torch.cat([text, found.sequences[row, LENGTH : LENGTH + step]])
                wanted = self.after(so_far, spoken[row, step])
                pairs.append((found.logits[step][row, :START], wanted[:START]))
        return _largest(pairs)

    def training(self) -> float:
        """One step with gradients; the thoughts that it sampled have the same losses when read again."""
        self.model.train()
        try:
            first = self.model(self.ids, attention_mask=self.mask, labels=self.ids)
            first.loss.backward()
            again = self.model(
                self.ids, attention_mask=self.mask, labels=self.ids, thought_ids=first.thought_ids
            )
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None and not parameter.grad.isfinite().all():
                    raise ArithmeticError(f"the gradient of {name} is not finite")
            return _difference(again.talk_losses, first.talk_losses)
        finally:
            self.model.zero_grad()
            self.model.eval()

    def reopening(self) -> float:
        """What was saved and opened again predicts the same."""
        before = self.model(self.ids[1:], thought_ids=self.forced[1:]).logits
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            opened = AutoModelForCausalLM.from_pretrained(folder).eval()
        return _difference(opened(self.ids[1:], thought_ids=self.forced[1:]).logits, before)


STAGES = ("thoughts", "losses", "rollout", "padding", "generation", "training", "reopening")


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where anything is not finite."""
    worst = (found - wanted).abs().max() / wanted.abs().max()
    return float(worst) if found.isfinite().all() and wanted.isfinite().all() else math.inf


def _largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    return max(_difference(found, wanted) for found, wanted in pairs)


def _is_refusal(error: Exception) -> bool:
    """One sentence of this package's own, and not one of its operators' about their arguments."""
    innermost = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    own = Path(quietstar.__file__).parent in innermost.parents
    return own and len(str(error)) > 20 and "\n" not in str(error)


def _described(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said} ({Path(place.filename).name}, line {place.lineno})"
