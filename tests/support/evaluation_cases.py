"""Rows of data sets and a model with known probabilities, for the tests of ``quietstar eval``."""

from types import SimpleNamespace

import torch

from quietstar.cli import app as cli

GSM_ROWS = [
    {
        "question": f"Tom has {n} apples and buys {n}. How many?",
        "answer": f"{n}+{n}={2 * n}\n#### {2 * n}",
    }
    for n in range(4, 10)
]
CSQA_ROWS = [
    {
        "id": str(n),
        "question": f"Where would you put {n} plates?",
        "question_concept": "plate",
        "choices": {"label": list("ABCDE"), "text": ["shelf", "sea", "sky", "road", f"hat {n}"]},
        "answerKey": "ABCDE"[n % 5],
    }
    for n in range(6)
]


class FakeModel:
    """Predicts at each position the probabilities of a table, whatever the text."""

    device = torch.device("cpu")

    def __init__(self, table: torch.Tensor):
        self.table = table
        self.config = SimpleNamespace(model_type="llama")

    def __call__(self, input_ids, attention_mask, position_ids, logits_to_keep):
        assert input_ids.shape == attention_mask.shape == position_ids.shape
        rows = self.table[-logits_to_keep:].log().expand(len(input_ids), -1, -1)
        return SimpleNamespace(logits=rows)


def run(*words: object) -> int:
    """``quietstar eval`` with these words; its exit status."""
    return cli.main(["eval", *map(str, words), "--quiet", "--device", "cpu"])
