"""`megatron-nft eval` with a vLLM server that it starts itself, and that dies half-way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import alive, below, wait_until
from tiny import make_model

from megatron_nft import cli
from megatron_nft.evaluate.records import read_answers

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm" / ".installed"
QUESTIONS = 16

pytestmark = pytest.mark.skipif(
    not ENVIRONMENT.is_file(), reason="no .venv-vllm: `bash tools/install_engine.sh vllm` makes it"
)


@pytest.fixture
def arguments(tmp_path):
    """Heads of 32, which vLLM's CPU attention needs; one question at a time, so that there is a half-way."""
    model = make_model(tmp_path / "model", hidden=128, layers=1)
    rows = [
        {"prompt": [{"role": "user", "content": f"{i} + 1?"}], "reward_model": {"ground_truth": str(i + 1)}}
        for i in range(QUESTIONS)
    ]
    questions = tmp_path / "sums.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["eval", "--model", model, "--benchmarks", questions, "--out", tmp_path / "out", "--engine", "vllm"]
    given += ["--samples", "2", "--max-response-tokens", "250", "--grader", "maths"]
    given += ["rollout.server.max_in_flight=1", "rollout.server.start_timeout_s=500", "rollout.server.max_restarts=0"]
    return [str(a) for a in given]


def servers(pid):
    """The server process below `pid`; what keeps watch over it has the same words further back in its command."""
    commands = {p: Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0") for p in below(pid)}
    return {p for p, words in commands.items() if words[1:3] == [b"-m", b"vllm.entrypoints.openai.api_server"]}


def answers_of(out):
    return {r.result.index: [a.text for a in r.result.answers] for _, r in read_answers(out / "answers" / "sums.jsonl")}


def test_a_server_that_dies_half_way(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    file = out / "answers" / "sums.jsonl"
    command = [sys.executable, "-m", "megatron_nft", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not file.exists() or file.read_bytes().count(b"\n") < 2:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            process.send_signal(signal.SIGSTOP)  # no further question until the server is gone
            started = below(process.pid)
            (server,) = servers(process.pid)
            os.kill(server, signal.SIGKILL)
            process.send_signal(signal.SIGCONT)
            error = process.communicate(timeout=300)[1]
        finally:
            process.kill()
    assert process.returncode == 1, error
    assert "all answers so far are kept; run the same command again to go on" in error
    wait_until(lambda: not alive(started))
    kept = answers_of(out)
    assert 2 <= len(kept) < QUESTIONS

    assert cli.main(arguments) == 0
    found = answers_of(out)
    assert sorted(found) == list(range(QUESTIONS))
    assert {i: found[i] for i in kept} == kept
    results = json.loads((out / "results.json").read_text())
    assert results["protocol"]["engine"]["name"] == "vllm"
    assert results["protocol"]["engine"]["version"].startswith("vllm 0.")
    assert results["benchmarks"]["sums"]["questions"] == QUESTIONS
    assert f"| sums (avg@2) | {QUESTIONS} | 2 |" in (out / "results.md").read_text()
    assert not servers(os.getpid())
    assert "written:" in capsys.readouterr().out
