"""The checkpoint store in one process: whole or not at all, damage noticed, the surplus exact."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron_nft.train.checkpoints import CheckpointError, CheckpointStore, RunState, complete_steps, read_surplus
from megatron_nft.types import TrainingSample

IDENTITY = {"seed": 1, "model": {"hidden_size": 8, "tied": True}, "data": "abc", "layout": {"tp": 1}}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("rendezvous") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def store(tmp_path, group) -> CheckpointStore:
    return CheckpointStore(tmp_path, 2, IDENTITY, group)


def weights(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)


def sample(draw: int, index: int) -> TrainingSample:
    rng = np.random.default_rng([draw, index])
    return TrainingSample(
        draw=draw,
        sample_index=index,
        input_ids=rng.integers(0, 9, 7).astype(np.int32),
        prompt_length=3,
        rollout_logprobs=rng.normal(size=4).astype(np.float32),
        behaviour_logprobs=rng.normal(size=4).astype(np.float32),
        correct=bool(index % 2),
        correct_rate=1 / 3,
        advantage=-0.1,
        step=5,
    )


def messages() -> tuple[list[str], object]:
    said: list[str] = []
    return said, said.append


def test_what_was_saved_comes_back(store, tmp_path):
    surplus = [sample(7, 0), sample(7, 1), sample(3, 2)]
    store.save(RunState(5, 6, 40), weights, surplus)
    folder, manifest = store.newest(print)
    assert (manifest.step, manifest.weight_version, manifest.cursor) == (5, 6, 40)
    assert (folder / "megatron" / "weights.bin").read_bytes() == bytes(range(256)) * 40
    read = read_surplus(folder)
    assert [(s.draw, s.sample_index) for s in read] == [(3, 2), (7, 0), (7, 1)]
    for got, want in zip(read, [surplus[2], surplus[0], surplus[1]], strict=True):
        for name in TrainingSample.__slots__:
            a, b = getattr(got, name), getattr(want, name)
            assert (a.tobytes(), a.dtype) == (b.tobytes(), b.dtype) if isinstance(a, np.ndarray) else a == b, name


def test_a_manifest_of_version_0_1_0_is_read(store):
    """It names a number of optimizer steps, which nothing reads any more."""
    folder = store.save(RunState(5, 6, 40), weights, [])
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"optimizer_steps": 20}))
    found = store.newest(print)
    assert found is not None and found[1].step == 5


def test_the_store_knows_the_newest_checkpoint(store, tmp_path, group):
    assert store.saved_step == 0
    store.save(RunState(3), weights, [])
    assert store.saved_step == 3
    other = CheckpointStore(tmp_path, 2, IDENTITY, group)
    other.newest(print)
    assert other.saved_step == 3


def test_metrics_that_were_not_written_yet_are_kept(store):
    store.save(RunState(1), weights, [])
    assert store.newest(print)[1].figures is None
    store.save(RunState(2, unwritten={"loss": ("mean", (0.1, 3.0))}), weights, [])
    assert store.newest(print)[1].figures == {"loss": ["mean", [0.1, 3.0]]}


def test_only_the_newest_stay(store, tmp_path):
    for step in (1, 2, 3):
        store.save(RunState(step), weights, [])
    assert complete_steps(tmp_path) == [3, 2]


def test_a_failed_save_leaves_the_earlier_one_and_nothing_half_done(store, tmp_path):
    store.save(RunState(1), weights, [])

    def fails(folder: Path) -> None:
        weights(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(
        CheckpointError, match=r"step 2 could not be written \(newest intact checkpoint: step 1\).*No space"
    ):
        store.save(RunState(2), fails, [])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert store.newest(print)[1].step == 1


def test_a_full_disk_is_a_clear_error(store, tmp_path):
    """The kernel refuses to write past a file size limit, as it would past the end of a disk."""
    store.save(RunState(1), weights, [])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="OSError"):
            store.save(RunState(2), weights, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert complete_steps(tmp_path) == [1]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damage_is_noticed_and_the_one_before_is_taken(store, tmp_path, damage):
    for step in (1, 2):
        store.save(RunState(step), weights, [])
    folder = tmp_path / "checkpoints" / "step_000002"
    victim = folder / "megatron" / "weights.bin"
    data = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(data[:-1])
    elif damage == "flip":
        data[100] ^= 1
        victim.write_bytes(data)
    elif damage == "remove":
        victim.unlink()
    else:
        (folder / "manifest.json").write_text('{"format": 1')
    said, say = messages()
    assert store.newest(say)[1].step == 1
    assert len(said) == 1 and str(folder) in said[0] and "damaged" in said[0]


def test_only_damaged_ones_are_an_error(store, tmp_path):
    store.save(RunState(1), weights, [])
    (tmp_path / "checkpoints" / "step_000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints of steps"):
        store.newest(lambda _: None)


def test_unfinished_folders_are_not_checkpoints_and_go_with_the_next_save(store, tmp_path):
    partial = tmp_path / "checkpoints" / "step_000009.partial"
    partial.mkdir(parents=True)
    assert store.newest(print) is None
    store.save(RunState(1), weights, [])
    assert not partial.exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "model",
            {"hidden_size": 16, "tied": True},
            r"another model: \{'hidden_size': 8\} there, \{'hidden_size': 16\} here",
        ),
        ("seed", 2, "another seed: 1 there, 2 here"),
        ("data", "xyz", "another data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, group, key, value, said):
    CheckpointStore(tmp_path, 2, IDENTITY, group).save(RunState(1), weights, [])
    with pytest.raises(CheckpointError, match=said):
        CheckpointStore(tmp_path, 2, {**IDENTITY, key: value}, group).newest(print)


def test_the_manifest_names_every_file_with_its_hash(store, tmp_path):
    import hashlib

    folder = store.save(RunState(1), weights, [])
    files = json.loads((folder / "manifest.json").read_text())["files"]
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(files) == on_disk
    assert files["megatron/weights.bin"]["sha256"] == hashlib.sha256(bytes(range(256)) * 40).hexdigest()
    assert os.path.getsize(folder / "megatron" / "weights.bin") == files["megatron/weights.bin"]["bytes"]
