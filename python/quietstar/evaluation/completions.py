"""Any prompts and completions, as the paper measures answers: the probability of the true completion.

Per item the product of the probabilities of the completion's tokens, its negative log-likelihood (nats),
and whether greedy decoding writes it. The end-of-text token behind it is not asked for: let a template
end with what ends an answer, a newline say.

A model whose ``think_at`` is ``completion`` thinks once, where it has learnt to: before the completion's
first token that is not blank. The next ``talk_length`` tokens are predicted with that thought, the
others without. Any other model thinks before every token of the completion.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quietstar.data.blocks import IGNORED
from quietstar.data.collator import PaddingCollator
from quietstar.data.left_out import LeftOut
from quietstar.data.pairs import PairTokens, encode_pairs, without_end
from quietstar.data.readers import Completion, TemplateReader
from quietstar.data.sources import local_documents
from quietstar.data.stdlib import Document
from quietstar.errors import UserError
from quietstar.evaluation.perplexity import undisturbed
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.layout import text_ranges
from quietstar.thinking.rollout import Thoughts
from quietstar.thinking.slots import depth_of_end
from quietstar.thinking.text_batch import TextBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = dict[str, Any]


def load_items(
    tokenizer: PreTrainedTokenizerBase,
    data: Path | None,
    templates: dict[str, str | Completion | None],
    max_length: int,
    limit: int | None = None,
) -> list[Item]:
    """The first ``limit`` prompts and completions of a file that have at most ``max_length`` tokens.

    Args:
        templates: ``prompt``, ``completion`` and ``preset`` of
            :class:`~quietstar.data.readers.TemplateReader`.

    Raises:
        UserError: if there are none, or the templates or the file cannot be used.
    """
    if data is None:
        raise UserError("task completions has no data set of its own; expected --data FILE")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; expected a whole number >= 1")
    if not any(templates.values()):
        raise UserError(
            "task completions has no templates; expected --preset, or --prompt and --completion"
        )
    reader, left_out = TemplateReader(**templates, lenient=True), LeftOut()  # type: ignore[arg-type]
    items: list[Item] = []
    for document in local_documents(str(data), text_column=reader):
        if len(items) == limit:
            break
        ids = _tokens(tokenizer, [document])[0]
        if not ids.prompt or len(ids) > max_length:
            reason = f"has {len(ids)} tokens; expected at most {max_length} (--max-length)"
            left_out.add(document.name, reason if ids.prompt else "has no token before its completion")
            continue
        left_out.used()
        items.append({"prompt": document.prompt, "completion": document.text})
    left_out.check(f"data file {data}")
    return items


def _tokens(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> list[PairTokens]:
    """The documents' tokens, without the end-of-text token that training adds."""
    pairs = zip(documents, encode_pairs(tokenizer, documents), strict=True)
    return [without_end(tokenizer, document, ids) for document, ids in pairs]


@dataclass
class CompletionThoughts:
    """What a model whose ``think_at`` is ``completion`` thinks before completions.

    Attributes:
        temperature: of its tokens; 0: the most likely.
        seed: of what is drawn.
        ids: [items, R, T] given thoughts, or those that were sampled, once it was used.
        count: R, thoughts per completion. Its probability is the mean over them, p(y) = sum_r p(y | r) /
            R, so a thought that made its first tokens likely counts for more at those that follow.
    """

    temperature: float = 0.0
    seed: int = 0
    ids: Tensor | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.ids is not None:
            self.count = self.ids.shape[1]
        if self.count < 1 or (self.count > 1 and self.ids is None and self.temperature == 0.0):
            raise ValueError(
                f"count is {self.count}, temperature {self.temperature}; expected count 1, or more of"
                " them and a temperature > 0"
            )


def thinks_once(model: Any) -> bool:
    """Whether a model thinks before completions alone, with tokens that can be drawn."""
    config = model.config
    thinks = getattr(config, "thought_kind", "none") not in ("none", "pause")
    return thinks and config.parse_think_at()[0] == "completion"


@torch.no_grad()
def score_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    thoughts: CompletionThoughts | None = None,
) -> list[dict[str, Any]]:
    """Per item ``base_nll``, ``base_probability`` and ``base_correct``, and the same with ``mixed_`` if
    the model thinks. An item's result does not depend on those beside it but for rounding, and for what
    is drawn.

    Args:
        thoughts: of a model that thinks at completions; gets the thoughts, or has them.
    """
    thoughts = CompletionThoughts() if thoughts is None else thoughts
    pairs = _tokens(tokenizer, [Document("", item["completion"], item["prompt"]) for item in items])
    rows = [
        {"input_ids": list(ids), "labels": [IGNORED] * ids.prompt + ids[ids.prompt :]} for ids in pairs
    ]
    batch = {name: value.to(model.device) for name, value in PaddingCollator()(rows).items()}
    anchors = torch.tensor([[ids.anchor] for ids in pairs], device=model.device)
    records: list[dict[str, Any]] = [{} for _ in items]
    where = batch["labels"][:, 1:] != IGNORED
    with undisturbed(model):
        for name, rows_of_logits in _predictions(model, batch, anchors, where, thoughts):
            for record, logits, labels in zip(records, rows_of_logits, batch["labels"], strict=True):
                found = _scores(model.config, logits, labels[1:][labels[1:] != IGNORED])
                record |= {f"{name}_{key}": value for key, value in found.items()}
    return records


def _predictions(
    model: Any,
    batch: dict[str, Tensor],
    anchors: Tensor,
    where: Tensor,
    thoughts: CompletionThoughts,
) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Names of predictions, and for each row the logits [R, n, V] of its completion, R thoughts apart.

    Args:
        anchors: [B, 1], the positions before the completions' first tokens that are not blank.
        where: [B, N-1] bool, the positions that a completion's tokens are predicted from.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if getattr(model.config, "thought_kind", "none") == "none":
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        yield "base", [row[places][None] for row, places in zip(logits, where, strict=True)]
        return
    config, td = model.config, model.thought_decoder
    once = config.parse_think_at()[0] == "completion"
    if not once:
        # A row with a shorter completion has its last position repeated.
        first, length = where.int().argmax(1)[:, None], where.sum(1, keepdim=True)
        ahead = torch.arange(int(length.max()), device=ids.device)
        anchors = (first + ahead).minimum(first + length - 1)
    ranges, part = text_ranges(mask, ids), BatchShard(seed=thoughts.seed)
    temperature, count = (thoughts.temperature, thoughts.count) if once else (0.0, 1)
    text = TextBatch(
        config, ids, ranges, anchors=anchors, rationales=count, temperature=temperature, shard=part
    )
    if once and thoughts.ids is not None:
        base, slots = td.packed(text, Thoughts(text.columns, thoughts.ids.to(ids.device)))
    else:
        made = td.rollout(text, config.num_slots if once else depth_of_end(config))
        base, slots = made.hidden
        if once and made.ids is not None:
            thoughts.ids = made.ids.cpu()
    mixed, _ = td.mix(text, base, slots, steps=None if once else 1)
    rows = zip(base[:, :-1], where, strict=True)
    yield "base", (td.output.logits(row[places])[None] for row, places in rows)
    ahead = torch.arange(len(mixed), device=ids.device)[:, None]

    def with_thoughts(row: int) -> Tensor:
        hidden = base[row].expand(count, -1, -1).clone()
        speaks_for = anchors[row] + ahead  # [K, A]
        inside = speaks_for < ids.shape[1]
        for number in range(count):
            spoken = mixed[:, row, number::count]
            hidden[number, speaks_for[inside]] = spoken[inside].to(hidden.dtype)
        return td.output.logits(hidden[:, :-1][:, where[row]])

    # A row at a time: R logits for every token of a vocabulary.
    yield "mixed", map(with_thoughts, range(len(ids)))


def _scores(config: Any, logits: Tensor, true: Tensor) -> dict[str, Any]:
    """What logits [R, n, V], the mean of R predictions, say of the true tokens [n]; meta tokens get no
    probability."""
    logits = logits.double()
    for name in ("start_token_id", "end_token_id"):
        if (token := getattr(config, name, None)) is not None:
            logits[..., token] = -torch.inf
    given = logits.log_softmax(-1)
    told = given.gather(2, true[None, :, None].expand(len(given), -1, 1))[..., 0].cumsum(1)  # [R, n]
    before = pad(told[:, :-1], (1, 0))
    means = (given + before[..., None]).logsumexp(0)  # but for a constant of each token
    nll = math.log(len(given)) - float(told[:, -1].logsumexp(0))
    correct = bool((means.argmax(-1) == true).all())
    return {"nll": nll, "probability": math.exp(-nll), "correct": correct}
