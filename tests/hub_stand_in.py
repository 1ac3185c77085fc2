"""A stand-in for the Hugging Face hub: as much of its HTTP interface as uploading a folder needs.

It keeps what it is sent as the hub would: small text files come inside the commit, all others by the LFS
batch interface, under their SHA-256, before the commit may name them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["StandIn", "hub_stand_in"]

TOKEN = "hf_stand_in"


@dataclass
class StandIn:
    """``repositories``: files by name; ``private``: those that were made private; ``commits``: messages."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    refuse_commits: int | None = None
    """A status with which every commit is refused."""


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn

    def do_GET(self) -> None:
        if not self._known():
            return
        if self.path == "/api/whoami-v2":
            self._answer({"name": "ann", "type": "user"})
        else:
            self._answer({"error": f"the stand-in has no {self.path}"}, 404)

    def do_PUT(self) -> None:
        data = self._body()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            self._answer({"error": "other bytes than were promised"}, 400)
            return
        self.hub.stored[oid] = data
        self._answer({})

    def do_POST(self) -> None:
        data = self._body()
        if not self._known():
            return
        if self.path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted.get('organization') or 'ann'}/{wanted['name']}"
            self.hub.repositories.setdefault(name, {})
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(name)
            self._answer({"url": f"{self.hub.address}/{name}", "id": name, "name": name})
        elif self.path == "/api/validate-yaml":
            assert json.loads(data)["content"].startswith("---\n")
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self._answer({"files": [self._mode(file) for file in json.loads(data)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer(
                {"transfer": "basic", "objects": [self._upload(o) for o in json.loads(data)["objects"]]}
            )
        elif "/commit/" in self.path:
            self._commit(data)
        else:
            self._answer({"error": f"the stand-in has no {self.path}"}, 404)

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        text = file["path"].endswith((".json", ".md", ".jsonl", ".sig"))
        return {"path": file["path"], "uploadMode": "regular" if text else "lfs", "shouldIgnore": False}

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        target = {"href": f"{self.hub.address}/lfs/{wanted['oid']}"}
        return {**wanted, "authenticated": True, "actions": {"upload": target}}

    def _commit(self, data: bytes) -> None:
        if self.hub.refuse_commits is not None:
            self._answer({"error": "no room"}, self.hub.refuse_commits)
            return
        owner, name = self.path.split("/")[3:5]
        files = self.hub.repositories[f"{owner}/{name}"]
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        address = f"{self.hub.address}/{owner}/{name}/commit/{'c' * 40}"
        self._answer({"success": True, "commitOid": "c" * 40, "commitUrl": address, "hookOutput": ""})

    def _known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer({"error": "Invalid username or password."}, 401)
        return False

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def hub_stand_in() -> Iterator[StandIn]:
    """One that runs in a thread, until the block ends."""
    hub = StandIn()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
