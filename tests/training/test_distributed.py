"""Two processes on gloo against one: gradients, what is drawn, gathers of FSDP2, checkpoints."""

import json
import os
import shutil
import socket
import sysconfig
from pathlib import Path

import pytest
import torch
import two_processes as two
from safetensors.torch import load_file
from small_recipes import content, run_python

SUPPORT = Path(__file__).parents[1] / "support"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Everything that needs two processes, run once."""
    folder = tmp_path_factory.mktemp("two")
    for name, case in two.SAVED.items():
        two.alone(case, folder / f"one-{name}", **two.SAVING)
        shutil.copytree(
            folder / f"one-{name}" / "checkpoint-2", folder / f"one-two-{name}" / "checkpoint-2"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    # DeepSpeed compiles an extension, with this environment's ninja; in the user's cache the lock of a
    # build that was killed would last.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    settings = {"PATH": path, "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    run_python(*launch, SUPPORT / "two_processes.py", folder, cwd=folder, **settings)
    return folder


def test_the_command_in_two_processes(out: Path, tmp_path):
    """``torchrun -m quietstar train`` ends where one process with twice the batch does."""
    recipe = content(
        data={"max_train_blocks": 40, "eval_blocks": 4},
        thoughts={"think_at": "random:0.5"},
        # Adam magnifies the rounding of small gradients.
        training={"learning_rate": 0.1, "optim": "sgd"},
    )
    (tmp_path / "small.yaml").write_text(json.dumps(recipe))
    for processes, batch in ((2, 2), (1, 4)):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        words = ["train", "small.yaml", "--quiet", "--output", str(tmp_path / str(processes))]
        words.append(f"per_device_train_batch_size={batch}")
        done = run_python(*launch, "-m", "quietstar", *words, cwd=tmp_path)
        assert done.stdout.count("4 steps of recipe small") == 1
    one, twice = (load_file(tmp_path / n / "model.safetensors") for n in ("1", "2"))
    # The start embedding's gradient is a sum that nearly cancels; everything else agrees to 1e-6.
    assert difference(twice, one) < 5e-3
    start = "thought_embedding.start"
    del one[start], twice[start]
    assert difference(twice, one) < 2e-5
    losses = [
        json.loads((tmp_path / n / "metrics.json").read_text())["evaluation"]["base_nll"]["mean"]
        for n in ("1", "2")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor."""
    assert set(ours) == set(theirs)
    return max(
        float((ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-6))
        for name, value in theirs.items()
    )


@pytest.mark.parametrize("name", two.CASES)
def test_gradients_are_those_of_one_process(out: Path, name: str, tmp_path):
    if "adapters" in two.CASES[name]:
        pytest.importorskip("peft")
    run, gradients = two.alone(two.CASES[name], tmp_path)
    for step, expected in enumerate(gradients.steps):
        found = load_file(out / f"{name}-gradients-{step}.safetensors")
        # Sums in another order; a wrong share would be off by 1e-2 (below). The second step follows an
        # update by Adam, which magnifies the rounding of small gradients.
        assert difference(found, expected) < (2e-5, 1e-4)[step], step
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert json.loads((out / f"{name}-losses.json").read_text()) == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("name", two.ZERO)
def test_deepspeed_ends_where_one_process_does(out: Path, name: str, tmp_path):
    pytest.importorskip("deepspeed")
    run, _ = two.alone(two.ZERO[name], tmp_path)
    weights, before = two.whole_weights(run), dict(two.build(two.ZERO[name]).named_parameters())
    saved = load_file(out / f"run-{name}" / "checkpoint-2" / "model.safetensors")
    assert difference(saved, weights) < 1e-4  # the two clip to norms that differ in the fifth digit
    assert difference(weights, before) > 1e-2
    assert json.loads((out / f"{name}.json").read_text()) == {"change": 0, "skipped": 1}


def test_a_wrong_share_would_be_noticed(tmp_path):
    """Means of two halves are not the mean: the rows' counts differ enough to tell."""
    case = two.CASES["ddp"]
    model, batch = two.build(case).train(), two.rows(case)[:4]
    stacked = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
    gradients = []
    for parts in (1, 2):
        model.zero_grad()
        for part in range(parts):
            rows = {key: value.chunk(parts)[part] for key, value in stacked.items()}
            (model(**rows).loss / parts).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert difference(*gradients) > 1e-2


def test_a_rollout_gathers_every_layer_once(out: Path):
    counted = json.loads((out / "collectives.json").read_text())
    layers, embedding_head_and_root = 2, 3
    # Forward and backward of the packed pass; backward asks for the embedding once more.
    forced = counted["forced"]["_allgather_base_"]
    assert forced == 2 * layers + embedding_head_and_root + 1
    assert counted["sampled"]["_allgather_base_"] == forced + layers


@pytest.mark.parametrize("name", two.SAVED)
def test_checkpoints_of_one_process_continue_in_two_and_back(out: Path, name: str):
    case = two.SAVED[name]
    whole = load_file(out / f"one-{name}" / "checkpoint-4" / "model.safetensors")
    start = dict(two.build(case).named_parameters())
    assert difference(whole, {n: start[n].detach() for n in whole}) > 1e-2
    for other in (f"two-{name}", f"one-two-{name}"):
        found = load_file(out / f"{other}.safetensors")
        assert difference({n: found[n] for n in whole}, whole) < 1e-4, other
    shutil.copytree(out / f"two-{name}" / "checkpoint-2", out / f"two-one-{name}" / "checkpoint-2")
    run, _ = two.alone(case, out / f"two-one-{name}", resume=True, **two.SAVING)
    back = dict(run.model.named_parameters())
    assert difference({n: back[n].detach() for n in whole}, whole) < 1e-4


@pytest.mark.parametrize("name", two.SAVED)
def test_a_checkpoint_of_two_processes_is_like_one_of_one(out: Path, name: str):
    files = [
        {p.name for p in (out / f"{kind}-{name}" / "checkpoint-2").iterdir()} for kind in ("one", "two")
    ]
    assert files[0] == files[1]
    assert not [f for f in files[0] if not f.endswith((".json", ".safetensors"))]
