r"""The steps3 task, its tokenizer and its model, as the rest of the project sees them."""

import json

import numpy as np
import pytest

from megatron_nft.data import synthetic
from megatron_nft.data.prompts import PromptStream, load_tokenizer
from megatron_nft.data.rows import read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic.write_model(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_the_worked_example():
    p = synthetic.Problem(12, 34, 56)
    assert (p.question, p.solution, p.answer) == ("12+34-56=", r"46-56=\boxed{-10}", "-10")


def test_task_files_are_disjoint_sound_and_repeatable(tmp_path):
    train, held_out = synthetic.write_task(tmp_path / "a", num_train=3000, num_held_out=200, seed=1)
    a, b = read_rows(train), read_rows(held_out)
    questions = [r.messages[0]["content"] for r in a + b]
    assert len(a) == 3000 and len(b) == 200 and len(set(questions)) == 3200
    for row in a + b:
        x, rest = row.messages[0]["content"].removesuffix("=").split("+")
        y, z = rest.split("-")
        assert all(10 <= int(v) <= 99 for v in (x, y, z)) and row.answer == str(int(x) + int(y) - int(z))
    synthetic.write_task(tmp_path / "b", num_train=3000, num_held_out=200, seed=1)
    assert (tmp_path / "a/train.jsonl").read_bytes() == (tmp_path / "b/train.jsonl").read_bytes()
    synthetic.write_task(tmp_path / "c", num_train=3000, num_held_out=200, seed=2)
    assert (tmp_path / "a/train.jsonl").read_bytes() != (tmp_path / "c/train.jsonl").read_bytes()


def test_operands_cover_their_range():
    drawn = synthetic.problems(90**3)
    assert len(set(drawn)) == 90**3
    assert {p.x for p in drawn} == {p.y for p in drawn} == {p.z for p in drawn} == set(range(10, 100))
    with pytest.raises(ValueError, match="729001 problems"):
        synthetic.problems(90**3 + 1)


def test_tokenizer_from_the_folder_is_the_one_that_was_made(tokenizer):
    """transformers rebuilds a Qwen2 model's tokenizer by its own recipe: nothing may be lost in that."""
    made = synthetic.make_tokenizer()
    for text in (r"46-56=\boxed{-10}", "12+34-56=", "Let $x^2 \\ne é$.\n\\boxed{a}", ""):
        assert tokenizer(text)["input_ids"] == made(text)["input_ids"]
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.tokenize(r"6=\boxed{-10}") == ["6", "=", r"\boxed{", "-", "1", "0", "}"]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_warm_up_samples_match_the_prompt_stream(tmp_path, tokenizer):
    train, _ = synthetic.write_task(tmp_path, num_train=50, num_held_out=5, seed=7)
    drawn = synthetic.problems(55, 7)[5:]
    stream = PromptStream([train], tokenizer, 32, shuffle=False)
    for (_, prompt), problem, (ids, solution) in zip(
        stream.draw(50), drawn, synthetic.sft_samples(tokenizer, drawn), strict=True
    ):
        assert prompt.token_ids.tolist() == ids.tolist() and prompt.answer == problem.answer
        assert solution[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(solution[:-1]) == problem.solution


def test_longest_solution_fits():
    tokenizer = synthetic.make_tokenizer()
    extremes = [synthetic.Problem(99, 99, 10), synthetic.Problem(10, 10, 99), synthetic.Problem(99, 99, 99)]
    lengths = [len(s) for _, s in synthetic.sft_samples(tokenizer, extremes)]
    assert max(lengths) == 13 < synthetic.MAX_RESPONSE_TOKENS


def test_sft_batches(tokenizer):
    drawn = synthetic.problems(30)
    ids, mask = next(synthetic.sft_batches(tokenizer, drawn, 8, seed=1))
    assert ids.shape == mask.shape and ids.shape[0] == 8
    for row, m in zip(ids, mask):
        trained = row[m > 0]
        assert trained[-1] == tokenizer.eos_token_id and row[0] == tokenizer.bos_token_id
        assert tokenizer.decode(row[: np.argmax(m)], skip_special_tokens=True).endswith("=")
        assert tokenizer.decode(trained, skip_special_tokens=True) in {p.solution for p in drawn}
    again, _ = next(synthetic.sft_batches(tokenizer, drawn, 8, seed=1))
    assert np.array_equal(ids, again)
    assert len(next(synthetic.sft_batches(tokenizer, drawn, 100))[0]) == 30


def test_model_folder(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["tie_word_embeddings"] is True
    assert config["vocab_size"] % 8 == 0 and config["num_attention_heads"] % 4 == 0
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    same = AutoModelForCausalLM.from_pretrained(synthetic.write_model(tmp_path / "same", seed=3))
    other = AutoModelForCausalLM.from_pretrained(synthetic.write_model(tmp_path / "other", seed=4))
    weight = "model.layers.1.mlp.up_proj.weight"
    assert (model.state_dict()[weight] == same.state_dict()[weight]).all()
    assert (model.state_dict()[weight] != other.state_dict()[weight]).any()
    assert model.get_input_embeddings().weight.shape[0] >= len(synthetic.make_tokenizer())
