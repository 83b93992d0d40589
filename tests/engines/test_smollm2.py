"""A real pretrained model with its own tokenizer and chat template: converters, engines, evaluation, the example."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import digits
import numpy as np
import pytest
import smollm2
import torch
from environments import install
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_nft import cli
from megatron_nft.config import RolloutConfig
from megatron_nft.data.prompts import load_tokenizer, render
from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.engines.open import open_engine
from megatron_nft.evaluate.records import read_answers

QUESTIONS = (607, 731, 4206)
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def model() -> Path:
    return smollm2.model_folder()


@pytest.fixture(scope="module")
def expected(model) -> dict[int, tuple[list[int], str, np.ndarray]]:
    """Greedy answers of transformers to QUESTIONS: tokens, text, and the log-prob of each token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = {}
    for number in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            digits.question(number), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = network.generate(
            **inputs, max_new_tokens=MAX_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
        logprobs = torch.stack(out.logits)[:, 0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        found[number] = (tokens.tolist(), tokenizer.decode(tokens, skip_special_tokens=True), logprobs.numpy())
    return found


def check_engine(rollout: RolloutConfig, model: Path, expected, logs: Path) -> None:
    """The engine's greedy answers are those of transformers, token by token, with its log-probs."""
    tokenizer = load_tokenizer(model)
    prompts = render(tokenizer, [digits.question(n) for n in QUESTIONS])
    requests = [Request(ids, 1, (0, i)) for i, ids in enumerate(prompts)]
    engine = open_engine(model, rollout, precision="fp32", log_dir=logs)
    try:
        answers = {r: a for r, _, a in engine.generate(requests, SamplingParams(MAX_TOKENS, temperature=0.0))}
    finally:
        engine.close()
    for i, number in enumerate(QUESTIONS):
        tokens, _, logprobs = expected[number]
        assert answers[i].token_ids.tolist() == tokens
        np.testing.assert_allclose(answers[i].logprobs, logprobs, atol=2e-4)


def test_embedded(model, expected, tmp_path):
    check_engine(RolloutConfig(engine="embedded"), model, expected, tmp_path)


def test_sglang(model, expected, tmp_path):
    install("sglang")
    server = {"start_timeout_s": 500, "max_total_tokens": 4096}
    check_engine(RolloutConfig(engine="sglang", server=server), model, expected, tmp_path)


@pytest.mark.long
def test_vllm(model, expected, tmp_path):
    install("vllm")
    check_engine(RolloutConfig(engine="vllm", server={"start_timeout_s": 500}), model, expected, tmp_path)


def test_converters_change_no_bit(model, tmp_path, capsys):
    """Nine heads and three groups of keys over three tensor ranks, thirty layers over two stages."""
    shards, back = tmp_path / "shards", tmp_path / "back"
    assert cli.main(["convert", "hf-to-megatron", str(model), str(shards), "--tp", "3", "--pp", "2"]) == 0
    assert cli.main(["convert", "megatron-to-hf", str(shards), str(back)]) == 0
    capsys.readouterr()
    assert cli.main(["diff", str(model), str(back)]) == 0
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (model, back)]
    chats = [
        t.apply_chat_template(digits.question(607), tokenize=False, add_generation_prompt=True) for t in tokenizers
    ]
    assert chats[0] == chats[1]


def test_evaluation(model, expected, tmp_path):
    questions = tmp_path / "numbers.jsonl"
    rows = [{"prompt": digits.question(n), "answer": str(n)} for n in QUESTIONS]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["eval", "--model", model, "--benchmarks", questions, "--out", tmp_path / "out", "--engine", "embedded"]
    given += ["--samples", 1, "--temperature", 0, "--top-p", 1, "--grader", "numeric:1e-6"]
    given += ["--max-prompt-tokens", 256, "--max-response-tokens", MAX_TOKENS]
    assert cli.main([str(a) for a in given]) == 0
    answers = {r.result.index: r.result.answers[0] for _, r in read_answers(tmp_path / "out/answers/numbers.jsonl")}
    for i, number in enumerate(QUESTIONS):
        text = expected[number][1]
        assert answers[i].text == text
        assert answers[i].verdict == ("correct" if text.strip() == str(number) else "wrong")


@pytest.mark.long
def test_example(model, tmp_path):
    """The example from end to end, a few steps: fetched, converted, trained, measured, exported, talked to."""
    env = os.environ | {"NFT_PYTHON": sys.executable}
    command = ["bash", str(smollm2.EXAMPLE / "run.sh"), "--smoke", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^held-out accuracy \(sampled\): [\d.]+ % -> [\d.]+ %$", done.stdout, re.MULTILINE)
    assert "user: Write the number seven hundred and thirty-one in digits\nmodel: " in done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert max(row["gap/max"] for row in steps[1:]) < 1e-3
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
