"""Output layer and loss in one pass: exact against whole logits, gradients added where Megatron wants them, once.

The plain computation is torch.log_softmax on whole logits with torch's own autograd, in float64. The Triton kernels run
in Triton's interpreter where there is no GPU; tests/gpu runs them compiled.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_nft.policy.one_pass import linear_loss, uses_one_pass

TOKENS, HIDDEN, ROWS, VOCAB = 150, 16, 300, 291  # the last rows are padding
TEMPERATURE, SCALE = 0.7, 1 / 32
OPTIONS = {"vocab_size": VOCAB, "temperature": TEMPERATURE, "scale": SCALE}


def make(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(ROWS, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    labels[:2] = torch.tensor([0, VOCAB - 1])
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def token_loss(logprobs: torch.Tensor, rows: slice) -> torch.Tensor:
    """Nonlinear, another one for every token, none for every fifth."""
    number = torch.arange(TOKENS)[rows].to(logprobs.dtype)
    return torch.where(number % 5 == 0, 0.0, torch.cos(number) * logprobs + 0.05 * logprobs.square())


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """(loss, log-probs, token losses, dX, dW) in float64, from whole logits."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    log_p = torch.log_softmax(x @ w[:VOCAB].T / TEMPERATURE, -1)
    logprobs = log_p.gather(-1, labels[:, None]).squeeze(-1)
    losses = token_loss(logprobs, slice(0, TOKENS))
    loss = SCALE * losses.sum()
    loss.backward()
    return [loss.detach(), logprobs.detach(), losses.detach(), x.grad, w.grad]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk_tokens", [1, 7, 150, 1000])
def test_exact_in_float64(chunk_tokens: int) -> None:
    hidden, weight, labels = make(torch.float64)
    loss, logprobs, losses = linear_loss(hidden, weight, labels, token_loss, chunk_tokens=chunk_tokens, **OPTIONS)
    loss.backward()
    found = (loss, logprobs, losses, hidden.grad, weight.grad)
    for f, e in zip(found, plain(hidden, weight, labels), strict=True):
        assert relative(f, e) < 1e-13
    assert (weight.grad[VOCAB:] == 0).all()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 8e-3)])
def test_sixteen_bits_into_a_main_gradient(dtype: torch.dtype, tolerance: float, kernels: str) -> None:
    """Two micro-batches add up in fp32, to what was there."""
    if kernels == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (pip install triton)")
    if kernels == "triton" and torch.cuda.is_available():
        pytest.skip("a GPU is there: tests/gpu runs the compiled kernels")
    hidden, weight, labels = make(dtype)
    weight.main_grad = torch.ones(ROWS, HIDDEN)
    expected = plain(hidden, weight, labels)
    for _ in range(2):
        hidden.grad = None
        loss, logprobs, _ = linear_loss(
            hidden, weight, labels, token_loss, chunk_tokens=74, use_triton=kernels == "triton", **OPTIONS
        )
        loss.backward()
    # 74 x 1.75 = 129 tokens fit a chunk of Triton's: 128 and 22. Its logits are fp32, torch's rounded to the dtype.
    assert relative(logprobs, expected[1]) < (1e-6 if kernels == "triton" else tolerance)
    assert hidden.grad.dtype is dtype
    assert relative(hidden.grad, expected[3]) < tolerance
    assert relative(weight.main_grad - 1, 2 * expected[4]) < tolerance
    assert (weight.main_grad[VOCAB:] == 1).all()


def test_megatron_sees_a_gradient_that_was_added_and_takes_no_memory() -> None:
    hidden, weight, labels = make(torch.float32)
    weight.main_grad = torch.zeros(ROWS, HIDDEN)
    linear_loss(hidden, weight, labels, token_loss, **OPTIONS)[0].backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape
    assert weight.grad.untyped_storage().nbytes() == weight.element_size()
    assert not weight.grad.any()


def test_a_tied_embeddings_own_gradient_still_counts() -> None:
    hidden, weight, labels = make(torch.float32)
    weight.main_grad = torch.zeros(ROWS, HIDDEN)
    embedded = weight[labels].sum()
    loss = linear_loss(hidden, weight, labels, token_loss, weight_is_shared=True, **OPTIONS)[0]
    (loss + embedded).backward()
    assert not hasattr(weight, "grad_added_to_main_grad")  # else Megatron's hook would drop the embedding's part
    torch.testing.assert_close(weight.grad[:, 0], torch.bincount(labels, minlength=ROWS).float())
    assert relative(weight.main_grad, plain(hidden, weight, labels)[4]) < 1e-5


def test_nothing_is_added_without_gradients() -> None:
    hidden, weight, labels = make(torch.float32)
    weight.main_grad = torch.zeros(ROWS, HIDDEN)
    with torch.no_grad():
        loss, logprobs, _ = linear_loss(hidden, weight, labels, token_loss, **OPTIONS)
    expected = plain(hidden, weight, labels)
    assert not loss.requires_grad and not weight.main_grad.any()
    assert relative(loss, expected[0]) < 1e-5 and relative(logprobs, expected[1]) < 1e-5


def test_a_loss_scaled_afterwards_is_refused() -> None:
    hidden, weight, labels = make(torch.float32)
    loss, _, _ = linear_loss(hidden, weight, labels, token_loss, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"policy\.lm_head=one_pass was scaled"):
        (2 * loss).backward()


def test_a_nan_reaches_both_gradients() -> None:
    hidden, weight, labels = make(torch.float32)
    with torch.no_grad():
        hidden[3, 0] = float("nan")
    weight.main_grad = torch.zeros(ROWS, HIDDEN)
    loss, logprobs, _ = linear_loss(hidden, weight, labels, token_loss, chunk_tokens=8, **OPTIONS)
    loss.backward()
    assert torch.isnan(loss)
    assert torch.isnan(logprobs).nonzero().flatten().tolist() == [3]
    assert torch.isnan(hidden.grad).any(-1).nonzero().flatten().tolist() == [3]
    assert torch.isnan(weight.main_grad).any()


def test_wrong_arguments() -> None:
    hidden, weight, labels = make(torch.float32)
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_loss(hidden, weight, labels, token_loss, temperature=0)
    with pytest.raises(ValueError, match="hidden has 149 tokens over the TP ranks, labels has 150"):
        linear_loss(hidden[:149], weight, labels, token_loss)


def test_where_it_is_used() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert uses_one_pass("auto", cpu) and not uses_one_pass("auto", gpu)
    assert uses_one_pass("one_pass", gpu) and not uses_one_pass("two_pass", cpu)
