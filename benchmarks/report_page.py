"""Size of the report page, seconds to build it, and milliseconds until a real Chromium shows it.

    python benchmarks/report_page.py [--rollouts 100000] [--runs DIR]

Three runs of the same size are made: `made` is the one of tests/browser/made_run.py; in `problems` every prompt and
every answer is a problem of the MATH training split, drawn at random; in `numbers` the digits of those answers are
drawn anew for each answer, so that hardly a formula occurs twice. The data are read from $NFT_DATA_DIR (default:
../shared/data); without them only the first run is measured. Prints the tables of benchmarks/results/report_page.md,
which also holds a comparison with an earlier version. With --runs the run folders and their pages are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "browser")]

from chromium import Page, find_or_install  # noqa: E402
from made_run import made_record, make_run  # noqa: E402
from tiny import make_tokenizer  # noqa: E402

from megatron_nft.data.rollout_file import list_rollout_files, rollout_path, write_rollouts  # noqa: E402
from megatron_nft.report.entries import rollout_entries  # noqa: E402
from megatron_nft.report.find_maths import Formula, find_maths  # noqa: E402
from megatron_nft.report.mathml import to_mathml  # noqa: E402
from megatron_nft.report.run_page import run_page  # noqa: E402
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict  # noqa: E402

DATA = Path(os.environ.get("NFT_DATA_DIR", ROOT / "../shared/data"))
STEPS, ANSWERS = 25, 16
LOADS = 3  # the best of these counts, as machines are shared
VOCABULARY = 50_000


def problem_texts() -> list[str]:
    """The problems of the MATH training split; empty where the data are missing."""
    path = DATA / "train" / "math.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line)["problem"] for line in path.read_text(encoding="utf-8").splitlines()]


def token_ids(text: str) -> np.ndarray:
    """int32 [R]: about as many ids as a tokenizer would give, the same for the same piece of text."""
    return np.array([zlib.crc32(piece.encode()) % VOCABULARY for piece in re.findall(r"\w{1,5}|\W", text)], np.int32)


def with_other_digits(text: str, rng: random.Random) -> str:
    """The text with every digit drawn anew."""
    return re.sub(r"\d", lambda _: str(rng.randrange(10)), text)


def make_problem_run(folder: Path, problems: list[str], rollouts: int, new_digits: bool) -> None:
    """Write a run whose prompts and answers are problems."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    for step in range(STEPS):
        groups = []
        for i in range(rollouts // STEPS // ANSWERS):
            draw = step * (rollouts // STEPS // ANSWERS) + i
            message = {"role": "user", "content": rng.choice(problems)}
            prompt = Prompt(draw, "math", (message,), r"\frac{1}{2}", np.arange(4, dtype=np.int32))
            answers = []
            for k in range(ANSWERS):
                text = rng.choice(problems)
                text = with_other_digits(text, rng) if new_digits else text
                ids = token_ids(text)
                engine = -noise.exponential(0.4, len(ids)).astype(np.float32)
                trainer = engine + noise.normal(0, 0.03, len(ids)).astype(np.float32)
                verdict = Verdict.CORRECT if rng.random() < 0.5 else Verdict.WRONG
                answers.append(
                    Rollout(draw, k, ids, engine, "stop", step, text, verdict=verdict, trainer_logprobs=trainer)
                )
            groups.append(RolloutGroup(draw, prompt, answers, step))
        write_rollouts(rollout_path(folder, step, 0), groups, ["trained"] * len(groups), step=step)
    lines = (json.dumps(made_record(noise, step, STEPS)) for step in range(STEPS))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def make_made_run(folder: Path, rollouts: int) -> None:
    """Write the run of tests/browser/made_run.py."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "hf")
    make_run(folder, tokenizer, steps=STEPS, groups=rollouts // STEPS // ANSWERS, answers=ANSWERS, metric_steps=400)


def formula_counts(folder: Path) -> dict[str, float]:
    """How many formulas the texts of a run hold, and the seconds it takes to find and to convert them."""
    texts = [
        text
        for _, path in list_rollout_files(folder)
        for entry in rollout_entries(path)
        for text in (entry.prompt, *(answer.text for answer in entry.answers))
    ]
    started = time.perf_counter()
    uses = [part[:2] for text in texts for part in find_maths(text) if isinstance(part, Formula)]
    found = time.perf_counter()
    distinct = set(uses)
    converting = time.perf_counter()
    converted = sum(to_mathml(source, display) is not None for source, display in distinct)
    return {
        "uses": len(uses),
        "distinct": len(distinct),
        "as source": len(distinct) - converted,
        "s to find": round(found - started, 1),
        "s to convert": round(time.perf_counter() - converting, 1),
    }


def open_times(browser: Page, path: Path) -> dict[str, float]:
    """Milliseconds to the first view, to the answers, and from a click on a question to its maths; best of LOADS."""
    first = min(browser.open(path) for _ in range(LOADS))
    answers = min(browser.open(path, "#answers") for _ in range(LOADS))
    clicks = []
    for _ in range(LOADS):
        browser.open(path, "#answers")
        browser.until("document.querySelector('.answer .body')?.textContent")
        clicks.append(float(browser.js(CLICK)))
    assert browser.errors == [], browser.errors
    return {"ms first view": round(first), "ms answers": round(answers), "ms question": round(min(clicks))}


CLICK = """(async () => {
  const list = document.querySelector('.list');
  list.scrollTop = list.scrollHeight / 2;
  await new Promise((resolve) => setTimeout(resolve, 300));
  const items = [...list.querySelectorAll('.item')];
  const item = items.find((e) => /[$]|\\\\[(]/.test(e.querySelector('.text').textContent)) ?? items[0];
  const old = document.querySelector('.answer'), start = performance.now();
  item.click();
  while (document.querySelector('.answer') === old || !document.querySelector('.question math, .question .katex')
      || !document.querySelector('.answer .body')?.textContent) {
    await new Promise((resolve) => setTimeout(resolve, 1));
    if (performance.now() - start > 20000) throw new Error('no maths is shown');
  }
  return performance.now() - start;
})()"""


def measure(browser: Page, folder: Path) -> dict[str, float]:
    """All measurements of one run."""
    path = folder / "report.html"
    started = time.perf_counter()
    size = run_page(folder, path, max_rollouts=10**9, max_bytes=10**12)
    built = time.perf_counter() - started
    return (
        {"MB": round(size / 1e6, 2), "s to build": round(built, 1)} | open_times(browser, path) | formula_counts(folder)
    )


def runs(rollouts: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(name, what makes the run in a folder)."""
    yield "made", partial(make_made_run, rollouts=rollouts)
    problems = problem_texts()
    if not problems:
        print(f"no problems in {DATA}; set NFT_DATA_DIR", file=sys.stderr)
        return
    yield "problems", partial(make_problem_run, problems=problems, rollouts=rollouts, new_digits=False)
    yield "numbers", partial(make_problem_run, problems=problems, rollouts=rollouts, new_digits=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=100_000, metavar="N", help="per run (default: 100000)")
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="keep the runs and pages here, and use those that exist"
    )
    args = parser.parse_args()
    executable, why_not = find_or_install()
    if executable is None:
        sys.exit(why_not)
    with tempfile.TemporaryDirectory() as temporary:
        browser = Page(executable)
        try:
            for name, make in runs(args.rollouts):
                folder = (args.runs or Path(temporary)) / name
                if not folder.is_dir():
                    folder.mkdir(parents=True)
                    make(folder)
                row = {"run": name, **measure(browser, folder)}
                if name == "made":
                    print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
                print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
        finally:
            browser.close()


if __name__ == "__main__":
    main()
