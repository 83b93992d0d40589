"""`megatron-nft plan`: published parameter counts, memory worked out by hand, rules, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_nft.config import ModelConfig
from megatron_nft.plan.architecture import read_architecture, total_params

QWEN_32B = {
    "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
    "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 131072,
}  # fmt: skip
QWEN_7B = QWEN_32B | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
QWEN_HALF_B = QWEN_32B | {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_8B = QWEN_32B | {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip
LLAMA_8B = QWEN_32B | {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 128256,
}  # fmt: skip


# The counts that safetensors headers of the published checkpoints add up to.
@pytest.mark.parametrize(
    ("architecture", "published"),
    [
        (QWEN_32B, 32_763_876_352),
        (QWEN_7B, 7_615_616_512),
        (QWEN_HALF_B, 494_032_768),
        (QWEN3_8B, 8_190_735_360),
        (LLAMA_8B, 8_030_261_248),
    ],
)
def test_parameter_counts_are_the_published_ones(architecture, published):
    spec = read_architecture(ModelConfig(path="nowhere", architecture=architecture))
    assert total_params(spec) == published


def settings(tmp_path: Path, architecture: dict, **sections) -> Path:
    tree = {
        "run_dir": "run",
        "model": {"path": "nowhere", "architecture": architecture},
        "data": {"train": ["train.parquet"]},
        **sections,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def settings_7b(tmp_path: Path) -> Path:
    return settings(
        tmp_path,
        QWEN_7B,
        policy={"tensor_model_parallel_size": 2, "sequence_parallel": True},
        rollout={"engine": "sglang", "server": {"memory_saver": True}},
    )


def plan(config: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_nft", "plan", "--config", str(config), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


H100_4 = ("--nodes", "4", "--gpus-per-node", "8", "--gpu", "h100")


def test_static_memory_by_hand(tmp_path):
    """7B on TP 2, DP 16: per rank 28 layers' shard, both embeddings' shards and the norms."""
    done = plan(settings_7b(tmp_path), *H100_4, "--json")
    assert done.returncode == 0, done.stderr
    layer = (3584 * (28 + 4 + 4) * 128 + (28 + 4 + 4) * 128 + 28 * 128 * 3584 + 3 * 3584 * 18944) // 2 + 2 * 3584
    params = 28 * layer + 3584 + 2 * 152064 * 3584 // 2
    planned = json.loads(done.stdout)["plan"]
    assert planned["host_bytes_per_node"] == {"optimizer": 0, "checkpoint copies": 8 * 14 * -(-params // 16)}
    parts = planned["memory"][0]["phases"]["train"]["parts_bytes"]
    assert parts["weights"] == 2 * params
    assert parts["gradients"] == 4 * params
    assert parts["optimizer"] == 12 * -(-params // 16)


def test_context_parallelism_by_hand(tmp_path):
    """7B on TP 2, CP 2, DP 8: the optimizer's state over 16 ranks as before, and half of the activations."""
    config, cp2 = settings_7b(tmp_path), "policy.context_parallel_size=2"
    one, two = (json.loads(plan(config, *H100_4, "--json", *more).stdout)["plan"] for more in ((), (cp2,)))
    assert (one["data_parallel_size"], two["data_parallel_size"]) == (16, 8)
    assert cp2 in two["overrides"] and two["layout"]["cp"] == 2
    of_one, of_two = (p["memory"][0]["phases"]["train"]["parts_bytes"] for p in (one, two))
    for part in ("weights", "gradients", "optimizer"):
        assert of_one[part] == of_two[part]
    assert of_two["activations"] == pytest.approx(of_one["activations"] / 2, rel=1e-6)
    assert "TP 2, CP 2, PP 1" in plan(config, *H100_4, cp2).stdout
    done = plan(config, *H100_4, cp2, "policy.precision=fp32")
    assert done.returncode == 1
    assert "context_parallel_size (2) needs precision=bf16 with Transformer Engine, not fp32" in done.stdout


def test_a_moving_average_takes_4_bytes_and_a_forward_pass(tmp_path):
    config = settings(
        tmp_path,
        QWEN_7B,
        policy={"tensor_model_parallel_size": 2, "sequence_parallel": True},
        algorithm={"reference": "ema"},
    )
    done = plan(config, *H100_4, "--json")
    found = json.loads(done.stdout)["plan"]
    parts = found["memory"][0]["phases"]["train"]["parts_bytes"]
    assert parts["average weights"] == parts["optimizer"] / 3, "4 bytes beside Adam's 12"
    assert "reference log-probs" in done.stdout


def test_fitting_run_says_so(tmp_path):
    done = plan(settings_7b(tmp_path), *H100_4)
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("FITS")
    for part in ("weights", "gradients", "optimizer", "activations", "logits chunk", "export buckets", "KV cache"):
        assert part in done.stdout


def test_too_small_a_machine_names_a_layout_that_fits(tmp_path):
    config = settings_7b(tmp_path)
    done = plan(config, "--nodes", "1", "--gpus-per-node", "2", "--gpu", "h100")
    assert done.returncode == 1
    assert "DOES NOT FIT" in done.stdout
    overrides = done.stdout.rstrip().splitlines()[-1].split()
    again = plan(config, "--nodes", "1", "--gpus-per-node", "2", "--gpu", "h100", *overrides)
    assert again.returncode == 0, again.stdout


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "policy.tensor_model_parallel_size=8",
            "the model's num_attention_heads (28); allowed for this model: 1, 2, 4",
        ),
        ("policy.pipeline_model_parallel_size=8", "must divide the model's num_hidden_layers (28)"),
        ("policy.fp8.recipe=mxfp8", "h100 does not have it"),
        ("rollout.server.mem_fraction_static=0.18", "KV cache holds"),
    ],
)
def test_broken_rules_exit_1_and_name_the_numbers(tmp_path, override, words):
    done = plan(settings_7b(tmp_path), *H100_4, override)
    assert done.returncode == 1
    assert words in done.stdout


CONFIG_32B = Path(__file__).parents[2] / "configs" / "nft_qwen2.5_32b.yaml"
H100_16 = ("--nodes", "16", "--gpus-per-node", "8", "--gpu", "h100")


def test_the_share_of_sglang_by_hand():
    """32B, TP 8, PP 2, DP 8 on 79.65 GiB: stage 1 has 32 layers, the last norm and the output; its engine of TP 4 gets
    80 % of what is free, of which its weights are a part."""
    done = plan(CONFIG_32B, *H100_16, "--json")
    assert done.returncode == 0, done.stderr
    everything = json.loads(done.stdout)
    report, shares = everything["plan"], everything["choices"]["rollout.server.mem_fraction_static"]
    attention = 5120 * (40 + 8 + 8) * 128 + 40 * 128 * 5120
    layer = (attention + (40 + 8 + 8) * 128 + 3 * 5120 * 27648) // 8 + 2 * 5120
    params = 32 * layer + 5120 + 152064 * 5120 // 8
    free = (81559 << 20) - (4 << 30) - 6 * params - 12 * -(-params // 8)
    assert report["engine_free_bytes"] == free
    held = report["memory"][1]["phases"]["generate"]["parts_bytes"]
    assert held["engine weights"] == 32_763_876_352 * 2 // 4
    assert held["engine KV cache"] == int(0.8 * free) - held["engine weights"]
    # one token: keys and values, 64 layers, 2 of 8 heads, 128 each, 2 bytes
    assert report["engine_kv_tokens"] == held["engine KV cache"] // (2 * 64 * 2 * 128 * 2)
    assert shares[0]["value"] == 0.8 and shares[0]["engine_kv_tokens"] == report["engine_kv_tokens"]
    assert shares[1]["engine_kv_tokens"] > shares[0]["engine_kv_tokens"] and shares[1]["fits"]
    quantized = plan(CONFIG_32B, *H100_16, "--json", "rollout.server.kv_cache_dtype=fp8_e4m3")
    assert json.loads(quantized.stdout)["plan"]["engine_kv_tokens"] == held["engine KV cache"] // (2 * 64 * 2 * 128)
    # one chunk of a prefill, logits of 256 rows, CUDA graphs
    working = 8192 * 2 * (2 * 5120 + 3 * 27648 // 4) + 256 * 152064 * 6 + (3 << 29)
    assert held["engine working"] == working
    memory = report["memory"][1]["phases"]
    assert memory["train"]["parts_bytes"]["engine working"] == working  # asleep, the rest is released
    assert "engine KV cache" in memory["sync"]["parts_bytes"]  # woken before the weights come


def test_the_share_of_vllm_is_of_the_whole_gpu():
    done = plan(CONFIG_32B, *H100_16, "rollout.engine=vllm")
    assert done.returncode == 1
    assert "(0.8) gives the engine 63.7 GiB of 79.6 GiB on the GPU, 61.3 GiB are free" in done.stdout
    assert "set at most 0.73" in done.stdout
    done = plan(CONFIG_32B, *H100_16, "rollout.engine=vllm", "rollout.server.mem_fraction_static=0.73", "--json")
    assert done.returncode == 0, done.stdout
    held = json.loads(done.stdout)["plan"]["memory"][1]["phases"]["generate"]["parts_bytes"]
    assert sum(held[p] for p in held if p.startswith("engine")) == int(0.73 * (81559 << 20))


def test_plan_says_what_recompute_and_the_share_bring():
    """Selective and full recompute take longer and less memory; a larger share holds more tokens."""
    lines = plan(CONFIG_32B, *H100_16).stdout.splitlines()
    # 14 bytes for each of 32.76 billion parameters, over 16 nodes
    assert "  host memory per node: checkpoint copies 26.70 GiB" in lines
    start = lines.index("What policy.recompute brings:") + 2
    rows = [line.split() for line in lines[start : start + 3]]
    assert [row[0] for row in rows] == ["none", "selective", "full"] and rows[0][-1] == "(set)"
    minutes, gib = [float(row[1]) for row in rows], [float(row[3]) for row in rows]
    assert minutes == sorted(minutes) and gib == sorted(gib, reverse=True)
    assert rows[0][3:5] == ["50.82", "GiB"]
    assert lines[start + 3] == "What rollout.server.mem_fraction_static brings (61.34 GiB are free for the engine):"
    shares = [line.split() for line in lines[start + 5 : start + 7]]
    assert [row[0] for row in shares] == ["0.8", "0.92"] and shares[0][3:] == ["554,054", "tokens", "(set)"]
    assert lines[start + 7 :] == ["", "FITS"]


def test_fp8_alignment_with_tensor_parallel(tmp_path):
    """QKV rows of 36 heads x 64 over TP 4: 576, a multiple of 16 and of 32 but not of 128."""
    architecture = QWEN_7B | {"head_dim": 64}
    config = settings(tmp_path, architecture, policy={"tensor_model_parallel_size": 4, "sequence_parallel": True})
    for recipe, code in (("tensorwise", 0), ("blockwise", 1)):
        done = plan(config, *H100_4[:-1], "h200", f"policy.fp8.recipe={recipe}", "rollout.embedded_batch_tokens=4096")
        assert done.returncode == code, done.stdout
    assert "multiples of 128: QKV rows per rank is 576 with TP 4" in done.stdout


def test_seq_len_raises_the_memory(tmp_path):
    config = settings_7b(tmp_path)
    peak = []
    for arguments in ((), ("--seq-len", "32768")):
        done = plan(config, *H100_4, "--json", "model.architecture.max_position_embeddings=65536", *arguments)
        memory = json.loads(done.stdout)["plan"]["memory"][0]
        peak.append(memory["phases"]["train"]["parts_bytes"]["activations"])
    assert peak[1] == pytest.approx(2 * peak[0], rel=1e-6)  # the cap goes from 16384 to 32768


def test_search_is_sorted_and_every_line_fits(tmp_path):
    done = plan(settings_7b(tmp_path), *H100_4, "--search", "--json")
    found = json.loads(done.stdout)["search"]
    assert len(found) > 3
    assert all(p["fits"] for p in found)
    assert [p["step_s"] for p in found] == sorted(p["step_s"] for p in found)
    assert {p["layout"]["cp"] for p in found} == {1, 2, 4, 8}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gpus-per-node", "8", "--gpu", "h100", "policy.tensor_parallel=2"),
        ("--gpus-per-node", "8", "--gpu", "a1000"),
        ("--gpus-per-node", "0", "--gpu", "h100"),
        ("--gpus-per-node", "8", "--gpu", "h100", "--engine-nodes", "1"),
        ("--gpus-per-node", "8", "--gpu", "h100", "--seq-len", "100"),
        ("--gpus-per-node", "8", "--gpu", "h100", "model.architecture=null"),
        ("--gpus-per-node", "8", "--gpu", "h100", "model.architecture.model_type=mamba"),
    ],
)
def test_unusable_input_exits_2(tmp_path, arguments):
    done = plan(settings_7b(tmp_path), *arguments)
    assert done.returncode == 2, done.stdout
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr


def test_missing_config_file_exits_2(tmp_path):
    done = plan(tmp_path / "none.yaml", *H100_4)
    assert done.returncode == 2
    assert "none.yaml" in done.stderr
