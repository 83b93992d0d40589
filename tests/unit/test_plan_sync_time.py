"""The planner's model of a weight sync against values worked out by hand from docs/weights.md."""

from __future__ import annotations

import pytest
from test_plan_command import QWEN_7B, QWEN_32B

from megatron_nft.config import Config
from megatron_nft.plan.architecture import read_architecture
from megatron_nft.plan.hardware import CHIPS
from megatron_nft.plan.layout import Cluster, LayoutSettings
from megatron_nft.plan.render import _sync_line
from megatron_nft.plan.sync_time import SyncTime, sync_time

W_7B = 2 * 7_615_616_512  # bytes, bf16
W_32B = 2 * 32_763_876_352
N, V, H = 40e9, 360e9, 1.34e12  # H100: 0.8 of 50 and 450 GB/s; half of 0.8 of 3.35 TB/s, since a copy reads and writes


def timed(architecture: dict, nodes: int, policy: dict, engine_nodes: int = 0, **sections) -> SyncTime:
    config = Config.model_validate(
        {
            "run_dir": "run",
            "model": {"path": "nowhere", "architecture": architecture},
            "data": {"train": ["train.parquet"]},
            "policy": policy,
            **sections,
        }
    )
    spec = read_architecture(config.model)
    return sync_time(spec, config, LayoutSettings.of(config), Cluster(CHIPS["h100"], nodes, 8, engine_nodes))


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
TP8_PP2 = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 2, "sequence_parallel": True}


def servers(**settings) -> dict:
    return {"rollout": {"engine": "sglang", "server": settings}}


def test_engines_beside_the_trainer_on_four_hosts():
    """15.23 GB are 28.4 buckets of 512 MiB; meetings and calls take longer than one adapter."""
    found = timed(QWEN_7B, 4, TP2, **servers(num_servers=4, tensor_parallel_size=2))
    assert (found.transport, found.nbytes, found.num_buckets) == ("tensor", W_7B, 29)
    assert found.gather_s == pytest.approx(W_7B / 2 / V)  # 0.021: half of it is on the leader already
    assert found.spread_s == pytest.approx(W_7B / N)  # 0.381
    assert found.copy_s == pytest.approx(W_7B / H)  # 0.0114
    assert found.calls_s == pytest.approx(29 * 0.009)
    assert found.meetings_s == pytest.approx(29 * 0.0151)
    # 7 calls, 7 agreements, and the engine's checksums read half of the model at 2.68 TB/s: 0.1043
    assert found.rest_s == pytest.approx(7 * 0.009 + 7 * 0.0055 + W_7B / 2 / 2.68e12)
    assert found.total_s == pytest.approx(0.0113666 + 0.261 + 0.4379 + 0.1043417, abs=1e-6)


def test_one_adapter_is_the_bound_of_a_large_model_with_large_buckets():
    """65.5 GB in 2 x 16 buckets of 2 GiB: 1.64 s over one adapter, which calls and meetings hide behind."""
    sections = servers(num_servers=2, tensor_parallel_size=4) | {"sync": {"bucket_bytes": 2 << 30}}
    found = timed(QWEN_32B, 16, TP8_PP2, **sections)
    assert found.num_buckets == 32
    gather, spread = W_32B / 2 * 7 / 8 / V, W_32B / N
    assert (found.gather_s, found.spread_s) == pytest.approx((gather, spread))
    assert found.copy_s + found.calls_s + found.meetings_s == pytest.approx(0.0489013 + 0.288 + 0.4832, abs=1e-6)
    assert found.total_s == pytest.approx(gather + spread + found.rest_s)
    assert found.total_s == pytest.approx(0.0796344 + 1.6381938 + 0.063 + 0.0385 + 0.0061127, abs=1e-6)


def test_on_one_host_nothing_leaves_it():
    found = timed(QWEN_7B, 1, TP2, **servers(num_servers=4, tensor_parallel_size=2))
    assert found.spread_s == pytest.approx(W_7B / V)
    assert found.num_buckets == 29 and found.calls_s > 0


def test_one_engine_rank_on_a_host_meets_nobody():
    assert timed(QWEN_7B, 4, TP2, **servers(num_servers=1, tensor_parallel_size=1)).meetings_s == 0


def test_engines_on_nodes_of_their_own():
    """Leaders take turns on one adapter; the calls do not overlap with it, and there are no meetings."""
    found = timed(QWEN_7B, 4, TP2, engine_nodes=2, **servers(num_servers=4, tensor_parallel_size=2))
    assert (found.transport, found.meetings_s) == ("distributed", 0)
    rest = 8 * 0.009 + 7 * 0.0055 + W_7B / 2 / 2.68e12
    assert found.total_s == pytest.approx(W_7B / N + W_7B / H + 29 * 0.009 + rest)


def test_files_are_written_and_read():
    sections = servers(num_servers=4, tensor_parallel_size=2) | {"sync": {"transport": "disk"}}
    found = timed(QWEN_7B, 4, TP2, **sections)
    assert found.calls_s == found.meetings_s == 0
    assert found.total_s == pytest.approx(W_7B / 2 / V + 2 * W_7B / N + 9 * 0.009 + 7 * 0.0055 + W_7B / 2 / 2.68e12)


def test_the_embedded_engine_makes_no_calls():
    found = timed(QWEN_7B, 4, TP2, rollout={"engine": "embedded"})
    assert (found.transport, found.calls_s, found.rest_s) == ("embedded", 0, 0)
    assert found.total_s == pytest.approx(W_7B / 2 / V + W_7B / N)


def test_experts_are_gathered_over_expert_parallel_ranks():
    """Without TP nothing else is gathered: 7 of 8 parts of all experts, 4 x 8 x 3 x 64 x 32 weights in bf16."""
    moe = {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
        "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 4096,
    }  # fmt: skip
    found = timed(moe, 1, {"expert_model_parallel_size": 8})
    assert found.gather_s == pytest.approx(4 * 8 * 3 * 64 * 32 * 2 * 7 / 8 / V)


def test_the_report_says_what_a_sync_is_made_of():
    line = _sync_line(timed(QWEN_7B, 4, TP2, **servers(num_servers=4, tensor_parallel_size=2)))
    assert line.startswith("Weight sync (tensor): 14.19 GiB in 0.815 s: the longer of (gather 0.0212 s, W/N 0.381 s)")
    assert "29 calls 0.261 s, 29 meetings 0.438 s" in line
