"""What a start refuses or warns of, without and with our launcher's look at the inputs before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from runs import TESTS, Run, make_start, merge

TEMPLATE = "{{ raise_exception('no system role here') }}"


def test_bad_inputs_are_refused_by_rank_0_alone_before_a_model_is_built(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(merge(make_start(tmp_path), model__chat_template=str(template))))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "megatron_nft", "train", "--config", str(config)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    said = [line for line in done.stdout.splitlines() if "megatron-nft" in line]
    assert len(said) == 1 and said[0].startswith("megatron-nft train: "), done.stdout
    assert "no system role here" in said[0]
    assert "exitcode  : 2" in done.stdout  # torchrun's table of failed ranks
    assert "optimizer:" not in done.stdout
    assert not Path(tmp_path / "run" / "config.yaml").exists()


def test_versions_that_were_not_tested_together_are_said_once(tmp_path, monkeypatch):
    installed = tmp_path / "installed" / "transformer_engine-2.12.0.dist-info" / "METADATA"  # tested with no core
    installed.parent.mkdir(parents=True)
    installed.write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.12.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    run = Run(merge(make_start(tmp_path), train__num_steps=1, eval__data=[]))
    assert run.wait() == 0, run.text
    assert run.text.count("were not tested together") == 1, run.text
    assert "Transformer Engine 2.12.0 were not tested together. What was:" in run.text
    assert ">=2.17,<2.18" in run.text  # the table
