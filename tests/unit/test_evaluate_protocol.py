"""Protocols: the paper's settings, what changes the hash and what does not, what differs in words."""

import pytest

from megatron_nft.data.benchmarks import Question
from megatron_nft.evaluate.model_folder import ModelIdentity
from megatron_nft.evaluate.protocol import (
    PRESETS,
    Sampling,
    build_protocol,
    describe_benchmark,
    differences,
    preset_for,
)

QUESTIONS = [Question("0", ({"role": "user", "content": "1+1?"},), "2", "sums")]


def protocol(**changes):
    parts = {
        "preset": "nft-7b",
        "benchmarks": {"aime24": describe_benchmark(QUESTIONS, 32)},
        "sampling": Sampling(0.6, 0.7, 512, 3584, 0),
        "prompt": {"system_prompt": None, "chat_template_sha256": "ab"},
        "grading": {"graders": "maths", "timeout_s": 3.0},
        "model": ModelIdentity("/models/a", "c0ffee", 7_600_000_000, 4096),
        "engine": {"name": "sglang", "version": "sglang 0.5.23"},
        "versions": {"torch": "2.13.0"},
    }
    return build_protocol(**{**parts, **changes})


def test_the_papers_settings_by_size():
    seven, thirty_two = preset_for(7_615_616_512), preset_for(32_763_876_352)
    assert (seven.temperature, seven.top_p, seven.max_prompt_tokens, seven.max_response_tokens) == (0.6, 0.7, 512, 3584)
    assert (thirty_two.temperature, thirty_two.top_p) == (1.0, 0.7)
    assert (thirty_two.max_prompt_tokens, thirty_two.max_response_tokens) == (1024, 7168)
    assert list(PRESETS) == ["nft-7b", "nft-32b"]


def test_another_model_changes_only_the_run_hash():
    a = protocol()
    b = protocol(model=ModelIdentity("/models/b", "decade", 7_600_000_000, 4096))
    assert a["protocol_hash"] == b["protocol_hash"]
    assert a["run_hash"] != b["run_hash"]
    assert differences(a, b) == []
    assert differences(a, b, with_model=True) == ["model.checksum: c0ffee against decade"]


def test_a_moved_model_is_the_same_model():
    moved = protocol(model=ModelIdentity("/elsewhere", "c0ffee", 7_600_000_000, 4096))
    assert moved["run_hash"] == protocol()["run_hash"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampling": Sampling(1.0, 0.7, 512, 3584, 0)}, "sampling.temperature: 0.6 against 1.0"),
        ({"engine": {"name": "vllm", "version": "sglang 0.5.23"}}, "engine.name: sglang against vllm"),
        ({"versions": {"torch": "2.14.0"}}, "versions.torch: 2.13.0 against 2.14.0"),
        ({"prompt": {"system_prompt": "Hi", "chat_template_sha256": "ab"}}, "prompt.system_prompt: None against Hi"),
        ({"benchmarks": {"aime24": describe_benchmark(QUESTIONS, 4)}}, "benchmarks.aime24.samples: 32 against 4"),
    ],
)
def test_every_other_setting_changes_the_protocol(change, words):
    changed = protocol(**change)
    assert changed["protocol_hash"] != protocol()["protocol_hash"]
    assert differences(protocol(), changed) == [words]


def test_results_of_other_grading_rules_differ():
    """An evaluation from before the rules were numbered has none in its protocol."""
    unnumbered, second, third = (
        protocol(grading={"graders": "maths", **rules}) for rules in ({}, {"rules": 2}, {"rules": 3})
    )
    assert len({p["protocol_hash"] for p in (unnumbered, second, third)}) == 3
    assert differences(unnumbered, second) == ["grading.rules: absent against 2"]
    assert differences(second, third) == ["grading.rules: 2 against 3"]


def test_a_renamed_grader_keeps_the_hash():
    former, current = (
        protocol(grading={"graders": graders, "timeout_s": 3.0})
        for graders in ("math_verify,dapo_boxed", "maths,dapo_boxed")
    )
    assert former == current
    assert former["grading"]["graders"] == "maths,dapo_boxed"


def test_a_renamed_grader_in_an_older_file_is_no_difference():
    new = protocol(grading={"graders": "maths,dapo_boxed", "timeout_s": 3.0})
    old = {**new, "grading": {"graders": "math_verify,dapo_boxed", "timeout_s": 3.0}}
    assert differences(old, new) == []
    plain = protocol(grading={"graders": "math_verify_plain,dapo_boxed", "timeout_s": 3.0})
    assert differences(old, plain) == ["grading.graders: maths,dapo_boxed against math_verify_plain,dapo_boxed"]
    assert len({p["protocol_hash"] for p in (new, plain)}) == 2


def test_a_changed_question_or_answer_changes_the_protocol():
    first = describe_benchmark(QUESTIONS, 1)["prompts_sha256"]
    asked = describe_benchmark([Question("0", ({"role": "user", "content": "1+2?"},), "2", "sums")], 1)
    answered = describe_benchmark([Question("0", QUESTIONS[0].messages, "3", "sums")], 1)
    renumbered = describe_benchmark([Question("9", QUESTIONS[0].messages, "2", "other")], 1)
    assert len({first, asked["prompts_sha256"], answered["prompts_sha256"]}) == 3
    assert renumbered["prompts_sha256"] == first


def test_benchmarks_that_only_one_has_do_not_count():
    both = {"aime24": describe_benchmark(QUESTIONS, 32), "amc23": describe_benchmark(QUESTIONS, 32)}
    assert differences(protocol(), protocol(benchmarks=both)) == []
