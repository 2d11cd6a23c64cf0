"""``quietstar generate``: continue a text, thinking before its tokens; the text streams as it comes."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from quietstar.cli.arguments import INTERRUPTED, Commands, add_model, check_at_least, open_model
from quietstar.errors import UserError, check_seed
from quietstar.files import read_text


def add_parser(commands: Commands) -> None:
    """The command and its arguments."""
    generate = commands.add_parser(
        "generate",
        usage="%(prog)s MODEL [PROMPT] [options]",
        help="continue a text, thinking before its tokens",
        description="Continue a text, thinking before its tokens where the model has thoughts. The new"
        " text alone is printed, as it comes. The most likely tokens are taken unless a sampling option"
        " is given.",
        epilog='example: quietstar generate quietstar-runs/tiny "def main(" --show-thoughts',
    )
    add_model(generate)
    add = generate.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="default: standard input")
    add("--file", metavar="FILE", type=Path, help="a file that holds the prompt")
    add("--max-new-tokens", metavar="N", type=int, default=64, help="default: 64")
    add("--temperature", metavar="X", type=float, help="sample; 0: the most likely")
    add("--top-p", metavar="P", type=float, help="sample among the likeliest")
    add("--top-k", metavar="K", type=int, help="sample among the likeliest K")
    add("--seed", metavar="N", type=int, help="repeat what was sampled")
    add("--num-beams", metavar="N", type=int, default=1, help="beam search")
    add(
        "--thinking",
        metavar="RULE",
        default="always",
        help="always (the default), never, every:K tokens, or entropy-nats:X (where the next token's"
        " entropy exceeds X nats)",
    )
    add("--thinking-budget", metavar="N", type=int, help="at most N thoughts")
    add(
        "--show-thoughts",
        action="store_true",
        help="a line per token, and the thought before it with its mixing weight",
    )
    generate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status. Raises :class:`UserError` before a model is loaded."""
    options = sampling_options(args)

    import torch
    from transformers import TextStreamer

    from quietstar.cli.thought_streamer import ThoughtStreamer
    from quietstar.config import QuietStarConfig
    from quietstar.data.pause_tokens import pause_ids
    from quietstar.modeling.generation_state import Thinking

    Thinking(args.thinking, args.thinking_budget)  # rejects anything that is not a rule
    prompt = read_prompt(args.prompt, args.file)
    asked = args.show_thoughts or args.thinking_budget is not None
    asked = asked or args.thinking not in ("always", "never")
    model, tokenizer = open_model(args, plain=not asked)
    thinking: dict[str, Any] = {}
    if isinstance(model.config, QuietStarConfig):
        thinking = {"thinking": args.thinking, "thinking_budget": args.thinking_budget}
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise UserError("the prompt has no tokens; give a text to continue")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and ids.shape[1] >= context:
        raise UserError(
            f"the prompt has {ids.shape[1]} tokens and {args.model} has {context} positions"
            " (max_position_embeddings); expected a shorter prompt"
        )
    ids = torch.cat([ids, torch.tensor([pause_ids(tokenizer)], dtype=ids.dtype)], dim=1)
    known = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if known is None else known
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = end[0] if isinstance(end, list) else (end or 0)
    streamer: ThoughtStreamer | TextStreamer | None = None
    if args.show_thoughts:
        streamer = ThoughtStreamer(model, tokenizer)
    elif args.num_beams == 1:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    try:
        made = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=args.max_new_tokens,
            streamer=streamer,
            eos_token_id=end,
            pad_token_id=padding,
            **thinking,
            **options,
        )
    except KeyboardInterrupt:  # what was said so far stays on the screen
        print(flush=True)
        return INTERRUPTED
    if streamer is None:
        print(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True), flush=True)
    return 0


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text to continue: the argument, a file, or standard input (less one final line end)."""
    if prompt is not None and file is not None:
        raise UserError("PROMPT and --file cannot be combined")
    if prompt is not None:
        text = prompt
    elif file is not None:
        text = read_text(file, "prompt file")
    elif sys.stdin is None or sys.stdin.isatty():
        raise UserError("no prompt was given; give one, name a file with --file, or pipe in a text")
    else:
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8 text") from None
    if prompt is None:
        text = text.removesuffix("\n")
    if not text:
        raise UserError("the prompt is empty; give a text to continue")
    from quietstar.data.left_out import is_utf8

    if not is_utf8(text):
        raise UserError("the prompt is not UTF-8 text")
    return text


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``generate`` takes for greedy decoding, sampling or beams; rejects contradictions."""
    check_at_least(args, max_new_tokens=1, num_beams=1, top_k=1)
    temperature = args.temperature
    if temperature is not None and not 0 <= temperature < math.inf:
        raise UserError(f"--temperature is {temperature}; expected a number >= 0 (0: the most likely)")
    check_seed(args.seed)
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p is {args.top_p}; expected a number above 0 and up to 1")
    narrowed = args.top_p is not None or args.top_k is not None
    if temperature == 0 and narrowed:
        raise UserError("--temperature 0 takes the most likely token, so --top-p and --top-k do nothing")
    if args.num_beams > 1 and args.show_thoughts:
        raise UserError("--show-thoughts and --num-beams cannot be combined: beams swap rows")
    if args.num_beams > 1 and args.thinking_budget is not None:
        raise UserError("--thinking-budget and --num-beams cannot be combined")
    options = {"num_beams": args.num_beams, "do_sample": bool(temperature or narrowed)}
    if not options["do_sample"]:
        return {**options, "temperature": None, "top_p": None, "top_k": None}
    return {
        **options,
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if args.top_p is None else args.top_p,
        "top_k": 0 if args.top_k is None else args.top_k,
    }
