"""Question sets in the layouts that they are published in, as templates.

A preset is a name for templates of :mod:`quietstar.data.templates`; with ``data.preset`` a recipe takes
them, and ``data.prompt`` or ``data.completion`` beside it replace the preset's. ``quietstar eval`` asks
the same questions.
"""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """The templates for rows that have their columns."""

    prompt: str
    completion: str


class Preset(NamedTuple):
    """A data set of the hub, and one layout for each way in which its rows are published."""

    hub_name: str
    config_name: str | None
    layouts: tuple[Layout, ...]


PRESETS: dict[str, Preset] = {
    # openai/grade-school-math and the hub have the same columns. The rationale is not asked for.
    "gsm8k": Preset("openai/gsm8k", "main", (Layout("Q: {question}\nA:", " {answer:final}\n"),)),
    "gsm8k-steps": Preset(
        "openai/gsm8k",
        "main",
        (Layout("Q: {question}\nA:", " {answer:steps}\n#### {answer:final}\n"),),
    ),
    "csqa": Preset(
        "tau/commonsense_qa",
        None,
        (
            Layout("Q: {question}\n{choices:choices}\nA:", " {answerKey}\n"),  # the hub
            Layout(
                "Q: {question.stem}\n{question.choices:choices}\nA:", " {answerKey}\n"
            ),  # its own file
        ),
    ),
    # A third of the bodies end without a full stop, and every answer is a float.
    "svamp": Preset(
        "ChilleD/SVAMP",
        None,
        (Layout("Question: {Body:sentence} {Question}\nAnswer:", " {Answer:number}\n"),),
    ),
}
