"""The Hub's client against a local server that speaks its protocol: real sockets, real files, real interruptions."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_weights import saved

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes] = {}
    cut_after: int | None = None
    requests: list[tuple[str, str, str | None]] = []

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        self.requests.append((self.command, name, self.headers.get("Range")))
        if "/owner/model/resolve/" not in self.path:
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if name not in self.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, start = self.files[name], 0
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        cut = type(self).cut_after
        if cut is not None and name.endswith("safetensors"):
            self.wfile.write(content[start : start + cut])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(content[start:])


@pytest.fixture
def hub(tmp_path):
    saved(tmp_path / "source")
    Hub.files = {p.name: p.read_bytes() for p in (tmp_path / "source").iterdir()}
    Hub.cut_after, Hub.requests = None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def load(endpoint, cache, name="hf-hub:owner/model", **more):
    """In a fresh process: the client reads its environment at import."""
    code = (
        "import sys\nimport huggingface_hub.constants as c\n"
        "c.DOWNLOAD_CHUNK_SIZE = 1000  # as small against our file as the client's 10 MiB against a real one\n"
        "from zoo.errors import ZooError\nfrom zoo.pretrained import load_model\n"
        "try:\n    model, card = load_model(sys.argv[1])\n    print('loaded', card['attention'])\n"
        "except ZooError as error:\n    print('refused:', error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    environment |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "3",
        "HF_HUB_DOWNLOAD_TIMEOUT": "3",
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_download_then_offline(hub, tmp_path):
    assert load(hub, tmp_path / "hf") == "loaded mala"
    asked = len(Hub.requests)
    assert load("http://127.0.0.1:9", tmp_path / "hf", HF_HUB_OFFLINE="1") == "loaded mala"
    assert len(Hub.requests) == asked
    assert "cannot be reached" in load(hub, tmp_path / "other", HF_HUB_OFFLINE="1")


def test_missing_repository_and_file(hub, tmp_path):
    assert "no such repository" in load(hub, tmp_path / "hf", "hf-hub:owner/absent")
    assert "write hf-hub:owner/name" in load(hub, tmp_path / "hf", "hf-hub:absent")
    del Hub.files["weights.safetensors"]
    assert "has no weights.safetensors" in load(hub, tmp_path / "hf")


def test_changed_weights_are_refused(hub, tmp_path):
    content = Hub.files["weights.safetensors"]
    Hub.files["weights.safetensors"] = content[:-4] + b"\1\1\1\1"
    assert "SHA-256 differs" in load(hub, tmp_path / "hf")


def test_interrupted_download_goes_on(hub, tmp_path):
    Hub.cut_after = 3000
    first = load(hub, tmp_path / "hf")
    Hub.cut_after = None
    if first.startswith("refused"):
        assert "run again" in first
        assert load(hub, tmp_path / "hf") == "loaded mala"
    else:  # the client itself went on within one call
        assert first == "loaded mala"
    ranges = [r for _, name, r in Hub.requests if name == "weights.safetensors" and r]
    assert "bytes=3000-" in ranges
