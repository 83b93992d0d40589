"""What the shipped scripts accept and refuse before a node is taken, and what a dry run prints."""

from __future__ import annotations

import shlex

import pytest
from submitting import LAUNCH

TRAIN = "train_7b_4nodes.sbatch"


@pytest.mark.parametrize(
    "script", ["train_32b_16nodes.sbatch", "train_7b_4nodes.sbatch", "eval.sbatch", "convert.sbatch"]
)
def test_headers_are_accepted(cluster, launch, script):
    """Slurm plans the job with the file's own header: 16 nodes of 8 GPUs for the 32B run."""
    done = cluster.run("sbatch", "--test-only", str(LAUNCH / script), check=False, cwd=launch.folder)
    assert done.returncode == 0, done.stderr
    if "32b" in script:
        assert "on nodes node[1-16]" in done.stderr


def test_a_submitted_job_has_the_header_of_its_script(cluster, launch):
    job = launch.submit(TRAIN, "--hold", "run_dir=held", "--time=00:30:00")
    fields = cluster.job(job)
    cluster.run("scancel", job)
    assert (fields["NumNodes"], fields["Requeue"], fields["TimeLimit"]) == ("2-2", "1", "00:30:00")
    assert fields["Command"] == f"{LAUNCH / TRAIN} run_dir=held"
    assert fields["WorkDir"] == str(launch.folder)


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        (["model.path=nowhere"], {}, "model.path nowhere: not a folder"),
        (["data.train=[nowhere.jsonl]"], {}, "data.train: nowhere.jsonl is not a file"),
        ([], {"NFT_CONFIG": "nowhere.yaml"}, "NFT_CONFIG=nowhere.yaml: no such file"),
        (["policy.tensor_model_parallel_size=3"], {}, "2 processes cannot be divided"),
        (["policy.tensor_parallel=3"], {}, "policy.tensor_parallel: unknown key"),
        (["--partition=nowhere"], {}, "Slurm refuses the job: invalid partition specified: nowhere"),
        (["--partition", "batch"], {}, "'batch': settings are written key=value, options of sbatch --name=value"),
        (["-p", "batch"], {}, "-p: write options of sbatch as --name=value"),
        (["notasetting"], {}, "settings are written key=value"),
        ([], {"NFT_GPUS_PER_NODE": "9"}, "Requested node configuration is not available"),
        ([], {"NFT_GPUS_PER_NODE": "many"}, "NFT_GPUS_PER_NODE=many: must be a whole number"),
        ([], {"NFT_NODES": "18"}, "Requested node configuration is not available"),
        ([], {"NFT_ENGINE_NODES": "2"}, "NFT_ENGINE_NODES=2: must be below NFT_NODES (2)"),
        ([], {"NFT_ENGINE_NODES": "1", "NFT_PROCS_PER_NODE": "2"}, "NFT_ENGINE_NODES needs rollout.engine=sglang"),
        (["model.architecture={model_type: qwen2}"], {"NFT_GPU": "h100"}, "num_attention_heads is None"),
        (["data.max_prompt_tokens=400"], {"NFT_GPU": "h100"}, "is more than the model's max_position_embeddings"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_clear_line(cluster, launch, arguments, settings, words):
    done = launch(TRAIN, "run_dir=refused", *arguments, **settings)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "submitted" not in done.stdout
    assert not (launch.folder / "refused").exists()


def test_a_job_with_other_nodes_or_gpus_than_asked_for_ends_with_a_clear_line(cluster, launch):
    """`sbatch` straight on the script: what it cannot refuse is refused when the job starts."""
    jobs = {
        "the job has 3 nodes, 4 are asked for: submit with NFT_NODES=3 if that is meant": {"NFT_NODES": "4"},
        "a node of the job has 8 GPUs, 4 are asked for: set NFT_GPUS_PER_NODE=8 if meant": {
            "NFT_NODES": "3",
            "NFT_GPUS_PER_NODE": "4",
        },
    }
    for words, settings in jobs.items():
        command = ["sbatch", "--parsable", "--nodes=3", str(LAUNCH / TRAIN)]
        job = cluster.run(*command, env=launch.environment(**settings), cwd=launch.folder).stdout.strip()
        assert cluster.wait(job)["JobState"] == "FAILED"
        assert words in launch.output(job).splitlines()[-1]


def test_dry_run_prints_everything_and_submits_nothing(cluster, launch):
    settings = {
        "NFT_ENGINE_NODES": "1", "NFT_HET": "1", "NFT_NODES": "3", "NFT_CONTAINER_IMAGE": "registry/image:1",
        "NFT_CONTAINER_MOUNTS": "/data:/data", "NCCL_DEBUG": "INFO", "NFT_DOCTOR": "1",
    }  # fmt: skip
    before = cluster.run("squeue", "-h", "-o", "%i").stdout
    done = launch(TRAIN, "--dry-run", "--account=me", "rollout.engine=sglang", "run_dir=dry", **settings)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    (submit,) = [line for line in lines if line[:1] == ["sbatch"]]
    steps = [line for line in lines if line[:1] == ["srun"]]
    doctors = [line for line in steps if "doctor" in line]
    train, engines = (line for line in steps if line not in doctors)
    assert submit.count("--account=me") == 2 and ":" in submit and "--nodes=2" in submit and "--nodes=1" in submit
    assert "--container-image=registry/image:1" in train
    assert f"--container-mounts={launch.folder}:{launch.folder},{LAUNCH.parent}:{LAUNCH.parent},/data:/data" in train
    assert "rollout.server.registry_nodes=1" in train and "--kill-on-bad-exit=1" in train
    assert "megatron_nft.engines.serve" in engines
    assert [line[line.index("doctor") + 1] for line in doctors] == ["--ranks-per-node=1", "--ranks-per-node=0"]
    assert [next(o for o in line if o.startswith("--het-group")) for line in doctors] == [
        f"--het-group={i}" for i in (0, 1)
    ]
    assert all("--cpu-bind=none" in line for line in (*doctors, train, engines))
    assert ["NCCL_DEBUG=INFO"] in lines
    assert cluster.run("squeue", "-h", "-o", "%i").stdout == before
    assert not (launch.folder / "dry").exists()


def test_apptainer_is_a_prefix(launch):
    settings = {"NFT_CONTAINER_IMAGE": "image.sif", "NFT_CONTAINER_RUNTIME": "apptainer"}
    done = launch("eval.sbatch", "--dry-run", "--", "--model", "a b", **settings)
    assert done.returncode == 0, done.stderr
    (run,) = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("srun")]
    assert run[run.index("apptainer") : run.index("bash")][-1] == "image.sif"
    assert run[-4:] == ["megatron_nft", "eval", "--model", "a b"]
