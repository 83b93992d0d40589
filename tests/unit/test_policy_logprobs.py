"""Log-probs and entropy without whole logits: exact against the plain computation, forward and backward.

The plain computation is torch.log_softmax on whole logits with torch's own autograd, in float64. The Triton kernels run
in Triton's interpreter where there is no GPU; tests/gpu runs them compiled.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from megatron_nft.policy.logprobs import linear_logprobs

TOKENS, HIDDEN, ROWS, VOCAB = 23, 16, 300, 291  # the last rows are padding
TEMPERATURE = 0.7


@pytest.fixture
def kernels():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (pip install triton)")
    if torch.cuda.is_available():
        pytest.skip("a GPU is there: tests/gpu runs the compiled kernels")
    from megatron_nft.policy import logprobs_triton

    return logprobs_triton


def make(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(ROWS, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    labels[:2] = torch.tensor([0, VOCAB - 1])
    return hidden, weight, labels


def upstream() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    return torch.randn(TOKENS, generator=g), torch.randn(TOKENS, generator=g)


def plain(hidden, weight, labels, with_entropy):
    """(log-probs, entropy, dX, dW) in float64, from whole logits."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    log_p = torch.log_softmax((x @ w[:VOCAB].T) / TEMPERATURE, -1)
    logprobs = log_p.gather(-1, labels[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    g, g_entropy = upstream()
    ((logprobs * g).sum() + (entropy * g_entropy * with_entropy).sum()).backward()
    return logprobs.detach(), entropy.detach(), x.grad, w.grad


def ours(hidden, weight, labels, with_entropy, **settings):
    x, w = (t.clone().requires_grad_() for t in (hidden, weight))
    logprobs, entropy = linear_logprobs(
        x, w, labels, vocab_size=VOCAB, temperature=TEMPERATURE, with_entropy=with_entropy, **settings
    )
    g, g_entropy = (u.to(logprobs.dtype) for u in upstream())
    total = (logprobs * g).sum() + ((entropy * g_entropy).sum() if with_entropy else 0)
    total.backward()
    return logprobs.detach(), None if entropy is None else entropy.detach(), x.grad, w.grad


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 64])
def test_torch_is_exact_in_float64(with_entropy, chunk_tokens):
    hidden, weight, labels = make(torch.float64)
    expected = plain(hidden, weight, labels, with_entropy)
    found = ours(hidden, weight, labels, with_entropy, chunk_tokens=chunk_tokens)
    assert (found[1] is None) == (not with_entropy)
    for f, e in zip(found, expected):
        assert f is None or relative(f, e) < 1e-13
    assert (found[3][VOCAB:] == 0).all()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("chunk_tokens", [1, 64])  # tiles of 128 columns, one tile
def test_triton_agrees_with_float64(kernels, dtype, tolerance, with_entropy, chunk_tokens):
    hidden, weight, labels = make(dtype)
    expected = plain(hidden, weight, labels, with_entropy)
    found = ours(hidden, weight, labels, with_entropy, chunk_tokens=chunk_tokens, use_triton=True)
    assert relative(found[0], expected[0]) < 1e-6  # logits are fp32: only their sums are rounded
    if with_entropy:
        assert relative(found[1], expected[1]) < 1e-6
    for f, e in zip(found[2:], expected[2:]):
        assert f.dtype is dtype
        assert relative(f, e) < tolerance
    assert (found[3][VOCAB:] == 0).all()


def test_triton_reads_each_ranks_rows(kernels):
    """Two ranks' sums, combined by hand, are those of the whole vocabulary."""
    hidden, weight, labels = make(torch.bfloat16)
    expected = plain(hidden, weight, labels, True)
    halves = []
    for first, rows in ((0, weight[:150]), (150, weight[150:VOCAB])):
        halves.append(
            kernels.local_sums(
                hidden, rows, labels - first, temperature=TEMPERATURE, max_logits=256 * TOKENS, with_entropy=True
            )
        )
    largest = torch.maximum(halves[0][0], halves[1][0])
    shifts = [(m - largest, sums) for m, sums in halves]
    total = sum(x.exp() * sums[0] for x, sums in shifts)
    label = sum(sums[1] for _, sums in shifts)
    weighted = sum(x.exp() * (sums[2] + x * sums[0]) for x, sums in shifts)
    assert relative(label - largest - total.log(), expected[0]) < 1e-6
    assert relative(total.log() - weighted / total, expected[1]) < 1e-6


def test_extreme_logits_stay_finite(kernels):
    hidden, weight, labels = make(torch.bfloat16)
    found = ours(hidden * 100, weight * 10, labels, True, use_triton=True)
    assert all(torch.isfinite(f).all() for f in found)
    assert (found[0] <= 0).all()
    assert found[0].min() < -1e3


def test_a_nan_is_not_hidden(kernels):
    hidden, weight, labels = make(torch.bfloat16)
    hidden[3, 0] = float("nan")
    found = ours(hidden, weight, labels, False, use_triton=True)[0]
    assert torch.isnan(found).nonzero().flatten().tolist() == [3]


def test_tiles_cover_the_vocabulary_within_the_bound(kernels):
    assert [(t.start, t.stop) for t in kernels.tiles(1000, 4, 2000)] == [(0, 384), (384, 768), (768, 1000)]
    assert [(t.start, t.stop) for t in kernels.tiles(1000, 4, 1 << 30)] == [(0, 1000)]
    assert [(t.start, t.stop) for t in kernels.tiles(0, 4, 2000)] == []
    # T 8192, V 131072, chunk_tokens 1024: half of 1024 x 131072 logits is 8192 columns
    target = list(kernels.tiles(131072, 8192, 1024 * 131072 // 2))
    assert len(target) == 16
    assert {t.stop - t.start for t in target} == {8192}
    for rows, tokens, bound in ((151665, 16384, 1 << 27), (32000, 100, 1 << 20)):
        found = list(kernels.tiles(rows, tokens, bound))
        assert found[0].start == 0
        assert found[-1].stop == rows
        assert all(a.stop == b.start for a, b in itertools.pairwise(found))
        assert all((t.stop - t.start) * tokens <= bound for t in found)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_nft.policy import logprobs_triton as m

fp32, aligned = "*fp32", [["tt.divisibility", 16]]
tile = {"first": "i32", "columns": "i32", "inverse_temperature": "fp32"}
chunk = {"columns": "i32", "inverse_temperature": "fp32"}
statistics = {"logits": fp32, "labels": "*i64", "maximum": fp32, "total": fp32, "label_logit": fp32, "weighted": fp32}
gradients = {n: fp32 for n in ("logits", "labels", "log_z", "entropy", "grad_logprobs", "grad_entropy")}
gradients |= {"labels": "*i64", "gradients": "*bf16"}
in_place = {"logits": fp32, "labels": "*i64", "log_z": fp32, "grad_logprobs": fp32, "gradients": "*bf16"}
for kernel, pointers, numbers, constants in (
    (m._statistics, statistics, tile, {"WITH_ENTROPY": True, "BLOCK": m.MAX_BLOCK, "BLOCKS": 2}),
    (m._logit_gradients, gradients, tile, {"WITH_ENTROPY": True, "BLOCK": m.MAX_BLOCK}),
    (m._logit_gradients_in_place, in_place, chunk, {"BLOCK": m.MAX_BLOCK, "BLOCKS": 32}),
):
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    attributes = {(i,): aligned for i in range(len(pointers) + len(numbers) - 1)}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": m.NUM_WARPS})
    assert made.asm["cubin"]
    assert "ld.global.v4" in made.asm["ptx"]  # 16 bytes a load
    assert ".local" not in made.asm["ptx"]
    if kernel is m._logit_gradients_in_place:  # nobody writes before all have read
        ptx = made.asm["ptx"]
        assert ptx.index("ld.global.v4") < ptx.index("bar.sync") < ptx.index("st.global")
"""


def test_kernels_compile_for_hopper(tmp_path):
    """Triton brings its own assembler: machine code for compute capability 9.0, made without a GPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (pip install triton)")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_cpu_takes_the_torch_path():
    from megatron_nft.policy.logprobs_kernels import triton_kernels

    assert triton_kernels(torch.zeros(1, dtype=torch.bfloat16)) is None
