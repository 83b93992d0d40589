"""Linear + log-softmax + gather + entropy, forward and backward: ours against liger-kernel, plain and chunked torch.

T 8192, H 4096, V 131072 in bf16. TFLOP/s counts 8 T H V, whatever is computed again. Memory: the peak beyond inputs
and the returned gradients. Errors: relative, 2-norm, against float64 on the first 512 tokens.

A second table holds the same with NFT's loss, from hidden states to an fp32 main gradient, as a training step has it:
in one pass over the logits (policy.lm_head=one_pass) and in two.
"""

from __future__ import annotations

import importlib.util

import torch
from gpu_common import Results, ceilings, free_memory, median_ms, verdict
from torch.utils.checkpoint import checkpoint

from megatron_nft.losses import nft_loss
from megatron_nft.policy.logprobs import linear_logprobs
from megatron_nft.policy.one_pass import linear_loss

T, H, V = 8192, 4096, 131072


def plain(x, w, labels):
    log_p = torch.log_softmax((x @ w.T).float(), -1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def chunked(x, w, labels, rows=1024):
    """The usual kind: chunks over tokens, recomputed in the backward pass by torch's checkpointing."""
    parts = [
        checkpoint(plain, x[i : i + rows], w, labels[i : i + rows], use_reentrant=False) for i in range(0, len(x), rows)
    ]
    return tuple(torch.cat(p) for p in zip(*parts))


def ours(x, w, labels):
    return linear_logprobs(x, w, labels, with_entropy=True)


def ours_torch(x, w, labels):
    return linear_logprobs(x, w, labels, with_entropy=True, use_triton=False)


def liger(x, w, labels):
    """liger-kernel 0.8.5: CuTe kernels on compute capability 9.0 (extra `cutedsl`), else chunked torch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(x, w, labels, 1.0, -100, 1, True)
    return -nll, entropy


def nft(logprobs, rows):
    """NFT's loss of some tokens: behaviour log-probs a little off, every other thousand of tokens wrong, r 0.5."""
    number = torch.arange(rows.start, rows.stop, device=logprobs.device)
    behaviour = logprobs.detach() + 0.1 * torch.cos(number)
    return nft_loss(logprobs, behaviour, (number // 1000 % 2).float(), torch.full_like(behaviour, 0.5))


def loss_in_one_pass(x, w, labels):
    loss, _, _ = linear_loss(x, w, labels, nft, scale=1 / len(labels))
    loss.backward()
    w.grad = None  # as Megatron's hook does


def loss_in_two_passes(logprobs_of):
    """From log-probs with autograd; the gradient of `w` is added to the main gradient as Megatron's hook does."""

    def run(x, w, labels):
        (nft(logprobs_of(x, w, labels), slice(0, len(labels))).sum() / len(labels)).backward()
        w.main_grad.add_(w.grad)
        w.grad = None

    return run


def liger_logprobs(x, w, labels):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(x, w, labels, 1.0, -100, 1, False)


def make(tokens: int):
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, H, generator=g, device="cuda").to(torch.bfloat16)
    w = (torch.randn(V, H, generator=g, device="cuda") * 3 / H**0.5).to(torch.bfloat16)
    labels = torch.randint(0, V, (tokens,), generator=g, device="cuda")
    return x.requires_grad_(), w.requires_grad_(), labels


def upstream(tokens: int):
    g = torch.Generator("cuda").manual_seed(1)
    return torch.randn(tokens, generator=g, device="cuda"), 0.1 * torch.randn(tokens, generator=g, device="cuda")


def both(method, x, w, labels, up):
    x.grad = w.grad = None
    logprobs, entropy = method(x, w, labels)
    torch.autograd.backward([logprobs, entropy], [u.to(logprobs.dtype) for u in up])
    return logprobs, entropy


def errors(method) -> dict:
    x, w, labels = make(512)
    up = upstream(512)
    found = [t.detach() for t in both(method, x, w, labels, up)] + [x.grad.clone(), w.grad.clone()]
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    log_p = torch.log_softmax(x64 @ w64.T, -1)
    expected = [log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)]
    torch.autograd.backward(expected, [u.double() for u in up])
    expected = [t.detach() for t in expected] + [x64.grad, w64.grad]
    relative = [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, expected)]
    return dict(zip(("error log-prob", "error entropy", "error dX", "error dW"), relative))


def measure(method, ceiling: float) -> dict:
    figures = errors(method)
    free_memory()
    x, w, labels = make(T)
    up = upstream(T)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both(method, x, w, labels, up)
    extra = torch.cuda.max_memory_allocated() - before - x.grad.nbytes - w.grad.nbytes
    x.grad = w.grad = None
    ms = median_ms(lambda: both(method, x, w, labels, up), repeats=10, warmup=2)
    with torch.no_grad():
        forward = median_ms(lambda: method(x, w, labels), repeats=5, warmup=1)
    rate = 8 * T * H * V / ms / 1e9
    targets = {"target ms": verdict(ms, at_most=50.0), "target GB": verdict(extra / 1e9, at_most=1.0)}
    return {
        "ms": ms,
        "forward ms": forward,
        "TFLOP/s": rate,
        "share of bf16 ceiling": rate / ceiling,
        "extra GB": extra / 1e9,
        **figures,
        **(targets if method is ours else {}),  # the others are compared with
    }


def loss_errors(method) -> dict:
    x, w, labels = make(512)
    w.main_grad = torch.zeros_like(w, dtype=torch.float32)
    method(x, w, labels)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    logprobs = torch.log_softmax(wide[0] @ wide[1].T, -1).gather(-1, labels[:, None])[:, 0]
    (nft(logprobs, slice(0, 512)).sum() / 512).backward()
    found, expected = (x.grad, w.main_grad), (wide[0].grad, wide[1].grad)
    relative = [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, expected)]
    return dict(zip(("error dX", "error dW"), relative))


def measure_loss(method, ceiling: float) -> dict:
    figures = loss_errors(method)
    free_memory()
    x, w, labels = make(T)
    w.main_grad = torch.zeros_like(w, dtype=torch.float32)

    def step():
        x.grad = None
        method(x, w, labels)

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    extra = torch.cuda.max_memory_allocated() - before - x.grad.nbytes
    ms = median_ms(step, repeats=10, warmup=2)
    return {
        "ms": ms,
        "share of 6 T H V at the bf16 ceiling": 6 * T * H * V / ms / 1e9 / ceiling,
        "extra GB": extra / 1e9,
        **figures,
        **({"target ms": verdict(ms, at_most=45.0)} if method is loss_in_one_pass else {}),
    }


def main() -> None:
    results = Results("lm_head", f"T {T}, H {H}, V {V}, bf16, forward + backward with entropy. Target 50 ms, 1 GB.")
    ceiling = results.add("ceilings of this run", **ceilings())["bf16 TFLOP/s"]
    for name, method in (
        ("ours (cuBLAS + Triton)", ours),
        ("ours in torch, 1024 tokens a chunk", ours_torch),
        ("chunked torch with checkpointing", chunked),
        ("plain torch, whole logits", plain),
    ):
        results.measure(name, lambda method=method: measure(method, ceiling))
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    if has_liger:
        results.measure("liger-kernel", lambda: measure(liger, ceiling))
    note = f"T {T}, H {H}, V {V}, bf16, with NFT's loss, into an fp32 main gradient. Target 45 ms."
    with_loss = Results("lm_head_loss", note)
    ours_two = loss_in_two_passes(lambda *inputs: linear_logprobs(*inputs)[0])
    with_loss.measure("one pass", lambda: measure_loss(loss_in_one_pass, ceiling))
    with_loss.measure("two passes", lambda: measure_loss(ours_two, ceiling))
    if has_liger:
        with_loss.measure("liger-kernel", lambda: measure_loss(loss_in_two_passes(liger_logprobs), ceiling))
    else:
        print("lm_head | liger-kernel left out: the package is not there", flush=True)


if __name__ == "__main__":
    main()
