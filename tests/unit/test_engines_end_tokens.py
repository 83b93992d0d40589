"""The tokens that end an answer: where they are named, and that the embedded engine ends there."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import make_model, make_tokenizer

from megatron_nft.config import Config
from megatron_nft.data.prompts import load_tokenizer
from megatron_nft.engines.answers import training_sampling
from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.end_tokens import cut_off_note, describe, find_end_tokens, token_ids
from megatron_nft.engines.engine import Request, SamplingParams

IM_END, END_OF_TEXT = 258, 256


def folder_with(folder, generation, config, vocab_size=264):
    """A folder that names end tokens in two files; None leaves a file's key out, "absent" the file."""
    folder.mkdir(exist_ok=True)
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value != "absent":
            content = {} if value is None else {"eos_token_id": value}
            (folder / name).write_text(json.dumps(content | {"vocab_size": vocab_size}))
    return folder


@pytest.mark.parametrize(
    ("generation", "config", "eos", "more", "found"),
    [
        (END_OF_TEXT, END_OF_TEXT, "<|im_end|>", [], {END_OF_TEXT, IM_END}),  # the case of chat models of 2024
        ([3, 4], 5, "<|im_end|>", [], {3, 4, 5, IM_END}),
        (IM_END, IM_END, "<|im_end|>", [], {IM_END}),
        ("absent", 7, "<|im_end|>", [], {7, IM_END}),
        (None, None, None, [9], {9}),
        (8, None, None, [9, 9, 8], {8, 9}),
        (-1, None, "<|im_end|>", [], {IM_END}),
        ("absent", "absent", "<|im_end|>", [0], {0, IM_END}),
    ],
)
def test_all_that_are_named_count(tmp_path, generation, config, eos, more, found):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = eos
    ends = find_end_tokens(folder_with(tmp_path / "m", generation, config), tokenizer, more)
    assert token_ids(ends) == tuple(sorted(found))


def test_the_line_says_where_each_is_named(tmp_path):
    ends = find_end_tokens(folder_with(tmp_path, [END_OF_TEXT, IM_END], END_OF_TEXT), make_tokenizer(), [65])
    assert describe(ends) == (
        f"an answer ends at {make_tokenizer().convert_ids_to_tokens(65)} (65: rollout.stop_token_ids), "
        "<|endoftext|> (256: generation_config.json, config.json), <|im_end|> (258: tokenizer, generation_config.json)"
    )
    many = find_end_tokens(folder_with(tmp_path, list(range(30)), None), make_tokenizer())
    assert describe(many).endswith(" and 21 more")


def test_the_end_of_a_message_of_llama_is_one(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|eom_id|>"]})
    ends = find_end_tokens(folder_with(tmp_path, None, None), tokenizer)
    assert [end.text for end in ends] == ["<|im_end|>", "<|eom_id|>"]


@pytest.mark.parametrize("value", [None, [], -1, "absent", [-1]])
def test_none_at_all_is_an_error(tmp_path, value):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"names no token that ends an answer .*set rollout\.stop_token_ids"):
        find_end_tokens(folder_with(tmp_path / "m", value, value), tokenizer)


def test_a_stop_token_must_be_one_of_the_models(tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.stop_token_ids: 264 is not a token of .*, which has 264"):
        find_end_tokens(folder_with(tmp_path, None, None), make_tokenizer(), [264])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        find_end_tokens(tmp_path, make_tokenizer())


def in_generation_config(*others):
    def name(folder, tokenizer, token):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*others, token]}))
        return []

    return name


def in_config(folder, tokenizer, token):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": token}))
    return []


def in_tokenizer(folder, tokenizer, token):
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    return []


def in_tokenizer_alone(folder, tokenizer, token):
    (folder / "generation_config.json").unlink()
    return in_tokenizer(folder, tokenizer, token)


def in_settings(folder, tokenizer, token):
    return [token]


@pytest.mark.parametrize(
    "name_it",
    [in_tokenizer, in_tokenizer_alone, in_config, in_settings, in_generation_config(), in_generation_config(263, 262)],
    ids=["tokenizer", "tokenizer alone", "config.json", "settings", "generation_config.json", "its last of three"],
)
def test_the_embedded_engine_ends_at_every_one_and_trains_it(tmp_path, name_it):
    """The token that the model says is named in one place, those that it never says in the others."""
    model = make_model(tmp_path / "m", layers=1, hidden=32)
    request = Request(np.arange(40, 46, dtype=np.int32), 32, (1,))
    engine = EmbeddedEngine.create(model)
    free = [c for _, _, c in engine.generate([request], SamplingParams(24, stop_token_ids=(263,)))]
    common = int(np.bincount(np.concatenate([c.token_ids for c in free])).argmax())  # said often by this model
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 263}))
    tokenizer = load_tokenizer(model)
    more = name_it(model, tokenizer, common)
    ends = token_ids(find_end_tokens(model, tokenizer, more))
    assert common in ends and len(ends) > 1
    config = Config(
        run_dir=tmp_path, model={"path": model}, data={"train": [tmp_path]}, rollout={"max_response_tokens": 24}
    )
    sampling = training_sampling(config, ends)
    assert sampling.stop_token_ids == ends
    answers = [c for _, _, c in EmbeddedEngine.create(model).generate([request], sampling)]
    stopped = [c for c in answers if c.finish_reason == "stop"]
    assert any(c.token_ids[-1] == common for c in stopped)
    assert all(common not in c.token_ids[:-1] for c in answers)
    assert all(len(c.logprobs) == len(c.token_ids) for c in stopped)  # the end token has its log-prob


def test_nearly_everything_cut_off_is_said_with_its_causes(tmp_path):
    ends = find_end_tokens(folder_with(tmp_path, END_OF_TEXT, None), make_tokenizer())
    for share in (0.0, 0.5, 0.89, float("nan")):
        assert cut_off_note(share, 100, ends) is None
    for share, shown in ((0.9, "90%"), (1.0, "100%")):
        note = cut_off_note(share, 100, ends) or ""
        assert note.startswith(f"{shown} of the answers were cut off at 100 tokens")
        assert "<|im_end|> (258: tokenizer)" in note and "rollout.stop_token_ids" in note
