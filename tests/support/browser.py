"""A headless Chromium for tests, driven through chromedriver's W3C WebDriver protocol.

Nothing but the standard library is needed beside the two programs (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "no chromium and chromedriver on this machine"

KEYS = {
    "Left": "\ue012",
    "Up": "\ue013",
    "Right": "\ue014",
    "Down": "\ue015",
    "Home": "\ue011",
    "End": "\ue010",
    "Tab": "\ue004",
    "Enter": "\ue007",
}


class Browser:
    """One window. Use as a context manager; what it started ends with it."""

    def __init__(self, profile: Path, width: int = 1300, height: int = 1500):
        assert CHROMIUM and DRIVER
        self._server = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._server.stdout is not None
        for line in self._server.stdout:
            if "on port" in line and "successfully" in line:
                self._root = f"http://127.0.0.1:{line.rstrip().rstrip('.').split()[-1]}/session"
                break
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ]
        options = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self._call("", {"capabilities": {"alwaysMatch": options}})
        self._root += "/" + session["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("", None, "DELETE")
        finally:
            self._server.terminate()
            self._server.wait(10)

    def _call(self, path: str, content: dict | None = None, method: str = "POST") -> Any:
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self._root + path, body, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:500]) from error

    def open(self, path: Path) -> None:
        """Show a file."""
        self._call("/url", {"url": path.as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self._call("/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys: str) -> None:
        """Press keys one after the other, by their names above or as characters."""
        strokes = []
        for key in keys:
            value = KEYS.get(key, key)
            strokes += [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        self._call("/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        found = self._call("/element", {"using": "css selector", "value": selector})
        self._call(f"/element/{next(iter(found.values()))}/click", {})

    def screenshot(self, path: Path) -> Path:
        """The window as a PNG file."""
        path.write_bytes(base64.b64decode(self._call("/screenshot", None, "GET")))
        return path

    def print_pages(self, path: Path) -> Path:
        """The page as it is printed, a PDF file."""
        path.write_bytes(base64.b64decode(self._call("/print", {"background": False})))
        return path

    def complaints(self) -> list[str]:
        """Errors and warnings of the console so far, blocked requests included."""
        return [entry["message"] for entry in self._call("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses asked for so far, but for files, what a page holds itself, and the browser's own."""
        log = [
            json.loads(e["message"])["message"] for e in self._call("/se/log", {"type": "performance"})
        ]
        asked = [
            e["params"]["request"]["url"] for e in log if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith(("file:", "data:", "chrome"))]
