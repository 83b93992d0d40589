"""`verify.on_disagreement` from the verdicts to what the loss trains on."""

import numpy as np
import pytest
from tiny import make_tokenizer

from megatron_nft.algorithms import open_algorithm
from megatron_nft.config import Config
from megatron_nft.engines.answers import generate_groups
from megatron_nft.engines.engine import Completion
from megatron_nft.types import Prompt
from megatron_nft.verify import VerifierPool

TEXTS = ("\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{2}")  # to 1/2; the strict grader refuses the second


class ScriptedEngine:
    """Gives TEXTS as the answers to every question."""

    weight_version = 0

    def generate(self, requests, sampling, on_wait=None):
        tokenizer = make_tokenizer()
        for i in range(len(requests)):
            for sample, text in enumerate(TEXTS):
                ids = np.array(tokenizer.encode(text), dtype=np.int32)
                yield i, sample, Completion(ids, np.zeros(len(ids), dtype=np.float32), "stop", 0)


@pytest.mark.parametrize(
    ("graders", "policy", "trained", "rate"),
    [
        ("dapo_boxed,maths", "trust_first", {0: True, 1: False, 2: False}, 1 / 3),
        ("dapo_boxed,maths", "drop", {0: True, 2: False}, 1 / 2),
        ("dapo_boxed,maths", "not_negative", {0: True, 2: False}, 1 / 2),
        ("maths,dapo_boxed", "trust_first", {0: True, 1: True, 2: False}, 2 / 3),
        ("maths,dapo_boxed", "drop", {0: True, 2: False}, 1 / 2),
        ("maths,dapo_boxed", "not_negative", {0: True, 1: True, 2: False}, 2 / 3),
    ],
)
def test_disagreement_decides_who_is_trained(tmp_path, graders, policy, trained, rate):
    config = Config(
        run_dir=tmp_path,
        model={"path": tmp_path},
        data={"train": [tmp_path]},
        rollout={"answers_per_question": len(TEXTS)},
        verify={"grader": graders, "on_disagreement": policy, "workers": 1},
    )
    prompt = Prompt(0, "", ({"role": "user", "content": "half?"},), "1/2", np.arange(3, dtype=np.int32))
    with VerifierPool(config.verify) as pool:
        (group,), _ = generate_groups(
            ScriptedEngine(), [(0, prompt)], config, pool, step=1, weight_version=0, tokenizer=make_tokenizer()
        )
    samples = open_algorithm(config.algorithm, max_response_tokens=20).samples(group)
    assert {s.sample_index: s.correct for s in samples} == trained
    assert [s.correct_rate for s in samples] == pytest.approx([rate] * len(trained))
    verdicts = {name: str(verdict) for name, verdict in group.rollouts[1].grader_verdicts.items()}
    assert verdicts == {"maths": "correct", "dapo_boxed": "wrong"}
