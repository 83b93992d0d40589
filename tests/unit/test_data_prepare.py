"""Public question sets into our layout, through the tool itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_nft.data import prepare as module
from megatron_nft.data.benchmarks import BOXED_INSTRUCTION
from megatron_nft.data.prepare import SETS, prepare
from megatron_nft.data.rows import DataError, read_raw, read_rows

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/prepare_data.py"
PUBLIC = Path(os.environ.get("NFT_DATA_DIR", ROOT / "../shared/data")).resolve()
needs_public = pytest.mark.skipif(
    not (PUBLIC / "train").is_dir(), reason=f"public data not found at {PUBLIC} (set NFT_DATA_DIR)"
)
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def run(*arguments, cwd=ROOT):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, TOOL, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def verl(problem, answer, **changes):
    row = {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": problem}],
        "ability": "MATH",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": "abc"},
    }
    return row | changes


@needs_public
@pytest.mark.parametrize(
    ("name", "file", "rows", "first", "last"),
    [
        ("gsm8k_train", "train/gsm8k.jsonl", 7473, "72", "50"),
        ("math_train", "train/math.jsonl", 7470, "0", None),  # four rows hold no answer
        ("gsm8k", "eval/gsm8k.jsonl", 1319, "18", "14"),
        ("math500", "eval/math500.jsonl", 500, r"\left( 3, \frac{\pi}{2} \right)", None),
        ("aime24", "eval/aime24.jsonl", 30, "204", None),
        ("aime25", "eval/aime25.jsonl", 30, "70", None),
        ("amc23", "eval/amc23.jsonl", 40, "27", None),
        ("minerva", "eval/minerva_math.jsonl", 272, "1.6", None),
        ("olympiadbench", "eval/olympiadbench.jsonl", 675, "2", None),
        ("aime24", "eval/dapo_aime-2024.parquet", 30, "540", None),
    ],
)
def test_public_files(name, file, rows, first, last, tmp_path):
    made, summary = prepare(name, read_raw(PUBLIC / file), file, missing="drop")
    module.write_rows(made, tmp_path / "q.parquet")
    back = read_rows(tmp_path / "q.parquet")  # all of it is what training reads
    assert len(back) == rows == summary.written
    assert back[0].answer == first and (last is None or back[-1].answer == last)
    for row in back:
        (message,) = row.messages
        assert message["role"] == "user" and message["content"].count("\\boxed{}") == 1
        assert "on its own line after" not in message["content"]
    assert summary.read == summary.written + summary.duplicates + sum(summary.dropped.values())


@needs_public
def test_amc_answers_are_whole_numbers_in_text():
    made, _ = prepare("amc23", read_raw(PUBLIC / "eval/amc23.jsonl"), "amc23")
    source = [row["answer"] for _, row in read_raw(PUBLIC / "eval/amc23.jsonl")]
    assert all(isinstance(a, float) for a in source)
    answers = [row["reward_model"]["ground_truth"] for row in made]
    assert [float(a) for a in answers] == source and not any("." in a for a in answers)


@needs_public
def test_the_tool_from_another_directory(tmp_path):
    (tmp_path / "a folder").mkdir()
    arguments = ("--missing", "drop", "--from", PUBLIC / "train/math.jsonl")
    done = run("math_train", "out/q.jsonl", *arguments, cwd=tmp_path / "a folder")
    assert done.returncode == 0, done.stderr
    assert "7474 rows read, 0 copies left out, 4 dropped" in done.stderr
    assert "dropped 2 (first: row 887): the answer is None" in done.stderr
    out = tmp_path / "a folder/out/q.jsonl"
    size, digest = re.search(r"7470 rows written to out/q.jsonl \((\d+) bytes, sha256 (\w{64})\)", done.stderr).groups()
    assert int(size) == out.stat().st_size
    checked = subprocess.run(["sha256sum", out], capture_output=True, text=True, check=True).stdout
    assert checked.split()[0] == digest
    assert len(read_rows(out)) == 7470 and not list(out.parent.glob("*.partial"))
    refused = run("math_train", "out/q.jsonl", "--from", PUBLIC / "train/math.jsonl", cwd=tmp_path)
    assert refused.returncode == 1 and "math.jsonl, row 887: the answer is None" in refused.stderr
    strict = run("math_train", "out/s.jsonl", "--strict", *arguments, cwd=tmp_path)
    assert strict.returncode == 1 and "4 rows cannot be used" in strict.stderr
    assert not (tmp_path / "out").exists()


def test_dapo_prompts_lose_their_answer_line_and_copies():
    rows = [
        verl(DAPO.format("What is $1+1$?\n\nThink."), "2"),
        verl(DAPO.format("What is $1+1$?\n\nThink."), "2"),
        verl("Compute. Put it in \\boxed{}.", "7", data_source=None),
        verl(DAPO.format("What is $1+1$?\n\nThink."), "3"),
    ]
    with pytest.raises(DataError, match=r"x: 1 question has copies with .* '2' at row 1, row 2 but '3' at row 4"):
        prepare("dapo_math_17k", enumerate(rows, 1), "x")
    made, summary = prepare("dapo_math_17k", enumerate(rows, 1), "x", conflicts="majority")
    assert [r["prompt"][0]["content"] for r in made] == [
        f"What is $1+1$?\n\nThink.\n{BOXED_INSTRUCTION}",
        "Compute. Put it in \\boxed{}.",
    ]
    assert [r["reward_model"]["ground_truth"] for r in made] == ["2", "7"]
    assert [r["data_source"] for r in made] == ["math_dapo", "dapo_math_17k"]
    assert (summary.duplicates, summary.conflicts, summary.conflict_rows, summary.read) == (1, 1, 1, 4)
    assert made[0]["extra_info"] == {"index": 0, "source_id": "abc"}


def test_instruction_copies_and_limit(tmp_path):
    rows = [{"problem": f" {i}? ", "answer": i} for i in range(5)]
    made, summary = prepare("aime25", enumerate(rows, 1), "x", instruction="", copies=2, limit=2)
    assert [r["prompt"][0]["content"] for r in made] == ["0?", "0?", "1?", "1?"]
    assert (summary.written, summary.read) == (4, 2)
    made, _ = prepare("aime25", enumerate(rows, 1), "x", instruction="Box \\boxed{} it")
    assert made[3]["prompt"][0]["content"] == "3?\nBox \\boxed{} it"


def test_math_solutions_and_olympiad_lists():
    made, _ = prepare("math_train", [(1, {"problem": "p", "solution": r"so \boxed{1} or \boxed{\frac{1}{2}}"})], "x")
    assert made[0]["reward_model"]["ground_truth"] == r"1, \frac{1}{2}"  # boxes of one sentence are one answer
    made, _ = prepare("olympiadbench", [(1, {"question": "p", "final_answer": ["2", "3"], "context": "Let."})], "x")
    assert made[0]["reward_model"]["ground_truth"] == "2, 3"
    assert made[0]["prompt"][0]["content"].startswith("Let.\n\np\n")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "math_train",
            {"problme": "p", "answer": "1"},
            r"x, row 1: no column 'problem'; columns found: problme, answer",
        ),
        ("gsm8k", {"question": "q", "answer": "no mark"}, r"none of the 1 rows.*no '####'"),
        ("minerva", {"problem": "p", "solution": "no box"}, r"none of the 1 rows.*no complete .boxed"),
        ("aime24", {"problem": "p", "answer": True}, "none of the 1 rows.*True"),
        ("aime24", {"problem": "", "answer": 3}, "none of the 1 rows.*problem is empty"),
        ("dapo_math_17k", {"problem": "p", "answer": "1"}, r"row 1: is not in the verl layout"),
    ],
)
def test_rows_of_another_kind(name, row, message):
    with pytest.raises(DataError, match=message):
        prepare(name, [(1, row)], "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["math_train", "o.csv"], "the output ends in .parquet or .jsonl"),
        (["maths", "o.parquet"], "invalid choice: 'maths'"),
        (["math_train", "o.parquet", "--from", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["math_train", "o.parquet", "--from", "missing"], "neither a .parquet or .jsonl file nor a data set's name"),
        (
            ["math_train", "o.parquet", "--from", "owner/name/f.parquet"],
            "owner/name/f.parquet cannot be had from the hub",
        ),
        (["math_train", "o.parquet"], "cannot be had from the hub"),
        (["math_train", "o.parquet", "--copies", "0"], "0 must be a whole number of at least 1"),
    ],
)
def test_the_tool_says_what_is_wrong(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_data_set_by_its_hub_name(monkeypatch, tmp_path):
    """The library stands in for the network: what we ask of it, and that its rows are used."""
    asked = {}

    class Datasets:
        @staticmethod
        def load_dataset(path, name, split):
            asked.update(path=path, name=name, split=split)
            return [{"problem": "p", "answer": "1"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    rows, where = module.open_source("owner/name", "math_train", "test", "main")
    assert asked == {"path": "owner/name", "name": "main", "split": "test"} and where == "owner/name, split test"
    assert prepare("math_train", rows, where)[1].written == 1


def test_help_names_every_set():
    done = run("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in SETS)


def test_output_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "q.parquet"
    module.write_rows([verl("p", "1")], path)
    before = path.read_bytes()

    def full(table, file):
        file.write(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        module.write_rows([verl("p", "2")], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_written_jsonl_is_utf8(tmp_path):
    module.write_rows([verl("é ≤ \u2028", "1")], tmp_path / "q.jsonl")
    assert "é ≤" in (tmp_path / "q.jsonl").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "q.jsonl").read_text(encoding="utf-8"))["prompt"][0]["content"] == "é ≤ \u2028"
