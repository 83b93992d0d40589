"""RoPE in two places of config.json: believed where they agree, refused where they do not."""

from __future__ import annotations

import json

import pytest
from tiny import make_model

from megatron_nft.policy.family import UnsupportedModelError, read_family, spec_from_config
from megatron_nft.policy.rope import RopeScaling

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEFAULT = {"rope_type": "default"}
BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 131072,
}
BOTH = r"rope_parameters is \{.* and rope_scaling is \{.*contradict"


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_scaling": {**LLAMA3, "factor": 32.0}}, BOTH),
        ({"rope_parameters": {**DEFAULT, "rope_theta": 1e6}, "rope_scaling": {**LLAMA3, "rope_theta": 1e6}}, BOTH),
        ({"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 2.0}}, BOTH),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 1e4}}, BOTH),
        ({"rope_parameters": DEFAULT, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, BOTH),
        ({"rope_parameters": LLAMA3, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}}, BOTH),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            r"rope_theta is .* and rope_parameters\.rope_theta",
        ),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, r"rope_scaling\.rope_type is 'llama3' and rope_scaling\.type"),
    ],
)
def test_places_that_contradict_each_other_are_both_named(rope, message):
    with pytest.raises(ValueError, match=message) as error:
        spec_from_config(BASE | rope)
    assert not isinstance(error.value, UnsupportedModelError)  # an evaluation refuses it too


THETA = {"rope_theta": 5e5}
SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        (
            {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_scaling": {**LLAMA3, "rope_theta": 5e5}},
            5e5,
            SCALING,
        ),
        ({**THETA, "rope_parameters": LLAMA3 | THETA, "rope_scaling": LLAMA3}, 5e5, SCALING),
        ({"rope_theta": 5e5, "rope_parameters": LLAMA3, "rope_scaling": None}, 5e5, SCALING),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {}}, 1e6, None),
        (
            {"rope_theta": 7.0, "rope_parameters": DEFAULT, "rope_scaling": {"type": "default", "factor": 1.0}},
            7.0,
            None,
        ),
        ({"rope_scaling": LLAMA3 | {"type": "llama3"}}, 1e4, SCALING),
        ({}, 1e4, None),
    ],
)
def test_places_that_agree_are_one(rope, theta, scaling):
    spec = spec_from_config(BASE | rope)
    assert (spec.rope_theta, spec.rope_scaling) == (theta, scaling)


def test_the_folder_is_named(tmp_path):
    model = make_model(tmp_path / "m", layers=1, hidden=32)
    config = json.loads((model / "config.json").read_text())
    config |= {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_theta": 1e6}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"m/config\.json: rope_parameters is"):
        read_family(model)
