"""The report in a real browser: what is drawn, what the filters find, what the tokens show, how quick it is."""

import json
import shutil

import numpy as np
import pytest
from made_run import make_group, make_run
from tiny import make_tokenizer

from megatron_nft import cli
from megatron_nft.data.rollout_file import list_rollout_files, read_rollout_file, rollout_path, write_rollouts
from megatron_nft.report.entries import AnswerEntry, QuestionEntry
from megatron_nft.report.formulas import BLOCK_SIZE
from megatron_nft.report.page import write_page

HOSTILE = (
    '<script>window.bad = 1</script><img src=x onerror="window.bad = 1"> \\(\\href{javascript:bad}{x}\\) '
    "$\\text{<img src=x onerror=window.bad=1>}$ \\boxed{\\htmlStyle{position:fixed}{<b>}} $\\undefined{"
)
TOKENS = "[...document.querySelectorAll('.answer:first-child .tokens span')]"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Six steps of 20 questions, 8 answers each, and one more question with a hostile answer."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "hf")
    make_run(folder, tokenizer, steps=6, groups=20, answers=8, metric_steps=60)
    group = make_group(np.random.default_rng(1), 6, 777, 2, tokenizer)
    group.rollouts[0].text = HOSTILE
    group.rollouts[1].text = "A broken half \ud83d of a character"
    write_rollouts(rollout_path(folder, 6, 0), [group], ["trained"], step=6)
    assert cli.main(["report", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(run_dir):
    return [row for _, path in list_rollout_files(run_dir) for row in read_rollout_file(path).to_pylist()]


def answers_shown(page):
    """(answers, questions) that pass the filters, as the page says."""
    words = page.js("document.querySelector('.filters .found').textContent").replace(",", "").split()
    return int(words[0]), int(words[3])


def found(rows):
    return len(rows), len({(r["step"], r["draw"]) for r in rows})


def open_answers(page, run_dir):
    page.open(run_dir / "report.html", "#answers")
    page.until("document.querySelectorAll('.answer .body').length > 0")


def titles(page):
    return page.js("[...document.querySelectorAll('#curves > .cards h3')].map((h) => h.firstChild.textContent)")


def test_curves_of_everything_that_the_run_wrote(page, run_dir):
    page.open(run_dir / "report.html")
    assert titles(page) == [
        "Accuracy of sampled answers",
        "Held-out accuracy, 95 % interval",
        "Correct rate of questions",
        "Question groups",
        "Answer length, tokens",
        "Share cut off at the length limit",
        "Loss",
        "Trainer/engine gap, |Δ log p|",
        "Seconds per phase",
        "Seconds that grading adds to a step",
        "Likelihood ratio, mean",
        "Share of negatives at the clamp",
        "Gradient norm",
        "Learning rate",
        "Tokens per second",
    ]
    cells = page.js("document.querySelectorAll('#curves .card:nth-child(3) rect').length")
    assert cells == 60 * 11  # 60 steps, 11 bins
    page.js("document.querySelector('#curves > details').open = true")
    page.until("document.querySelectorAll('#curves > details .card').length > 0")
    rest = page.js("[...document.querySelectorAll('#curves > details h3')].map((h) => h.firstChild.textContent)")
    assert rest == ["length/max", "ratio/max", "seconds/total"]


def test_a_curve_says_its_values_under_the_mouse(page, run_dir):
    page.open(run_dir / "report.html")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()[:60]]
    page.move_to("#curves .card:nth-child(1) svg")
    page.until("!document.querySelector('#tip').hidden")
    step_line, value_line = page.js("document.querySelector('#tip').textContent").split("\n")
    step = int(step_line.removeprefix("step "))
    assert 20 <= step <= 40  # the middle of 0 .. 59
    name, value = value_line.split("  ")
    assert name == "accuracy/train"
    assert float(value) == pytest.approx(records[step]["accuracy/train"], abs=1e-4)


@pytest.mark.parametrize(
    ("filters", "keep"),
    [
        ([], lambda r: True),
        ([("step", "3")], lambda r: r["step"] == 3),
        ([("verdict", "timeout")], lambda r: r["verdict"] == "timeout"),
        ([("fate", "all wrong")], lambda r: r["fate"] == "all_wrong"),
        ([("flag", "cut off")], lambda r: r["finish_reason"] == "length"),
        (
            [("flag", "graders disagree"), ("verdict", "wrong"), ("step", "1")],
            lambda r: r["step"] == 1 and r["verdict"] == "wrong" and '"dapo_boxed": "correct"' in r["grader_verdicts"],
        ),
    ],
)
def test_filters_find_what_is_in_the_files(page, run_dir, rows, filters, keep):
    open_answers(page, run_dir)
    for key, text in filters:
        page.choose(f"#filter-{key}", text)
    expected = found([r for r in rows if keep(r)])
    assert expected[0] > 0
    assert answers_shown(page) == expected


def test_length_and_text_filters(page, run_dir, rows):
    open_answers(page, run_dir)
    lengths = sorted(len(r["response_ids"]) for r in rows)
    low, high = lengths[len(lengths) // 4], lengths[3 * len(lengths) // 4]
    page.type("#filter-min", str(low))
    page.type("#filter-max", str(high))
    assert answers_shown(page) == found([r for r in rows if low <= len(r["response_ids"]) <= high])
    page.type("#filter-min", "")
    page.type("#filter-max", "")
    page.type("#filter-search", "QUESTION 17)")
    assert answers_shown(page) == found([r for r in rows if "question 17)" in r["prompt_text"]])
    page.type("#filter-search", "no question says this")
    assert answers_shown(page) == (0, 0)
    assert "No answer passes" in page.js("document.querySelector('.columns').textContent")


def test_answers_stand_side_by_side_with_maths(page, run_dir, rows):
    open_answers(page, run_dir)
    page.until("document.querySelectorAll('.answer math').length > 8")
    assert page.js("document.querySelectorAll('.answer').length") == 8
    above, below, upper_middle, lower_middle = page.js(
        """(() => { const parts = [...document.querySelector('.answer mfrac').children];
          const [a, b] = parts.map((e) => e.getBoundingClientRect());
          return [a.bottom, b.top, a.left + a.width / 2, b.left + b.width / 2]; })()"""
    )
    assert above < below  # laid out as maths: the numerator stands over the denominator
    assert abs(upper_middle - lower_middle) < 1
    boxes = "[...document.querySelectorAll('.answer')].map((a) => a.getBoundingClientRect())"
    sides = page.js(f"{boxes}.map((b) => [b.left, b.top, b.right, b.bottom])")
    left, top, right, bottom = zip(*sides, strict=True)
    assert len({round(t) for t in top}) <= 4  # several beside each other
    for i in range(8):
        for k in range(i):
            assert (
                left[i] >= right[k] or left[k] >= right[i] or top[i] >= bottom[k] or top[k] >= bottom[i]
            )  # no overlap
    first = page.js("document.querySelector('.answer .body').innerText")
    assert "The ticket costs $5 and the bus costs $7, which changes nothing." in first  # prices are no formula
    boxed = page.js("document.querySelector('.answer .box').title")
    assert page.js("document.querySelector('.answer .box math').textContent") == boxed
    shown = page.js("document.querySelector('.list .item.on .top').textContent")
    mine = [r for r in rows if shown.startswith(f"step {r['step']} · draw {r['draw']}sums")]
    assert boxed == mine[0]["extracted"]
    badges = page.js("[...document.querySelectorAll('.answer .badge')].map((b) => b.textContent)")
    assert badges == [r["verdict"] for r in mine]


def test_tokens_show_the_ratio_of_trainer_and_engine(page, run_dir, rows):
    open_answers(page, run_dir)
    page.type("#filter-search", "question 21)")  # draw 21: odd draws have the trainer's log-probs
    page.until("document.querySelector('.question').textContent.includes('question 21)')")
    page.js("[...document.querySelectorAll('.bar button')].find((b) => b.textContent === 'tokens').click()")
    page.until("document.querySelectorAll('.answer:first-child .tokens span').length > 0")
    mine = next(r for r in rows if r["draw"] == 21)
    assert page.js("document.querySelector('.answer .tokens').textContent") == mine["text"]
    gaps = np.array(mine["trainer_logprobs"]) - np.array(mine["rollout_logprobs"])
    colors = page.js(
        "[...document.querySelectorAll('.answer:first-child .tokens span')].map((s) => s.style.background)"
    )
    assert len(colors) == len(gaps)
    for gap, color in zip(gaps, colors):
        if abs(gap) > 0.02:
            assert color.startswith("rgba(31, 111, 235" if gap > 0 else "rgba(214, 64, 50")
    strongest = int(np.abs(gaps).argmax())
    page.move_to(f".answer:first-child .tokens span:nth-child({strongest + 1})")
    page.until("!document.querySelector('#tip').hidden")
    lines = page.js("document.querySelector('#tip').textContent").split("\n")
    assert float(lines[-1].removeprefix("ratio trainer / engine ")) == pytest.approx(np.exp(gaps[strongest]), abs=2e-4)
    assert f"engine log p {mine['rollout_logprobs'][strongest]:.2f}"[:-1] in lines[1]


def test_without_the_trainers_logprobs_the_tokens_stay_plain(page, run_dir):
    open_answers(page, run_dir)
    page.type("#filter-search", "question 22)")
    page.until("document.querySelector('.question').textContent.includes('question 22)')")
    page.js("[...document.querySelectorAll('.bar button')].find((b) => b.textContent === 'tokens').click()")
    page.until("document.querySelectorAll('.answer:first-child .tokens span').length > 0")
    painted = (
        "[...document.querySelectorAll('.answer:first-child .tokens span')].filter((s) => s.style.background).length"
    )
    assert page.js(painted) == 0
    page.choose(".bar select", "colour: probability")
    page.until(f"{painted} > 10")


def test_what_a_model_writes_is_text_and_never_code(page, run_dir):
    open_answers(page, run_dir)
    page.type("#filter-search", "question 777)")
    page.until("document.querySelectorAll('.answer').length === 2")
    page.until("document.querySelector('.answer .body').textContent !== ''")
    assert page.js("window.bad") is None
    assert page.js("document.querySelectorAll('.answer a, .answer img, .answer script').length") == 0
    assert page.js("document.querySelector('.answer .body').textContent").startswith(
        "<script>window.bad = 1</script><img"
    )
    codes = page.js("[...document.querySelectorAll('.answer code')].map((e) => e.textContent)")
    assert codes == ["\\href{javascript:bad}{x}", "\\htmlStyle{position:fixed}{<b>}"]  # as they were written
    assert page.js("document.querySelector('.answer math').textContent") == "<img src=x onerror=window.bad=1>".replace(
        " ", "\xa0"
    )
    assert "A broken half ? of a character" in page.js("document.querySelectorAll('.answer .body')[1].textContent")


def test_formulas_are_found_wherever_in_the_table_they_are(page, tmp_path):
    """Questions whose formulas lie in many blocks of the table, and one that uses some from every block."""
    count = 3 * BLOCK_SIZE
    entries = [
        QuestionEntry(0, n, "s", f"Is it ${n}$ or \\[\\frac{{{n}}}{{7}}\\] then?", "1", [answer_of(f"\\boxed{{{n}}}")])
        for n in range(count)
    ]
    everywhere = range(0, count, 100)
    entries.append(QuestionEntry(1, count, "s", "last", "$0$", [answer_of(" ".join(f"${n}$" for n in everywhere))]))
    path = tmp_path / "page.html"
    write_page(path, title="t", subtitle="", overview="", metrics=None, questions=entries)
    page.open(path, "#answers")
    for n in (0, count - 1, 700):
        page.type("#filter-search", f"it ${n}$")
        page.until(f"document.querySelector('.question .body math')?.textContent === '{n}'")
        assert page.js("document.querySelector('.question .body math[display=block]').textContent") == f"{n}7"
        page.until(f"document.querySelector('.answer .box math')?.textContent === '{n}'")
    page.type("#filter-search", "last")
    page.until("document.querySelector('.bar math')?.textContent === '0'")
    page.until(f"document.querySelectorAll('.answer math').length === {len(everywhere)}")
    shown = page.js("[...document.querySelectorAll('.answer math')].map((e) => e.textContent)")
    assert shown == [str(n) for n in everywhere]


def answer_of(text):
    return AnswerEntry(text, num_tokens=3, finish_reason="stop", verdict="correct")


def test_keys_move_through_the_list(page, run_dir):
    open_answers(page, run_dir)
    for _ in range(3):
        page.js("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'j'}))")
    page.until("document.querySelector('.list .item.on .top').textContent.startsWith('step 0 · draw 3')")


def test_a_run_that_has_only_just_begun(page, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "accuracy/train": 0.25}\n{"step": 1, "accu')
    assert cli.main(["report", str(tmp_path)]) == 0
    page.open(tmp_path / "report.html")
    assert titles(page) == ["Accuracy of sampled answers"]
    page.js("document.querySelector('[data-tab=answers]').click()")
    page.until("document.querySelector('.columns')?.textContent.includes('There are no answers yet')")


def test_a_broken_file_is_named_and_the_rest_is_shown(page, run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (broken := list_rollout_files(copy)[0][1]).write_bytes(b"PAR1")
    assert cli.main(["report", str(copy)]) == 0
    open_answers(page, copy)
    notes = page.js("document.querySelector('#notes').textContent")
    assert f"{broken.parent.name}/{broken.name} cannot be read" in notes
    assert answers_shown(page)[0] == 6 * 20 * 8 + 2 - 10 * 8


def test_100_000_rollouts_stay_usable(page, tmp_path):
    """First view within 3 s, and so is the browser of answers; the best of three loads, as the machine is shared."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "hf")
    make_run(tmp_path, tokenizer, steps=25, groups=250, answers=16, metric_steps=400, work="So it is \\boxed{{{x}}}.")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert min(page.open(tmp_path / "report.html") for _ in range(3)) < 3000
    assert min(page.open(tmp_path / "report.html", "#answers") for _ in range(3)) < 3000
    assert answers_shown(page) == (100_000, 6_250)
    spent = """(() => {{ const s = document.querySelector('#filter-verdict'); const t = performance.now();
      s.selectedIndex = {}; s.dispatchEvent(new Event('change')); return performance.now() - t; }})()"""
    assert min(page.js(spent.format(i)) for i in (1, 2, 1, 2)) < 200  # ms, for a filter over all answers
    assert page.js("document.querySelectorAll('.list .item').length") < 60  # only what is in sight is drawn
    page.js("document.querySelector('.list').scrollTop = 1e7")
    page.until("document.querySelector('.list').textContent.includes('step 24')")
