"""The compiled Triton kernels: exact within stated rounding, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from gpu_policies import relative

from megatron_nft.policy.logprobs import linear_logprobs
from megatron_nft.policy.logprobs_kernels import triton_kernels
from megatron_nft.policy.one_pass import linear_loss

pytestmark = pytest.mark.needs("cuda")

TEMPERATURE = 0.8


def make(tokens: int, hidden: int, rows: int, dtype: torch.dtype, seed: int = 0):
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g, device="cuda").to(dtype)
    w = (torch.randn(rows, hidden, generator=g, device="cuda") * 3 / hidden**0.5).to(dtype)
    return x, w, torch.randint(0, rows - 5, (tokens,), generator=g, device="cuda")


def upstream(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(9)
    return torch.randn(tokens, generator=g, device="cuda"), torch.randn(tokens, generator=g, device="cuda")


def run(x, w, labels, **settings):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    logprobs, entropy = linear_logprobs(x, w, labels, temperature=TEMPERATURE, with_entropy=True, **settings)
    g, g_entropy = upstream(len(labels))
    ((logprobs * g).sum() + (entropy * g_entropy).sum()).backward()
    return logprobs.detach(), entropy.detach(), x.grad, w.grad


def plain(x, w, labels, vocab_size):
    x, w = (t.double().requires_grad_() for t in (x, w))
    log_p = torch.log_softmax(x @ w[:vocab_size].T / TEMPERATURE, -1)
    logprobs, entropy = log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    g, g_entropy = upstream(len(labels))
    ((logprobs * g).sum() + (entropy * g_entropy).sum()).backward()
    return logprobs.detach(), entropy.detach(), x.grad, w.grad


@pytest.mark.parametrize(("dtype", "gradient"), [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("tokens", "rows", "chunk"), [(513, 5003, 64), (64, 32000, 1024), (1000, 777, 7)])
def test_kernels_agree_with_float64(dtype, gradient, tokens, rows, chunk):
    x, w, labels = make(tokens, 256, rows, dtype)
    vocab_size = rows - 3
    assert triton_kernels(x) is not None
    expected = plain(x, w, labels, vocab_size)
    found = run(x, w, labels, vocab_size=vocab_size, chunk_tokens=chunk)
    for i, limit in enumerate((1e-5, 1e-5, gradient, gradient)):
        assert relative(found[i], expected[i]) < limit
    assert (found[3][vocab_size:] == 0).all()


def test_entropies_leave_the_logprobs_as_they_are():
    """Behaviour log-probs may be computed with them, those of an update never are: the ratio must be 1 all the same."""
    x, w, labels = make(300, 512, 9001, torch.bfloat16)
    a, b = (linear_logprobs(x, w, labels, temperature=TEMPERATURE, with_entropy=on)[0] for on in (True, False))
    assert (a - b).abs().max() < 1e-6


def test_kernels_agree_with_the_torch_path():
    x, w, labels = make(300, 512, 9001, torch.bfloat16)
    a, b = (run(x, w, labels, use_triton=on) for on in (True, False))
    assert (a[0] - b[0]).abs().max() < 0.1  # the torch path rounds logits to bf16
    assert relative(a[3], b[3]) < 0.02


def test_fp32_takes_the_torch_path():
    assert triton_kernels(torch.zeros(1, device="cuda")) is None


def curved(logprobs: torch.Tensor, rows: slice) -> torch.Tensor:
    """A loss per token: nonlinear, another one for each."""
    number = torch.arange(rows.start, rows.stop, device=logprobs.device)
    return torch.cos(number) * logprobs + 0.05 * logprobs.square()


@pytest.mark.parametrize(("dtype", "gradient"), [(torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("tokens", "rows", "chunk"), [(513, 5003, 64), (64, 32000, 1024), (1000, 777, 100)])
def test_one_pass_agrees_with_float64(dtype, gradient, tokens, rows, chunk):
    """The main gradient is added to. Gradients of logits are written over them by other threads than read them."""
    x, w, labels = make(tokens, 256, rows, dtype)
    vocab_size = rows - 3
    wide = [t.double().requires_grad_() for t in (x, w)]
    log_p = torch.log_softmax(wide[0] @ wide[1][:vocab_size].T / TEMPERATURE, -1)
    expected = log_p.gather(-1, labels[:, None])[:, 0]
    (curved(expected, slice(0, tokens)).sum() / 64).backward()
    x.requires_grad_(), w.requires_grad_()
    w.main_grad = torch.ones_like(w, dtype=torch.float32)
    loss, logprobs, _ = linear_loss(
        x, w, labels, curved, scale=1 / 64, vocab_size=vocab_size, temperature=TEMPERATURE, chunk_tokens=chunk
    )
    loss.backward()
    assert relative(logprobs, expected.detach()) < 1e-5
    assert relative(x.grad, wide[0].grad) < gradient
    assert relative(w.main_grad - 1, wide[1].grad) < gradient
    assert (w.main_grad[vocab_size:] == 1).all()


def test_memory_of_one_pass_at_the_target_size():
    """T 8192, H 4096, V 131072: at most 1 GB beyond inputs, main gradient and the returned gradient."""
    x, w, labels = make(8192, 4096, 131072, torch.bfloat16)
    x.requires_grad_(), w.requires_grad_()
    w.main_grad = torch.zeros_like(w, dtype=torch.float32)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_loss(x, w, labels, curved)[0].backward()
    assert torch.cuda.max_memory_allocated() - before - x.grad.nbytes <= 1e9


def test_memory_at_the_target_size():
    """T 8192, H 4096, V 131072: at most 1 GB beyond inputs and the returned gradients."""
    x, w, labels = make(8192, 4096, 131072, torch.bfloat16)
    x.requires_grad_(), w.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprobs, entropy = linear_logprobs(x, w, labels, with_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    returned = x.grad.nbytes + w.grad.nbytes
    assert torch.cuda.max_memory_allocated() - before - returned <= 1e9
