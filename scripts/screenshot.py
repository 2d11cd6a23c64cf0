#!/usr/bin/env python
"""Takes the picture of a page of `quietstar inspect` that docs/inspect.md shows, in a real browser.

    quietstar demo
    python scripts/screenshot.py quietstar-demo/thoughts.html

It needs Debian's chromium and chromium-driver, writes docs/figures/inspect.png, and puts the picture
between the marks of docs/inspect.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import browser  # noqa: E402

PAGE = ROOT / "docs" / "inspect.md"
PICTURE = ROOT / "docs" / "figures" / "inspect.png"
BEGIN, END = "<!-- screenshot -->", "<!-- /screenshot -->"
SIZE = (1300, 900)


def take(page: Path, picture: Path) -> Path:
    """The beginning of a page as a PNG file, the token that thinking helped most being chosen.

    Raises:
        RuntimeError: if the page asks for anything beside itself, or its script complains.
    """
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browser.Browser(Path(profile), *SIZE) as window,
    ):
        window.open(page.resolve())
        window.screenshot(picture)
        asked, complaints = window.requests(), window.complaints()
    if asked or complaints:
        raise RuntimeError(f"{page} asked for {asked} and said {complaints}; expected neither")
    return picture


def with_picture(text: str, picture: str) -> str:
    """The text of a page with the picture between its marks."""
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"the page lacks the marks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n![A page of quietstar inspect in a browser]({picture})\n{END}{tail}"


def main() -> int:
    """Take it, and show it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path, help="written by quietstar inspect or quietstar demo")
    page: Path = parser.parse_args().page
    if browser.MISSING:
        print(f"{browser.MISSING}; apt-get install chromium chromium-driver", file=sys.stderr)
        return 2
    take(page, PICTURE)
    shown = PICTURE.relative_to(PAGE.parent).as_posix()
    PAGE.write_text(with_picture(PAGE.read_text(encoding="utf-8"), shown), encoding="utf-8")
    print(f"written: {PICTURE}, {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
