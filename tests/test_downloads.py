"""Where data and pretrained weights are looked for, and that nothing is fetched unasked."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from lsdc_utils import downloads


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No mount, no credentials, and a kagglehub that must not be asked."""
    monkeypatch.setattr(downloads, "MOUNTS", (tmp_path / "input",))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in downloads.CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(competition_download=lambda _: 1 / 0))


def test_a_named_folder_is_taken(tmp_path):
    assert downloads.find_data(str(tmp_path)) == (tmp_path, "folder")
    with pytest.raises(downloads.DataNotFound, match="no folder"):
        downloads.find_data(str(tmp_path / "absent"))


def test_the_mount_is_found(tmp_path):
    (tmp_path / "input" / downloads.COMPETITION).mkdir(parents=True)
    assert downloads.find_data() == (tmp_path / "input" / downloads.COMPETITION, "kaggle")


def test_nothing_is_fetched_unasked_or_without_credentials():
    with pytest.raises(downloads.DataNotFound, match="--data DIR"):
        downloads.find_data()
    with pytest.raises(downloads.DataNotFound, match="credentials"):
        downloads.find_data(download=True)


def test_download(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "set")
    monkeypatch.setattr(sys.modules["kagglehub"], "competition_download", lambda name: str(tmp_path / name))
    assert downloads.find_data(download=True) == (tmp_path / downloads.COMPETITION, "kaggle")


# ---- pretrained weights --------------------------------------------------------------------------------------------

WEIGHTS = b"weights" * 1000
CHECKSUM = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def host(tmp_path, monkeypatch) -> Iterator[dict[str, bytes]]:
    """A server on this machine in the place of the sources: path -> what it answers; and an empty cache."""
    answers: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path in answers
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answers.get(self.path, b""))

        def log_message(self, *_) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    for name, path in {"RELEASE": "/tags/{}/{}", "ASSET": "/{}/{}/{}", "HUB": "/timm/{}/{}"}.items():
        monkeypatch.setattr(downloads, name, base + path)
    monkeypatch.setenv("LSDC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    release = {"assets": [{"name": "yolov10x.pt", "digest": f"sha256:{CHECKSUM}"}, {"name": "yolov8n.pt"}]}
    answers["/tags/ultralytics/assets/v8.4.0"] = json.dumps(release).encode()
    answers["/ultralytics/assets/v8.4.0/yolov10x.pt"] = WEIGHTS
    answers["/timm/vit_tiny.one/raw"] = f"version x\noid sha256:{CHECKSUM}\nsize {len(WEIGHTS)}\n".encode()
    answers["/timm/vit_tiny.one/resolve"] = WEIGHTS
    yield answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["yolov10x.pt", "vit_tiny.one.safetensors"])
def test_weights_are_fetched_once_and_only_when_asked_for(host, tmp_path, name):
    with pytest.raises(downloads.WeightsNotFound, match=rf"no pretrained weights {name}.*cache.*fetch_weights=true"):
        downloads.find_weights(name)
    found = downloads.find_weights(name, fetch=True)
    assert found == tmp_path / "cache" / name and found.read_bytes() == WEIGHTS
    host.clear()
    assert downloads.find_weights(name) == found
    (tmp_path / name).write_bytes(b"my own")
    assert downloads.find_weights(name) == tmp_path / name
    assert downloads.find_weights(str(tmp_path / name)) == tmp_path / name


def test_weights_are_those_of_the_checksum(host, tmp_path):
    host["/ultralytics/assets/v8.4.0/yolov10x.pt"] = WEIGHTS[:-1]  # cut short
    with pytest.raises(downloads.WeightsNotFound, match=f"yolov10x.pt: invalid hash value.*{CHECKSUM}"):
        downloads.find_weights("yolov10x.pt", fetch=True)
    assert not list((tmp_path / "cache").iterdir())
    found = downloads.find_weights("vit_tiny.one.safetensors", fetch=True)
    found.write_bytes(b"changed since")
    with pytest.raises(downloads.WeightsNotFound, match="is not the file that vit_tiny"):
        downloads.find_weights("vit_tiny.one.safetensors", fetch=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [("yolov8n.pt", "states no checksum"), ("vit_none.safetensors", "404"), ("model.bin", "can be downloaded")],
)
def test_what_cannot_be_fetched_is_told(host, name, message):
    with pytest.raises(downloads.WeightsNotFound, match=message):
        downloads.find_weights(name, fetch=True)
