"""A grader that a model with random weights satisfies half of the time."""


def grade(response: str, answer: str, data_source: str, extra: dict | None) -> bool:
    """True where the characters' code points add up to an even number."""
    return sum(map(ord, response)) % 2 == 0
