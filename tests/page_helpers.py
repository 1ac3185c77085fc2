"""What the tests of HTML pages share: a page as a parser reads it, and as a browser shows it."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

__all__ = ["CHROMIUM", "HOSTILE", "Reader", "opened"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"
_ITSELF = "not an origin"


class Reader(HTMLParser):
    """Tags, attributes, and the text that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def opened(page: Path, folder: Path) -> tuple[str, list[str]]:
    """What a browser makes of a page, and what the page asked of other hosts, none of which is found."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    switches += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    switches += [f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}"]
    command = [CHROMIUM, *switches, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    events = [event.get("params", {}) for event in json.loads(log.read_text("utf-8"))["events"]]
    # What the browser asks for itself has no origin.
    asked = [e["url"] for e in events if "url" in e and e.get("initiator", _ITSELF) != _ITSELF]
    return done.stdout, [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
