"""What a checkpoint holds beside the weights, as safetensors and JSON: nothing in it is code.

Transformers writes optimiser, schedule and random states with pickle. Here tensors go to safetensors
under the names of their parameters and plain values to JSON, whole even where the parameters are
sharded, so that a checkpoint does not depend on how many processes wrote it.
``torch.distributed.checkpoint.state_dict`` does not serve here: reading an optimiser that has not
stepped counts a step in it, one without state (SGD) cannot be loaded, and 8-bit states come nested.
"""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.safetensors", "scheduler.json"
RNG_FILE, SCALER_FILE, DATA_FILE = "rng_state.json", "scaler.json", "data_position.json"
# In a key, between a parameter's name and the name of its state; neither contains it.
_SEPARATOR = "//"
_META = "quietstar"
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")

Meta = dict[str, Any]


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter's name, without what wrappers put into it."""
    return {
        parameter: _WRAPPERS.sub("", name).removeprefix("module.")
        for name, parameter in model.named_parameters()
    }


def full_on_cpu(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered if it is sharded (all processes have to call then)."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous()


def gathered(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Full tensors on the CPU, by name; on every process, in the same order.

    Args:
        keep: False on a process that only takes part in the gathering; its result is empty.
    """
    full = ((name, full_on_cpu(tensor)) for name, tensor in tensors)
    return {name: tensor for name, tensor in full if keep}


def sharded_like(value: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, sharded as ``pattern`` is if it has its shape; no communication."""
    if isinstance(pattern, DTensor) and value.shape == pattern.shape:
        value = value.to(pattern.device)
        return distribute_tensor(value, pattern.device_mesh, pattern.placements, src_data_rank=None)
    return value


def save_optimizer(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    names: dict[nn.Parameter, str],
    writes: bool,
) -> None:
    """Write the states of optimiser and learning-rate schedule; every process calls, one ``writes``.

    Raises:
        ValueError: for a state that is neither a tensor nor plain data.
    """
    tensors, meta = optimizer_state(optimizer, names, keep=writes)
    if writes:
        write_tensors(tensors, meta, folder / OPTIMIZER_FILE)
        schedule = scheduler.state_dict()
        check_plain(schedule, f"lr_scheduler {type(scheduler).__name__}")
        write_plain(folder / SCHEDULER_FILE, schedule)


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any, names: dict[nn.Parameter, str]
) -> None:
    """Read what :func:`save_optimizer` wrote; without it (save_only_model) both stay fresh."""
    if (folder / OPTIMIZER_FILE).is_file():
        load_optimizer_state(optimizer, names, folder / OPTIMIZER_FILE)
        scheduler.load_state_dict(read_plain(folder / SCHEDULER_FILE))


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], keep: bool
) -> tuple[dict[str, Tensor], Meta]:
    """Tensors by ``parameter//state`` and everything else as plain data.

    Args:
        keep: as :func:`gathered` has it.

    Raises:
        ValueError: for a state that is neither a tensor nor plain data.
    """
    state: dict[str, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({**settings, "params": [names[p] for p in group["params"]]})
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"{names[parameter]}{_SEPARATOR}{key}"] = value
    tensors = gathered(((k, v) for k, v in state.items() if isinstance(v, Tensor)), keep)
    meta = {"groups": groups, "values": {k: v for k, v in state.items() if not isinstance(v, Tensor)}}
    check_plain(meta, f"optimizer {type(optimizer).__name__}")
    return tensors, meta


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], path: Path
) -> None:
    """Put back what :func:`optimizer_state` took out.

    Raises:
        ValueError: if the file is of other parameters than the optimiser's.
    """
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {names[p]: (i, p) for i, p in enumerate(order)}
    state: dict[int, dict[str, Any]] = {}
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[_META])
        saved = [name for group in meta["groups"] for name in group["params"]]
        if set(saved) != set(index):
            strange = sorted(set(saved) ^ set(index))[0]
            raise ValueError(
                f"{path} does not fit: parameter {strange!r} is only in one of file and run"
            )
        for place in file.keys():  # noqa: SIM118 - not a mapping
            name, key = place.split(_SEPARATOR)
            number, parameter = index[name]
            state.setdefault(number, {})[key] = sharded_like(file.get_tensor(place), parameter)
    for place, value in meta["values"].items():
        name, key = place.split(_SEPARATOR)
        state.setdefault(index[name][0], {})[key] = value
    groups = [{**group, "params": [index[n][0] for n in group["params"]]} for group in meta["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_random_states(folder: Path, writes: bool) -> None:
    """Write the random states of all processes; every process calls, one ``writes``."""
    states = gather_object([random_state(cuda=torch.cuda.is_available())])
    if writes:
        write_plain(folder / RNG_FILE, states)


def load_random_state(folder: Path, process: int) -> None:
    """Read this process's random state, if the checkpoint has any."""
    if (folder / RNG_FILE).is_file():
        states = read_plain(folder / RNG_FILE)
        # The processes draw the same numbers, so one that was not there takes the first's.
        set_random_state(states[process if process < len(states) else 0])


def random_state(cuda: bool) -> Meta:
    """Python's, numpy's and torch's generators of this process, as plain data."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, [int(key) for key in keys], *(float(value) for value in rest)],
        "torch": _to_text(torch.get_rng_state()),
        "cuda": [_to_text(state) for state in torch.cuda.get_rng_state_all()] if cuda else [],
    }


def set_random_state(state: Meta) -> None:
    """Put back what :func:`random_state` took out; another number of GPUs keeps its own states."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    keys = np.array(keys, dtype=np.uint32)
    np.random.set_state((kind, keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(_from_text(state["torch"]))
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([_from_text(text) for text in state["cuda"]])


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def save_scaler(folder: Path, scaler: Any) -> None:
    """Write the state of a gradient scaler, if there is one."""
    if scaler is not None:
        write_plain(folder / SCALER_FILE, scaler.state_dict())


def load_scaler(folder: Path, scaler: Any) -> None:
    """Read what :func:`save_scaler` wrote, if anything."""
    if (folder / SCALER_FILE).is_file():
        scaler.load_state_dict(read_plain(folder / SCALER_FILE))


def save_data_position(folder: Path, data: Any, rows: int, workers: int) -> None:
    """Write where a streamed data set is after ``rows`` rows, if it can tell; nothing for others.

    With ``workers``, which have streams of their own, a resumed run skips what was trained on.
    """
    if hasattr(data, "position_at") and not workers:
        write_plain(folder / DATA_FILE, data.position_at(rows))


def seek_data(checkpoint: Any, data: Any, workers: int) -> bool:
    """Set a streamed data set to a checkpoint's place; False if a resumed run has to skip rows."""
    if not isinstance(checkpoint, str | Path) or not hasattr(data, "seek") or workers:
        return False
    path = Path(checkpoint) / DATA_FILE
    if not path.is_file():
        return False
    data.seek(read_plain(path))
    return True


def read_plain(path: Path) -> Any:
    """Read plain data of a checkpoint."""
    return json.loads(path.read_text())


def write_plain(path: Path, value: Any) -> None:
    """Write plain data of a checkpoint, which is flushed to the disk as a whole."""
    path.write_text(json.dumps(value))


def write_tensors(tensors: dict[str, Tensor], meta: Any, path: Path) -> None:
    """Write tensors and plain data into one safetensors file."""
    save_file(tensors, path, metadata={_META: json.dumps(meta)})


def check_plain(value: Any, what: str) -> None:
    """Raise ``ValueError`` unless JSON gives back what it was given (tuples become lists)."""
    try:
        json.dumps(value)
    except TypeError as error:
        raise ValueError(f"{what} keeps a state that is no plain data ({error})") from error


def without_tied(model: nn.Module, loaded: Any) -> Any:
    """What ``load_state_dict`` says, without weights as missing that were read under another name.

    A file has tied weights once.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = set(loaded.missing_keys)
    read = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    left = [name for name in loaded.missing_keys if id(parameters.get(name)) not in read]
    return loaded._replace(missing_keys=left)
