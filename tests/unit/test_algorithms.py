"""The algorithm that the settings name: its loss over packed micro-batches, its metrics, and names that are refused."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_nft.algorithms import ALGORITHMS, AlgorithmError, algorithm_class, open_algorithm, read_settings
from megatron_nft.data.packing import filler, pack
from megatron_nft.losses import nft_loss, nft_sequence_loss, policy_gradient_loss, rft_loss
from megatron_nft.metrics import Max, Mean
from megatron_nft.types import TrainingSample


def sample(prompt, response, correct, rate, advantage=0.0, behaviour=-1.0):
    return TrainingSample(
        draw=0,
        sample_index=0,
        input_ids=np.arange(1, prompt + response + 1, dtype=np.int32),
        prompt_length=prompt,
        rollout_logprobs=np.full(response, -1.1, np.float32),
        behaviour_logprobs=None if behaviour is None else np.full(response, behaviour, np.float32),
        correct=correct,
        correct_rate=rate,
        advantage=advantage,
    )


def evaluate(logprobs, batch, **settings):
    """Loss [T], 0 outside the mask, and metrics, as policy/step.py takes them."""
    algorithm = open_algorithm(read_settings(settings), max_response_tokens=20)
    loss = algorithm.loss(logprobs, batch).where(batch.loss_mask > 0, 0.0)
    with torch.no_grad():
        return loss, algorithm.metrics(logprobs.detach(), loss.detach(), batch)


def parts(metric):
    """(total, count) of a mean, the value of a maximum, as numbers."""
    return (float(metric.total), float(metric.count)) if isinstance(metric, Mean) else float(metric.value)


@pytest.fixture
def batch():
    """3 + 5 response tokens, then 4 tokens of padding. Ratio 2 on the right answer, 2 and 1/2 on the wrong one."""
    return pack([sample(2, 3, True, 0.25, 1.5), sample(3, 5, False, 0.5, -0.5)], [0, 1], multiple_of=17)


@pytest.fixture
def logprobs(batch):
    ratio = torch.ones_like(batch.loss_mask)
    ratio[1:4] = 2.0
    ratio[7:12] = torch.tensor([2.0, 0.5, 0.5, 1.0, 1.0])
    return (ratio.log() - 1.0).requires_grad_()


@pytest.mark.parametrize(
    ("settings", "direct"),
    [
        (
            {"name": "nft", "negative_weight": 0.5, "clamp": 0.7, "prompt_weight": "grpo"},
            lambda lp, b: nft_loss(
                lp,
                b.behaviour_logprobs,
                b.correct,
                b.correct_rate,
                negative_weight=0.5,
                clamp=0.7,
                prompt_weight="grpo",
            ),
        ),
        ({"name": "rft"}, lambda lp, b: rft_loss(lp, b.behaviour_logprobs, b.correct, b.correct_rate)),
        (
            {"name": "nft", "ratio": "sequence", "loss_divisor": "answers", "ratio_max_log": 1.0},
            lambda lp, b: nft_sequence_loss(
                lp, b.behaviour_logprobs, b.correct, b.correct_rate, b.loss_mask, b.segment_ids, ratio_max_log=1.0
            ),
        ),
        (
            {"name": "dapo", "clip_low": 0.1, "clip_high": 0.28},
            lambda lp, b: policy_gradient_loss(lp, b.behaviour_logprobs, b.advantage, clip_low=0.1, clip_high=0.28),
        ),
        ({"name": "grpo"}, lambda lp, b: policy_gradient_loss(lp, b.behaviour_logprobs, b.advantage)),
        (
            {"name": "dr_grpo", "clip_low": 0.3},
            lambda lp, b: policy_gradient_loss(lp, b.behaviour_logprobs, b.advantage, clip_low=0.3),
        ),
    ],
    ids=lambda x: x["name"] if isinstance(x, dict) else "",
)
def test_settings_reach_the_loss(settings, direct, batch, logprobs):
    loss, _ = evaluate(logprobs, batch, **settings)
    expected = direct(logprobs, batch) * batch.loss_mask
    assert expected.abs().sum() > 0.1
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient[batch.loss_mask == 0].abs().sum() == 0


def test_metrics_by_hand(batch, logprobs):
    loss, metrics = evaluate(logprobs, batch, prompt_weight="uniform")
    ln2 = math.log(2)
    # wrong, r = 1/2: x = 2 - R is 0 (clamped), 1.5, 1.5, 1, 1: loss -log of 1, 1.5, 1.5, 1, 1
    expected = {
        "loss/positive": (-3 * ln2, 3),
        "loss/negative": (-2 * math.log(1.5), 5),
        "tokens/positive_share": (3, 8),
        "ratio/mean": (6 + 2 + 0.5 + 0.5 + 1 + 1, 8),
        "ratio/log_mean": (3 * ln2 + ln2 - 2 * ln2, 8),
        "ratio/kl": ((6 + 2 + 0.5 + 0.5 + 1 + 1) - 8 - 2 * ln2, 8),
        "ratio/max": 2.0,
        "ratio/max_inverse": 2.0,
        "clamp/share": (1, 5),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert parts(metrics[name]) == pytest.approx(value, rel=1e-5), name
    assert loss.sum().item() == pytest.approx(-3 * ln2 - 2 * math.log(1.5), rel=1e-5)


def test_with_one_ratio_per_answer_the_clamp_is_that_of_the_answer():
    # r = 1/2, eps = 1: an answer is at the clamp where the product of its tokens' ratios is above 1.
    batch = pack([sample(1, 2, False, 0.5), sample(1, 3, False, 0.5)], [0, 1])
    ratio = torch.tensor([4.0, 0.5, 1.0, 0.5, 0.5, 2.0, 1.0])  # products 2 and 1/2
    token, answer = (
        evaluate(ratio.log() - 1.0, batch, **settings)[1]["clamp/share"]
        for settings in ({}, {"ratio": "sequence", "loss_divisor": "answers"})
    )
    assert parts(token) == (2, 5)  # the first token of the one, the last of the other
    assert parts(answer) == (2, 5)  # both tokens of the one, none of the other
    ratio[5] = 8.0
    longer = evaluate(ratio.log() - 1.0, batch, ratio="sequence", loss_divisor="answers")[1]
    assert parts(longer["clamp/share"]) == (5, 5)


def test_the_denominator_is_of_tokens_of_answers_or_a_number():
    given = {"tokens": 40, "answers": 8}
    found = [read_settings({"loss_divisor": d}).denominator(**given) for d in ("tokens", "answers", 1000)]
    assert found == [40.0, 8.0, 1000.0] and all(isinstance(f, float) for f in found)


def test_only_nft_has_a_clamp_to_log(batch, logprobs):
    for name in ALGORITHMS:
        assert ("clamp/share" in evaluate(logprobs, batch, name=name)[1]) == (name == "nft")


def test_a_filler_carries_no_loss_and_no_counts():
    for name in ALGORITHMS:
        logprobs = torch.full((8,), -3.0, requires_grad=True)
        loss, metrics = evaluate(logprobs, filler(8), name=name)
        loss.sum().backward()
        assert loss.tolist() == [0.0] * 8 and logprobs.grad.abs().sum() == 0
        assert all(parts(v) == (0.0 if isinstance(v, Max) else (0.0, 0.0)) for v in metrics.values())


@pytest.mark.parametrize(
    "settings",
    [
        *({"name": name} for name in ("nft", "grpo", "gspo", "cispo")),
        {"name": "nft", "ratio": "sequence", "loss_divisor": "answers"},
    ],
)
def test_samples_without_behaviour_logprobs_cannot_pass(settings):
    batch = pack([sample(2, 3, True, 0.5, 1.0, behaviour=None)], [0])
    loss, _ = evaluate(torch.full((5,), -1.0), batch, **settings)
    assert torch.isnan(loss.sum())


def test_an_enormous_ratio_stays_finite_in_the_log():
    batch = pack([sample(1, 2, False, 0.5, behaviour=-200.0)], [0])
    loss, metrics = evaluate(torch.full((3,), -0.5), batch)
    assert torch.isfinite(loss).all()
    assert all(np.isfinite(parts(v)).all() for v in metrics.values())
    assert parts(metrics["ratio/max"]) > 1e30


@pytest.mark.parametrize(
    "settings",
    [
        *({"name": name} for name in ALGORITHMS),
        {"name": "nft", "ratio": "sequence", "loss_divisor": "answers"},
        {"name": "grpo", "answer_loss": "mean", "loss_divisor": "answers"},
    ],
)
def test_only_losses_per_answer_make_a_token_depend_on_others(settings, batch, logprobs):
    algorithm = open_algorithm(read_settings(settings), max_response_tokens=20)
    whole = algorithm.loss(logprobs, batch)
    columns = ("behaviour_logprobs", "loss_mask", "correct", "correct_rate", "advantage", "segment_ids")
    pieces = [replace(batch, **{k: getattr(batch, k)[part] for k in columns}) for part in (slice(9), slice(9, None))]
    found = torch.cat([algorithm.loss(logprobs[:9], pieces[0]), algorithm.loss(logprobs[9:], pieces[1])])
    inside = batch.loss_mask > 0
    per_answer = settings["name"] == "gspo" or bool({"ratio", "answer_loss"} & settings.keys())
    assert torch.equal(found[inside], whole[inside]) != per_answer


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "ppo",
            "'ppo' is none of nft, rft, grpo, dr_grpo, dapo, gspo, cispo, w_reinforce, and not module:Class of your",
        ),
        (3, "3 is none of"),
        ("no_such_module:Mine", "cannot import no_such_module: ModuleNotFoundError"),
        ("broken:Mine", "cannot import broken: ZeroDivisionError: division by zero"),
        ("mine:Absent", "has no Absent"),
        ("mine:", "has no class after the colon"),
        ("mine:function", "function is not a subclass of megatron_nft.algorithms.Algorithm"),
        ("mine:Unrelated", "Unrelated is not a subclass of megatron_nft.algorithms.Algorithm"),
        ("mine:WithoutSettings", "WithoutSettings has no Settings"),
        ("mine:WithoutLoss", "WithoutLoss does not define loss"),
    ],
)
def test_names_that_cannot_be_used(name, said, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "mine.py").write_text(
        "from megatron_nft.algorithms import Algorithm, AlgorithmSettings\n"
        "def function(): pass\n"
        "class Unrelated: pass\n"
        "class WithoutSettings(Algorithm):\n"
        "    def loss(self, logprobs, batch): return logprobs\n"
        "class WithoutLoss(Algorithm):\n"
        "    Settings = AlgorithmSettings\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(AlgorithmError) as error:
        algorithm_class(name)
    assert said in str(error.value)


PER_TOKEN = {
    "nft": {},
    "rft": {},
    "grpo": {"correction_level": "sequence"},  # weights are made before the loss
    "dr_grpo": {"loss_divisor": "answers"},
    "dapo": {"overlong_buffer_tokens": 4},
    "cispo": {},
    "w_reinforce": {},
}
NOT_PER_TOKEN = (
    {"name": "gspo"},
    {"name": "gspo", "answer_loss": "sum"},
    {"name": "nft", "ratio": "sequence", "loss_divisor": "answers"},
    {"name": "rft", "ratio": "sequence", "loss_divisor": 8.0},
    *({"name": name, "answer_loss": "mean", "loss_divisor": "answers"} for name in ("grpo", "dapo", "cispo")),
)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_loss_that_is_per_token_may_be_asked_about_some_tokens(name, batch, logprobs):
    """Parts that cut both answers give what the whole gives."""
    algorithm = open_algorithm(read_settings({"name": name} | PER_TOKEN[name]), max_response_tokens=20)
    assert algorithm.per_token
    cuts = [slice(0, 3), slice(3, 9), slice(9, 17)]
    parts = torch.cat([algorithm.loss(logprobs[rows], batch.tokens_of(rows)) for rows in cuts])
    assert torch.equal(parts, algorithm.loss(logprobs, batch))


@pytest.mark.parametrize("settings", NOT_PER_TOKEN, ids=lambda s: "-".join(map(str, s.values())))
def test_a_loss_of_whole_answers_does_not_say_that_it_is_per_token(settings):
    assert not open_algorithm(read_settings(settings), max_response_tokens=20).per_token


def test_nobody_inherits_that_another_loss_was_per_token():
    class Other(algorithm_class("nft")):
        def loss(self, logprobs, batch):
            return logprobs - logprobs.mean()

    class Own(algorithm_class("grpo")):
        per_token = True

        def token_loss(self, logprobs, batch):
            return -logprobs

    class Renamed(algorithm_class("nft")):
        pass

    assert not Other(read_settings({}), max_response_tokens=20).per_token
    assert Own(read_settings({"name": "grpo"}), max_response_tokens=20).per_token
    assert Renamed(read_settings({}), max_response_tokens=20).per_token


def test_segments_of_some_tokens_are_those_that_lie_inside(batch):
    """Segments of 5, 8 and 4 tokens; tokens 3 to 9 are the last 2 of the first and the first 5 of the second."""
    assert batch.cu_seqlens.tolist() == [0, 5, 13, 17]
    part = batch.tokens_of(slice(3, 10))
    assert part.cu_seqlens.tolist() == [0, 2, 7, 7]
    assert part.segment_ids.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert torch.equal(part.labels, batch.labels[3:10])


def test_settings_are_read_without_torch_or_numpy():
    code = (
        "import sys\nfrom megatron_nft.algorithms import ALGORITHMS, read_settings\nimport megatron_nft.config\n"
        "for name in ALGORITHMS: read_settings({'name': name})\n"
        "print(sorted({'torch', 'numpy', 'megatron'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"
