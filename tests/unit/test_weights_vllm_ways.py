"""Which way a vLLM server takes weights is found by asking it; what its own calls are told and tell."""

from __future__ import annotations

import base64
import json
import pickle
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch

from megatron_nft.engines.vllm.transfer import TransferCalls
from megatron_nft.engines.vllm.weights import VLLMWeightClient
from megatron_nft.weights.buckets import Bucket, TensorMeta
from megatron_nft.weights.client import ServerFacts
from megatron_nft.weights.transport import WeightSyncError

NO_EXTENSION = {
    "error": {
        "message": "Call to collective_rpc method failed: Worker failed with error ''Worker' object has no attribute "
        "'nft_facts'', please check the stack trace above for the root cause",
        "code": 500,
    }
}
WORKER = {
    "tp_size": 1,
    "rank": 0,
    "dtype": "bfloat16",
    "quantization": None,
    "plain": True,
    "device": "cuda",
    "hosts": 1,
}


def config(backend: str | None, **parallel: int) -> dict:
    """What vLLM 0.32 says of itself, as far as it is read."""
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "data_parallel_size": 1, **parallel}
    return {
        "vllm_config": {
            "parallel_config": sizes,
            "model_config": {"dtype": "torch.bfloat16", "quantization": None},
            "device_config": {"device": "cuda"},
            "weight_transfer_config": {"backend": backend} if backend else None,
        }
    }


def client(answers: dict[str, tuple[int, dict]]) -> VLLMWeightClient:
    """One whose server gives these answers by path, 404 for others."""

    def answer(request: httpx.Request) -> httpx.Response:
        status, body = answers.get(request.url.path, (404, {"detail": "Not Found"}))
        return httpx.Response(status, json=body)

    made = VLLMWeightClient("http://v:1", 5, lambda ids, url: np.zeros(0, np.float32))
    made._client = httpx.Client(transport=httpx.MockTransport(answer))
    return made


def test_the_extension_is_taken_where_it_is_loaded():
    worker = WORKER | {"gpu": "GPU-1"}
    asked = client({"/collective_rpc": (200, {"results": [worker]}), "/server_info": (200, config("ipc"))})
    assert asked.facts() == ServerFacts(1, "bfloat16", None, True, "cuda", gpus=("GPU-1",))


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
def test_vllms_own_calls_are_taken_where_the_server_names_a_backend(backend):
    asked = client({"/collective_rpc": (500, NO_EXTENSION), "/server_info": (200, config(backend))})
    found = ServerFacts(2, "bfloat16", None, True, "cuda", finds_gpu=True, one_sender=True, backend=backend)
    assert asked.facts() == found
    two = client({"/collective_rpc": (500, NO_EXTENSION), "/server_info": (200, config("ipc", data_parallel_size=2))})
    assert not two.facts().plain


@pytest.mark.parametrize(
    "answers",
    [
        {},  # without VLLM_SERVER_DEV_MODE=1
        {"/collective_rpc": (500, NO_EXTENSION), "/server_info": (200, config(None))},
        {"/collective_rpc": (500, NO_EXTENSION), "/server_info": (200, config("sharded_rdt"))},
    ],
)
def test_a_server_that_was_started_for_neither_is_refused_with_what_to_do(answers):
    match = r"http://v:1 cannot take weights.*DEV_MODE=1.*'--weight-transfer-config=.*ipc.*nccl.*WeightReceiver"
    with pytest.raises(WeightSyncError, match=match):
        client(answers).facts()


def test_another_error_is_not_taken_for_a_missing_extension():
    broken = {"error": {"message": "Worker failed with error 'CUDA out of memory'", "code": 500}}
    with pytest.raises(WeightSyncError, match="CUDA out of memory"):
        client({"/collective_rpc": (500, broken), "/server_info": (200, config("ipc"))}).facts()


def test_handles_are_the_arguments_of_torchs_rebuild():
    """By the GPU that each lies on, in the order of `rebuild_cuda_tensor`; the reader fills in its device."""
    posts: list[tuple[str, dict]] = []
    server = SimpleNamespace(url="http://v:1", post=lambda path, body: posts.append((path, body)))
    facts = ServerFacts(1, "bfloat16", None, True, "cuda", finds_gpu=True, one_sender=True, backend="ipc")
    metas = [TensorMeta("a", (2, 3), torch.bfloat16, 0, 12), TensorMeta("b", (4,), torch.bfloat16, 12, 20)]
    bucket = Bucket(metas, torch.zeros(20, dtype=torch.uint8))
    numbers = {"nbytes": 20, "tensor_offset": 1, "storage_bytes": 64, "storage_offset": 2, "ref_counter_offset": 3}
    text = {key: base64.b64encode(key.encode()).decode() for key in ("handle", "ref_counter_handle", "event_handle")}
    shares = [{"cuda": numbers | text | {"uuid": uuid, "event_sync_required": True}} for uuid in ("GPU-0", "GPU-1")]
    TransferCalls(server, facts).load_shared(bucket, shares)
    ((path, body),) = posts
    told = json.loads(json.dumps(body))["update_info"]
    assert path == "/update_weights"
    pickled = told.pop("ipc_handles_pickled")
    assert told == {
        "names": ["a", "b"],
        "dtype_names": ["bfloat16", "bfloat16"],
        "shapes": [[2, 3], [4]],
        "tensor_sizes": [12, 8],
    }
    one = (torch.Tensor, (20,), (1,), 1, torch.UntypedStorage, torch.uint8, None, b"handle", 64, 2, False)
    one += (b"ref_counter_handle", 3, b"event_handle", True)
    assert pickle.loads(base64.b64decode(pickled)) == {"GPU-0": one, "GPU-1": one}


def test_checksums_are_told_by_tensor_and_rank():
    found = {f"dp0:pp0:pcp0:tp{rank}:model.norm.weight": f"{rank}" * 64 for rank in (0, 1)}
    asked = client({"/weight_checker": (200, {"checksums": found})})
    asked.configure(ServerFacts(2, "bfloat16", None, True, "cuda", backend="ipc"))
    assert asked.checksums() == {"model.norm.weight": {0: "0" * 16, 1: "1" * 16}}
