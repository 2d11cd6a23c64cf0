"""scripts/screenshot.py: a picture of a page, in a real browser."""

import struct
import subprocess
import sys
from pathlib import Path

import browser
import pytest

from quietstar.inspect.data import SeenThought, SeenToken
from quietstar.inspect.page import render_page

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import screenshot

    return screenshot


@pytest.fixture
def page(tmp_path: Path) -> Path:
    thought = SeenThought("A B D", "most likely", 1.0, 0.5, 1.0)
    top = (("C", 0.5, True), ("A", 0.2, False))
    seen = [SeenToken("A", 0)] + [SeenToken(" C", 0, 2.0, 1.0, 0.5, top, top, (thought,))] * 20
    path = tmp_path / "page.html"
    path.write_text(render_page(seen, title="Thoughts", subtitle="of a test"), encoding="utf-8")
    return path


@pytest.mark.skipif(browser.MISSING is not None, reason=browser.MISSING or "")
def test_picture_of_a_page(script, page: Path, tmp_path: Path):
    """As large as the window, and not all of one colour."""
    data = script.take(page, tmp_path / "page.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width == script.SIZE[0] and 0.7 * script.SIZE[1] < height <= script.SIZE[1]
    assert len(data) > 10_000  # a page of one colour takes less


@pytest.mark.skipif(browser.MISSING is not None, reason=browser.MISSING or "")
def test_a_page_that_asks_the_network_is_refused(script, tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text("<img src='http://127.0.0.1:9/x.png'>", encoding="utf-8")
    with pytest.raises(RuntimeError, match="asked for .*127.0.0.1:9/x.png"):
        script.take(path, tmp_path / "page.png")


@pytest.mark.skipif(browser.MISSING is None, reason="there is a browser")
def test_without_a_browser_it_says_what_to_install(page: Path):
    words = [sys.executable, ROOT / "scripts" / "screenshot.py", page]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "apt-get install chromium chromium-driver" in done.stderr


def test_marks_of_the_page(script):
    """The picture stands between the marks, once, however often it is taken."""
    text = script.PAGE.read_text(encoding="utf-8")
    once = script.with_picture(text, "figures/inspect.png")
    assert once.count("![A page") == 1 and script.with_picture(once, "figures/inspect.png") == once
    assert once.partition(script.END)[2] == text.partition(script.END)[2]
    with pytest.raises(ValueError, match="lacks the marks"):
        script.with_picture("no marks", "x.png")
