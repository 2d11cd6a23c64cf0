"""``quietstar inspect``: the numbers on the page, the page in a browser, and what is rejected."""

import json
import math
import os
import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from families import thinking_model, tiny_decoder
from small_recipes import rejected

from quietstar import QuietStarForCausalLM
from quietstar.cli import app as cli
from quietstar.data.lookup import LookupLanguage, build_tokenizer
from quietstar.data.stdlib import stdlib_tokenizer
from quietstar.demos import lookup as demo
from quietstar.errors import UserError
from quietstar.inspect.data import SeenThought, SeenToken, look, spell, split_rows
from quietstar.inspect.figures import curves_figure, deciles_figure, nice_ticks
from quietstar.inspect.page import colour, read_curves, render_page, write_page

TEXT = (
    "def f(x):\n\treturn x < 1 & x > 0  # </script><script>document.title='broken'</script>\n"
    "text = '<b onclick=\"x\">caf\u00e9 \u2603 \U0001f600 {{data}} &amp;</b>'\n\n<!-- the end -->\n"
)
LOG = [
    {
        **{"step": step, "loss": 2.0, "base_loss": 2.0 - step / 100, "talk_loss_0": 1.9 - step / 90},
        **{"gain": 0.1 + step / 900, "mixing_weight_hard": 0.01 * step},
        **{"mixing_weight_easy": 0.001 * step, "thought_entropy": 1.0},
    }
    for step in (10, 20, 30)
]


def tiny(tokenizer, **fields) -> QuietStarForCausalLM:
    torch.manual_seed(5)
    decoder = tiny_decoder("llama", vocab_size=len(tokenizer))
    fields = {"thought_length": 3, "talk_length": 2, **fields}
    model = thinking_model(decoder, tokenizer, mixing=0.5, **fields)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return stdlib_tokenizer(300)


@pytest.fixture(scope="module")
def model(tokenizer) -> QuietStarForCausalLM:
    return tiny(tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("run")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "checkpoint-30").mkdir()
    (path / "checkpoint-30" / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return path


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def page(folder: Path, text_file: Path, capsys) -> Path:
    output = text_file.with_name("page.html")
    assert cli.main(["inspect", str(folder), str(text_file), "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"page: {output}\n" and captured.err == ""
    return output


@pytest.fixture
def window(tmp_path) -> Iterator[browser.Browser]:
    if browser.MISSING:
        pytest.skip(browser.MISSING)
    with browser.Browser(tmp_path / "profile") as opened:
        yield opened


# ---- numbers ------------------------------------------------------------------------------------


def test_what_is_seen_is_what_the_model_computes(model, tokenizer):
    rows = [tokenizer(TEXT)["input_ids"][:20], tokenizer(TEXT)["input_ids"][20:32]]
    state = torch.get_rng_state()
    seen = look(model, tokenizer, rows, samples=2)
    assert torch.equal(state, torch.get_rng_state())
    assert [t.row for t in seen] == [0] * 20 + [1] * 12
    for number, row in enumerate(rows):
        ids = torch.tensor([row])
        with torch.no_grad():
            output = model(ids, labels=ids)
            mixed = model(ids).logits[0].softmax(-1)
            base = model.base(ids).logits[0].softmax(-1)
        tokens = [t for t in seen if t.row == number]
        assert tokens[0].base is None and tokens[0].gain is None
        for at, token in enumerate(tokens[1:]):
            assert token.base == pytest.approx(output.base_losses[0, at].item(), abs=1e-5)
            assert token.mixed == pytest.approx(output.talk_losses[0, 0, 0, at].item(), abs=1e-5)
            assert token.weight == pytest.approx(output.mixing_weight[0, 0, 0, at].item(), abs=1e-5)
            assert math.exp(-token.mixed) == pytest.approx(mixed[at, row[at + 1]].item(), abs=1e-5)
            for found, chances in ((token.top_base, base[at]), (token.top_mixed, mixed[at])):
                assert [p for _, p, _ in found] == pytest.approx(
                    chances.topk(5).values.tolist(), abs=1e-5
                )
                assert [t for _, _, t in found] == [i == row[at + 1] for i in chances.topk(5).indices]
                assert found[0][0] == tokenizer.decode([int(chances.argmax())])
            first, *others = token.thoughts
            assert first.kind == "most likely" and {t.kind for t in others} == {"sampled"}
            assert first.text == tokenizer.decode(output.thought_ids[0, 0, at].tolist())
            assert first.gain == pytest.approx(token.gain)
            assert first.reward == pytest.approx(output.reward[0, 0, at].item(), abs=1e-5)
    assert len({t.text for token in seen for t in token.thoughts}) > 10  # they were sampled


def test_samples_repeat_with_their_seed(model, tokenizer):
    rows = [tokenizer(TEXT)["input_ids"][:12]]
    runs = [look(model, tokenizer, rows, samples=1, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_pause_tokens_and_no_thoughts(tokenizer):
    rows = [tokenizer(TEXT)["input_ids"][:12]]
    seen = look(tiny(tokenizer, thought_kind="pause"), tokenizer, rows)
    assert all(t.thoughts == () for t in seen) and seen[1].gain is not None
    with pytest.raises(UserError, match="no thoughts to look at"):
        look(tiny(tokenizer, thought_kind="none"), tokenizer, rows)
    with pytest.raises(UserError, match="row 0 has 3 tokens; expected at least 4"):
        look(tiny(tokenizer), tokenizer, [rows[0][:3]])


def test_rows_cover_the_text():
    for count in range(4, 60):
        rows = split_rows(list(range(count)), 10, 4)
        assert rows[0] + [t for row in rows[1:] for t in row[1:]] == list(range(count))
        assert all(len(row) >= 4 for row in rows)
        assert all(len(row) <= 10 for row in rows[:-1])


def test_spelling_adds_up_to_the_text(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    pieces = spell(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    assert "\U0001f600" in pieces and "" in pieces  # spread over several tokens
    words = build_tokenizer()
    assert spell(words, words("A u v ?")["input_ids"]) == ["A", " u", " v", " ?"]
    broken = tokenizer("\U0001f600")["input_ids"][:2] * 4  # never becomes a character
    assert len(spell(tokenizer, broken)) == 8


# ---- the page as text ---------------------------------------------------------------------------


class Reader(HTMLParser):
    """Text of the heat map's tokens, and everything that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "data", "srcset")]


def test_it_is_one_file_and_the_text_stays_text(page: Path, tokenizer):
    content = page.read_text()
    reader = Reader()
    reader.feed(content)
    assert reader.loads == []
    assert reader.tags.count("script") == 2 and "b" in reader.tags and "link" not in reader.tags
    assert "url(" not in content and "@import" not in content and "http://" not in content
    assert "default-src 'none'" in content
    data = json.loads(re.search(r'id="data">(.*?)</script>', content, re.S).group(1))
    ids = tokenizer(TEXT)["input_ids"]
    assert sorted(map(int, data)) == list(range(1, len(ids)))
    heat_map = re.search(r'<div id="text".*?</div>', content, re.S).group(0)
    shown = unescape(re.sub(r"<[^>]*>", "", heat_map))
    assert shown.replace("\u21b5", "") == TEXT


def test_json_inside_a_script_element():
    nasty = "</script><!-- & \u2028 <script>"
    token = SeenToken(nasty, 0, 1.0, 0.5, 0.1)
    page = render_page([SeenToken("x", 0), token], title="t", subtitle="s")
    held = re.search(r'id="data">(.*?)</script>', page, re.S).group(1)
    assert "<" not in held and ">" not in held and "&" not in held
    assert json.loads(held)["1"]["text"] == nasty


def test_colours_and_ticks():
    assert colour(2.0, 1.0) == colour(1.0, 1.0) == "rgb(31 122 140 / 0.70)"
    assert colour(-0.5, 1.0) == "rgb(217 118 43 / 0.35)"
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for low, high in ((3.0, 3.0), (-1e-4, 2e-4), (-17, 250), (0.0, 0.0)):
        ticks = nice_ticks(low, high)
        assert len(ticks) >= 2 and ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9


def test_figures_say_what_they_were_given():
    gains = [list(np.linspace(d, d + 1, 9)) for d in range(9)] + [[]]
    figure = deciles_figure(gains, [(d, d + 1) for d in range(10)])
    assert figure.count("<title>decile") == figure.count("-decile-") == 9
    assert "decile 3: NLL 2.00 to 3.00, 9 tokens; mean gain +2.500, median +2.500" in figure
    assert "nan" not in figure
    chart = curves_figure(
        "a < b", {"one": [(1, 0.0), (2, 1.0), (3, math.nan)], "two": [(1, 2.0), (3, 0.5)]}
    )
    assert "a &lt; b" in chart and chart.count("-curve-") == 2 and "nan" not in chart
    # Both in one page: no id twice, and every reference has its target.
    other = curves_figure("b", {"one": [(1, 0.0), (2, 1.0)]})
    ids = re.findall(r' id="([^"]+)"', figure + chart + other)
    assert len(ids) == len(set(ids)) > 9
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', figure + chart + other)) <= set(ids)


def test_curves_of_a_run(folder: Path, tmp_path):
    curves = dict(read_curves(folder))
    assert curves["NLL (nats)"]["without"] == [(10, 1.9), (20, 1.8), (30, 1.7)]
    assert len(curves) == 4
    assert read_curves(folder / "checkpoint-30") == read_curves(folder)
    assert read_curves(None) == read_curves(tmp_path) == read_curves("someone/model") == []


def test_a_text_that_thinking_changed_nowhere():
    token = SeenToken("x", 0, 1.0, 1.0, 0.0, (("x", 0.4, True),), (("x", 0.4, True),))
    page = render_page([SeenToken("y", 0), token, token], title="{{data}}", subtitle="s")
    assert page.count("nowhere") == 2
    assert page.count("{{") == 2  # in the title, where it is no place to fill


# ---- the page in a browser ----------------------------------------------------------------------


def test_in_a_browser(page: Path, window: browser.Browser, tmp_path):
    window.open(page)
    title = window.run("return document.title")
    assert title == "text.txt: what thinking gained"
    count = window.run("return document.querySelectorAll('.t').length")
    panel = "return document.getElementById('panel').textContent"
    focus = "return document.activeElement.dataset.i"
    assert window.run(panel).startswith("Token ")  # the largest gain is shown at once
    data = json.loads(window.run("return document.getElementById('data').textContent"))

    window.click('.t[data-i="7"]')
    told = window.run(panel)
    seen = data["7"]
    assert told.startswith("Token 7")
    assert f"NLL {seen['base']:.3f} \u2192 {seen['mixed']:.3f}" in told
    rows = window.run("return [...document.querySelectorAll('#panel tbody')][0].rows.length")
    assert rows == len(seen["thoughts"]) == 4
    for top in (seen["top_base"], seen["top_mixed"]):
        assert f"{100 * top[0][1]:.1f}%" in told

    # Keys: neighbours, ends, lines, and the next token with a large change.
    window.press("Right")
    assert window.run(focus) == "8" and window.run(panel).startswith("Token 8")
    window.press("Left", "Left")
    assert window.run(focus) == "6"
    window.press("End")
    assert window.run(focus) == str(count)
    window.press("Right", "Home")
    assert window.run(focus) == "1"
    before = window.run("return document.activeElement.getBoundingClientRect().top")
    window.press("Down")
    assert window.run("return document.activeElement.getBoundingClientRect().top") > before
    window.press("Up", "Home", "n")
    gains = {int(i): abs(t["base"] - t["mixed"]) for i, t in data.items()}
    chosen = int(window.run(focus))
    assert chosen > 1 and gains[chosen] >= max(gains[i] for i in range(2, chosen + 1))
    # One stop for Tab in the whole text, and it is the token that is shown.
    assert window.run("return document.querySelectorAll('.t[tabindex=\"0\"]').length") == 1
    window.press("Tab")
    assert window.run("return document.activeElement.className") == "go"
    window.press("Enter")
    assert window.run("return document.activeElement.className") == "t"

    assert window.run("return document.querySelectorAll('svg').length") == 5
    assert window.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert window.run("return document.title") == title  # the text's script did not run
    assert window.complaints() == []
    assert window.requests() == []

    from PIL import Image

    # Kept where a person can look at it, if they say where.
    shots = Path(os.environ.get("QUIETSTAR_SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    picture = np.asarray(Image.open(window.screenshot(shots / "inspect.png")).convert("RGB")).astype(int)
    assert picture.shape[1] > 1000
    assert (picture[0, 0] == 255).all()  # a light page
    teal = (picture[..., 2] - picture[..., 0] > 40).mean()
    orange = (picture[..., 0] - picture[..., 2] > 40).mean()
    assert teal > 0.001 and orange > 0.001
    assert window.print_pages(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_a_narrow_window(page: Path, tmp_path):
    if browser.MISSING:
        pytest.skip(browser.MISSING)
    with browser.Browser(tmp_path / "narrow", 520, 900) as window:
        window.open(page)
        assert window.run("return document.documentElement.scrollWidth <= window.innerWidth")


def test_nothing_in_a_thought_is_markup(window: browser.Browser, tmp_path):
    evil = "<img src=x onerror=\"document.title='broken'\"></script>"
    thought = SeenThought(evil, "most likely", 0.5, 0.1, None)
    token = SeenToken(evil, 0, 1.0, 0.5, 0.1, ((evil, 0.4, True),), ((evil, 0.6, True),), (thought,))
    path = tmp_path / "evil.html"
    path.write_text(render_page([SeenToken(evil, 0), token], title=evil, subtitle=evil))
    window.open(path)
    assert window.run("return document.title") == evil
    assert window.run("return document.querySelectorAll('img').length") == 0
    assert evil in window.run("return document.getElementById('panel').textContent")


# ---- the command --------------------------------------------------------------------------------


def test_part_of_a_text(folder: Path, text_file: Path, capsys, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    options = ["--tokens", "16", "--context", "9", "--samples", "0"]
    assert cli.main(["inspect", str(folder), str(text_file), *options]) == 0
    assert capsys.readouterr().out == "page: text.html\n"
    content = (text_file.parent / "text.html").read_text()
    assert content.count('class="t"') == 15 and "the first 16 of" in content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}", "no.txt"], "text file no.txt does not exist"),
        (["{folder}", "{folder}"], "cannot be read: Is a directory"),
        (["no-such/model", "{text}"], "is neither a folder nor in the local cache"),
        (["{folder}", "{text}", "--tokens", "1"], "--tokens is 1; expected a whole number >= 2"),
        (["{folder}", "{text}", "--samples", "-1"], "--samples is -1"),
        (["{folder}", "{text}", "--output", "/no/where/page.html"], "cannot be written"),
        (["{folder}", "{text}", "--output", "{text}"], "the page would overwrite"),
        (["{folder}", "{short}"], "has 1 tokens; expected at least 4"),
        (["{folder}", "{empty}"], "is empty"),
        (["{folder}", "{binary}"], "is not UTF-8 text"),
    ],
)
def test_rejected(words: list[str], message: str, folder: Path, text_file: Path, capsys, monkeypatch):
    here = text_file.parent
    (here / "short.txt").write_text("x")
    (here / "empty.txt").write_text(" \n")
    (here / "binary.txt").write_bytes(b"\xff\xfe\x00")
    names = {"folder": folder, "text": text_file}
    names |= {name: here / f"{name}.txt" for name in ("short", "empty", "binary")}
    rejected(capsys, ["inspect", *(word.format(**names) for word in words)], message)
    assert text_file.read_text() == TEXT


def test_the_demo_ends_with_a_page(tmp_path):
    model = tiny(build_tokenizer(), init_embedding_from="A")
    model.save_pretrained(tmp_path / "full")
    page = demo.save_page(tmp_path, LookupLanguage(4))
    assert page == tmp_path / "thoughts.html" and page.read_text().count('<p class="text">') == 6


def test_write_page_without_a_run(model, tokenizer, tmp_path):
    rows = [tokenizer(TEXT)["input_ids"][:14]]
    path = write_page(model, tokenizer, rows, tmp_path / "page.html", samples=0)
    content = path.read_text()
    assert "<h2>Training</h2>" not in content and "{{" not in content
    assert content.count('class="t"') == 13
