"""How much room an answer has: the limits of the protocol and the positions of the model."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nft.evaluate.protocol import Sampling
from megatron_nft.evaluate.tasks import by_max_tokens
from megatron_nft.types import Prompt


def prompt(index: int, tokens: int) -> Prompt:
    return Prompt(index, "", ({"role": "user", "content": "q"},), "1", np.zeros(tokens, dtype=np.int32))


def room(lengths: list[int], max_positions: int) -> dict[int, list[int]]:
    """Answers of at most 20 tokens after prompts of at most 10 -> numbers of the prompts."""
    sampling = Sampling(temperature=1.0, top_p=1.0, max_prompt_tokens=10, max_response_tokens=20, seed=0)
    groups = by_max_tokens([prompt(i, n) for i, n in enumerate(lengths)], sampling, max_positions)
    return {answer: [p.index for p in prompts] for answer, prompts in groups.items()}


def test_long_prompts_leave_less():
    assert room([3, 10, 14, 29], 30) == {20: [0, 1], 16: [2], 1: [3]}


def test_a_prompt_that_fills_both_limits_is_named():
    with pytest.raises(ValueError, match=r"question 1 has 30 tokens, which leaves no room .* --max-prompt-tokens"):
        room([3, 30], 100)


def test_too_few_positions_say_what_would_fit():
    with pytest.raises(
        ValueError, match=r"question 0 has 9 tokens; .* 25 positions; lower --max-response-tokens to 16$"
    ):
        room([9], 25)


@pytest.mark.parametrize("positions", [12, 11])
def test_a_question_that_alone_exceeds_the_model_is_not_told_to_shorten_answers(positions):
    with pytest.raises(ValueError, match=rf"question 0 alone has 12 tokens, and the model has {positions} pos") as told:
        room([12], positions)
    assert "--max-response-tokens" not in str(told.value)
