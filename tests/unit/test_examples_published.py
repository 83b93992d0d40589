"""The published runs' scripts: their commands fit the tools, their paths fit the configs."""

import os
import re
import shlex
import subprocess
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest

from megatron_nft.cli import build_parser
from megatron_nft.config import load_config
from megatron_nft.data.benchmarks import BENCHMARKS
from megatron_nft.data.download import SOURCES
from megatron_nft.data.prepare import prepare, write_rows
from megatron_nft.data.rows import read_raw, read_rows

ROOT = Path(__file__).parents[2]
RUNS = ("nft_qwen2.5_math_7b", "nft_qwen2.5_32b")
STAGES = ("1_download", "2_convert", "3_train", "4_evaluate", "5_export")
PUBLIC = Path(os.environ.get("NFT_DATA_DIR", ROOT / "../shared/data")).resolve()


def script(run, stage, *arguments, work, **environment):
    command = ["bash", ROOT / f"examples/{run}/{stage}.sh", *arguments]
    environment = os.environ | {"NFT_WORK": str(work), "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """(run, stage) -> the commands that the script would run, from a folder with a space in its name."""
    work = tmp_path_factory.mktemp("a folder")
    out = {}
    for run in RUNS:
        for stage in STAGES:
            arguments = ["--weights"] if stage == "2_convert" else []
            done = script(run, stage, "--dry-run", *arguments, work=work, NFT_SLURM="0")
            assert done.returncode == 0, done.stderr
            lines = [shlex.split(line) for line in done.stdout.splitlines()]
            assert lines and all(line[0] == "+" for line in lines)
            out[run, stage] = [line[1:] for line in lines]
    assert not list(work.iterdir()), "a dry run writes nothing"
    return out


def of_tool(lines, name):
    """Arguments of each command that runs tools/NAME.py."""
    path = ROOT / f"tools/{name}.py"
    assert path.is_file(), f"{path} is called by an example"
    return [line[2:] for line in lines if line[1] == str(path)]


@pytest.mark.parametrize("run", RUNS)
def test_downloads_are_offered_and_go_where_the_config_looks(run, commands):
    config = load_config([ROOT / f"configs/{run}.yaml"])
    folders = set()
    for arguments in of_tool(commands[run, "1_download"], "download"):
        assert arguments[-2:] == ["--to", "data"]
        names = [a for a in arguments[:-2] if a not in ("--part", "tokenizer")]
        folders |= {Path("data") / SOURCES[n].folder for n in names}
    assert config.model.path in folders
    assert {Path("data/datasets/DAPO-Math-17k"), Path("data/datasets/VeRL_math_validation")} <= folders
    assert Path("data/models/NFT-7B" if "7b" in run else "data/models/NFT-32B") in folders


@pytest.mark.parametrize("run", RUNS)
def test_conversion_makes_every_file_that_the_config_reads(run, commands):
    config = load_config([ROOT / f"configs/{run}.yaml"])
    parsed = [
        build_parser("prepare").parse_args(["prepare", *a]) for a in of_tool(commands[run, "2_convert"], "prepare_data")
    ]
    assert {a.output for a in parsed} == {*config.data.train, *config.eval.data}
    for a in parsed:
        assert Path(a.source).parent == Path("data/datasets/VeRL_math_validation")
        if a.set in BENCHMARKS:  # the files are those that `eval --data` finds, in the numbers of the paper
            assert Path(a.source).stem in BENCHMARKS[a.set].files and a.copies == BENCHMARKS[a.set].samples
    templates = of_tool(commands[run, "2_convert"], "chat_template")
    if config.model.chat_template is None:
        assert not templates
    else:
        assert templates == [["data/models/Qwen2.5-Math-7B", str(config.model.chat_template)]]


@pytest.mark.parametrize("run", RUNS)
def test_weights_are_converted_for_the_layout_of_the_config(run, commands):
    config = load_config([ROOT / f"configs/{run}.yaml"])
    ((model, _, *layout),) = of_tool(commands[run, "2_convert"], "convert_hf_to_megatron")
    tp, pp = config.policy.tensor_model_parallel_size, config.policy.pipeline_model_parallel_size
    assert Path(model) == config.model.path and layout == ["--tp", str(tp), "--pp", str(pp)]
    ((checkpoint, out),) = of_tool(commands[run, "5_export"], "convert_megatron_to_hf")
    assert Path(checkpoint).parent == config.run_dir / "checkpoints" and Path(out).parent == config.run_dir


@pytest.mark.parametrize("run", RUNS)
def test_training_without_and_with_slurm(run, commands, tmp_path):
    (line,) = commands[run, "3_train"]
    assert line[1:] == ["-m", "megatron_nft", "train", "--config", str(ROOT / f"configs/{run}.yaml")]
    done = script(run, "3_train", "--dry-run", "--partition=gpu", "optimizer.lr=1e-5", work=tmp_path, NFT_SLURM="1")
    (slurm,) = [shlex.split(x)[1:] for x in done.stdout.splitlines()]
    assert slurm[:3] == ["env", f"NFT_CONFIG={ROOT}/configs/{run}.yaml", "bash"]
    assert Path(slurm[3]).is_file() and slurm[4:] == ["--partition=gpu", "optimizer.lr=1e-5"]
    baseline = run.replace("nft_", "rft_")
    done = script(run, "3_train", "--dry-run", work=tmp_path, NFT_SLURM="0", NFT_CONFIG_NAME=baseline)
    assert load_config([shlex.split(done.stdout)[-1]]).algorithm.name == "rft"


@pytest.mark.parametrize("run", RUNS)
def test_evaluation_arguments_and_protocol(run, commands):
    config = load_config([ROOT / f"configs/{run}.yaml"])
    (line,) = commands[run, "4_evaluate"]
    assert line[1:4] == ["-m", "megatron_nft", "eval"]
    args = build_parser("eval").parse_args(line[3:])
    assert Path(args.model) == config.run_dir / "hf" and Path(args.out).parent == config.run_dir
    assert args.protocol == ("nft-7b" if "7b" in run else "nft-32b") and args.engine == "sglang"
    template = args.chat_template and Path(args.chat_template)
    assert template == config.model.chat_template


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("stage", STAGES)
def test_scripts_say_what_they_do(run, stage, tmp_path):
    done = script(run, stage, "--help", work=tmp_path)
    assert done.returncode == 0 and f"examples/{run}/{stage}.sh" in done.stdout
    assert stage in (ROOT / f"examples/{run}/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("run", RUNS)
def test_export_needs_a_checkpoint_and_takes_the_newest_whole_one(run, tmp_path):
    done = script(run, "5_export", work=tmp_path)
    assert done.returncode == 1 and "run 3_train.sh first" in done.stderr
    for name in ("step_000002", "step_000010", "step_000012.partial"):
        (tmp_path / f"runs/{run}/checkpoints/{name}").mkdir(parents=True)
    done = script(run, "5_export", "--dry-run", work=tmp_path)
    assert done.stdout.split()[-2:] == [f"runs/{run}/checkpoints/step_000010", f"runs/{run}/hf-step_000010"]


def test_unknown_arguments_are_refused(tmp_path):
    done = script(RUNS[0], "2_convert", "--dry-run", "--wieghts", work=tmp_path)
    assert done.returncode == 2 and "unknown argument --wieghts" in done.stderr


@pytest.mark.parametrize("run", RUNS)
def test_readme_names_settings_that_exist_with_the_values_of_the_config(run):
    tree = load_config([ROOT / f"configs/{run}.yaml"]).model_dump(mode="json")
    reference = load_config([ROOT / f"configs/{run.replace('nft_', 'dapo_')}.yaml"]).model_dump(mode="json")
    text = (ROOT / f"examples/{run}/README.md").read_text(encoding="utf-8")
    checked = 0
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if len(cells) != 4 or not cells[2].startswith("`"):
            continue
        keys = re.findall(r"`([\w.]+)`", cells[2])
        for key in keys:
            *sections, name = key.split(".")
            found = [part[name] for part in (reduce(getitem, sections, t) for t in (tree, reference)) if name in part]
            assert found, f"{key} in the README is no setting of either algorithm"
            if len(keys) == 1 and re.fullmatch(r"[\d.e-]+", cells[3]):
                assert float(cells[3]) in found, f"{key}: {cells[3]} in the README, {found} in the configs"
                checked += 1
    assert checked >= 5


@pytest.mark.skipif(not (PUBLIC / "eval").is_dir(), reason=f"public data not found at {PUBLIC} (set NFT_DATA_DIR)")
def test_conversion_runs(tmp_path):
    """2_convert.sh for real, on the public questions in the places and the layout of the authors' files."""
    folder = tmp_path / "data/datasets/VeRL_math_validation"
    files = {
        "aime-2024-boxed_w_answer": ("aime24", "eval/aime24.jsonl", 32),
        "aime2025_32_dapo_boxed_w_answer": ("aime25", "eval/aime25.jsonl", 32),
        "amc2023_32_dapo_boxed_w_answer": ("amc23", "eval/amc23.jsonl", 32),
        "math500_boxed": ("math500", "eval/math500.jsonl", 1),
        "olympiadbench": ("olympiadbench", "eval/olympiadbench.jsonl", 1),
        "minerva_math": ("minerva", "eval/minerva_math.jsonl", 1),
        "dapo-math-17k_10boxed": ("math_train", "train/math.jsonl", 1),
    }
    for stem, (name, source, copies) in files.items():
        # MATH's training file has a solution without an answer
        rows, _ = prepare(name, read_raw(PUBLIC / source), source, copies=copies, missing="drop")
        write_rows(rows, folder / f"{stem}.parquet")
    done = script(RUNS[0], "2_convert", work=tmp_path)
    assert done.returncode == 0, done.stderr
    config = load_config([ROOT / f"configs/{RUNS[0]}.yaml"])
    counts = {p.stem: len(read_rows(tmp_path / p)) for p in (*config.data.train, *config.eval.data)}
    assert counts == {
        "train": 7470,
        "aime24": 960,
        "aime25": 960,
        "amc23": 1280,
        "math500": 500,
        "olympiadbench": 675,
        "minerva": 272,
    }
