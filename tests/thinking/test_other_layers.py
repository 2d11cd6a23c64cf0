"""Decoders with layers that passes with thoughts do not know are refused by the layers' name, wherever
they come from: a decoder, a plan, a run."""

import re
import runpy
from pathlib import Path

import pytest
import torch
import transformers
from families import thinking_model
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name

from quietstar import QuietStarForCausalLM
from quietstar.cli import app as cli
from quietstar.errors import UserError
from quietstar.thinking.recurrent.mixers import KNOWN_RECURRENCES
from quietstar.thinking.supported import check_supported

CONFIGS = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "family_configs.py"))
CAUSAL_TYPES, tiny_config = CONFIGS["CAUSAL_TYPES"], CONFIGS["tiny_config"]
# What code of layers that hand something on from token to token has in it.
SIGNS = re.compile(
    "causal_conv1d|delta_rule|delta_attention|selective_scan|lightning_attn|LightningAttention"
    "|linear_attention_cpu|mlstm|rg_lru|recurrent_state|ShortConv"
)
NEW_IN_5_24 = {"inkling2_loop_text", "lara_mini"}
THINK = {
    *("bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "lara_mini", "lfm2"),
    *("lfm2_moe", "lfm3", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_5_moe"),
    *("qwen3_5_moe_text", "qwen3_next"),
}
REFUSED = {
    "minimax": "layers with lightning attention (MiniMaxLightningAttention)",
    "jamba": "layers with Mamba-1 (JambaMambaMixer)",
    "mamba": "layers with Mamba-1 (MambaMixer)",
    "falcon_mamba": "layers with Mamba-1 (FalconMambaMixer)",
    "zamba": "layers with Mamba-1 (ZambaMambaMixer)",
    "zamba2": "layers with attention that several layers share (Zamba2HybridLayer)",
    "mamba2": "no attention layer, by whose keys",
    "recurrent_gemma": "layers with the RG-LRU recurrence (RecurrentGemmaRecurrentBlock)",
    "rwkv": "layers with RWKV's time mixing (RwkvSelfAttention)",
    "xlstm": "layers with mLSTM (xLSTMLayer)",
    "zaya": "layers with compressed convolutional attention (ZayaCCAProjection)",
    "inkling_text": "layers with convolutions beside their attention (InklingShortConvolution)",
    "inkling2_text": "layers with convolutions beside their attention (Inkling2ShortConvolution)",
    "inkling2_loop_text": "layers with convolutions beside their attention (Inkling2LoopShort",
    "qwen4_exp": "layers of type 'indexed_attention'",
    "qwen4_exp_text": "layers of type 'indexed_attention'",
}


def of_the_kind() -> list[str]:
    """The causal model types whose code has such layers, as the installed transformers has them."""
    models = Path(transformers.__file__).parent / "models"
    found = []
    for family in CAUSAL_TYPES:
        folder = models / model_type_to_module_name(family)
        if any(SIGNS.search(file.read_text("utf-8")) for file in folder.glob("modeling_*.py")):
            found.append(family)
    return found


def outline(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


def test_none_is_missing_from_the_lists():
    """A family that a later transformers brings has to think or to say why not, like these."""
    found = set(of_the_kind())
    assert found <= THINK | REFUSED.keys()
    missing = (THINK | REFUSED.keys()) - found
    if transformers.__version__.startswith(("5.23.", "5.24.")):
        assert missing == (NEW_IN_5_24 if transformers.__version__.startswith("5.23.") else set())


@pytest.mark.parametrize("family", of_the_kind())
def test_layers_think_or_are_refused_by_name(family: str):
    try:
        decoder = outline(family)
    except (ValueError, StrictDataclassError) as error:
        if not transformers.__version__.startswith("5.17."):
            raise
        pytest.skip(f"transformers 5.17 has configurations without their layers: {error}")
    if family in THINK:
        check_supported(decoder)
        return
    with pytest.raises(ValueError, match=re.escape(REFUSED[family])) as raised:
        check_supported(decoder)
    said = str(raised.value)
    assert said.startswith(f"model type '{decoder.config.get_text_config().model_type}' has ")
    assert said.endswith(f"{KNOWN_RECURRENCES} can be used with thoughts") or family == "mamba2"


def test_a_decoder_is_refused_before_anything_is_made_of_it():
    decoder = AutoModelForCausalLM.from_config(tiny_config("minimax"))
    with pytest.raises(ValueError, match="'minimax' has layers with lightning attention"):
        thinking_model(decoder)


@pytest.mark.parametrize("family", ["minimax", "zamba2"])
def test_plan_and_train_refuse_them_too(family: str, tmp_path, capsys):
    """zamba2's Mamba-2 layers alone would do, and be planned."""
    decoder = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=2060))
    decoder.save_pretrained(tmp_path)
    words = [f"model.name={tmp_path}", "model.config=null"]
    for command in (["plan"], ["train", "--quiet", "--output", str(tmp_path / "run")]):
        assert cli.main([command[0], "tiny", *words, *command[1:]]) == 2, command
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"quietstar: error: model type '{family}' has ")
        assert REFUSED[family] in said


@pytest.mark.parametrize("family", ["qwen3_omni_moe", "t5"])
def test_what_is_no_causal_language_model_is_told_in_one_sentence(family: str, tmp_path):
    config = transformers.AutoConfig.for_model(family)
    config.save_pretrained(tmp_path)
    message = f"no causal language model for a {type(config).__name__}; expected a decoder of text$"
    with pytest.raises(UserError, match=message):
        QuietStarForCausalLM.from_base(tmp_path, start_token_id=0, end_token_id=1)
