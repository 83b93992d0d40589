"""The name table and the splits, against layouts written out by hand and against transformers' own models."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nft.policy.families import FAMILIES
from megatron_nft.weights.names import Kind, all_places, hf_shapes, place_of, rows
from megatron_nft.weights.offline.megatron_writer import TargetLayout, boxes
from megatron_nft.weights.splits import merge, place, region, unmerge


def geometry(family="qwen2", **changes):
    figures = {
        "family": family,
        "num_layers": 4,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 3,
        "ffn_hidden_size": 10,
        "vocab_size": 13,
        "tied": False,
        "num_experts": 4 if family == "qwen3_moe" else 0,
        "moe_ffn_hidden_size": 6 if family == "qwen3_moe" else 0,
    }
    return SimpleNamespace(**figures | changes)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_hf_names_and_shapes_are_those_of_transformers(family, tied, tmp_path):
    """A folder that transformers writes holds exactly the tensors of the table."""
    from tiny import make_model

    from megatron_nft.policy.family import read_family
    from megatron_nft.weights.hf_folder import HFFolder

    make_model(tmp_path / "model", family, tied=tied, layers=2, vocab=263)
    assert HFFolder(tmp_path / "model").shapes == hf_shapes(read_family(tmp_path / "model"))


def test_qkv_is_interleaved_by_group_as_megatron_has_it():
    """2 groups of 2 query heads, head size 1: rows q0 q1 k0 v0 | q2 q3 k1 v1."""
    g = geometry(num_attention_heads=4, num_query_groups=2, kv_channels=1)
    q, k, v = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    merged = merge(Kind.QKV, [q, k, v], g)
    assert merged.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    # TP 2: the second rank's parts are the second group's
    parts = [part[region(Kind.QKV, tuple(part.shape), 1, 2)] for part in (q, k, v)]
    assert merge(Kind.QKV, parts, g).flatten().tolist() == [2, 3, 11, 21]


def test_gate_up_of_a_rank_is_its_gate_then_its_up():
    gate, up = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11], [12], [13]])
    parts = [part[region(Kind.GATE_UP, (4, 1), 1, 2)] for part in (gate, up)]
    assert merge(Kind.GATE_UP, parts, geometry()).flatten().tolist() == [2, 3, 12, 13]


def test_regions():
    assert region(Kind.COLUMN, (6, 4), 1, 3) == (slice(2, 4), slice(0, 4))
    assert region(Kind.ROW, (6, 4), 1, 2) == (slice(0, 6), slice(2, 4))
    assert region(Kind.REPLICATED, (6,), 1, 2) == (slice(0, 6),)
    # 13 rows padded to 16 over 4 ranks: the last holds one real row
    assert region(Kind.VOCAB, (13, 8), 3, 4, padded_rows=4) == (slice(12, 13), slice(0, 8))
    # 5 rows over 4 ranks of 2: the last rank has padding alone
    assert region(Kind.VOCAB, (5, 8), 3, 4, padded_rows=2) == (slice(5, 5), slice(0, 8))
    with pytest.raises(ValueError, match=r"size 4 does not divide axis 0 of shape \[6, 4\]"):
        region(Kind.COLUMN, (6, 4), 1, 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.booleans())
def test_parts_of_all_ranks_put_together_are_the_whole(groups_per_rank, heads_per_group, d, tp, bias):
    g = geometry(
        num_attention_heads=groups_per_rank * tp * heads_per_group, num_query_groups=groups_per_rank * tp, kv_channels=d
    )
    tail = () if bias else (5,)
    full = [torch.randn(heads * d, *tail) for heads in (g.num_attention_heads, *[g.num_query_groups] * 2)]
    found = [torch.zeros_like(t) for t in full]
    for rank in range(tp):
        places = [region(Kind.QKV, tuple(t.shape), rank, tp) for t in full]
        parameter = merge(Kind.QKV, [t[where] for t, where in zip(full, places, strict=True)], g)
        for target, where, part in zip(found, places, unmerge(Kind.QKV, parameter, g), strict=True):
            place(target, where, part).copy_(part)
    assert all(torch.equal(a, b) for a, b in zip(found, full, strict=True))


def test_megatron_names_of_both_layer_specs_are_known():
    dense, moe = geometry("qwen3"), geometry("qwen3_moe")
    pairs = {
        "decoder.layers.3.input_layernorm.weight": "model.layers.3.input_layernorm.weight",
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight": "model.layers.3.input_layernorm.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight": "model.layers.0.post_attention_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": "model.layers.0.post_attention_layernorm.weight",
    }
    assert {name: place_of(name, dense).hf_names[0] for name in pairs} == pairs
    layer = "decoder.layers.2.mlp.experts."
    for name in (layer + "local_experts.3.linear_fc2.weight", layer + "linear_fc2.weight3"):
        assert place_of(name, moe).hf_names == ["model.layers.2.mlp.experts.3.down_proj.weight"]


def test_unknown_names_and_families_are_named():
    with pytest.raises(ValueError, match=r"'decoder\.layers\.0\.mlp\.linear_fc9\.weight' is not in the name table"):
        place_of("decoder.layers.0.mlp.linear_fc9.weight", geometry())
    with pytest.raises(ValueError, match="model family 'gpt2' is not in the name table; known: llama, qwen2"):
        rows("gpt2", tied=False)


def test_tied_models_have_no_output_layer_of_their_own():
    assert "lm_head.weight" in hf_shapes(geometry()) and "lm_head.weight" not in hf_shapes(geometry(tied=True))
    copies = [place for place in all_places(geometry(tied=True)) if place.row.tied_copy]
    assert [place.hf_names for place in copies] == [["model.embed_tokens.weight"]]


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_boxes_cover_a_parameter_once(kind, tp):
    seen = torch.zeros(16, 8, dtype=torch.int64)
    for _, offsets, sizes in boxes(kind, (16, 8), tp):
        seen[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
    assert seen.min() == seen.max() == 1


def test_boxes_of_gate_up_belong_to_the_rank_that_has_both_halves():
    # 8 rows = 4 of gate and 4 of up; rank 1 of 2 has gate rows 2, 3 and up rows 6, 7
    mine = [(offsets[0], sizes[0]) for rank, offsets, sizes in boxes(Kind.GATE_UP, (8, 1), 2) if rank == 1]
    assert mine == [(2, 2), (6, 2)]


def test_virtual_stages_go_round_the_pipeline():
    # 4 layers, 2 stages of 2 chunks: stage 0 has layers 0 and 2, stage 1 has 1 and 3
    places = {place.layer: place for place in all_places(geometry()) if place.layer is not None}
    assert [TargetLayout(1, 2, 2).stage(places[layer], 4) for layer in range(4)] == [0, 1, 0, 1]
    assert [TargetLayout(1, 2, 1).stage(places[layer], 4) for layer in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (TargetLayout(3, 1, 1), r"--tp 3 must divide the model's num_attention_heads \(4\)"),
        (TargetLayout(4, 1, 1), r"--tp 4 must divide the model's num_key_value_heads \(2\)"),
        (TargetLayout(1, 2, 4), r"--pp 2 x --vpp 4 must divide the model's num_hidden_layers \(4\)"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_says_the_numbers(grid, message):
    with pytest.raises(ValueError, match=message):
        grid.check(geometry())


def test_parameter_count_of_a_published_model():
    """Qwen2.5-32B has 32,763,876,352 parameters (the sizes of its safetensors, divided by 2 bytes)."""
    figures = geometry(
        num_layers=64,
        hidden_size=5120,
        num_attention_heads=40,
        num_query_groups=8,
        kv_channels=128,
        ffn_hidden_size=27648,
        vocab_size=152064,
    )
    assert sum(math.prod(shape) for shape in hf_shapes(figures).values()) == 32_763_876_352
