"""What counts of a response that thinks first, and of one that was cut off: alike for all graders and all callers."""

import io
import json

import pytest
from rich.console import Console

from megatron_nft.config import VerifyConfig
from megatron_nft.types import Verdict
from megatron_nft.verify import GRADERS, Outcome, VerifierPool, grade_one, graders
from megatron_nft.verify.boxed import is_cut_off, last_boxes
from megatron_nft.verify.extract import find_answer
from megatron_nft.verify.grade_file import grade_file
from megatron_nft.verify.thinking import NoAnswer, answer_part, opens_thinking

_QUESTION = {"role": "user", "content": "5 + 7?"}
OPENED = "so it could be \\boxed{12}"


@pytest.mark.parametrize(
    ("response", "opened", "part"),
    [
        ("\\boxed{12}", False, "\\boxed{12}"),
        ("<think>a</think> b", False, " b"),
        ("a</think> b", True, " b"),
        ("a</think> b", False, " b"),
        ("<think>a</think> b <think>c</think> d", False, " d"),
        ("<THINK>a</THINK> b", False, " b"),
        ("<thinking>a</thinking> b", False, " b"),
        ("<Thought>a</Thought> b", False, " b"),
        ("a</THINK> b", True, " b"),
        ("I think> so, and a < b", False, "I think> so, and a < b"),
    ],
)
def test_the_part_that_may_hold_the_answer(response, opened, part):
    assert answer_part(response, opened=opened) == part


@pytest.mark.parametrize(
    ("response", "opened", "reason"),
    [
        (OPENED, True, "the prompt opens it"),
        (f"<think>{OPENED}", False, "there is no </think>"),
        (f"<think>{OPENED}</think>", False, "nothing follows </think>"),
        (f"<THINK>{OPENED}", False, "there is no </think>"),
        (f"<thinking>{OPENED}", False, "there is no </think>"),
        (f"<thought>{OPENED}</thought>\n", False, "nothing follows </think>"),
        (f"{OPENED}</think>\n \n", True, "nothing follows </think>"),
        (f"<think>a</think>\n<think>{OPENED}", False, "there is no </think>"),
        (f"{OPENED} <think> but wait", False, "there is no </think>"),
        (f"<think>a</think> {OPENED} <think> but wait", False, "there is no </think>"),
        (f"<think>a</thinking> {OPENED} <THINK>", False, "there is no </think>"),
        (f"a</think> {OPENED} <think> but wait", True, "there is no </think>"),
        (" \n", False, "empty"),
    ],
)
def test_thinking_that_gives_no_answer(response, opened, reason):
    with pytest.raises(NoAnswer, match=reason):
        answer_part(response, opened=opened)
    assert find_answer(response, opened=opened) is None


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|assistant|>\n<think>\n", True),
        ("<|assistant|><think>", True),
        ("<|assistant|><THINK>\n", True),
        ("<|assistant|><thinking>", True),
        ("<|assistant|><thinking>a", False),
        ("<|assistant|></think>", False),
        ("<|assistant|>", False),
        ("Put your thoughts between <think> and </think>.\n<|assistant|>\n", False),
        ("<|assistant|>\n<think>\n\n</think>\n\n", False),
    ],
)
def test_prompts_that_open_thinking(prompt, opens):
    assert opens_thinking(prompt) is opens


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("\\boxed{12} and \\boxed{1", True),
        ("\\boxed{12} and \\boxed{\\frac{1}{2}", True),
        ("\\boxed{12} and \\boxed", True),
        ("\\boxed{12} and \\fbox{", True),
        ("\\boxed{12} and \\box", True),
        ("\\boxed{12} and \\boxed 1", False),
        ("\\boxed{1, then \\boxed{12}", False),
        ("\\boxed{12} and so on", False),
        ("a box of 12", False),
    ],
)
def test_boxes_that_are_cut_off(text, cut):
    assert is_cut_off(text) is cut


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{4} cats and \\boxed{9} dogs", "4, 9"),
        ("$\\boxed{(2,5)} \\quad \\text{and} \\quad \\boxed{(8,5)}$", "(2,5), (8,5)"),
        ("\\boxed{4}. That was wrong. \\boxed{9}", "9"),
        ("\\boxed{4}, no, rather \\boxed{9}", "9"),
        ("\\boxed{4}, so the area is \\boxed{9}", "9"),
        ("(a) \\boxed{4} cats\n(b) \\boxed{9}", "9"),
        ("\\boxed{4} = \\boxed{9}", "9"),
        ("\\boxed{4}" + " cats" * 100 + " and \\boxed{9}", "9"),
    ],
)
def test_boxes_of_one_sentence(text, answer):
    assert last_boxes(text) == answer


@pytest.mark.parametrize("grader", [name for name in GRADERS if name != "dapo_minerva"])
def test_all_graders_judge_unfinished_answers_alike(grader):
    assert grade_one(OPENED, "12", grader).verdict is Verdict.CORRECT
    for response, opened in ((OPENED, True), (f"<think>{OPENED}", False), (f"{OPENED} or \\boxed{{1", False)):
        graded = grade_one(response, "12", grader, prompt_opens_thinking=opened)
        assert graded.verdict is Verdict.UNPARSEABLE, (response, graded)
        assert "thinking" in graded.reason or "cut off" in graded.reason
    assert grade_one(f"a</think>{OPENED}", "12", grader, prompt_opens_thinking=True).verdict is Verdict.CORRECT


def test_the_answer_line_of_unfinished_thinking():
    assert grade_one("Answer: 12", "12", "dapo_minerva").verdict is Verdict.CORRECT
    graded = grade_one("Answer: 12", "12", "dapo_minerva", prompt_opens_thinking=True)
    assert graded.verdict is Verdict.UNPARSEABLE and "thinking" in graded.reason


def test_the_pool_tells_its_graders():
    with VerifierPool(VerifyConfig(workers=1)) as pool:
        futures = [
            pool.submit(OPENED, "12", "", {"index": 3}, prompt_opens_thinking=opened) for opened in (False, True)
        ]
        closed, opened = (future.result(120) for future in futures)
    assert closed.verdict is Verdict.CORRECT
    assert opened.verdict is Verdict.UNPARSEABLE and "the prompt opens it" in opened.reason


def test_a_file_is_graded_as_in_training(tmp_path):
    """A column says that the prompt opens thinking, or the rendered prompt itself does."""
    rows = [
        {"prompt": "Q\n<think>\n", "text": OPENED, "answer": "12"},
        {"prompt": "Q\n", "text": OPENED, "answer": "12"},
        {"prompt": "Q<think>", "text": OPENED, "answer": "12"},
        {"prompt": [{"role": "user", "content": "<think>"}], "text": OPENED, "answer": "12"},
        {"prompt": [_QUESTION, {"role": "assistant", "content": "<think>\n"}], "text": OPENED, "answer": "12"},
        {"prompt": [_QUESTION, {"role": "assistant", "content": "<Thinking>"}], "text": OPENED, "answer": "12"},
        {"prompt": [_QUESTION, {"role": "assistant", "content": "The sum"}], "text": OPENED, "answer": "12"},
        {"prompt": [_QUESTION, {"role": "assistant", "content": None}], "text": OPENED, "answer": "12"},
        {"prompt": [], "text": OPENED, "answer": "12"},
        {"prompt_opens_thinking": True, "text": OPENED, "answer": "12"},
        {"extra_info": {"prompt_opens_thinking": True}, "text": OPENED, "answer": "12"},
        {"prompt_opens_thinking": False, "prompt": "<think>", "text": OPENED, "answer": "12"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    grade_file(source, target, VerifyConfig(workers=1), Console(file=io.StringIO()))
    verdicts = [json.loads(line)["verdict"] for line in target.read_text(encoding="utf-8").splitlines()]
    c, u = "correct", "unparseable"
    assert verdicts == [u, c, u, c, u, u, c, c, c, u, u, c]


def test_a_verdict_of_the_users_function_has_a_reason():
    silent = graders._adapt("my.grader", lambda *_: Outcome(Verdict.UNPARSEABLE))
    assert silent("a", "b", "", None).reason == "said by my.grader"
    raising = graders._adapt("my.grader", lambda *_: {}["answer"])
    assert graders.call(raising, "a", "b", "", None).reason == "the grader failed: KeyError: 'answer'"
