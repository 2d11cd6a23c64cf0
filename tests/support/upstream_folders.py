"""Folders as the reference implementation writes them, made of small random models."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

OWN = Path(__file__).parents[1] / "data" / "golden" / "A"


FLAGS = {
    "merged_talk_heads": True,
    "merged_lm_and_talk_heads": False,
    "merged_lm_and_think_heads": True,
    "use_concat_talk_head": True,
    "use_shallow_think": True,
    "use_shallow_talk": False,
    "use_complex_think_head": False,
    "use_complex_talk_head": True,
    "use_weighted_talk_head": True,
}


def golden(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((folder / "meta.json").read_text()), load_file(folder / "golden.safetensors")


def write_checkpoint(
    path: Path, case: Path = OWN, *, kind: str = "safetensors", drop: tuple[str, ...] = (), **config
) -> Path:
    """A golden case as ``save_pretrained`` of the reference's patched transformers leaves it."""
    meta, data = golden(case)
    path.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": ["MistralForCausalLM"],
        "_name_or_path": "mistralai/Mistral-7B-v0.1",
        "model_type": "mistral",
        "torch_dtype": "float32",
        "transformers_version": "4.37.0.dev0",
        **meta["config"],
        **FLAGS,
        **config,
    }
    (path / "config.json").write_text(json.dumps(settings))
    state = {n[6:]: t for n, t in data.items() if n.startswith("param/") and n[6:] not in drop}
    names = sorted(state)
    whole, save = {
        "safetensors": ("model.safetensors", save_file),
        "bin": ("pytorch_model.bin", torch.save),
    }[kind.removesuffix("-whole")]
    if kind.endswith("-whole"):
        save(state, path / whole)
        return path
    stem, ending = whole.split(".")
    parts = {f"{stem}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save({n: state[n] for n in part}, path / file)
    weight_map = {n: file for file, part in parts.items() for n in part}
    (path / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def dash_tokenizer(size: int = 128) -> PreTrainedTokenizerFast:
    """``---`` is token 7; the meta tokens are the last two."""
    names = [f"t{i}" for i in range(size)]
    names[7] = "---"
    names += ["<|startthought|>", "<|endthought|>"]
    inner = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="t0")
