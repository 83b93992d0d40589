"""The command line before any rank starts: help, dry run, and what is refused."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_nft.cli import main
from megatron_nft.config import load_config
from megatron_nft.data.synthetic import write_model, write_task
from megatron_nft.policy.stack import Stack

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("start")
    train, _ = write_task(folder / "task", num_train=20, num_held_out=5)
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": str(write_model(folder / "model"))},
        "policy": {"precision": "fp32"},
        "data": {"train": [str(train)], "max_prompt_tokens": 64},
        "rollout": {"max_response_tokens": 64},
    }


def train(start: dict, tmp_path: Path, *arguments: str) -> int:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(start))
    return main(["train", "--config", str(path), *arguments])


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["train"], "--dry-run"),
        (["convert", "megatron-to-hf"], "--max-file-gb"),
        (["reshard"], "--vpp"),
        (["diff"], "--weights-only"),
        (["prepare"], "--copies"),
        (["download"], "--part"),
    ],
)
def test_help_imports_nothing_heavy(command, option):
    code = "import sys; from megatron_nft.cli import main\n"
    code += f"try: main({[*command, '--help']})\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'megatron', 'pyarrow', 'math_verify'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert option in shown
    assert shown.splitlines()[-1] == "[]"


def test_warnings_for_the_user_are_one_plain_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"response": "1", "answer": "1"}\n')
    command = [sys.executable, "-m", "megatron_nft", "grade", "--input", str(tmp_path / "rows.jsonl")]
    command += ["--output", str(tmp_path / "out.jsonl"), "--grader", "math_verify,maths"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    warning, error = done.stderr.splitlines()
    assert warning == "megatron-nft: the grader math_verify is now called maths"
    assert "named twice in 'math_verify,maths'; math_verify is the former name of maths" in error
    assert done.returncode == 2


def test_help_lists_every_command():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, "-m", "megatron_nft", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 20  # of the processor, about 0.5; the imports above are what decides it
    commands = "train eval compare grade plan report convert reshard diff prepare download"
    for command in commands.split():
        assert command in shown.stdout


def test_dry_run_prints_settings_that_read_back_and_the_ranks(start, tmp_path, capsys):
    assert train(start, tmp_path, "num_processes=8", "policy.tensor_model_parallel_size=2",
                 "policy.pipeline_model_parallel_size=2", "--dry-run") == 0  # fmt: skip
    shown = capsys.readouterr().out
    settings, plan = shown.split("8 ranks = ")
    (tmp_path / "again.yaml").write_text(settings)
    assert load_config([tmp_path / "again.yaml"]).num_processes == 8
    assert plan.startswith("TP 2 x PP 2 x DP 2")
    assert "rank 5: tensor 1, data 0, pipeline 1" in plan
    assert not (Path(start["run_dir"])).exists()
    assert train(start, tmp_path, "num_processes=8", "policy.context_parallel_size=2",
                 "policy.tensor_model_parallel_size=2", "--dry-run") == 0  # fmt: skip
    plan = capsys.readouterr().out.split("8 ranks = ")[1]
    assert plan.startswith("TP 2 x CP 2 x PP 1 x DP 2")
    assert "rank 6: tensor 0, context 1, data 1, pipeline 0" in plan


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optimiser.lr=1"], "optimiser: unknown key (did you mean optimizer?"),
        (["optimizer.lr=fast"], "optimizer.lr = 'fast': input should be a valid number"),
        (["rollout.top_p=0.7"], "bias the likelihood ratio"),
        (["policy.sequence_parallel=true"], "needs tensor_model_parallel_size >= 2"),
        (
            ["train.questions_per_optimizer_step=7"],
            "questions_per_optimizer_step (7) must divide questions_per_step (512)",
        ),
        (["num_processes=6", "policy.context_parallel_size=4"], r"x context_parallel_size (4) x"),
        (["num_processes=3", "policy.tensor_model_parallel_size=2"], "3 processes cannot be divided"),
        (["rollout.max_response_tokens=99999"], "policy.micro_batch_tokens (16384) must hold the longest answer"),
        (["model.path=/nowhere"], "model.path /nowhere: not a folder"),
        (["data.train=[/nowhere.jsonl]"], "data.train: /nowhere.jsonl is not a file"),
        (["verify.grader=no.such.module"], "grader no.such.module: cannot import"),
        (["run_dir=/proc/run"], "run_dir /proc/run cannot be written"),
        (["policy.tensor_model_parallel_size=3", "num_processes=3"], "tensor_model_parallel_size (3)"),
        (["policy.pipeline_model_parallel_size=4", "num_processes=4"], "pipeline_model_parallel_size (4)"),
        (["nonsense"], "write it as key=value"),
    ],
)
def test_refused_before_any_rank_starts(start, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("megatron_nft.train.launch.start_local", lambda *_: pytest.fail("ranks were started"))
    assert train(start, tmp_path, *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "content", "said"),
    [
        ("data.train", b'{"promt": "1+1=", "answer": "2"}', "row 1: column 'prompt' is missing; 'promt' looks like it"),
        ("data.train", b'{"prompt": "1+1="}', "row 1: column 'reward_model' (or 'answer') is missing"),
        ("data.train", b'{"prompt": "1+1=", "answer": 2}', "row 1, column 'answer': 2 (int), not text"),
        ("data.train", b'{"prompt": "1+1=", "answer": "2"}\n\xff\xfe', "row 2: not UTF-8 text"),
        ("data.train", b"\n\n", "holds no questions"),
        ("data.train", b"", "is empty"),
        ("eval.data", b'{"prompt": "1+1=", "anwser": "2"}', "'answer'"),
    ],
)
def test_unusable_questions_are_refused_before_any_rank_starts(
    start, tmp_path, capsys, monkeypatch, key, content, said
):
    monkeypatch.setattr("megatron_nft.train.launch.start_local", lambda *_: pytest.fail("ranks were started"))
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    assert train(start, tmp_path, f"{key}=[{path}]") == 2
    error = capsys.readouterr().err
    assert said in error and str(path) in error


def test_a_stack_that_computes_wrong_numbers_is_refused(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_nft.train.launch.start_local", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setattr(
        "megatron_nft.train.preflight.read_stack", lambda: Stack("3.11.7", "0.16.1", "2.13.0", "2.13.0")
    )
    assert train(start, tmp_path) == 2
    assert "leaves experts out of the gradient norm" in capsys.readouterr().err


def test_architecture_that_disagrees_with_the_folder_is_refused(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_nft.train.launch.start_local", lambda *_: pytest.fail("ranks were started"))
    settings = {**start, "model": {**start["model"], "architecture": {"hidden_size": 128, "num_hidden_layers": 2}}}
    assert train(settings, tmp_path) == 2
    assert "model.architecture: hidden_size is 128, config.json has 64" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json"])
def test_an_incomplete_model_folder_is_refused(start, tmp_path, capsys, broken):
    folder = write_model(tmp_path / "model")
    for path in folder.glob("*token*") if broken.startswith("token") else [folder / broken]:
        path.unlink()
    settings = {**start, "model": {"path": str(folder)}}
    assert train(settings, tmp_path) == 2
    assert (
        "tokenizer" in capsys.readouterr().err
        if broken.startswith("token")
        else "config.json" in capsys.readouterr().err
    )


def test_an_unknown_family_is_refused(start, tmp_path, capsys):
    folder = write_model(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"qwen2"', '"gpt_neox"'))
    assert train({**start, "model": {"path": str(folder)}}, tmp_path) == 2
    said = capsys.readouterr().err
    assert "gpt_neox" in said and "qwen3" in said
