"""Folders that version 0.1.0 saved open and give what they gave then; tests/data/saved holds two.

They were trained for 30 steps (seed 42) by the commit 865a120: ``full`` a whole model, ``adapter`` LoRA
of rank 2 on ``decoder``. The JSON files hold an input and what that commit made of it.
"""

import json
from pathlib import Path

import pytest
import torch
from small_recipes import run_python

from quietstar.checkpoints.load import load_checkpoint

SAVED = Path(__file__).parents[1] / "data" / "saved"


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_a_folder_gives_what_it_gave(name: str, monkeypatch):
    if name == "adapter":
        pytest.importorskip("peft")
    monkeypatch.chdir(SAVED)  # the adapter names its decoder by a relative path
    model, _ = load_checkpoint(name, device="cpu")
    model.eval()
    expected = json.loads((SAVED / f"{name}.json").read_text())
    ids, thoughts = (torch.tensor(expected[key]) for key in ("input_ids", "thought_ids"))
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids, thought_ids=thoughts)
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
    for loss in ("loss", "language_loss", "policy_loss"):
        assert float(output[loss]) == pytest.approx(expected[loss], rel=2e-5), loss
    assert generated.tolist() == expected["generated"]


def words_of(code: str) -> list[str]:
    """What a fresh process prints; its argument is the whole model's folder."""
    return run_python("-P", "-c", code, SAVED / "full").stdout.split()


@pytest.mark.slow
def test_import_of_the_package_alone_teaches_transformers_the_type():
    code = (
        "import sys, quietstar\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    assert words_of(code) == ["QuietStarForCausalLM"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, quietstar",
        "import quietstar, transformers",
        # These bring in transformers while they are half there themselves.
        "import quietstar.modeling.model",
        "from quietstar.config import QuietStarConfig",
        "import quietstar.thinking.supported",
    ],
)
def test_the_order_of_imports_does_not_matter(imports: str):
    code = (
        f"import sys\n{imports}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "print(type(config).__name__, AutoModelForCausalLM._model_mapping[type(config)].__name__)"
    )
    assert words_of(code) == ["QuietStarConfig", "QuietStarForCausalLM"]


@pytest.mark.slow
def test_threads_may_import_transformers_behind_it():
    code = (
        "import importlib, threading, quietstar\n"
        "found = []\n"
        "def ask(name): found.append(importlib.import_module(name))\n"
        "names = ['transformers.modeling_utils', 'transformers.models.auto', 'quietstar.demos.text']\n"
        "threads = [threading.Thread(target=ask, args=(name,)) for name in names]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "from transformers import CONFIG_MAPPING\n"
        "print(len(found), CONFIG_MAPPING['quietstar'].__name__)"
    )
    assert words_of(code) == ["3", "QuietStarConfig"]


@pytest.mark.slow
def test_names_of_version_0_1_resolve():
    code = (
        "import quietstar\n"
        "from quietstar.thinking import Thinking\n"
        "from quietstar.corpora import stdlib_tokenizer\n"
        "from quietstar.adapters import settle_new_rows\n"
        "print(quietstar.layout.ThoughtLayout is quietstar.ThoughtLayout, Thinking.__name__)"
    )
    assert words_of(code) == ["True", "Thinking"]
