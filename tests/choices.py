"""Functions for `data.choose` in tests of whole runs."""

from megatron_nft.data.choice import Drawn


def seldom_answered(question: Drawn) -> bool:
    """Questions that were never asked; others with a chance of 0.6, or of 0.3 where the last answers were all wrong."""
    return not question.past.asked or question.chance < (0.6 if question.past.rates[-1] else 0.3)


def nothing(question: Drawn) -> bool:
    """No question at all."""
    return False
