"""vLLM on the trainer's GPU: weights through its own transfer calls and CUDA IPC; the id of an NCCL group."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
import torch
from gpu_engines import checked_sync, start_engine
from gpu_policies import likelihood_loss, make_policy, make_samples, packed

from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.engines.vllm.transfer import TransferCalls
from megatron_nft.weights.transport import WeightSyncError
from megatron_nft.weights.transports.broadcast_group import BroadcastGroup, Rendezvous

VOCAB = 320


@pytest.fixture(scope="module")
def colocated(layout, tmp_path_factory):
    """(policy, engine, sync): one vLLM server, as a run starts it."""
    from tiny import make_model

    folder = tmp_path_factory.mktemp("vllm") / "model"
    shape = {"hidden": 256, "heads": 4, "kv_heads": 2, "layers": 4, "ffn": 512, "vocab": VOCAB}
    model = make_model(folder, "qwen2", tied=False, dtype="bfloat16", **shape)
    server = {"mem_fraction_static": 0.2, "max_running_requests": 64, "start_timeout_s": 400, "cuda_graphs": False}
    policy = make_policy(layout, model, rollout={"engine": "vllm", "server": server})
    engine, sync = start_engine(policy, tmp_path_factory.mktemp("vllm-run"))
    yield policy, engine, sync
    sync.close()
    engine.close()


def greedy(engine) -> list[int]:
    request = Request(np.arange(40, 60, dtype=np.int32), 1, (0,))
    ((_, _, answer),) = engine.generate([request], SamplingParams(16, temperature=0))
    return answer.token_ids.tolist()


@pytest.mark.needs("engine", "vllm")
def test_weights_go_through_vllms_own_calls_and_are_checked(colocated):
    policy, engine, sync = colocated
    assert sync._transport._facts.backend == "ipc"
    receipt = checked_sync(policy, sync, version=1)
    assert receipt.transport == "tensor"
    assert receipt.engine_checked == len(receipt.checksums) > 0  # SHA-256 of vLLM's own parameters
    assert receipt.probe_difference < 0.1
    before = greedy(engine)
    for _ in range(3):
        policy.train_step(packed(policy, make_samples([64, 80], VOCAB)), likelihood_loss, 10.0)
    second = checked_sync(policy, sync, version=2)
    assert second.checksums != receipt.checksums and second.probe_difference < 0.1
    assert engine.weight_version == 2 and greedy(engine) != before


@pytest.mark.needs("engine", "vllm")
def test_an_update_that_failed_half_way_does_not_spoil_the_next(colocated, monkeypatch):
    policy, _, sync = colocated
    load = TransferCalls.load_shared

    def then_break_off(calls, bucket, shares) -> None:
        load(calls, bucket, shares)
        load(calls, bucket, [{"cuda": {**shares[0]["cuda"], "uuid": "GPU-of-nobody"}}])

    monkeypatch.setattr(TransferCalls, "load_shared", then_break_off)
    with pytest.raises(WeightSyncError, match="IPC handle not found"):
        checked_sync(policy, sync, version=3)
    monkeypatch.undo()
    assert checked_sync(policy, sync, version=4).engine_checked > 0


@pytest.mark.needs("cuda")
def test_nccls_id_is_where_those_who_join_by_it_look(layout):
    """`Rendezvous.unique_id` reads what torch's group puts into its store."""
    rendezvous = Rendezvous.open("127.0.0.1", "alone", 1, layout.device, 60)
    group = BroadcastGroup(rendezvous, 60, warm_up=True)
    assert len(rendezvous.unique_id()) == 128
    group.close(60)


@pytest.mark.needs("engine", "vllm")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL does not take two ranks on one GPU: needs two GPUs")
def test_weights_go_over_nccl_into_a_server_on_another_gpu(layout, colocated, tmp_path):
    """A server with the backend nccl, as a user starts it, on the second GPU."""
    policy, *_ = colocated
    transfer = '--weight-transfer-config={"backend": "nccl"}'
    on_second = {"mem_fraction_static": 0.2, "start_timeout_s": 400, "cuda_graphs": False}
    on_second |= {"env": {"CUDA_VISIBLE_DEVICES": "1"}, "extra_args": [transfer]}  # the last one counts
    start = {"engine": "vllm", "server": on_second}
    server, _ = start_engine(make_policy(layout, policy.config.model.path, rollout=start), tmp_path / "server")
    url = server.group.servers[0].url
    given = {"engine": "vllm", "server": {"urls": [url]}}
    sending = make_policy(layout, policy.config.model.path, rollout=given, sync={"transport": "distributed"})
    engine, sync = start_engine(sending, tmp_path / "run")
    try:
        receipt = checked_sync(sending, sync, version=1)
        assert receipt.transport == "distributed" and receipt.engine_checked == len(receipt.checksums) > 0
        assert httpx.get(f"{url}/weight_info").json() == {"weight_version": "1"}
    finally:
        sync.close()
        engine.close()
        server.close()
