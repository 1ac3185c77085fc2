"""Data sets by name: fetched once, believed by their digest alone, one clear line without a network."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from patchkit.errors import NotFound, Unavailable
from patchkit.evaluation import cases as reader
from patchkit.evaluation.cases import read_cases
from patchkit.evaluation.datasets import DATASETS, Dataset, fetch

DATA = json.dumps(
    [{"subject": name, "prompt": "{} plays", "target_new": "football"} for name in ("Ann", "Paris")]
).encode()


class Server:
    """Gives ``data`` for every path, and counts; ``cut`` closes the line after so many bytes."""

    def __init__(self, address: str) -> None:
        self.address, self.data, self.asked = address, DATA, 0
        self.cut: int | None = None
        self.status = 200


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found: Server

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked += 1
            self.send_response(found.status)
            self.send_header("Content-Length", str(len(found.data)))
            self.end_headers()
            self.wfile.write(found.data[: found.cut])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        found = Server(f"http://127.0.0.1:{listening.server_address[1]}/counterfact.json")
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield found
        finally:
            listening.shutdown()
            thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "datasets"


def of(server: Server) -> Dataset:
    return Dataset("counterfact", server.address, hashlib.sha256(DATA).hexdigest(), len(DATA))


def put(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> Mapping[str, Dataset]:
    known = {dataset.name: dataset}
    monkeypatch.setattr(reader, "DATASETS", known)
    return known


def test_it_is_fetched_once_and_a_file_of_the_name_comes_first(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, of(server))
    told: list[tuple[int, int, str]] = []
    for _ in range(2):
        found = read_cases("counterfact", lambda *step: told.append(step))
        assert (found.source, len(found.cases)) == ("counterfact", 2)
    assert server.asked == 1
    assert told[-1] == (len(DATA), len(DATA), "fetch counterfact")
    assert {path.name for path in cache.iterdir()} == {"counterfact.json", "counterfact.json.lock"}
    Path("counterfact").write_text('{"subject": "Ann", "prompt": "{} is", "target": "x"}\n')
    assert len(read_cases("counterfact").cases) == 1


def test_a_size_that_is_only_a_bound_ends_at_what_came(server: Server, cache: Path) -> None:
    told: list[tuple[int, int, str]] = []
    bound = replace(of(server), size=10 * len(DATA))
    assert fetch(bound, lambda *step: told.append(step)).read_bytes() == DATA
    assert told[-1] == (len(DATA), len(DATA), "fetch counterfact")
    assert {whole for _, whole, _ in told} == {len(DATA)}


def test_a_damaged_copy_is_fetched_again(server: Server, cache: Path) -> None:
    place = fetch(of(server))
    place.write_bytes(DATA.replace(b"Ann", b"Eve"))
    assert fetch(of(server)).read_bytes() == DATA
    assert server.asked == 2


@pytest.mark.parametrize(
    "bad", [DATA.replace(b"Ann", b"Eve"), DATA + b" " * 3_000_000, DATA[:-1], b""], ids=len
)
def test_other_bytes_are_refused_and_nothing_is_kept(server: Server, cache: Path, bad: bytes) -> None:
    server.data = bad
    with pytest.raises(Unavailable, match="is not the file that patchkit knows") as caught:
        fetch(of(server))
    assert "\n" not in caught.value.message
    assert [path.name for path in cache.iterdir()] == ["counterfact.json.lock"]
    server.data = DATA
    assert fetch(of(server)).read_bytes() == DATA


def test_without_a_network_the_way_out_is_said(server: Server, cache: Path) -> None:
    server.cut = 9
    with pytest.raises(Unavailable):  # the line broke
        fetch(of(server))
    server.cut, server.status = None, 404
    with pytest.raises(Unavailable, match=r"cannot be fetched from .*Not Found"):
        fetch(of(server))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}/counterfact.json"
        lost = Dataset("counterfact", nowhere, hashlib.sha256(DATA).hexdigest(), len(DATA))
        with pytest.raises(Unavailable) as caught:
            fetch(lost)
        said = caught.value.message
        assert said.startswith(f"counterfact: cannot be fetched from {nowhere}")
        assert said.endswith(f"put the file there yourself: {cache / 'counterfact.json'}")
        (cache / "counterfact.json").write_bytes(DATA)
        assert fetch(lost) == cache / "counterfact.json"


def test_names_that_are_none_are_told_of_those_that_are(cache: Path) -> None:
    with pytest.raises(NotFound, match="or counterfact, multi_counterfact or zsre to have"):
        read_cases("hotpot")


def test_the_digests_are_whole_and_those_on_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text("utf-8")
    for name, dataset in DATASETS.items():
        assert len(bytes.fromhex(dataset.sha256)) == 32
        assert dataset.address.startswith("https://")
        row = f"| `{name}` | <{dataset.address}> | {dataset.size:,} | `{dataset.sha256}` |"
        assert row in page


def test_a_line_that_is_cut_is_no_wrong_file(server: Server, cache: Path) -> None:
    server.cut = 10
    with pytest.raises(Unavailable, match=rf"cut off {len(DATA) - 10} bytes before its end\); try again"):
        fetch(of(server))
    server.cut = None
    assert fetch(of(server)).read_bytes() == DATA
