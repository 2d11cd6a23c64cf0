"""``quietstar eval``: run or resume evaluation tasks, write their results and show them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.cli.arguments import Commands, add_model, check_at_least
from quietstar.errors import UserError, check_seed
from quietstar.files import check_writable_file, write_json
from quietstar.versions import package_versions

if TYPE_CHECKING:
    from quietstar.evaluation.tasks import Settings


def add_parser(commands: Commands) -> None:
    """The command and its arguments."""
    evaluate = commands.add_parser(
        "eval",
        usage="%(prog)s MODEL [options]",
        help="measure a model, with its thoughts and without",
        description="Measure a model, with its thoughts and without (a plain decoder: without): a table,"
        " and a json file. The same command goes on where it was interrupted. Several processes:"
        " torchrun --nproc-per-node N -m quietstar eval ...",
        epilog="example: quietstar eval quietstar-runs/tiny --tasks perplexity",
    )
    add_model(evaluate)
    add = evaluate.add_argument
    add(
        "--tasks",
        metavar="T,...",
        default="gsm8k,csqa,perplexity",
        help="gsm8k, csqa, perplexity (these by default), svamp, gsm8k-cot, completions, and"
        " lm-evaluation-harness's",
    )
    add(
        "--data",
        metavar="[TASK=]FILE",
        action="append",
        help="a local file with the data set's columns: jsonl, json, csv, tsv or parquet; perplexity:"
        " any text (default: the standard library's held-out files)",
    )
    add("--limit", metavar="N", type=int, help="the first N items of each task")
    add("--output", metavar="FILE", type=Path, help="default: quietstar-runs/eval/MODEL-....json")
    add("--batch-size", metavar="N", type=int, default=8, help="items at once (default: 8)")
    add("--max-length", metavar="N", type=int, default=256, help="tokens of an item (default: 256)")
    add("--block-size", metavar="N", type=int, default=256, help="perplexity: tokens (default: 256)")
    add("--include-path", metavar="DIR", type=Path, help="task files for lm-evaluation-harness")
    add("--seed", metavar="N", type=int, default=0, help="default: 0")
    add("--quiet", action="store_true", help="no progress bars")
    add = evaluate.add_argument_group("task gsm8k-cot").add_argument
    add("--votes", metavar="K", type=int, default=8, help="chains per item (default: 8)")
    add("--temperature", metavar="X", type=float, default=0.9, help="default: 0.9")
    add("--max-new-tokens", metavar="N", type=int, default=384, help="of a chain (default: 384)")
    add("--thinking", metavar="RULE", default="always", help="as in generate (default: always)")
    add = evaluate.add_argument_group("task completions").add_argument
    add("--preset", metavar="NAME", help="a known question set, as data.preset of a recipe")
    for part in ("prompt", "completion"):
        add(f"--{part}", metavar="T", help=f"template, as data.{part} of a recipe")
    add("--thoughts", metavar="K", type=int, help="the mean over K drawn thoughts")
    evaluate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the arguments, open the model, run the tasks, write and print their results."""
    check_at_least(args, batch_size=1)

    import torch
    from accelerate import PartialState

    from quietstar.checkpoints.load import load_checkpoint
    from quietstar.config import QuietStarConfig
    from quietstar.evaluation.journal import Journal
    from quietstar.evaluation.run import (
        TaskRunner,
        assign_files,
        check_foreign,
        fingerprint,
        split_names,
    )
    from quietstar.evaluation.tasks import OWN

    names = split_names(args.tasks)
    own, foreign = [n for n in names if n in OWN], [n for n in names if n not in OWN]
    manager = check_foreign(foreign, args.include_path)
    files = assign_files(args.data or [], own)
    check_seed(args.seed)
    if args.output is not None:
        check_writable_file(args.output)
    state = PartialState(cpu=not torch.cuda.is_available() or args.device == "cpu")
    if foreign and state.num_processes > 1:
        raise UserError(
            f"task {foreign[0]} belongs to the harness, which starts its own processes; use accelerate"
            " launch -m quietstar.evaluation.harness"
        )
    # Several processes: each on the device that accelerate gives it.
    device = args.device if state.num_processes == 1 else str(state.device)
    plain = args.thinking in ("always", "never")
    model, tokenizer = load_checkpoint(args.model, device=device, tokenizer=args.tokenizer, plain=plain)
    if not isinstance(model.config, QuietStarConfig):
        args.thinking = "never"
    tasks = [OWN[name](name, settings_of(args, files.get(name))) for name in own]
    items = [task.items(tokenizer) for task in tasks]
    identity = fingerprint(model)
    name = f"{Path(args.model).resolve().name}-{identity[:8]}.json"
    output = args.output or Path("quietstar-runs/eval") / name
    check_writable_file(output)
    journal = Journal(output, state.process_index)
    runner = TaskRunner(
        model, tokenizer, identity, journal, args.batch_size, state, progress=not args.quiet
    )
    results: dict[str, Any] = {
        task.name: task.summarize(runner.records(task, rows))
        for task, rows in zip(tasks, items, strict=True)
    }
    tables = [task.render(results[task.name]) for task in tasks]
    if foreign:
        from quietstar.evaluation.harness import render, run_tasks

        limits = {"limit": args.limit, "batch_size": args.batch_size, "seed": args.seed}
        found = run_tasks(model, tokenizer, foreign, manager, **limits)
        results.update(found)
        tables += [render(name, result) for name, result in found.items()]
    if state.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": args.model, "fingerprint": identity, "tasks": results}
        write_json(output, {**content, "versions": package_versions()})
        print("\n\n".join(tables))
        print(f"\nwritten to {output}")
    return 0


def settings_of(args: argparse.Namespace, data: Path | None) -> Settings:
    """The settings of one task."""
    from quietstar.evaluation.chains import ChainSettings
    from quietstar.evaluation.tasks import Settings

    chains = ChainSettings(
        votes=args.votes,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        thinking=args.thinking,
        seed=args.seed,
    )
    return Settings(
        data=data,
        limit=args.limit,
        max_length=args.max_length,
        block_size=args.block_size,
        templates={name: getattr(args, name) for name in ("prompt", "completion", "preset")},
        chains=chains,
        thoughts=args.thoughts,
        seed=args.seed,
    )
