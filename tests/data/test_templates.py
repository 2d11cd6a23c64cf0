"""Templates: what a row's columns become, and a sentence for those that no row can fill."""

from typing import Any

import pytest

from quietstar.data.templates import Template
from quietstar.errors import UserError


def filled(text: str, **row: Any) -> str:
    return Template(text, "data.prompt").fill(row)


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("{x}", "as it is ", "as it is "),
        ("{{{x}}}", 3, "{3}"),
        (" {x:g}", 51.0, " 51"),
        ("{x:g}", "51.0", "51"),
        ("{x:.2f}", 2, "2.00"),
        ("{x:d}", 51.0, "51"),
        ("{x:d}", "51.0", "51"),
        ("{x:>4}", "a", "   a"),
        ("{x:04d}", 7, "0007"),
        # Python's g has six digits; the word has all.
        ("{x:g}", 22090603.0, "2.20906e+07"),
        ("{x:number}", 22090603.0, "22090603"),
        ("{x:number}", "1,200.50", "1200.5"),
        ("{x:number}", 0.5, "0.5"),
        ("{x:number}", -3.0, "-3"),
        ("{x:number}", 1e-7, "0.0000001"),
        ("{x:sentence}", " no stop ", "no stop."),
        ("{x:sentence}", "A stop.", "A stop."),
        ("{x:sentence}", 'He said "no!"', 'He said "no!"'),
        ("{x:equation}", "( 43.0 - 21.0 )", "43 - 21"),
        ("{x:equation}", "( ( 8.0 - 2.0 ) * 10.0 )", "(8 - 2) * 10"),
        ("{x:equation}", "( 8.0 - 2.0 ) * ( 3.5 + 1.0 )", "(8 - 2) * (3.5 + 1)"),
        ("{x:equation}", "( 100.05 + 20.0 )", "100.05 + 20"),
        ("{x:final}", "a\n#### 1,234", "1,234"),
        ("{x:final}", "#### half", "half"),
        ("{x:steps}", "48/2 = <<48/2=24>>24 in May.\n#### 24", "48/2 = 24 in May."),
        ("{x:choices}", {"label": ["A", "B"], "text": ["ape", "bee"]}, "(A) ape\n(B) bee"),
        ("{x:choices}", [{"label": "A", "text": "ape"}], "(A) ape"),
        ("{x.y}", {"y": "inside"}, "inside"),
        ("{x[y].z}", {"y": {"z": 4}}, "4"),
        ("{x.1}", ["a", "b"], "b"),
        ("{x.stem:sentence}", {"stem": "Why"}, "Why."),
    ],
)
def test_what_a_value_becomes(text: str, value: Any, expected: str):
    assert filled(text, x=value) == expected


def test_a_column_with_a_dot_in_its_name():
    assert filled("{a.b}", **{"a.b": "flat", "a": {"b": "nested"}}) == "flat"


def test_no_attribute_is_read():
    with pytest.raises(UserError, match="has no column 'x.__class__'"):
        filled("{x.__class__}", x="text")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{x", "data.prompt is '{x', which is no template: "),
        ("x}", "data.prompt is 'x}', which is no template: "),
        ("{}", "with the field {}; expected a column, e.g. {question}"),
        ("{x.}", "with the field {x.}; expected a column"),
        ("{x!r}", "with the conversion !r of {x}; expected a format behind a colon"),
        (
            "{x:sentense}",
            "with the format 'sentense' of column 'x'; expected one of Python's, or number",
        ),
        ("{x:sentense}", "; did you mean sentence?"),
        ("{x:.g.}", "with the format '.g.' of column 'x'"),
    ],
)
def test_templates_that_no_row_can_fill(text: str, said: str):
    with pytest.raises(UserError) as error:
        Template(text, "data.prompt")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "row", "said"),
    [
        (
            "Q: {Bodi}",
            {"Body": "b", "Answer": 1},
            "has no column 'Bodi' for data.prompt 'Q: {Bodi}'; its columns are: Answer, Body",
        ),
        ("{q.stem}", {"q": {"steam": 1}}, "has no column 'q.stem' .* its columns are: q, q.steam"),
        ("{x}", {"x": None}, "cannot fill data.prompt '{x}': column 'x' holds null; expected text or"),
        ("{x}", {"x": ["a"]}, "column 'x' holds a list; expected text or a number"),
        ("{x:g}", {"x": "many"}, "column 'x' holds 'many'; expected a number"),
        ("{x:d}", {"x": 1.5}, "column 'x' holds 1.5, which the format 'd' does not take"),
        ("{x:number}", {"x": "nan"}, "column 'x' holds 'nan'; expected a number"),
        ("{x:number}", {"x": True}, "column 'x' holds a bool; expected a number"),
        ("{x:sentence}", {"x": {}}, "column 'x' holds a dict; expected text"),
        ("{x:choices}", {"x": {"label": ["A"], "text": []}}, "expected labels and texts of choices"),
        ("{x}", {"x": "half \ud83d"}, "column 'x' holds half of a surrogate pair"),
    ],
)
def test_rows_that_do_not_fit(text: str, row: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said.replace("{", r"\{")):
        Template(text, "data.prompt").fill(row)


@pytest.mark.parametrize("value", ["1e5000", "1e999999999", "1,2", "1_000", "-", "nan"])
def test_what_is_no_number(value: str):
    with pytest.raises(UserError, match="expected a number"):
        filled("{x:number}", x=value)
