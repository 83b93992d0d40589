"""The checkpoint store in one process: whole or not at all, damage noticed, the surplus exact."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from megatron_nft.train import checkpoints
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


WEIGHTS = bytes(range(256)) * 40


class Weights:
    """Stands in for a policy's snapshot: one file of weights, and one that says so."""

    def write(self, folder: Path) -> SimpleNamespace:
        (folder / "weights.bin").write_bytes(WEIGHTS)
        digest = hashlib.sha256(WEIGHTS).hexdigest()
        return SimpleNamespace(file=SimpleNamespace(name="weights.bin", nbytes=len(WEIGHTS), sha256=digest))

    def finish(self, folder: Path, parts: list[SimpleNamespace]) -> None:
        (folder / "index").write_text(" ".join(part.file.name for part in parts))


def newest(store: CheckpointStore, say=print, loaded=None):
    """What is restored; `loaded` notes the folders that were loaded."""
    return store.restore(lambda folder, _: (loaded.append(folder.name) if loaded is not None else None, {})[1], say)


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
    store.save(RunState(5, 6, 40), Weights, surplus)
    folder, manifest = newest(store)
    assert (manifest.step, manifest.weight_version, manifest.cursor) == (5, 6, 40)
    assert (folder / "megatron" / "weights.bin").read_bytes() == WEIGHTS
    read = read_surplus(folder)
    assert [(s.draw, s.sample_index) for s in read] == [(3, 2), (7, 0), (7, 1)]
    for got, want in zip(read, [surplus[2], surplus[0], surplus[1]], strict=True):
        for name in TrainingSample.__slots__:
            a, b = getattr(got, name), getattr(want, name)
            assert (a.tobytes(), a.dtype) == (b.tobytes(), b.dtype) if isinstance(a, np.ndarray) else a == b, name


def test_a_manifest_of_version_0_1_0_is_read(store):
    """It names a number of optimizer steps, which nothing reads any more."""
    folder = store.save(RunState(5, 6, 40), Weights, [])
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"optimizer_steps": 20}))
    found = newest(store)
    assert found is not None and found[1].step == 5


def test_the_store_knows_the_newest_checkpoint(store, tmp_path, group):
    assert store.saved_step == 0
    store.save(RunState(3), Weights, [])
    assert store.saved_step == 3
    other = CheckpointStore(tmp_path, 2, IDENTITY, group)
    newest(other)
    assert other.saved_step == 3


def test_metrics_that_were_not_written_yet_are_kept(store):
    store.save(RunState(1), Weights, [])
    assert newest(store)[1].figures is None
    store.save(RunState(2, unwritten={"loss": ("mean", (0.1, 3.0))}), Weights, [])
    assert newest(store)[1].figures == {"loss": ["mean", [0.1, 3.0]]}


def test_only_the_newest_stay(store, tmp_path):
    for step in (1, 2, 3):
        store.save(RunState(step), Weights, [])
    assert complete_steps(tmp_path) == [3, 2]


def test_a_failed_save_leaves_the_earlier_one_and_nothing_half_done(store, tmp_path):
    store.save(RunState(1), Weights, [])

    class Full(Weights):
        def write(self, folder: Path) -> SimpleNamespace:
            super().write(folder)
            raise OSError(28, "No space left on device")

    with pytest.raises(
        CheckpointError, match=r"step 2 could not be written \(newest intact checkpoint: step 1\).*No space"
    ):
        store.save(RunState(2), Full, [])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert newest(store)[1].step == 1


def test_a_full_disk_is_a_clear_error(store, tmp_path):
    """The kernel refuses to write past a file size limit, as it would past the end of a disk."""
    store.save(RunState(1), Weights, [])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="OSError"):
            store.save(RunState(2), Weights, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert complete_steps(tmp_path) == [1]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damage_is_noticed_and_the_one_before_is_taken(store, tmp_path, damage):
    for step in (1, 2):
        store.save(RunState(step), Weights, [])
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
    assert newest(store, say)[1].step == 1
    assert len(said) == 1 and str(folder) in said[0] and "damaged" in said[0]


def test_only_damaged_ones_are_an_error(store, tmp_path):
    store.save(RunState(1), Weights, [])
    (tmp_path / "checkpoints" / "step_000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints of steps"):
        newest(store, lambda _: None)


def test_unfinished_folders_are_not_checkpoints_and_go_with_the_next_save(store, tmp_path):
    partial = tmp_path / "checkpoints" / "step_000009.partial"
    partial.mkdir(parents=True)
    assert newest(store) is None
    store.save(RunState(1), Weights, [])
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
    CheckpointStore(tmp_path, 2, IDENTITY, group).save(RunState(1), Weights, [])
    with pytest.raises(CheckpointError, match=said):
        newest(CheckpointStore(tmp_path, 2, {**IDENTITY, key: value}, group))


def test_the_manifest_names_every_file_with_its_hash(store, tmp_path):
    folder = store.save(RunState(1), Weights, [])
    files = json.loads((folder / "manifest.json").read_text())["files"]
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(files) == on_disk
    assert files["megatron/weights.bin"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert os.path.getsize(folder / "megatron" / "weights.bin") == files["megatron/weights.bin"]["bytes"]


def test_digests_of_the_loader_count_and_files_that_it_has_read_are_not_read_again(store, monkeypatch):
    folder = store.save(RunState(1), Weights, [])
    read = []
    real = checkpoints.sha256_of_file
    monkeypatch.setattr(checkpoints, "sha256_of_file", lambda path: (read.append(path.name), real(path))[1])
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert store.restore(lambda *_: {"megatron/weights.bin": digest}, print) is not None
    assert sorted(read) == ["index", "rank_00000.parquet"]
    said, say = messages()
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        store.restore(lambda *_: {"megatron/weights.bin": "0" * 64}, say)
    assert said == [
        f"checkpoint {folder} is damaged (megatron/weights.bin has another SHA-256 than when it was written); "
        "trying the one before it"
    ]


def test_a_checkpoint_that_cannot_be_loaded_is_damaged_or_the_error_counts(store, tmp_path):
    for step in (1, 2):
        store.save(RunState(step), Weights, [])

    def load(folder: Path, _: object) -> dict[str, str]:
        if folder.name == "step_000002":
            raise ValueError("was saved with another precision")
        return {}

    with pytest.raises(ValueError, match="another precision"):
        store.restore(load, print)
    victim = tmp_path / "checkpoints" / "step_000002" / "megatron" / "weights.bin"
    victim.write_bytes(WEIGHTS[::-1])
    assert store.restore(load, print)[1].step == 1


# --- beside the training


class Held(Weights):
    """Writes when it is told to."""

    def __init__(self, error: OSError | None = None) -> None:
        self.begun, self.go, self.error = threading.Event(), threading.Event(), error

    def write(self, folder: Path) -> SimpleNamespace:
        self.begun.set()
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return super().write(folder)


@pytest.fixture
def beside(tmp_path, group) -> CheckpointStore:
    background = dist.new_group(backend="gloo")
    yield CheckpointStore(tmp_path, 1, IDENTITY, group, background)
    dist.destroy_process_group(background)


def test_a_save_beside_the_training_counts_when_it_is_whole(beside, tmp_path):
    beside.save(RunState(1), Weights, [])
    beside.wait()
    held = Held()
    beside.save(RunState(2), lambda: held, [])
    assert held.begun.wait(60)
    assert (beside.saved_step, beside.pending_step) == (1, 2)
    beside.check()  # neither waits nor fails
    assert complete_steps(tmp_path) == [1], "the one before was given up too early"
    held.go.set()
    beside.wait()
    assert (beside.saved_step, beside.pending_step) == (2, 0)
    assert complete_steps(tmp_path) == [2]
    assert newest(beside)[1].step == 2


def test_there_is_never_a_second_save_under_way(beside, tmp_path):
    held, order = Held(), []
    beside.save(RunState(1), lambda: held, [])
    assert held.begun.wait(60)
    threading.Thread(target=lambda: (order.append("released"), held.go.set())).start()
    beside.save(RunState(2), lambda: (order.append(beside.saved_step), Weights())[1], [])
    assert order == ["released", 1], "the snapshot was taken while its memory was being written"
    beside.wait()
    assert complete_steps(tmp_path) == [2]


def test_an_error_beside_the_training_is_raised_by_the_next_check(beside, tmp_path):
    beside.save(RunState(1), Weights, [])
    beside.wait()
    held = Held(OSError(28, "No space left on device"))
    beside.save(RunState(2), lambda: held, [])
    held.go.set()
    beside._writer._thread.join()
    with pytest.raises(
        CheckpointError, match=r"step 2 could not be written \(newest intact checkpoint: step 1\).*space"
    ):
        beside.check()
    assert (beside.saved_step, beside.pending_step) == (1, 0)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    beside.save(RunState(3), Weights, [])  # where the run goes on all the same
    beside.wait()
    assert complete_steps(tmp_path) == [3]


def test_a_run_that_ends_early_lets_the_save_become_whole(beside, tmp_path):
    held = Held()
    beside.save(RunState(1), lambda: held, [])
    threading.Thread(target=lambda: (held.begun.wait(60), held.go.set())).start()
    beside.close()
    assert complete_steps(tmp_path) == [1]
