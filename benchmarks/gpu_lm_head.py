"""Linear + log-softmax + gather + entropy, forward and backward: ours against plain torch and chunked torch.

T 8192, H 4096, V 131072 in bf16. TFLOP/s counts 8 T H V, whatever is computed again. Memory: the peak beyond inputs
and the returned gradients. Errors: relative, 2-norm, against float64 on the first 512 tokens.
"""

from __future__ import annotations

import torch
from gpu_common import Results, ceilings, free_memory, median_ms, verdict
from torch.utils.checkpoint import checkpoint

from megatron_nft.policy.logprobs import linear_logprobs

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


if __name__ == "__main__":
    main()
