"""`megatron-nft report`: what it refuses, what it leaves out, and that it writes whole pages."""

import pytest
from test_data_rollout_file import make_group
from tiny import make_tokenizer

from megatron_nft import cli
from megatron_nft.data.rollout_file import rollout_path, write_rollouts
from megatron_nft.report.run_page import run_page


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    for step in range(4):
        groups = [make_group(step * 10 + i) for i in range(10)]
        write_rollouts(rollout_path(folder, step, 0), groups, ["trained"] * 10, step=step)
    return folder


def rollouts_in(run_dir, **limits):
    seen = []
    given = {"max_rollouts": 10**6, "max_bytes": 10**9, **limits}
    run_page(run_dir, run_dir / "report.html", **given, on_file=lambda: seen.append(1))
    assert len(seen) == 4
    return (run_dir / "report.html").read_text()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "absent")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "neither metrics.jsonl nor rollouts" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_limits_leave_out_whole_questions_evenly_and_say_so(run_dir, capsys):
    assert "rollouts are in this page" not in rollouts_in(run_dir)
    page = rollouts_in(run_dir, max_rollouts=60)  # of 40 questions x 3 answers
    assert "about 50.0% of 120 rollouts are in this page, evenly over the run" in page
    assert cli.main(["report", str(run_dir), "--max-rollouts", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_a_missing_tokenizer_is_said_and_a_wrong_one_refused(run_dir, tmp_path, capsys):
    assert "no tokenizer was found" in rollouts_in(run_dir)
    (run_dir / "config.yaml").write_text(f"model:\n  path: {tmp_path / 'model'}\n")
    make_tokenizer().save_pretrained(tmp_path / "model")
    page = rollouts_in(run_dir)
    assert "no tokenizer was found" not in page
    assert "model.path" in page  # the settings are shown
    assert cli.main(["report", str(run_dir), "--tokenizer", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: not there" in capsys.readouterr().err


def test_the_old_page_stays_until_the_new_one_is_whole(run_dir, capsys):
    rollouts_in(run_dir)
    before = (run_dir / "report.html").read_bytes()
    path = rollout_path(run_dir, 3, 0)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(200) + content[204:])  # the footer is sound, the data are not
    assert cli.main(["report", str(run_dir)]) == 2
    assert "rank_00000.parquet" in capsys.readouterr().err
    assert (run_dir / "report.html").read_bytes() == before
    assert [p.name for p in run_dir.iterdir() if "partial" in p.name] == []
