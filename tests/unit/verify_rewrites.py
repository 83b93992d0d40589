r"""Reference answers of the public benchmarks, and ways to write them: the same, equivalently, or wrongly.

Used by test_verify_real_data.py and benchmarks/grading.py.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

DATA = Path(os.environ.get("NFT_DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data"))
BENCHMARKS = ("aime24", "aime25", "amc23", "gsm8k", "math500", "minerva_math", "olympiadbench")
WORK = "We first note that $f(3) = 17$ and $g(2) = \\frac{5}{7}$, so that \\[ x^2 + 4 = 29. \\] Next, 12 of 40 remain. "


def references(benchmark: str) -> list[str]:
    """The reference answers of a benchmark, as its file has them (Minerva: the last box of the solution)."""
    rows = [
        json.loads(line) for line in (DATA / "eval" / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    if benchmark == "minerva_math":
        return [_last_box(row["solution"]) for row in rows]
    if benchmark == "olympiadbench":
        return [row["final_answer"][0] for row in rows]
    if benchmark == "gsm8k":
        return [row["answer"].split("####")[1].strip() for row in rows]
    return [str(row["answer"]) for row in rows]


def _last_box(text: str) -> str:
    start = text.rindex("\\boxed{") + len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end]
    raise ValueError("a box without its end")


def content(answer: str) -> str:
    """A reference answer without its dollar signs."""
    return re.sub(r"(?<!\\)\$", "", answer).strip()


def box(answer: str) -> str:
    return "\\boxed{" + answer + "}"


def wrappings(answer: str) -> Iterator[tuple[str, str]]:
    """(name, response) for every way to give `answer` that must be accepted."""
    a = content(answer)
    yield "boxed", f"So we get \\boxed{{{a}}}"
    yield "boxed_in_dollars", f"Hence the result is $\\boxed{{{a}}}$."
    yield "boxed_reference", f"\\boxed{{{answer}}}"
    yield "brackets", f"Therefore\n\\[ {a} \\]"
    yield "brackets_tight", f"We conclude that the value is \\[{a}\\]."
    yield "dollars", f"Adding up, the result is ${a}$."
    yield "dollars_in_sentence", f"Thus we find that ${a}$ is what was asked for."
    yield "final_answer_dollars", f"The final answer is ${a}$. I hope it is correct."
    yield "answer_line", f"We add both parts.\n\nAnswer: {a}"
    yield "answer_line_stop", f"Work.\nAnswer: {a}."
    yield "answer_is", f"The answer is {a}"
    yield "bold_answer", f"Some work.\n\n**Answer:** {a}"
    yield "dfrac", box(a.replace("\\frac", "\\dfrac"))
    yield "spaces", f"\\boxed{{   {a.replace(' ', '  ')}   }}"
    yield "spaces_in_dollars", f"The result is $  {a}  $"
    if not re.search(r"text|mbox|circ|%|\$", answer):
        yield "unit_text", f"\\boxed{{{a} \\text{{ cm}}}}"
        yield "unit_mathrm", f"\\boxed{{{a}\\,\\mathrm{{kg}}}}"
        yield "unit_units", f"\\boxed{{{a}\\text{{ units}}}}"
    yield "stop_in_box", f"\\boxed{{{a}.}}"
    yield "after_work", WORK * 30 + f"\n\nSo the answer is \\boxed{{{a}}}."
    yield "after_work_dollars", WORK * 30 + f"\n\nThis gives ${a}$."
    yield "after_other_boxes", f"\\boxed{{7}} was the first part of it. Then we go on and obtain \\boxed{{{a}}}"


_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_E_NOTATION = re.compile(r"(-?\d+(?:\.\d+)?)e([+-]?\d+)")


def equivalents(answer: str) -> Iterator[tuple[str, str]]:
    """(name, response) for ways to write the same answer differently."""
    a = content(answer)
    plain = a.replace(",", "")
    if power := _E_NOTATION.fullmatch(a):
        yield "times_ten", f"\\boxed{{{power[1]} \\times 10^{{{int(power[2])}}}}}"
        yield "cdot_ten", f"\\boxed{{{power[1]} \\cdot 10^{{{int(power[2])}}}}}"
    if re.fullmatch(r"\d{4,}", plain) and (a == plain or re.fullmatch(r"\d{1,3}(,\d{3})+", a)) and a[0] != "0":
        grouped = f"{int(plain):,}"
        yield "thousands_comma", f"\\boxed{{{grouped}}}"
        yield "thousands_thin", box(grouped.replace(",", "\\,"))
        yield "thousands_space", f"\\boxed{{{grouped.replace(',', ' ')}}}"
        yield "thousands_brace", f"\\boxed{{{grouped.replace(',', '{,}')}}}"
    if "\\sqrt{" in a and re.search(r"\\sqrt\{(\d+)\}", a):
        yield "unicode_root", box(re.sub(r"\\sqrt\{(\d+)\}", lambda root: "√" + root[1], a))
    if "\\pi" in a:
        yield "unicode_pi", box(a.replace("\\pi", "π"))
    if not re.search(r"text|mbox|circ|%|\$|,|=|_\d|\\in\b|geq|cup|matrix|pm|\\le", a):
        yield "doubled_fraction", f"\\boxed{{\\frac{{2({a})}}{{2}}}}"
    if words := re.fullmatch(r"\\text\{([A-Za-z]+)\}", a):
        yield "text_stop", f"\\boxed{{\\text{{{words[1]}.}}}}"
        yield "text_plain", f"\\boxed{{{words[1]}}}"
        yield "text_bold", f"\\boxed{{\\textbf{{{words[1]}}}}}"
    if choice := re.fullmatch(r"\\text\{\(([A-E])\)\}", a):
        yield "choice_bold", f"The answer is **{choice[1]}**."
        yield "choice_box", f"\\boxed{{{choice[1]}}}"
        yield "choice_parentheses", f"The answer is ({choice[1]})."
    parts = list_parts(answer)
    if parts:
        reordered = parts[1:] + parts[:1]
        yield "reordered", f"\\boxed{{{', '.join(reordered)}}}"
        yield "reversed_and", f"The answers are ${'$, $'.join(parts[::-1][:-1])}$ and ${parts[0]}$."
    if fraction := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", a):
        yield "slash", f"\\boxed{{{fraction[1]}{fraction[2]}/{fraction[3]}}}"
        yield "scaled", f"\\boxed{{{fraction[1]}\\frac{{{3 * int(fraction[2])}}}{{{3 * int(fraction[3])}}}}}"
    if re.fullmatch(r"-?\d{1,9}", a):
        yield "point_zero", f"\\boxed{{{int(a)}.0}}"
        yield "sum", f"\\boxed{{{int(a) - 1} + 1}}"


def list_parts(answer: str) -> list[str]:
    """The parts of an answer that is a bare list of several, else []."""
    a = content(answer)
    parts, depth, start = [], 0, 0
    if re.fullmatch(r"\$?\d{1,3}(,(\\!)?\s*\d{3})+", a) or "\\!" in a or "text" in a or "where" in a:
        return []
    for index, character in enumerate(a):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(a[start:index].strip())
            start = index + 1
    parts.append(a[start:].strip())
    return parts if len(parts) > 1 and all(parts) else []


def near_misses(answer: str) -> Iterator[tuple[str, str]]:
    """(name, response) for answers that look like the reference and are wrong."""
    a = content(answer)
    integer = re.fullmatch(r"\d{1,6}", a)
    if integer and all(digit < "9" for digit in a):
        yield "base_nine", f"\\boxed{{{a}_9}}"
    if mixed := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", a):
        whole, rest = divmod(int(mixed[2]), int(mixed[3]))
        if whole and rest and not mixed[1]:
            yield "product_not_mixed", f"\\boxed{{{whole}({rest}/{mixed[3]})}}"
        yield "upside_down", f"\\boxed{{{mixed[1]}\\frac{{{mixed[3]}}}{{{mixed[2]}}}}}" if mixed[2] != mixed[3] else ""
        yield "off_by_one", f"\\boxed{{{mixed[1]}\\frac{{{int(mixed[2]) + 1}}}{{{mixed[3]}}}}}"
    if power := _E_NOTATION.fullmatch(a):
        yield "e_times", f"\\boxed{{{power[1]} e·{int(power[2])}}}"
        yield "other_power", f"\\boxed{{{power[1]}e{int(power[2]) + 1}}}"
        yield "other_mantissa", f"\\boxed{{{float(power[1]) / 4:g}e{int(power[2])}}}"
    if unit := re.fullmatch(r"(.*)\\(?:text|mbox)\{\s*(cm|inches|cents)\s*\}(.*)", a):
        yield "other_unit", f"\\boxed{{{unit[1]}\\text{{ km}}{unit[3]}}}"
    if _NUMBER.fullmatch(a):
        yield "not", f"\\boxed{{\\text{{not }}{a}}}"
        yield "plus_one", f"\\boxed{{{float(a) + 1:g}}}" if len(a) < 6 else ""
        yield "hundred_times", f"\\boxed{{{float(a) * 100:g}}}" if len(a) < 4 and float(a) else ""
        yield "negated", f"\\boxed{{{-float(a):g}}}" if len(a) < 6 and float(a) else ""
        yield "million", f"\\boxed{{{a} \\text{{ million}}}}" if float(a) else ""
    for index, part in enumerate(list_parts(answer)):
        if not all(other == part for other in list_parts(answer)):
            yield f"only_part_{index}", f"\\boxed{{{part}}}"
    if pair := re.fullmatch(r"(?:\\left)?\(\s*([^,()]+),([^,()]+?)\s*(?:\\right)?\)", a):
        if pair[1].strip() != pair[2].strip():
            yield "swapped", f"\\boxed{{({pair[2]}, {pair[1]})}}"
        yield "half_closed", f"\\boxed{{[{pair[1]}, {pair[2]})}}"


def other_rows(answers: list[str], count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`count` pairs (reference, another row's answer) whose texts differ."""
    generator = random.Random(seed)
    while count:
        gold, other = generator.sample(answers, 2)
        if content(gold).replace(" ", "").strip(".") != content(other).replace(" ", "").strip("."):
            yield gold, other
            count -= 1
