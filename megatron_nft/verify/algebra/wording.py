"""Answers in words: how they are compared, and which of them stand for a number or a set."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_nft.verify.algebra.tree import Tree
from megatron_nft.verify.algebra.vocabulary import words

_NUMBERS = words(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
    """
)
NUMBER_WORDS = {word: number for number, word in enumerate(_NUMBERS)}
_FILLER = frozenset(
    words(
        """
        the a an value values answer answers final is are equals equal to of so therefore thus hence approximately
        approx roughly about
        """
    )
)
MAX_WORDS_CHARS = 2000  # longer answers are not words
_SYNONYMS = {"dne": "doenotexist", "limitdoenotexist": "doenotexist"}
_REALS = frozenset(words("sreal allrealnumber allreal realnumber setofallrealnumber setofrealnumber allrealvalue"))
_EMPTY = frozenset(words("emptyset semptyset nullset"))
_opening = re.compile(r"(?:it is|it's|they are|the answer is|answer:)\s+")
_words_only = re.compile(r"[^\d\\{}^_=<>+*/|]*[^\W\d_]{2,}[^\d\\{}^_=<>+*/|]*$")
_word_or_picture = re.compile(r"[^\W_]+|(?<=\w)[^\w\s!-~\u2000-\u206f]+(?=\w)")  # a picture within a word is no space
_letters = re.compile(r"[^\W\d_]+")
_text = re.compile(r"\\text\{([^{}]*)\}")
_point = re.compile(r"(?<!\d)[.,]|[.,](?!\d)")


def is_words(text: str) -> bool:
    """Whether a normalised answer consists of words and punctuation, such as `no solution`."""
    return len(text) <= MAX_WORDS_CHARS and bool(_words_only.match(text))


def is_filler(phrase: str) -> bool:
    """Whether words in front of an answer say nothing about it, such as `The answer is`."""
    found = _letters.findall(phrase.lower())
    return bool(found) and all(word in _FILLER for word in found)


def normal_text(phrase: str) -> str:
    """Return words in the form that is compared: lower-case letters and digits, singular, without articles."""
    phrase = phrase.casefold().strip()
    opening = _opening.match(phrase)
    kept = _word_or_picture.findall(phrase[opening.end() :] if opening else phrase)
    singular = [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in kept]
    text = "".join(word for word in singular if word not in ("the", "a", "an")) or "".join(kept)
    return _SYNONYMS.get(text, text)


def word_tree(phrase: str) -> Tree:
    """Return words as a tree: a number (`twelve`), a set (`all real numbers`), or text."""
    text = normal_text(phrase)
    if phrase.strip().lower() in NUMBER_WORDS:
        return ("n", Fraction(NUMBER_WORDS[phrase.strip().lower()]))
    if text in _REALS:
        return ("reals",)
    return ("set",) if text in _EMPTY else ("text", text)


def same_wording(gold: str, found: str) -> bool:
    r"""Whether two normalised answers read alike apart from LaTeX: `\text{8:30 a.m.}` and `8:30 \text{ a.m.}`."""
    gold, found = _as_read(gold), _as_read(found)
    return gold == found != ""


def _as_read(text: str) -> str:
    text = _text.sub(r"\1", text).casefold()
    return re.sub(r"\s", "", _point.sub("", text))
