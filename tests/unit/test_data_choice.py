"""Which drawn questions are asked, and what is remembered of them, by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_nft.data import choice
from megatron_nft.data.choice import Choice, ChoiceError, Drawn, Past, load_choice, skip_solved, with_rates
from megatron_nft.train import choosing
from megatron_nft.train.choosing import Memory, draw_questions, rates_of, read_past, remember, write_past
from megatron_nft.types import Prompt

SEED = 5


def prompt(index: int) -> Prompt:
    return Prompt(index, "made_up", (), "1", np.array([1], np.int32))


class Stream:
    """Questions 0 to n - 1, again and again."""

    def __init__(self, n: int = 4) -> None:
        self.num_prompts, self.cursor = n, 0

    def draw(self, n: int) -> list[tuple[int, Prompt]]:
        draws = range(self.cursor, self.cursor + n)
        self.cursor += n
        return [(d, prompt(d % self.num_prompts)) for d in draws]


def drawn(*rates: float, chance: float = 0.5) -> Drawn:
    return Drawn(9, prompt(3), Past(len(rates), rates), chance)


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        (drawn(), True),
        (drawn(1.0), True),  # one group says little
        (drawn(1.0, 1.0), False),
        (drawn(0.0, 1.0, 1.0), False),
        (drawn(1.0, 1.0, 0.9375), True),
        (drawn(1.0, 0.0, 1.0), True),
        (drawn(1.0, 1.0, chance=0.7499), False),
        (drawn(1.0, 1.0, chance=0.75), True),
    ],
)
def test_skip_solved_by_hand(question, asked):
    assert skip_solved(question) is asked


def test_a_solved_question_is_asked_one_time_in_four():
    solved = {0: Past(2, (1.0, 1.0))}
    _, skipped = load_choice("skip_solved", SEED).draw(Stream(1), 2000, solved)
    assert abs(2000 / (2000 + skipped) - 0.25) < 3 * (0.25 * 0.75 / 8000) ** 0.5
    _, skipped = load_choice("skip_solved:0.1", SEED).draw(Stream(1), 2000, solved)
    assert abs(2000 / (2000 + skipped) - 0.9) < 3 * (0.09 / 2200) ** 0.5


def test_skipped_draws_are_passed_over_and_counted():
    stream, solved = Stream(4), {1: Past(2, (1.0, 1.0)), 2: Past(5, (0.5, 1.0, 1.0))}
    never = Choice("never", lambda d: skip_solved(d, 1.0), SEED)
    chosen, skipped = never.draw(stream, 5, solved)
    assert [(d, p.index) for d, p in chosen] == [(0, 0), (3, 3), (4, 0), (7, 3), (8, 0)]
    assert skipped == 4 and stream.cursor == 9


def test_what_is_asked_follows_from_seed_draw_and_past_alone():
    """In one piece or in several, from a cursor; another seed asks others."""
    solved = {i: Past(2, (1.0, 1.0)) for i in range(4)}
    choice = load_choice("skip_solved", SEED)
    whole, _ = choice.draw(Stream(), 40, solved)
    stream = Stream()
    first, _ = choice.draw(stream, 15, solved)
    again = Stream()
    again.cursor = stream.cursor
    rest, _ = choice.draw(again, 25, solved)
    assert [d for d, _ in first + rest] == [d for d, _ in whole]
    other, _ = load_choice("skip_solved", SEED + 1).draw(Stream(), 40, solved)
    assert [d for d, _ in other] != [d for d, _ in whole]
    chance = np.random.default_rng([SEED, 0, 7]).random()
    assert (whole[0][0] == 0) == (chance >= 0.75)


def test_no_skipping_without_end():
    with pytest.raises(ChoiceError, match=r"never skipped 1000 draws in a row, .* 1003 \(question 3\) of 4 quest"):
        Choice("never", lambda d: d.draw < 4, SEED).draw(Stream(), 5, {})
    with pytest.raises(ChoiceError, match="2000 draws in a row"):
        Choice("never", lambda d: False, SEED).draw(Stream(200), 1, {})


def raises(_: Drawn) -> bool:
    raise KeyError("level")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raises, "data.choose=own, at draw 0 (question 0 of made_up): KeyError: 'level'"),
        (lambda _: 1, "data.choose=own, at draw 0 (question 0 of made_up) returned 1: True asks"),
        (lambda _: None, "returned None"),
    ],
)
def test_errors_name_function_draw_and_question(function, said):
    with pytest.raises(ChoiceError) as caught:
        draw_questions(Stream(), 1, Choice("own", function, SEED), {}, None)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("solved", "use skip_solved, skip_solved:PROBABILITY or module.function"),
        ("skip_solved:1", "between 0 and 1, not '1'"),
        ("skip_solved:often", "not 'often'"),
        ("skip_solved:", "not ''"),
        ("no_such_module.f", "cannot import no_such_module"),
        ("math.no_such_function", "math has no no_such_function"),
        ("math.pi", "is a float, not a function"),
    ],
)
def test_names_that_cannot_be_used(name, said):
    with pytest.raises(ChoiceError, match=r"^data\.choose=") as caught:
        load_choice(name, SEED)
    assert said in str(caught.value)


def test_the_last_four_rates_are_kept_in_the_order_of_draws():
    past = with_rates({}, [(7, 0.0), (7, 0.25), (3, 1.0), (7, 0.5), (7, 0.75), (7, 1.0)])
    assert past == {7: Past(5, (0.25, 0.5, 0.75, 1.0)), 3: Past(1, (1.0,))}
    before = {7: Past(1, (0.125,))}
    assert remember(before, [(11, 7, 1.0), (9, 7, 0.5), (10, 2, 0.0)]) == {
        7: Past(3, (0.125, 0.5, 1.0)),
        2: Past(1, (0.0,)),
    }
    assert before == {7: Past(1, (0.125,))}


def test_groups_of_which_too_few_answers_count_say_nothing():
    groups = [SimpleNamespace(draw=d, prompt=prompt(d % 3), correct_rate=d / 8) for d in range(4)]
    fates = ["all_wrong", "kept", "too_few", "kept"]
    assert rates_of(groups, fates) == [(0, 0, 0.0), (1, 1, 0.125), (3, 0, 0.375)]
    assert rates_of(groups, ["too_old"] * 4) == []


def test_what_is_stored_comes_back_bit_for_bit(tmp_path):
    past = {3: Past(9, (1 / 3, 0.1, 1.0, 0.0)), 12: Past(1, (2 / 7,))}
    ahead = ((17, 3, 1 / 7), (19, 12, 1.0))
    write_past(tmp_path, past, ahead)
    assert read_past(tmp_path) == (past, ahead)
    assert json.loads((tmp_path / "questions" / "past.json").read_text())["12"] == [1, [2 / 7]]
    (tmp_path / "ahead").mkdir()
    write_past(tmp_path / "ahead", {}, ahead)
    assert read_past(tmp_path / "ahead") == ({}, ahead)
    write_past(tmp_path / "none", {}, ())
    assert read_past(tmp_path / "none") == ({}, ()) and not (tmp_path / "none").exists()


def test_groups_count_in_draw_order_whenever_they_are_complete():
    """Question 5 was all right at draw 8, which is known before its draw 2."""
    memory = Memory({5: Past(1, (0.5,))}, [(8, 5, 1.0)])
    memory.add([(9, 6, 0.25), (4, 6, 0.0)])
    memory.count_up_to(4)
    assert memory.past == {5: Past(1, (0.5,)), 6: Past(1, (0.0,))}
    assert memory.ahead(waiting={9}) == ((8, 5, 1.0),)
    memory.add([(7, 5, 0.75)])
    memory.count_up_to(9)
    assert memory.past == {5: Past(3, (0.5, 0.75, 1.0)), 6: Past(2, (0.0, 0.25))}
    assert memory.ahead(waiting=()) == ()


def test_without_a_choice_everything_is_asked():
    stream = Stream()
    assert [d for d, _ in draw_questions(stream, 3, None, {}, None)[0]] == [0, 1, 2] and stream.cursor == 3


def test_ranks_that_differ_are_an_error(monkeypatch):
    """The other rank stands for one whose function threw dice."""
    others = iter([[0], [0, 2, 3]])

    def gather(mine, _):
        return [mine] if mine is None else [mine, next(others) if isinstance(mine, list) else hash((0, 2, 3))]

    monkeypatch.setattr(choosing, "gather_objects", gather)
    next(others)
    with pytest.raises(ChoiceError, match=r"does not say the same on every rank: asked are draws \[1, 2\]"):
        draw_questions(Stream(), 3, Choice("dice", lambda _: True, SEED), {}, None)


def test_the_module_says_its_numbers():
    assert choice.SKIP_PROBABILITY == 0.75 and choice.KEPT_RATES == 4
