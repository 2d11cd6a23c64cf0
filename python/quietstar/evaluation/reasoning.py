"""Zero-shot GSM8K and CommonsenseQA as the paper measures them (Zelikman et al. 2024, section 5), and
SVAMP in the same way.

An item is the text ``Q: question\nA: answer\n`` (SVAMP's is that of its preset). Its score is the
probability of the gold answer, the product over the answer's tokens, each renormalised over the *valid*
tokens: those made of digits, or the letters A to E, and the newline that ends the answer. Answer tokens
that are not valid (the space before a number, a thousands separator) are given for free, as in the
reference code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quietstar.data.collator import IGNORED, PaddingCollator
from quietstar.data.pause_tokens import pause_ids
from quietstar.data.plain_text import plain_ids, spells
from quietstar.data.readers import TemplateReader
from quietstar.errors import UserError
from quietstar.evaluation.perplexity import undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_MARK = "\nA:"
_SVAMP = TemplateReader(preset="svamp")
LETTERS = "ABCDE"


# ---- prompts ------------------------------------------------------------------------------------


def gsm8k_text(row: dict[str, Any]) -> tuple[str, str]:
    """(prompt, answer) of a GSM8K row: columns ``question`` and ``answer`` (``... #### 18``).

    Raises:
        UserError: for a question that is not text, and an answer without a number (in the digits 0 to 9,
            whose tokens are scored) behind its last ``####``.
    """
    given = row["answer"]
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise UserError(f"answer is {_shown(given)}; expected text or a number")
    answer = str(given).rsplit("####", 1)[-1].strip()
    if not any(digit in answer for digit in "0123456789"):
        raise UserError(f"answer {_shown(given)} has no number; expected one behind '####'")
    return f"Q: {_question(row)}{ANSWER_MARK}", f" {answer}\n"


def csqa_text(row: dict[str, Any]) -> tuple[str, str]:
    """(prompt, answer) of a CommonsenseQA row: ``question``, ``choices`` {label, text}, ``answerKey``.

    The choices stand one per line, ``(A) text``.

    Raises:
        UserError: for a question or choices that are not text, choices not labelled with A to E, or
            a key that is none of them.
    """
    choices, key = row["choices"], row["answerKey"]
    found: list[Any] = [
        choices.get(name) if isinstance(choices, dict) else None for name in ("label", "text")
    ]
    if not all(isinstance(part, list) and all(isinstance(x, str) for x in part) for part in found):
        raise UserError(
            f"choices is {_shown(choices)}; expected {{'label': [...], 'text': [...]}}, lists of text"
        )
    labels, texts = found
    if not labels or len(labels) != len(texts) or "".join(labels) != LETTERS[: len(labels)]:
        raise UserError(
            f"choices are labelled {labels}; expected up to five, A to E, and a text for each"
        )
    if key not in labels:
        raise UserError(f"answerKey is {key!r}; expected one of {', '.join(labels)}")
    lines = [f"({label}) {text}" for label, text in zip(labels, texts, strict=True)]
    return "\n".join([f"Q: {_question(row)}", *lines]) + ANSWER_MARK, f" {key}\n"


def csqa_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of CommonsenseQA's own file, ``question`` {stem, choices [{label, text}]}, with the hub's
    columns; another one as it is."""
    question = row.get("question")
    if not isinstance(question, dict):
        return row
    listed = question.get("choices")
    parts = [choice if isinstance(choice, dict) else {} for choice in listed or []]
    choices = {name: [part.get(name) for part in parts] for name in ("label", "text")}
    return {**row, "question": question.get("stem"), "choices": choices}


def svamp_text(row: dict[str, Any]) -> tuple[str, str]:
    """(prompt, answer) of an SVAMP row: columns ``Body``, ``Question`` and ``Answer``.

    Raises:
        UserError: for a row that the preset's templates cannot be filled with.
    """
    answer, prompt, _ = _SVAMP.fields(row, "")
    return prompt, answer


def _question(row: dict[str, Any]) -> str:
    question = row["question"]
    if not isinstance(question, str):
        raise UserError(f"question is {_shown(question)}; expected text")
    return question


def _shown(value: object) -> str:
    return f"{value!r:.80}"


# ---- tokens -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValidTokens:
    """Which tokens an answer may consist of.

    Attributes:
        ids: [n] all of them, ascending; letters: ids of A to E in that order (empty for numbers).
    """

    ids: Tensor
    letters: tuple[int, ...] = ()


def number_tokens(tokenizer: PreTrainedTokenizerBase) -> ValidTokens:
    """Tokens of digits, and the newline.

    A token counts if it reads as ASCII digits, with or without a space before them, and is one that
    the tokenizer itself writes (a byte-fallback token that spells "1" is not). Tokenizers that split
    numbers into digits have ten; others have tokens of several digits, and those count too.

    Raises:
        UserError: if the tokenizer cannot write a digit or the newline as a token of its own.
    """
    texts = _texts_in_context(tokenizer)
    digits = {
        i for i, text in enumerate(texts) if _is_number(text) and i in token_ids(tokenizer, f"A:{text}")
    }
    single = {texts[i].strip() for i in digits}
    missing = [d for d in "0123456789" if d not in single]
    if missing:
        raise UserError(f"the tokenizer has no token for the digit {missing[0]!r}; GSM8K needs one")
    return ValidTokens(torch.tensor(sorted(digits | {_newline(tokenizer, texts, "1")})))


def letter_tokens(tokenizer: PreTrainedTokenizerBase) -> ValidTokens:
    """Tokens of the letters A to E as they are written behind ``A:`` and a space, and the newline.

    Raises:
        UserError: if the tokenizer has no token of its own for one of them.
    """
    texts = _texts_in_context(tokenizer)
    letters = []
    for letter in LETTERS:
        start, ids = split_answer(tokenizer, f"Q{ANSWER_MARK}", f" {letter}\n")
        found = [i for i in ids[start:] if texts[i].strip(" ") == letter]
        if not found:
            raise UserError(
                f"the tokenizer has no token for the letter {letter!r}; CommonsenseQA needs one"
            )
        letters.append(found[0])
    ids_ = sorted({*letters, _newline(tokenizer, texts, " A")})
    return ValidTokens(torch.tensor(ids_), tuple(letters))


def split_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[int, list[int]]:
    """(index of the first answer token, all ids) of prompt and answer, tokenized as one text.

    A token that holds the end of the prompt and the beginning of the answer belongs to the answer.
    Pauses that the model has learnt to expect behind a prompt stand between them.
    """
    head, ids = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + answer)
    start = 0
    while start < min(len(head), len(ids)) and head[start] == ids[start]:
        start += 1
    pauses = pause_ids(tokenizer)
    return start + len(pauses), ids[:start] + pauses + ids[start:]


def _is_number(text: str) -> bool:
    digits = text[1:] if text.startswith(" ") else text
    return digits.isascii() and digits.isdigit()


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids with what the tokenizer puts before a text, without an end-of-text token behind it."""
    ids = plain_ids(tokenizer, text)
    if ids and ids[-1] == tokenizer.eos_token_id and not spells(tokenizer, text, tokenizer.eos_token):
        ids.pop()
    return ids


def _texts_in_context(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every token. Decoded behind another token, because some tokenizers drop the
    space before the first one."""
    anchor = token_ids(tokenizer, "A")[-1:]
    length = len(tokenizer.decode(anchor))
    pairs = [[*anchor, i] for i in range(len(tokenizer))]
    texts = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
    return [text[length:] for text in texts]


def _newline(tokenizer: PreTrainedTokenizerBase, texts: list[str], before: str) -> int:
    found = [i for i in token_ids(tokenizer, f"{before}\n") if texts[i] == "\n"]
    if not found:
        raise UserError("the tokenizer has no token for the newline, which ends an answer")
    return found[-1]


# ---- the metric ---------------------------------------------------------------------------------


def gold_probability(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """The product of the gold tokens' probabilities, renormalised over the valid tokens.

    ``Π_a softmax(logits[a, valid])[target_a]`` over the answer's tokens a that are valid.

    Args:
        logits: [B, A, V]; targets: [B, A] int64, -100 where a row has no answer token.
        valid: [n] int64.

    Returns:
        [B] float64; 1 for a row without a valid token.
    """
    place = torch.full((logits.shape[-1],), -1, dtype=torch.int64, device=logits.device)
    place[valid] = torch.arange(len(valid), device=logits.device)
    index = torch.where(targets == IGNORED, -1, place[targets.clamp(min=0)])
    logp = logits[..., valid].double().log_softmax(-1)
    gold = logp.gather(2, index.clamp(min=0)[..., None])[..., 0]
    return gold.masked_fill(index < 0, 0.0).sum(1).exp()


def exact_match(logits: Tensor, targets: Tensor) -> Tensor:
    """[B] bool, whether greedy decoding writes the gold answer, every token of it."""
    return ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(1)


def letter_choice(
    logits: Tensor, targets: Tensor, letters: Sequence[int], choices: Sequence[int]
) -> Tensor:
    """[B] int64, the most likely of each row's first ``choices[b]`` letters where its answer stands."""
    ids = torch.tensor(letters, device=logits.device)
    where = torch.isin(targets, ids).int().argmax(1)
    rows = torch.arange(len(logits), device=logits.device)
    scores = logits[rows, where][:, ids].double()
    count = torch.tensor(choices, device=logits.device)[:, None]
    beyond = torch.arange(len(ids), device=logits.device) >= count
    return scores.masked_fill(beyond, -torch.inf).argmax(1)


# ---- predictions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A tokenized item: [n] ids, the last ``answer`` of them the answer's; whether it was cut."""

    ids: list[int]
    answer: int
    cut: bool


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, max_length: int = 256
) -> Encoded:
    """Tokenize an item; of a longer one, the last ``max_length`` tokens (the first, if it is the
    begin-of-text token, stays). The reference cuts at random, and may so cut the answer off.

    Raises:
        UserError: if the answer alone does not fit.
    """
    start, ids = split_answer(tokenizer, prompt, answer)
    count, over = len(ids) - start, len(ids) - max_length
    if over > 0:
        first = [ids[0]] if ids[0] == tokenizer.bos_token_id else []
        ids = first + ids[over + len(first) :]
    if start < 1 or count >= max_length - 1:
        raise UserError(
            f"an answer has {count} tokens; expected fewer than {max_length - 1} (max_length - 1)"
        )
    return Encoded(ids, count, over > 0)


def without_thoughts(model: Any) -> AbstractContextManager[None]:
    """Context in which a Quiet-STaR model predicts without thinking (its weights are the same)."""
    return undisturbed(model, thought_kind="none")


@torch.no_grad()
def answer_logits(model: Any, items: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Logits [B, A, V] of the answers' tokens and the targets [B, A] (-100 where a row has fewer).

    Rows are padded at the left, so that all answers end together and thoughts are needed at the last
    positions only. Meta tokens get no probability.
    """
    keep = max(item.answer for item in items)
    rows = []
    for item in items:
        before = len(item.ids) - item.answer
        rows.append({"input_ids": item.ids, "labels": [IGNORED] * before + item.ids[before:]})
    batch = PaddingCollator(padding_side="left")(rows)
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    # The last token is predicted, never read.
    mask = mask[:, :-1]
    logits = model(
        input_ids=ids[:, :-1],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=keep,
    ).logits.float()
    for name in ("start_token_id", "end_token_id"):
        token = getattr(model.config, name, None)
        if token is not None:
            logits[..., token] = -torch.inf
    return logits, batch["labels"][:, -keep:].to(model.device)


Record = dict[str, Any]
TextOf = Callable[[dict[str, Any]], tuple[str, str]]


def score_answers(
    model: Any, items: Sequence[Encoded], valid: ValidTokens, choices: Sequence[int] | None = None
) -> list[Record]:
    """Score a batch of items with thoughts (``mixed_...``) and without (``base_...``).

    Args:
        choices: how many letters each item offers, for a question with choices; None: numbers.

    Returns:
        per item ``base_probability``, ``base_correct`` (the choice, or exact match), the same with
        ``mixed_`` if the model thinks, and ``cut``.
    """
    records: list[Record] = [{"cut": item.cut} for item in items]
    passes: dict[str, AbstractContextManager[None]] = {"base": without_thoughts(model)}
    if getattr(model.config, "thinks", False):
        passes["mixed"] = nullcontext()
    for name, context in passes.items():
        with context:
            logits, targets = answer_logits(model, items)
        probability = gold_probability(logits, targets, valid.ids.to(logits.device))
        if choices is None:
            correct = exact_match(logits, targets)
        else:
            letters = torch.tensor(valid.letters, device=logits.device)
            named = (targets[:, :, None] == letters).any(1)
            if not named.any(1).all():
                raise UserError(
                    "the answer of an item has none of the letters as a token; this tokenizer writes"
                    " them in another way behind its question"
                )
            gold = named.int().argmax(1)
            correct = letter_choice(logits, targets, valid.letters, choices) == gold
        for record, p, c in zip(records, probability.tolist(), correct.tolist(), strict=True):
            record[f"{name}_probability"] = p
            record[f"{name}_correct"] = c
    return records
