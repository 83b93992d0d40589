"""What the weight tools show: help, progress, summaries. Output is checked against safetensors' and torch's readers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from torch.distributed.checkpoint import FileSystemReader

from megatron_nft import console
from megatron_nft.cli import main

TOOLS = Path(__file__).resolve().parents[2] / "tools"
OPTIONS = {
    "convert_hf_to_megatron.py": ("HF_DIR OUT", "--tp N", "--pp N", "--vpp N", "--dtype {fp32,bf16}"),
    "convert_megatron_to_hf.py": ("CKPT OUT", "--hf HF_DIR", "--dtype {fp32,bf16}", "--max-file-gb GB"),
    "reshard_checkpoint.py": ("CKPT OUT", "--tp N", "--pp N", "--vpp N"),
    "diff_checkpoints.py": ("A B", "--all", "--weights-only"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "source", "qwen3", tied=False, ffn=96, vocab=263)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs a tool's file as a program, in this process and another directory -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOLS / name), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return call


def table_of(text: str) -> dict[str, list[str]]:
    """First cell -> the others, of the lines that have as many cells as the table's head."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    head = next(cells for cells in lines if cells[0] == "tensor")
    return {cells[0]: cells[1:] for cells in lines if len(cells) == len(head) and cells != head}


def expected_table(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, list[str]]:
    """The summary's lines, from another reader's (shape, dtype) of every tensor."""
    table: dict[str, list[str]] = {}
    for name, (shape, dtype) in tensors.items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        count = int(table.get(kind, ["0"])[0]) + 1
        nbytes = count * math.prod(shape) * dtype.itemsize
        table[kind] = [str(count), "x".join(map(str, shape)), str(dtype).split(".")[1], f"{nbytes:,}"]
    return table


def in_checkpoint(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {key: (tuple(entry.size), entry.properties.dtype) for key, entry in entries.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_help_answers_at_once_from_another_directory(name, tmp_path):
    command = [sys.executable, "-X", "importtime", str(TOOLS / name), "--help"]
    wide = os.environ | {"COLUMNS": "200"}
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=wide)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"usage: {name} [-h]")
    assert all(option in shown.stdout for option in OPTIONS[name]), shown.stdout
    assert f"\n    {name} " in shown.stdout  # an example
    loaded = {line.rsplit("|", 1)[1].strip() for line in shown.stderr.splitlines() if "|" in line}
    assert "rich" in loaded and not loaded & {"torch", "numpy", "transformers", "megatron.core"}


def test_programs_from_another_directory(model, tmp_path):
    def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOLS / name), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    made = program("convert_hf_to_megatron.py", str(model), "megatron", "--tp", "2", "--vpp", "2")
    assert made.returncode == 0 and len(list((tmp_path / "megatron").glob("*.distcp"))) == 2, made.stderr
    equal = program("diff_checkpoints.py", "megatron", str(model))
    assert equal.returncode == 0 and "25 tensors, 0 differ" in equal.stdout, equal.stdout + equal.stderr


def test_conversions_tell_names_shapes_bytes_and_seconds(call, model, tmp_path):
    code, out, err = call("convert_hf_to_megatron.py", model, "megatron", "--tp", 2, "--pp", 2)
    assert code == 0 and not err
    there = in_checkpoint(tmp_path / "megatron")
    assert table_of(out) == expected_table(there)
    elements = sum(math.prod(shape) for shape, _ in there.values())
    assert elements == sum(t.numel() for t in load_file(model / "model.safetensors").values()) + 2 * 64  # padding
    last = rf"megatron: 11 tensors, {elements:,} elements, {4 * elements:,} bytes in 4 files, \d+\.\d s \(\d+ MB/s\)"
    assert re.fullmatch(last, out.splitlines()[-1]), out

    code, out, err = call("reshard_checkpoint.py", "megatron", "resharded", "--pp", 2)
    there = in_checkpoint(tmp_path / "resharded")
    assert code == 0 and table_of(out) == expected_table(there)
    assert there["output_layer.weight"][0] == (263, 64) and "resharded: 11 tensors" in out and "in 2 files" in out

    code, out, err = call("convert_megatron_to_hf.py", "resharded", "hf", "--dtype", "bf16", "--max-file-gb", 5e-5)
    assert code == 0 and not err
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert table_of(out) == expected_table({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    assert all(file.stat().st_size < 50_000 + 5000 for file in files) and len(files) > 2
    assert f"{sum(t.nbytes for t in tensors.values()):,} bytes in {len(files)} files" in out


def test_diff_tells_every_kind_and_the_checksums(call, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] += 0.25
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    code, out, _ = call("diff_checkpoints.py", model, "other")
    kinds, listed = map(table_of, out.split("\n\n"))
    nbytes = 2 * tensors[name].nbytes
    assert code == 1 and kinds["model.layers.*.mlp.up_proj.weight"] == ["2", "1", "96x64", f"{nbytes:,}", "0.25"]
    assert kinds["model.layers.*.mlp.gate_proj.weight"] == ["2", "0", "96x64", f"{nbytes:,}", "0"]
    assert len(kinds) == 14 and set(listed) == {name}
    changed, original = (t[name] for t in (tensors, load_file(model / "model.safetensors")))
    checksums = [hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for t in (original, changed)]
    assert listed[name] == ["96x64", "float32", "0.25", *checksums]
    total = f"{sum(t.nbytes for t in tensors.values()):,}"
    assert re.search(rf"^{len(tensors)} tensors, 1 differ, {total} / {total} bytes, \d+\.\d s$", out, re.M)

    code, out, _ = call("diff_checkpoints.py", model, model, "--all")
    assert code == 0 and set(table_of(out.split("\n\n")[1])) == set(tensors)


def test_refusals_are_one_line_and_an_exit_code(call, model, tmp_path):
    code, out, err = call("diff_checkpoints.py", model, "nowhere")
    assert (code, out) == (2, "") and err.startswith("diff_checkpoints.py: nowhere is no Megatron checkpoint")
    code, out, err = call("convert_hf_to_megatron.py", model, "never", "--tp", 3)
    assert (code, out) == (1, "") and not list(tmp_path.iterdir())
    assert err == "convert_hf_to_megatron.py: --tp 3 must divide the model's num_attention_heads (4)\n"
    (tmp_path / "here").mkdir()
    code, _, err = call("convert_hf_to_megatron.py", model, "here")
    assert code == 1 and err == "convert_hf_to_megatron.py: here exists already; choose another folder or remove it\n"
    for option, value in (("--tp", "0"), ("--pp", "two"), ("--vpp", "-1")):
        code, _, err = call("convert_hf_to_megatron.py", model, "never", option, value)
        assert code == 2 and f"argument {option}: {value} must be a whole number of at least 1" in err
    for value in ("0.0", "nan", "inf"):
        code, _, err = call("convert_megatron_to_hf.py", model, "never", "--max-file-gb", value)
        assert code == 2 and f"argument --max-file-gb: {value} must be a number above 0" in err


def test_progress_is_a_bar_on_a_terminal(call, model, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: write as to a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    code, _, err = call("convert_hf_to_megatron.py", model, "megatron")
    size = sum(t.nbytes for t in load_file(model / "model.safetensors").values()) / 1000
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert code == 0 and f"{size:.1f}/{size:.1f} kB" in plain and "output_layer.weight" in plain, plain


def test_progress_is_lines_elsewhere(call, model, monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    for name, *arguments in (("convert_hf_to_megatron.py", model, "megatron"), ("diff_checkpoints.py", model, model)):
        code, _, err = call(name, *arguments)
        assert code == 0
        pattern = r"\w+ (\S+): (\d\.\d\d) of (\d\.\d\d) GB, \d+ MB/s, about \d+ s left"
        lines = [re.fullmatch(pattern, line) for line in err.splitlines()]
        assert len(lines) >= 11 and all(lines), err


def test_config_is_carried_through_the_tools(call, model, tmp_path):
    call("convert_hf_to_megatron.py", model, "megatron")
    call("convert_megatron_to_hf.py", "megatron", "hf")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text()) == json.loads((model / name).read_text())


def test_the_commands_do_what_the_tools_do(call, model, tmp_path, capsys):
    """`megatron-nft convert | reshard | diff`: the same files as the tools write, and their exit statuses."""
    assert call("convert_hf_to_megatron.py", model, "by_tool", "--tp", 2)[0] == 0
    assert main(["convert", "hf-to-megatron", str(model), "by_command", "--tp", "2"]) == 0
    names = sorted(path.name for path in (tmp_path / "by_tool").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "by_command").iterdir())
    data = [name for name in names if name.endswith(".distcp")]
    assert len(data) == 2
    assert all((tmp_path / "by_tool" / n).read_bytes() == (tmp_path / "by_command" / n).read_bytes() for n in data)
    assert main(["reshard", "by_command", "resharded", "--pp", "2"]) == 0
    assert main(["convert", "megatron-to-hf", "resharded", "hf"]) == 0
    assert main(["diff", "hf", str(model)]) == 0
    assert "25 tensors, 0 differ" in capsys.readouterr().out
    assert main(["diff", "hf", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("megatron-nft diff: nowhere is no Megatron checkpoint")
    assert main(["convert", "hf-to-megatron", str(model), "hf"]) == 1
    assert capsys.readouterr().err.startswith("megatron-nft convert hf-to-megatron: hf exists already")
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(model), "out"])
    assert ended.value.code == 2
