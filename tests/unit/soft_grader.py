"""A grader that gives numbers: the share of the characters of the answer that the response has."""


def grade(response: str, answer: str, data_source: str, extra: dict | None) -> float:
    return sum(c in response for c in answer) / len(answer)


def beyond(response: str, answer: str, data_source: str, extra: dict | None) -> float:
    return 1.5
