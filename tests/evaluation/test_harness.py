"""lm-evaluation-harness with a model that thinks."""

import copy
import json
from pathlib import Path

import pytest
import torch
from evaluation_cases import run
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM
from quietstar.evaluation import reasoning

TASK_FILE = """
task: quietstar_toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task_folder(tmp_path) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    path = tmp_path / "tasks"
    path.mkdir()
    rows = [
        {"question": "Two and two?", "choices": ["four", "six"], "label": 0},
        {"question": "The sky?", "choices": ["green", "blue", "red"], "label": 1},
    ]
    (path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "toy.yaml").write_text(TASK_FILE.format(data=path / "toy.jsonl"))
    return path


@pytest.mark.slow
def test_a_task_of_the_harness(
    folder: str, model: QuietStarForCausalLM, task_folder: Path, tmp_path, capsys
):
    output = tmp_path / "out.json"
    decoder = copy.deepcopy(model.base)
    decoder.set_attn_implementation("sdpa")
    decoder.save_pretrained(tmp_path / "plain")
    words = ["--tasks", "quietstar_toy", "--include-path", task_folder, "--output", output]
    for name in (folder, tmp_path / "plain"):
        assert run(name, *words, "--tokenizer", folder) == 0
        assert "quietstar_toy (lm-evaluation-harness)" in capsys.readouterr().out
        found = json.loads(output.read_text())["tasks"]["quietstar_toy"]
        assert found["acc,none"] in (0.0, 0.5, 1.0)


def test_the_harness_thinks(
    model: QuietStarForCausalLM, merging: PreTrainedTokenizerFast, task_folder: Path
):
    """Its log-likelihoods are those of the mixed prediction; ``thoughts=False`` gives the base's."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    import quietstar.evaluation.harness  # noqa: F401 - registers the model

    adapter = get_model("quietstar")
    context, rest = "Q: 1 2?\nA:", " 18"
    start, ids = reasoning.split_answer(merging, context, rest)
    request = Instance("loglikelihood", {}, (context, rest), 0)
    found = {}
    try:
        for thoughts in (True, False):
            lm = adapter(model, tokenizer=merging, batch_size=1, thoughts=thoughts)
            # One position less for each slot of a thought: start, three tokens, end.
            assert lm.max_length == (395 if thoughts else 400)
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))
            ((found[thoughts], _),) = lm.loglikelihood([request], disable_tqdm=True)
            assert found[thoughts] == pytest.approx(expected, rel=1e-4)
    finally:
        model.config.thought_kind = "sampled"
    assert found[True] != pytest.approx(found[False], rel=1e-3)
    with pytest.raises(ValueError, match="expected a Quiet-STaR model"):
        adapter(model.base, tokenizer=merging)
