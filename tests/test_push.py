"""An export reaches the hub: a stand-in that takes what the hub's own client sends."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from flashgrpo.errors import UserError
from flashgrpo.export import check_repository, push


class Hub(BaseHTTPRequestHandler):
    """Makes repositories, takes every file as it is, and keeps what it was sent on the server."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        address = f"http://{self.headers['host']}"
        if self.server.status != 200:
            return self.answer({"error": "You have no right to do so"}, self.server.status)
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self.answer({"url": f"{address}/me/lora"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{address}/me/lora/commit/0", "commitOid": "0" * 40, "success": True})

    def do_GET(self) -> None:
        self.answer({"id": "me/lora", "sha": "0" * 40, "siblings": [], "tags": [], "private": True})

    def answer(self, content: dict, status: int = 200) -> None:
        told = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.status, server.made, server.files = 200, [], {}
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "README.md").write_text("# Aligned with Flash-GRPO\n")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    return tmp_path


def test_an_export_is_uploaded_whole_and_privately(hub, folder):
    assert push(folder, "me/lora").endswith("/me/lora")
    assert [(made["name"], made.get("organization")) for made in hub.made] == [("lora", "me")]
    assert hub.made[0].get("private") is True or hub.made[0].get("visibility") == "private"
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_the_hub_refuses_is_told_and_the_export_stays(hub, folder):
    hub.status = 403
    with pytest.raises(UserError, match=r"me/lora was not written: .*; the export is in .*, and hf auth login gives"):
        push(folder, "me/lora")
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("name", ["lora", "/lora", "me/", "a/b/c"])
def test_what_is_no_repository_is_refused_first(name):
    with pytest.raises(UserError, match="is no repository; write OWNER/NAME"):
        check_repository(name)


def test_a_name_that_the_hub_does_not_allow(folder):
    with pytest.raises(UserError, match="can be no name of a repository"):
        push(folder, "me/a b")
