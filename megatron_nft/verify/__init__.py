"""Verdicts on answers: graders, and worker processes that can be killed."""

from megatron_nft.verify.inbox import VerifierError
from megatron_nft.verify.outcome import Graded, Outcome
from megatron_nft.verify.pool import VerifierPool
from megatron_nft.verify.registry import GRADERS, GraderError, grade_one, split_names

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
