"""Grading of answers: the graders, and the worker processes that can be killed."""

from megatron_nft.verify.graders import GRADERS, GraderError, grade_one, split_names
from megatron_nft.verify.inbox import VerifierError
from megatron_nft.verify.outcome import Graded, Outcome
from megatron_nft.verify.pool import VerifierPool

__all__ = [
    "GRADERS",
    "Graded",
    "GraderError",
    "Outcome",
    "VerifierError",
    "VerifierPool",
    "grade_one",
    "split_names",
]
