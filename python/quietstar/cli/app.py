"""The command line: ``quietstar info``, ``quietstar train``, ``quietstar generate``, ``quietstar eval``,
``quietstar demo``.

Only argparse is imported here; each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

USER_ERROR, INTERRUPTED = 2, 130
TRACEBACK_VARIABLE = "QUIETSTAR_TRACEBACK"
# What is done by these is found again.
CONTINUED = ("train", "eval", "demo")


def build_parser() -> argparse.ArgumentParser:
    """The argument parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="quietstar",
        description="Quiet-STaR: language models that think before each token.",
        epilog=f"{TRACEBACK_VARIABLE}=1 shows where an error came from.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="versions, what was compiled, what will run where")
    info.set_defaults(run=_info)

    train = commands.add_parser(
        "train",
        help="train as a recipe says",
        description="Train as a recipe says: a YAML file, or one that is shipped by its name.",
        epilog="example: quietstar train tiny max_steps=50 thoughts.thought_length=8",
    )
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    train.add_argument(
        "settings",
        metavar="KEY=VALUE",
        nargs="*",
        help="changes to the recipe, e.g. training.learning_rate=1e-4",
    )
    train.add_argument(
        "--output", metavar="DIR", type=Path, help="output folder (default: quietstar-runs/NAME)"
    )
    how = train.add_mutually_exclusive_group()
    how.add_argument(
        "--resume",
        action="store_true",
        help="insist on continuing a run that is there (an unfinished run continues anyway)",
    )
    how.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    train.add_argument("--quiet", action="store_true", help="no progress bars")
    train.set_defaults(run=_train)

    plan = commands.add_parser(
        "plan",
        help="what of a recipe fits GPUs of a given size",
        description="Count the memory and the operations of a recipe's step, and what fits a GPU: batch"
        " size, gradient checkpointing, adapters, several GPUs. Reads no weights (docs/scaling.md).",
        epilog="example: quietstar plan mistral-7b-lora --gpu-memory 24G",
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    plan.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="changes to the recipe")
    plan.add_argument(
        "--gpu-memory", metavar="SIZE", default="24G", help="of a GPU, e.g. 80G (default: 24G)"
    )
    plan.set_defaults(run=_plan)

    merge = commands.add_parser(
        "merge",
        help="make a model of an adapter and its decoder",
        description="Add an adapter's updates into the weights of its decoder and save the model.",
    )
    merge.add_argument("model", metavar="ADAPTER", help="folder of a run with an adapter section")
    merge.add_argument("output", metavar="DIR", type=Path, help="a new folder for the model")
    merge.add_argument("--tokenizer", metavar="T", help="another tokenizer than the adapter's own")
    merge.set_defaults(run=_merge)

    _add_generate(commands)
    _add_inspect(commands)
    _add_eval(commands)

    demo = commands.add_parser(
        "demo",
        help="see thoughts being learned, on this machine, without a download",
        description="Train a small model and show what thoughts do: on a task that needs them "
        "(the default), or on real text, the Python standard library (text).",
    )
    demo.add_argument("what", nargs="?", choices=["task", "text"], default="task")
    demo.add_argument("--quick", action="store_true", help="fewer steps and controls")
    demo.add_argument("--fresh", action="store_true", help="start anew instead of continuing")
    demo.add_argument("--sweep", action="store_true", help="task: also try several thought lengths")
    demo.add_argument("--seed", type=int, default=4, help="task: which language, and all else drawn")
    demo.add_argument("--output", metavar="DIR", type=Path, help="output folder")
    demo.set_defaults(run=_demo)
    return parser


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a text, thinking before its tokens",
        description="Continue a text, thinking before its tokens. The new text alone is printed, as it"
        " comes. The most likely tokens are taken unless a sampling option is given.",
        epilog='example: quietstar generate quietstar-runs/tiny "def main(" --show-thoughts',
    )
    _add_model(generate)
    generate.add_argument("prompt", metavar="PROMPT", nargs="?", help="default: standard input")
    generate.add_argument("--file", metavar="F", type=Path, help="a file that holds the prompt")
    generate.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="default: 64")
    generate.add_argument("--temperature", metavar="X", type=float, help="sample; 0: the most likely")
    generate.add_argument("--top-p", metavar="P", type=float, help="sample among the likeliest")
    generate.add_argument("--top-k", metavar="K", type=int, help="sample among the likeliest K")
    generate.add_argument("--seed", metavar="N", type=int, help="repeat what was sampled")
    generate.add_argument("--num-beams", metavar="N", type=int, default=1, help="beam search")
    generate.add_argument(
        "--thinking",
        metavar="RULE",
        default="always",
        help="always (the default), never, every:K tokens, or entropy:X (where the next token's entropy"
        " exceeds X nats)",
    )
    generate.add_argument("--thinking-budget", metavar="N", type=int, help="at most N thoughts")
    generate.add_argument(
        "--show-thoughts",
        action="store_true",
        help="a line per token, and the thought before it with its mixing weight",
    )
    generate.set_defaults(run=_generate)


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure a model, with its thoughts and without",
        description="Measure a model, with its thoughts and without: a table, and a json file. A command"
        " that was interrupted continues when it is given again. For several processes: torchrun"
        " --nproc-per-node N -m quietstar eval ...",
        epilog="example: quietstar eval quietstar-runs/tiny --tasks perplexity --data notes.txt",
    )
    _add_model(evaluate)
    add = evaluate.add_argument
    add(
        "--tasks",
        metavar="T,...",
        default="gsm8k,csqa,perplexity",
        help="gsm8k, csqa, gsm8k-cot, perplexity, and tasks of lm-evaluation-harness"
        " (default: gsm8k,csqa,perplexity)",
    )
    add(
        "--data",
        metavar="[TASK=]FILE",
        action="append",
        help="a local file instead of the data set: jsonl, json, csv, tsv or parquet of the same"
        " columns; for perplexity any text (default there: the standard library's held-out files)",
    )
    add("--limit", metavar="N", type=int, help="the first N items of each task")
    add("--output", metavar="FILE", type=Path, help="default: quietstar-runs/eval/MODEL-....json")
    add("--batch-size", metavar="N", type=int, default=8, help="items at once (default: 8)")
    add("--max-length", metavar="N", type=int, default=256, help="tokens of an item (default: 256)")
    add("--block-size", metavar="N", type=int, default=256, help="perplexity: tokens (default: 256)")
    add("--votes", metavar="K", type=int, default=8, help="gsm8k-cot: chains per item (default: 8)")
    add("--temperature", metavar="X", type=float, default=0.9, help="gsm8k-cot (default: 0.9)")
    add("--max-new-tokens", metavar="N", type=int, default=384, help="gsm8k-cot: of a chain")
    add(
        "--thinking",
        metavar="RULE",
        default="always",
        help="gsm8k-cot: always (the default), never, every:K or entropy:X, as in generate",
    )
    add("--include-path", metavar="DIR", type=Path, help="task files for lm-evaluation-harness")
    add("--seed", metavar="N", type=int, default=0, help="default: 0")
    add("--quiet", action="store_true", help="no progress bars")
    evaluate.set_defaults(run=_eval)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="a page that shows the thoughts in a text and what they gained",
        description="Write one HTML page: the text coloured by what thinking gained at each token, the"
        " thoughts at a token that is clicked, the gain by difficulty, and a run's training curves.",
        epilog="example: quietstar inspect quietstar-runs/tiny notes.txt --output page.html",
    )
    _add_model(inspect)
    inspect.add_argument("file", metavar="FILE", type=Path, help="a text")
    inspect.add_argument(
        "--output", metavar="PAGE", type=Path, help="default: the text's name with .html"
    )
    inspect.add_argument("--tokens", metavar="N", type=int, default=512, help="at most N (default: 512)")
    inspect.add_argument(
        "--context", metavar="N", type=int, help="tokens per row (default: as trained, otherwise 512)"
    )
    inspect.add_argument(
        "--samples", metavar="N", type=int, default=3, help="thoughts sampled per token (default: 3)"
    )
    inspect.add_argument("--seed", metavar="N", type=int, default=0, help="of the samples")
    inspect.set_defaults(run=_inspect)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="MODEL", help="folder of a run or checkpoint, or its name on the hub"
    )
    command.add_argument("--tokenizer", metavar="T", help="another tokenizer than the model's own")
    command.add_argument("--device", metavar="D", help="cpu, cuda, ... (default: cuda if it is there)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's error, 130 when interrupted."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and hasattr(args, "settings") and not any(word.startswith("-") for word in rest):
        args.settings += rest  # key=value words after an option, which argparse leaves over
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # bitsandbytes asks for another package on some CPUs, where nothing here would use it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_about_something_else)
    try:
        status = int(args.run(args) or 0)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        continues = "; the same command continues where it stopped"
        _say("interrupted" + (continues if args.command in CONTINUED else ""))
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as in `quietstar info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing it is quiet
        return 0
    except Exception as error:
        message = _users_fault(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            traceback.print_exc()
            return 1 if message is None else USER_ERROR
        _say(f"error: {message}")
        return USER_ERROR


def _is_about_something_else(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


def _say(message: str) -> None:
    # A progress bar may have left its line open.
    start = "\n" if sys.stderr.isatty() else ""
    print(f"{start}quietstar: {message}", file=sys.stderr, flush=True)


def _users_fault(error: Exception) -> str | None:
    """What to say where a message alone is enough, bad input, files and devices; None: a fault of ours.

    ValueError is how this package, transformers and datasets refuse input.
    """
    words = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        place = error.filename if error.filename is not None else "writing"
        return f"{place}: {error.strerror}"
    if isinstance(error, ValueError | OSError):
        return words or None
    trainer = sys.modules.get("quietstar.training.trainer")
    if trainer is not None and isinstance(error, trainer.NonFiniteLoss):
        return words
    if type(error).__name__ == "SafetensorError" and "os error" in words:
        return f"a file cannot be read or written: {words}"
    if _is_out_of_memory(error, words):
        return (
            f"out of memory ({words}); lower the batch size or the length of rows, or see what fits with"
            " quietstar plan"
        )
    return None


def _is_out_of_memory(error: Exception, words: str) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    # The CPU's allocator has no error of its own.
    return torch is not None and (
        isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in words)
    )


def _info(args: argparse.Namespace) -> int:
    from quietstar.cli.info import main as run

    return run(args)


def _train(args: argparse.Namespace) -> int:
    from quietstar.recipes.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.settings)
    output = args.output or Path("quietstar-runs") / recipe.name
    from quietstar.recipes.run import main as run

    return run(recipe, output, args)


def _plan(args: argparse.Namespace) -> int:
    from quietstar.plan.table import main as run

    return run(args)


def _merge(args: argparse.Namespace) -> int:
    from quietstar.cli.merge import main as run

    return run(args)


def _generate(args: argparse.Namespace) -> int:
    from quietstar.cli.generate import main as run

    return run(args)


def _eval(args: argparse.Namespace) -> int:
    from quietstar.evaluation.run import main as run

    return run(args)


def _inspect(args: argparse.Namespace) -> int:
    from quietstar.inspect.page import main as run

    return run(args)


def _demo(args: argparse.Namespace) -> int:
    import importlib

    module = importlib.import_module(
        "quietstar.demos.text" if args.what == "text" else "quietstar.demos.lookup"
    )
    return int(module.main(args) or 0)


if __name__ == "__main__":
    sys.exit(main())
