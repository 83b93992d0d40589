"""Where a prompt begins and ends, and what a chat template refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tokenizers import processors

from megatron_nft.cli import main
from megatron_nft.data import synthetic
from megatron_nft.data.prompts import PromptStream, load_tokenizer, render
from megatron_nft.data.rows import DataError

TALK = [{"role": "user", "content": "1+1="}]
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_with(single: str):
    """The synthetic task's tokenizer with another post-processor, for example `<bos> $A <eos>`."""
    tokenizer = synthetic.make_tokenizer()
    tokens = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>", "<pad>") if t in single]
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens) if tokens else None
    return tokenizer


@pytest.mark.parametrize(
    ("single", "content", "text"),
    [
        ("<bos> $A <eos>", "1+1=", "<bos>1+1="),
        ("$A <eos>", "1+1=", "1+1="),
        ("<bos> $A", "1+1=", "<bos>1+1="),
        ("<bos> $A <eos> <eos>", "1+1=", "<bos>1+1="),
        ("<pad> <bos> $A <eos> <pad>", "1+1=", "<pad><bos>1+1="),
        ("$A", "1+1=", "1+1="),
        ("<bos> $A <eos>", "<bos>1+1=", "<bos>1+1="),  # BOS once, also where the question begins with it
        ("<bos> $A <eos>", "1+1=<eos>", "<bos>1+1=<eos>"),  # an end that is written in the question stays
    ],
)
def test_a_prompt_never_ends_with_what_a_post_processor_adds(single, content, text):
    tokenizer = tokenizer_with(single)
    [ids] = render(tokenizer, [[{"role": "user", "content": content}]])
    assert tokenizer.decode(ids) == text


def test_a_template_decides_alone():
    tokenizer = tokenizer_with("<bos> $A <eos>")
    tokenizer.chat_template = NO_SYSTEM
    [ids] = render(tokenizer, [TALK])
    assert tokenizer.decode(ids) == "<user>1+1=<assistant>"
    tokenizer.chat_template = "<bos>" + NO_SYSTEM
    [ids] = render(tokenizer, [TALK])
    assert tokenizer.decode(ids) == "<bos><user>1+1=<assistant>"


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        (NO_SYSTEM, "TemplateError: no system role"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ undefined_name.x }}", "UndefinedError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('two\nlines') }}", "TemplateError: two lines"),
    ],
)
def test_a_template_that_raises_is_one_line_with_place_and_setting(tmp_path, template, cause):
    tokenizer = synthetic.make_tokenizer()
    tokenizer.chat_template = template
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    with pytest.raises(DataError, match=rf"q\.jsonl, row 1: the chat template refuses .*{cause}") as error:
        PromptStream([path], tokenizer, 64, system_prompt="Be brief.")
    assert "model.system_prompt" in str(error.value) and "\n" not in str(error.value)


def test_training_questions_with_two_answers_are_refused(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    second.write_text('{"prompt": "1+1=", "answer": "2 "}\n{"prompt": "1+2=", "answer": "4"}\n')
    with pytest.raises(DataError, match=r"'3' at .*a\.jsonl, row 2 but '4' at .*b\.jsonl, row 2"):
        PromptStream([first, second], synthetic.make_tokenizer(), 64)
    assert PromptStream([first, first], synthetic.make_tokenizer(), 64).num_prompts == 4


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    train, _ = synthetic.write_task(folder / "task", num_train=5, num_held_out=2)
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": str(synthetic.write_model(folder / "model"))},
        "policy": {"precision": "fp32"},
        "data": {"train": [str(train)], "max_prompt_tokens": 64},
        "rollout": {"max_response_tokens": 64},
    }


def command(start, tmp_path, *arguments):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(start))
    return main(["train", "--config", str(tmp_path / "config.yaml"), *arguments])


def test_a_dry_run_shows_the_first_prompt_as_text_and_tokens(start, tmp_path, capsys):
    assert command(start, tmp_path, "--dry-run") == 0
    shown = capsys.readouterr().out
    question = json.loads(Path(start["data"]["train"][0]).read_text().splitlines()[0])["prompt"]
    assert f"<bos>{question}\n" in shown
    assert f"its tokens: 1:'<bos>' {synthetic.make_tokenizer().convert_tokens_to_ids(question[0])}:" in shown
    assert "an answer ends at <eos> (2: tokenizer, generation_config.json, config.json)" in shown
    assert command(start, tmp_path, "--dry-run", "data.train=[/nowhere.jsonl]") == 0
    assert "first prompt: not shown, /nowhere.jsonl is not on this machine" in capsys.readouterr().out


def evaluation(start, tmp_path, *arguments):
    given = ["eval", "--model", start["model"]["path"], "--out", str(tmp_path / "out"), "--engine", "embedded"]
    given += ["--max-prompt-tokens", "16", "--max-response-tokens", "16"]  # the model has 128 positions
    return main([*given, *arguments])


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([], "<bos>1+1="),
        (["--system-prompt", "2"], "<bos>2\n1+1="),
        (["--chat-template", "t.jinja"], "<user>1+1=<assistant>"),
        (["--chat-template", "t.jinja", "--system-prompt", "2"], None),  # which this template refuses
        (["--limit", "1", "rollout.stop_token_ids=[4]"], "<bos>1+1="),
    ],
)
def test_a_dry_run_of_an_evaluation_shows_it_too(start, tmp_path, monkeypatch, capsys, more, text):
    monkeypatch.chdir(tmp_path)
    Path("t.jinja").write_text(NO_SYSTEM)
    Path("q.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    asked = ["--benchmarks", "q.jsonl", "--dry-run", *more]
    if text is None:
        assert evaluation(start, tmp_path, *asked) == 2
        assert "q.jsonl, row 1: the chat template refuses" in capsys.readouterr().err
        return
    assert evaluation(start, tmp_path, *asked) == 0
    shown = capsys.readouterr().out
    tokenizer = load_tokenizer(start["model"]["path"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = " ".join(f"{i}:{token!r}" for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids)))
    assert f"first prompt (q), {len(ids)} tokens:\n{text}\nits tokens: {tokens}\n" in shown
    assert "an answer ends at " in shown and not (tmp_path / "out").exists()


def test_an_evaluation_refuses_copies_with_different_answers(start, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(f'{{"prompt": "1+1=", "answer": "{answer}"}}\n' for answer in (2, 3, 2)))
    asked = ["--benchmarks", str(path), "--dry-run"]
    assert evaluation(start, tmp_path, *asked) == 2
    assert "'2' at" in (error := capsys.readouterr().err) and "row 3 but '3' at" in error and "--conflicts" in error
    assert evaluation(start, tmp_path, *asked, "--conflicts", "drop") == 2
    assert "no question is left" in capsys.readouterr().err
    assert evaluation(start, tmp_path, *asked, "--conflicts", "majority") == 0
    assert "benchmarks.q.questions: 1" in capsys.readouterr().out


def test_a_template_that_raises_is_told_before_ranks_start(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_nft.train.launch.start_local", lambda *_: pytest.fail("ranks were started"))
    template = tmp_path / "t.jinja"
    template.write_text(NO_SYSTEM)
    asked = [f"model.chat_template={template}", "model.system_prompt=Be brief."]
    for dry in ([], ["--dry-run"]):
        assert command(start, tmp_path, *asked, *dry) == 2
        error = capsys.readouterr().err
        assert "train.jsonl, row 1: the chat template refuses this prompt" in error and "model.chat_template" in error
        assert error.count("\n") == 1


def test_an_evaluation_tells_it_too(start, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text(NO_SYSTEM)
    asked = ["--benchmarks", start["data"]["train"][0], "--chat-template", str(template)]
    assert evaluation(start, tmp_path, *asked, "--system-prompt", "Be brief.") == 2
    error = capsys.readouterr().err
    assert "train.jsonl, row 1: the chat template refuses" in error and "--system-prompt" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ending", "opens"),
    [("<think>", True), ("<think>\n", True), ("<think>\n\n</think>\n", False), ("", False), ("<think> Well,", False)],
)
def test_a_prompt_that_ends_in_think_opens_the_thinking(tmp_path, ending, opens):
    tokenizer = synthetic.make_tokenizer()
    tokenizer.chat_template = NO_SYSTEM.replace("<assistant>", "<assistant>" + ending)
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "1+1= <think>", "answer": "2"}\n')
    assert PromptStream([path], tokenizer, 64).prompt(0).opens_thinking is opens
