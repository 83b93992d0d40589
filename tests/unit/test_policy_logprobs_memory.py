"""Log-probs from hidden states: the whole logits never exist, extreme and low-precision input, wrong arguments."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nft.policy.logprobs import linear_logprobs

TOKENS, HIDDEN, VOCAB = 96, 4, 512


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result of a torch call had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(item):
                self.numel = max(self.numel, item.numel())
        return result


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(TOKENS, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def exact(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs and gradients of their sum in float64, from whole logits."""
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logprobs = torch.log_softmax(wide[0] @ wide[1].T, -1).gather(-1, labels[:, None]).squeeze(-1)
    return logprobs.detach(), list(torch.autograd.grad(logprobs.sum(), wide))


@pytest.mark.parametrize("chunk", [8, 32])
def test_the_whole_logits_never_exist(chunk: int) -> None:
    hidden, weight, labels = inputs()
    with LargestTensor() as largest:
        logprobs, entropy = linear_logprobs(hidden, weight, labels, chunk_tokens=chunk, with_entropy=True)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest.numel == chunk * VOCAB  # neither [T, V] nor a second dimension of it


def test_large_logits_neither_overflow_nor_vanish() -> None:
    hidden, weight, labels = inputs(scale=1e3)
    logprobs, entropy = linear_logprobs(hidden, weight, labels, with_entropy=True)
    torch.testing.assert_close(logprobs.double(), exact(hidden, weight, labels)[0], rtol=1e-5, atol=1e-2)
    assert torch.isfinite(entropy).all() and (entropy >= -1e-3).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Sums are in fp32. The torch path's logits are rounded to the input's dtype: bf16 keeps 8 bits, 0.4 %."""
    hidden, weight, labels = inputs(dtype)
    logprobs, _ = linear_logprobs(hidden, weight, labels, chunk_tokens=5)
    assert logprobs.dtype is torch.float32
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert [g.dtype for g in gradients] == [dtype, dtype]
    expected, expected_gradients = exact(hidden, weight, labels)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=tolerance)
    for got, want in zip(gradients, expected_gradients, strict=True):
        assert (got.double() - want).norm() / want.norm() < tolerance


def test_wrong_arguments() -> None:
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_logprobs(hidden, weight, labels, temperature=0)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        linear_logprobs(hidden, weight, labels, chunk_tokens=0)
    with pytest.raises(ValueError, match="hidden has 95 tokens over the TP ranks, labels has 96"):
        linear_logprobs(hidden[:95], weight, labels)
