"""Question files and the stream over them."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_nft.data import synthetic
from megatron_nft.data.prompts import PromptStream, load_tokenizer, render
from megatron_nft.data.rows import DataError, read_rows

PUBLIC = Path(os.environ.get("NFT_DATA_DIR", Path(__file__).parents[2] / "../shared/data"))
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return synthetic.make_tokenizer()


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def questions(n):
    return [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(n)]


def verl_row(**changes):
    row = {
        "data_source": "math",
        "prompt": [{"role": "user", "content": "1+1="}],
        "ability": "MATH",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0},
    }
    return row | changes


def test_jsonl_and_parquet_hold_the_same_rows(tmp_path):
    rows = [
        verl_row(),
        verl_row(prompt=[{"role": "system", "content": "s"}, {"role": "user", "content": "é \u2028 x"}]),
    ]
    a = read_rows(jsonl(tmp_path / "a.jsonl", *rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    b = read_rows(tmp_path / "a.parquet")
    assert [(r.data_source, r.messages, r.answer, r.extra) for r in a] == [
        (r.data_source, r.messages, r.answer, r.extra) for r in b
    ]
    assert a[1].messages[1]["content"] == "é \u2028 x"
    assert a[0].extra == {"index": 0} and a[0].answer == "2"


def test_short_jsonl_rows(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "1+1=", "answer": "2"}\r\n\n{"prompt": "a\xe2\x80\xa8b", "answer": "x"}')
    first, second = read_rows(path)
    assert first.messages == ({"role": "user", "content": "1+1="},) and first.answer == "2"
    assert second.messages[0]["content"] == "a\u2028b" and second.where.endswith("row 3")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "1+1=", "answer": "2"}, r"row 2: column 'prompt' is missing; 'promt' looks like it"),
        ({"prompt": "1+1="}, r"row 2: column 'reward_model' \(or 'answer'\) is missing; columns found: prompt"),
        ({"prompt": "1", "reward_modle": {}}, r"column 'reward_model'.*'reward_modle' looks like it"),
        (
            {"prompt": "1", "answer": "2", "data_sorce": "x"},
            r"'data_sorce' \(did you mean 'data_source'",
        ),
        ({"prompt": "1", "answer": "2", "zzz": 1}, r"unknown column 'zzz' \(known: .*extra_info"),
        ({"prompt": "1", "answer": 2}, r"row 2, column 'answer': 2 \(int\), not text"),
        ({"prompt": "1", "answer": 2.0}, r"column 'answer': 2.0 \(float\), not text"),
        ({"prompt": "1", "answer": ["2"]}, r"column 'answer': \['2'\] \(list\)"),
        ({"prompt": "1", "answer": " "}, r"column 'answer': an empty answer"),
        ({"prompt": "1", "answer": None}, r"column 'answer': None \(null\)"),
        ({"prompt": "1", "answer": "NaN"}, r"column 'answer': the text 'nan', which pandas"),
        ({"prompt": "1", "answer": None, "reward_model": {"style": "x"}}, r"column 'reward_model': \{'style': 'x'\}"),
        ({"prompt": "1", "answer": "1", "reward_model": {"ground_truth": "1"}}, r"both 'answer' and 'reward_model'"),
        (verl_row(reward_model={"style": "rule"}), r"column 'reward_model'.*ground_truth"),
        (verl_row(reward_model={"ground_truth": 7}), r"column 'reward_model.ground_truth': 7 \(int\)"),
        (verl_row(prompt=[]), r"column 'prompt': \[\] \(list\)"),
        (verl_row(prompt=7), r"column 'prompt': 7 \(int\)"),
        (verl_row(prompt=""), r"column 'prompt': content is '' \(str\)"),
        (verl_row(prompt=[{"role": "user"}]), r"column 'prompt'.*role and content"),
        (verl_row(prompt=[{"role": "user", "content": None}]), r"content is None"),
        (verl_row(extra_info="x"), r"column 'extra_info': 'x' \(str\)"),
        (verl_row(data_source=3), r"column 'data_source': 3 \(int\)"),
        ([1, 2], "row 2: a list, not an object"),
    ],
    ids=lambda x: "" if isinstance(x, str) else json.dumps(x)[:40],
)
def test_bad_rows_name_file_row_and_column(tmp_path, row, message):
    path = jsonl(tmp_path / "q.jsonl", {"prompt": "1+1=", "answer": "2"}, row)
    with pytest.raises(DataError, match=r"q\.jsonl.*" + message):
        read_rows(path)


def test_parquet_with_misspelt_column_and_wrong_type(tmp_path):
    path = tmp_path / "q.parquet"
    pq.write_table(pa.table({"promt": ["1"], "answer": ["2"]}), path)
    with pytest.raises(DataError, match=r"q\.parquet, row 1: column 'prompt' is missing; 'promt' looks like it"):
        read_rows(path)
    pq.write_table(pa.table({"prompt": ["1", "2"], "answer": [2.0, 3.0]}), path)
    with pytest.raises(DataError, match=r"q\.parquet, row 1, column 'answer': 2\.0 \(float\)"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "holds no questions"),
        ("blank.jsonl", b"\n \n", "holds no questions"),
        ("latin.jsonl", b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xe9"}\n', r"row 2: not UTF-8 text \(byte 43\)"),
        ("broken.jsonl", b'{"prompt": "a", "answer": "b"}\n{"prompt": ', r"row 2: not JSON"),
        ("q.csv", b"a,b", r"end in .jsonl or .parquet, not in '.csv'"),
        ("broken.parquet", b"PAR1 nothing", "parquet"),
        ("empty.parquet", b"", "parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        read_rows(path)


def test_missing_file_and_no_file(tmp_path, tokenizer):
    for name in ("no.jsonl", "no.parquet"):
        with pytest.raises(DataError, match=f"{name}.*cannot be read"):
            read_rows(tmp_path / name)
    with pytest.raises(DataError, match="no question files given"):
        PromptStream([], tokenizer, 32)


def test_order_is_a_function_of_seed_and_draw(tmp_path, tokenizer):
    path = jsonl(tmp_path / "q.jsonl", *questions(10))
    whole = PromptStream([path], tokenizer, 32, seed=3).draw(35)
    assert [d for d, _ in whole] == list(range(35))
    for epoch in range(3):
        assert sorted(p.index for _, p in whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    orders = [[p.index for _, p in whole[10 * e : 10 * e + 10]] for e in range(3)]
    assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(10))
    # in pieces, across the end of an epoch, from a cursor
    again = PromptStream([path], tokenizer, 32, seed=3)
    again.cursor = 7
    pieces = again.draw(6) + again.draw(1)
    assert [(d, p.index) for d, p in pieces] == [(d, p.index) for d, p in whole[7:14]] and again.cursor == 14
    assert again.prompt(33).index == whole[33][1].index and again.cursor == 14
    other = PromptStream([path], tokenizer, 32, seed=4).draw(10)
    assert [p.index for _, p in other] != orders[0]


def test_the_order_of_seed_0_stays_what_it_was(tmp_path, tokenizer):
    """A changed order would break the resume of every run that exists."""
    stream = PromptStream([jsonl(tmp_path / "q.jsonl", *questions(8))], tokenizer, 32, seed=0)
    expected = [np.random.default_rng([0, e]).permutation(8).tolist() for e in (0, 1)]
    assert [p.index for _, p in stream.draw(16)] == [*expected[0], *expected[1]]


def test_file_order_without_shuffle_over_two_files(tmp_path, tokenizer):
    a = jsonl(tmp_path / "a.jsonl", *questions(3))
    b = jsonl(tmp_path / "b.jsonl", {"prompt": "9-9=", "answer": "0"})
    stream = PromptStream([a, b], tokenizer, 32, shuffle=False)
    assert [(p.index, p.answer) for _, p in stream.draw(5)] == [(0, "1"), (1, "2"), (2, "3"), (3, "0"), (0, "1")]
    assert stream.paths == (a, b)


def test_over_long_prompts(tmp_path, tokenizer):
    rows = [*questions(3), {"prompt": "1" * 40, "answer": "1"}]
    path = jsonl(tmp_path / "q.jsonl", *rows)
    stream = PromptStream([path], tokenizer, 40)  # BOS makes it 41
    assert (stream.num_prompts, stream.num_dropped) == (3, 1)
    assert PromptStream([path], tokenizer, 41).num_dropped == 0
    with pytest.raises(DataError, match=r"row 4, column 'prompt': 41 tokens, above data.max_prompt_tokens=40"):
        PromptStream([path], tokenizer, 40, over_long="refuse")
    with pytest.raises(DataError, match=r"all 4 prompts are above data.max_prompt_tokens=2"):
        PromptStream([path], tokenizer, 2)
    with pytest.raises(ValueError, match="over_long='cut'"):
        PromptStream([path], tokenizer, 40, over_long="cut")


def test_rendering_with_and_without_a_chat_template(tmp_path):
    tokenizer = synthetic.make_tokenizer()
    talk = [{"role": "user", "content": "1+1="}, {"role": "user", "content": "2"}]
    (plain,) = render(tokenizer, [talk])
    assert tokenizer.decode(plain) == "<bos>1+1=\n2" and plain.dtype == np.int32
    tokenizer.chat_template = CHATML
    one, same = render(tokenizer, [talk, talk])
    assert tokenizer.decode(one) == "<user>1+1=<user>2<assistant>"  # nothing is added to the template's text
    assert one.tolist() == same.tolist()


def test_system_prompt(tmp_path):
    tokenizer = synthetic.make_tokenizer()
    tokenizer.chat_template = CHATML
    path = jsonl(tmp_path / "q.jsonl", *questions(1))
    ((_, prompt),) = PromptStream([path], tokenizer, 64, system_prompt="think").draw(1)
    assert tokenizer.decode(prompt.token_ids) == "<system>think<user>0+1=<assistant>"
    assert prompt.messages[0] == {"role": "system", "content": "think"}
    jsonl(path, verl_row(prompt=[{"role": "system", "content": "own"}, {"role": "user", "content": "1"}]))
    assert PromptStream([path], tokenizer, 64).num_prompts == 1
    with pytest.raises(DataError, match=r"row 1.*system message of its own while model.system_prompt is set"):
        PromptStream([path], tokenizer, 64, system_prompt="think")


def test_load_tokenizer(tmp_path):
    tokenizer = synthetic.make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    template = tmp_path / "t.jinja"
    template.write_text(CHATML, encoding="utf-8")
    assert load_tokenizer(tmp_path / "model").chat_template is None
    loaded = load_tokenizer(tmp_path / "model", template)
    assert loaded.chat_template == CHATML
    assert loaded("1+1=")["input_ids"] == tokenizer("1+1=")["input_ids"]
    with pytest.raises(DataError, match=r"t2\.jinja: cannot be read"):
        load_tokenizer(tmp_path / "model", tmp_path / "t2.jinja")
    with pytest.raises(DataError, match="not there"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(DataError, match=r"bare: has no tokenizer \(none of tokenizer.json"):
        load_tokenizer(tmp_path / "bare")


def test_a_damaged_tokenizer_and_remote_code_are_refused(tmp_path):
    folder = tmp_path / "model"
    synthetic.make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own:\n    pass\n")
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="without running code from the folder"):
        load_tokenizer(folder)
    assert not marker.exists()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="model: its tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_many_prompts_load_quickly(tmp_path, tokenizer):
    path = jsonl(tmp_path / "q.jsonl", *({"prompt": f"{i}: " + "word " * 40, "answer": "1"} for i in range(17_000)))
    started = time.process_time()
    assert PromptStream([path], tokenizer, 512).num_prompts == 17_000
    assert time.process_time() - started < 60  # CPU seconds; about 4, at 205 tokens a prompt


@pytest.mark.skipif(not (PUBLIC / "eval").is_dir(), reason=f"public data not found at {PUBLIC} (set NFT_DATA_DIR)")
def test_a_public_file_in_the_verl_layout(tokenizer):
    rows = read_rows(PUBLIC / "eval/dapo_aime-2024.parquet")
    assert len(rows) == 960 and len({r.messages[0]["content"] for r in rows}) == 30
    assert all(r.answer.isdigit() for r in rows) and {r.data_source for r in rows} == {"math_dapo"}
    stream = PromptStream([PUBLIC / "eval/dapo_aime-2024.parquet"], tokenizer, 4096)
    assert stream.num_prompts == 960
