"""tools/download.py with the real huggingface_hub, against a small hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 4000  # 1 MB
FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "x"}',
    "model-00001-of-00001.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "training_args.pt": b"a pickle",
    "run_me.py": b"print(1)",
    "README.md": "# Modèle\n".encode(),
}
LARGE = ("model-00001-of-00001.safetensors", "pytorch_model.bin")


def git_blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download uses."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        self.server.seen.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/"):
            return self.api(path)
        name = path.rpartition(f"/resolve/{COMMIT}/")[2]
        if name not in FILES:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = FILES[name]
        if name in self.server.damaged and self.command == "GET":
            data = b"\xff" * len(data)
            self.server.damaged[name] -= 1
            if not self.server.damaged[name]:
                del self.server.damaged[name]
        etag = hashlib.sha256(FILES[name]).hexdigest() if name in LARGE else git_blob(FILES[name])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if name == self.server.breaks_at[0] and self.command == "GET" and start < self.server.breaks_at[1]:
            end = self.server.breaks_at[1]
            self.send(200, data[start:], headers, only=end - start)
            self.close_connection = True
            return None
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.send(206 if start else 200, data[start:], headers, only=None if body else 0)

    def api(self, path):
        repo = "/".join(path.split("/")[3:5])
        if repo != "Qwen/Qwen2.5-Math-7B":
            return self.send(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        names = [n for n in FILES if not (self.server.only_pickles and "safetensors" in n)]
        if "/tree/" in path:
            listing = [{"type": "file", "path": n, "size": len(FILES[n]), "oid": git_blob(FILES[n])} for n in names]
            for entry in listing:
                if entry["path"] in LARGE:
                    sha256 = hashlib.sha256(FILES[entry["path"]]).hexdigest()
                    entry["lfs"] = {"oid": sha256, "size": entry["size"], "pointerSize": 130}
            return self.send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        siblings = [{"rfilename": n, "size": len(FILES[n]), "blobId": git_blob(FILES[n])} for n in names]
        for entry in siblings:
            if entry["rfilename"] in LARGE:
                sha256 = hashlib.sha256(FILES[entry["rfilename"]]).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": entry["size"], "pointerSize": 130}
        info = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def send(self, status, data, headers, only=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if only is None else data[:only])


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.damaged, server.breaks_at, server.only_pickles = [], {}, ("", 0), False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def download(hub, tmp_path, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_a_secret",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "COLUMNS": "200",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, ROOT / "tools/download.py", *arguments, "--to", tmp_path / "to here"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert "hf_a_secret" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done


def test_download_check_and_run_again(hub, tmp_path):
    done = download(hub, tmp_path, "qwen2.5-math-7b")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "to here/models/Qwen2.5-Math-7B"
    taken = [n for n in FILES if n not in ("pytorch_model.bin", "training_args.pt", "run_me.py")]
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == sorted([*taken, "SHA256SUMS"])
    assert all((folder / n).read_bytes() == FILES[n] for n in taken)
    # every file with size and checksum
    for name in taken:
        checksum = hashlib.sha256(FILES[name]).hexdigest() if name in LARGE else git_blob(FILES[name])
        assert any(
            name in line and str(len(FILES[name])) in line and checksum in line for line in done.stdout.splitlines()
        )
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    assert (folder / "SHA256SUMS").read_text().startswith(f"# Qwen/Qwen2.5-Math-7B at {COMMIT}\n")
    hub.seen.clear()
    assert download(hub, tmp_path, "qwen2.5-math-7b").returncode == 0
    assert not [path for method, path, _ in hub.seen if method == "GET" and "/resolve/" in path]


def test_interrupted_download_goes_on(hub, tmp_path):
    name = "model-00001-of-00001.safetensors"
    hub.breaks_at = (name, 600_000)
    first = download(hub, tmp_path, "qwen2.5-math-7b")
    assert first.returncode == 1 and "run it again to go on" in first.stderr
    folder = tmp_path / "to here/models/Qwen2.5-Math-7B"
    complete = {p.name for p in folder.iterdir() if p.is_file()}
    assert complete and name not in complete and "SHA256SUMS" not in complete
    hub.seen.clear()
    hub.breaks_at = ("", 0)
    assert download(hub, tmp_path, "qwen2.5-math-7b").returncode == 0
    assert (folder / name).read_bytes() == WEIGHTS
    again = {path.rpartition("/")[2] for method, path, _ in hub.seen if method == "GET" and "/resolve/" in path}
    assert name in again and not again & complete


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "config.json"])
def test_a_file_damaged_on_disk_or_on_the_way_is_fetched_again(hub, tmp_path, name):
    hub.damaged = {name: 1}
    assert download(hub, tmp_path, "qwen2.5-math-7b").returncode == 0
    path = tmp_path / "to here/models/Qwen2.5-Math-7B" / name
    assert path.read_bytes() == FILES[name]
    damaged = bytearray(FILES[name])
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert download(hub, tmp_path, "qwen2.5-math-7b").returncode == 0
    assert path.read_bytes() == FILES[name]


def test_a_file_that_stays_damaged_is_an_error(hub, tmp_path):
    hub.damaged = {"config.json": 1000}
    done = download(hub, tmp_path, "qwen2.5-math-7b")
    assert done.returncode == 1 and "after a second download" in done.stderr and "config.json: sha256" in done.stderr
    assert not (tmp_path / "to here/models/Qwen2.5-Math-7B/SHA256SUMS").exists()


def test_tokenizer_only_and_dry_run(hub, tmp_path):
    done = download(hub, tmp_path, "qwen2.5-math-7b", "--dry-run")
    assert done.returncode == 0 and "model-00001-of-00001.safetensors" in done.stdout
    assert not (tmp_path / "to here").exists()
    assert download(hub, tmp_path, "qwen2.5-math-7b", "--part", "tokenizer").returncode == 0
    names = {p.name for p in (tmp_path / "to here/models/Qwen2.5-Math-7B").iterdir() if p.is_file()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", "SHA256SUMS"}


def test_repositories_that_cannot_be_had(hub, tmp_path):
    done = download(hub, tmp_path, "nft-7b")
    assert done.returncode == 1 and "nvidia/NFT-7B: not on the hub, or private: set HF_TOKEN" in done.stderr
    hub.only_pickles = True
    done = download(hub, tmp_path, "qwen2.5-math-7b")
    assert done.returncode == 1 and "holds no safetensors" in done.stderr and "pytorch_model.bin" in done.stderr


def test_unreachable_hub_and_unwritable_folder(hub, tmp_path):
    (tmp_path / "to here").write_text("a file")
    done = download(hub, tmp_path, "qwen2.5-math-7b")
    assert done.returncode == 1 and "cannot be written" in done.stderr
    nobody = SimpleNamespace(server_port=9)  # the discard port, where nothing listens
    done = download(nobody, tmp_path, "qwen2.5-math-7b")
    assert done.returncode == 1 and "the hub cannot be reached" in done.stderr


def test_every_published_name_is_offered(hub, tmp_path):
    help_text = download(hub, tmp_path, "--help").stdout
    for repo in (
        "Qwen/Qwen2.5-Math-7B",
        "Qwen/Qwen2.5-32B",
        "nvidia/NFT-7B",
        "nvidia/NFT-32B",
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "ChenDRAG/VeRL_math_validation",
    ):
        assert repo in help_text


def test_chat_template_tool(tmp_path):
    from megatron_nft.data.synthetic import make_tokenizer

    def run(model, out):
        command = [sys.executable, ROOT / "tools/chat_template.py", model, out]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    assert run("chat", "sub/t.jinja").returncode == 0
    assert (tmp_path / "sub/t.jinja").read_text() == tokenizer.chat_template
    done = run("plain", "p.jinja")
    assert done.returncode == 1 and "its tokenizer has no chat template" in done.stderr
