"""The documentation as a site: built without a warning, whole in a browser, nothing loaded from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_helpers import CHROMIUM, opened

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(path.stem for path in (ROOT / "docs").glob("*.md")), "limits"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", str(ROOT / "mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, "--site-dir", str(place)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return place


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text("utf-8")
    for page in PAGES:
        assert (site / f"{page}.html").exists(), page
        assert page == "index" or f'href="{page}.html"' in home, page


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    """Scripts, styles, pictures and fonts are the site's own; links may lead out."""
    loads = re.compile(
        r"""<(?:script|img|iframe|source|video|audio|object|embed)\b[^>]*?\b(?:src|data)=["']?([^"'\s>]+)"""
        r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|icon|preload|modulepreload|preconnect))[^>]*?\bhref=["']?([^"'\s>]+)"""
    )
    for page in site.rglob("*.html"):
        found = [source or style for source, style in loads.findall(page.read_text("utf-8"))]
        assert len(found) > 3, page
        assert not [place for place in found if re.match(r"(?:\w+:)?//", place)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import\s*|url\()[\"']?(?:https?:)?//", style.read_text("utf-8")), style


def test_fences_and_formulae_are_rendered(site: Path) -> None:
    """No fence that MkDocs did not know as one, no formula left as TeX."""
    for page in PAGES:
        text = (site / f"{page}.html").read_text("utf-8")
        body = text[text.index("<article") : text.index("</article>")]
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", body, flags=re.DOTALL)
        assert "```" not in prose, page
        assert "arithmatex" not in prose, page
        assert "$$" not in prose, page
    assert (site / "maths.html").read_text("utf-8").count("<math") > 50


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("page", PAGES)
def test_a_browser_shows_the_page_and_asks_no_other_host(page: str, site: Path, tmp_path: Path) -> None:
    document, asked = opened(site / f"{page}.html", tmp_path)
    source = ROOT / "docs" / f"{page}.md"
    heading = source.read_text("utf-8").split("\n")[0] if source.exists() else "# Limits"
    shown = re.search(r"<h1[^>]*>(.*?)<", document)
    assert shown is not None
    assert shown[1].strip() == heading.removeprefix("# ")
    assert asked == []


@pytest.mark.slow
@needs_chromium
def test_a_page_that_asks_another_host_is_noticed(tmp_path: Path) -> None:
    address = "https://example.invalid/a.js"
    page = tmp_path / "page.html"
    page.write_text(f"<script>fetch('{address}')</script><h1>Hello</h1>", "utf-8")
    document, asked = opened(page, tmp_path / "browser")
    assert "Hello" in document
    assert address in asked
