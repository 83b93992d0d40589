"""The trainer's end of an update group, with engines that die or stay away in the middle of a broadcast."""

from __future__ import annotations

import datetime
import multiprocessing
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest
import torch
import torch.distributed as dist
from processes import wait_until

from megatron_nft.engines.vllm.command import WORKER_FOLDERS
from megatron_nft.weights.transports.broadcast_group import BroadcastGroup, Rendezvous

TIMEOUT_S = 90.0  # of the group: what must not be waited for


def member(rank: int, port: int, num_bytes: int, takes_part: bool, results, world_size: int = 3) -> None:
    """An engine's rank: receives a first tensor, then waits for more or stays away. Puts the error it got.

    For more, not for one more: gloo may have given this rank its copy before it notices the loss of another.
    """
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore("127.0.0.1", port, None, is_master=False, timeout=timeout)
    store = dist.PrefixStore("cpu/", dist.PrefixStore("g/", dist.PrefixStore("g", store)))
    group = dist.ProcessGroupGloo(store, rank, world_size, timeout)
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    received = torch.zeros(num_bytes, dtype=torch.uint8)
    group.broadcast([received], options).wait()
    results.put(int(received.sum()))
    if not takes_part:
        time.sleep(600)
    try:
        while True:
            group.broadcast([received], options).wait()
    except RuntimeError as error:
        results.put(str(error))


@pytest.fixture
def group_of():
    """group_of(num_bytes): the trainer's group with members 1, which stays away, and 2; their processes and results."""
    context = multiprocessing.get_context("spawn")
    processes = []

    def make(num_bytes: int):
        rendezvous = Rendezvous.open("127.0.0.1", "g", 3, torch.device("cpu"), TIMEOUT_S)
        results = [context.Queue() for _ in range(2)]  # one that is killed takes the lock of its queue with it
        for rank in (1, 2):
            arguments = (rank, rendezvous.port, num_bytes, rank == 2, results[rank - 1])
            processes.append(context.Process(target=member, args=arguments, daemon=True))
            processes[-1].start()
        group = BroadcastGroup(rendezvous, TIMEOUT_S)
        group.broadcast(torch.ones(num_bytes, dtype=torch.uint8))
        group.wait()
        assert [queue.get(timeout=60) for queue in results] == [num_bytes] * 2
        return group, processes, results

    yield make
    for process in processes:
        process.kill()
        process.join()


def test_members_hear_of_a_lost_one_as_soon_as_the_trainer_leaves(group_of):
    """Gloo closes no connection while the broken broadcast is still referred to."""
    group, processes, results = group_of(1000)
    processes[0].kill()
    processes[0].join()
    group.broadcast(torch.ones(1000, dtype=torch.uint8))
    start = time.monotonic()
    group.close()
    assert "onnection" in results[1].get(timeout=TIMEOUT_S / 2)
    assert time.monotonic() - start < TIMEOUT_S / 2


def test_leaving_does_not_wait_for_a_member_that_stays_away(group_of):
    """More than sockets hold: the send goes on until the timeout."""
    group, _, _ = group_of(30_000_000)
    group.broadcast(torch.ones(30_000_000, dtype=torch.uint8))
    time.sleep(0.5)
    assert not group.is_sent()
    start = time.monotonic()
    group.close()
    assert time.monotonic() - start < TIMEOUT_S / 10


def test_a_vllm_worker_receives_from_several_leaders(monkeypatch):
    """Each stage leader has a group of its own; the first goes on sending after the second has joined."""
    for folder in WORKER_FOLDERS:
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "nft_vllm_extension", raising=False)
    from nft_vllm_extension import WeightReceiver

    class Worker(WeightReceiver):
        device, rank = torch.device("cpu"), 0

        def _nft_load(self, tensors: dict) -> dict:
            return tensors

    worker, groups = Worker(), {}
    with ThreadPoolExecutor(1) as threads:
        for name in ("first", "second"):
            rendezvous = Rendezvous.open("127.0.0.1", name, 2, torch.device("cpu"), 60)
            joined = threads.submit(worker.nft_join, rendezvous.address, rendezvous.port, name, 1, 2, 60)
            groups[name] = BroadcastGroup(rendezvous, 60)
            assert joined.result(60)
        for value, name in enumerate(("first", "second", "first"), start=1):
            loaded = threads.submit(worker.nft_load_broadcast, [["w", "float32", [2, 3], 0, 24]], name)
            groups[name].broadcast(torch.full((6,), float(value)).view(torch.uint8))
            groups[name].wait()
            assert torch.equal(loaded.result(60)["w"], torch.full((2, 3), float(value)))
        assert worker.nft_leave("first") and list(worker.nft_groups) == ["second"]


def test_a_tensor_that_was_sent_is_let_go():
    """One larger than a bucket must be gone before the next is made."""
    rendezvous = Rendezvous.open("127.0.0.1", "g", 2, torch.device("cpu"), 60)
    results = SimpleQueue()
    threading.Thread(target=member, args=(1, rendezvous.port, 1000, True, results, 2), daemon=True).start()
    group, tensor = BroadcastGroup(rendezvous, 60), torch.ones(1000, dtype=torch.uint8)
    held = weakref.ref(tensor.untyped_storage())
    group.broadcast(tensor)
    group.wait()
    del tensor
    assert results.get(timeout=60) == 1000
    wait_until(lambda: held() is None, what="the end of the tensor")  # gloo's thread may hold it for a moment
    group.close()
    assert "onnection" in results.get(timeout=60)


LEAVES = """
import sys, torch
from megatron_nft.weights.transports.broadcast_group import BroadcastGroup, Rendezvous
rendezvous = Rendezvous.open("127.0.0.1", "g", 2, torch.device("cpu"), 60)
print(rendezvous.port, flush=True)
group = BroadcastGroup(rendezvous, 60)
group.broadcast(torch.ones(1000, dtype=torch.uint8))
group.wait()
group.close(60)
"""


def test_a_process_that_has_left_may_exit():
    """The C++ runtime aborts one that exits while a thread is still taking the group down."""
    with subprocess.Popen([sys.executable, "-c", LEAVES], stdout=subprocess.PIPE, text=True) as process:
        results = SimpleQueue()
        member(1, int(process.stdout.readline()), 1000, True, results, 2)
    assert process.returncode == 0 and results.get() == 1000
