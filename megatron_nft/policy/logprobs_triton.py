"""Log-probs from hidden states on a GPU: cuBLAS for the products, Triton for what happens to the logits between them.

The vocabulary is walked in tiles of [T, C] fp32 logits. Forward: one kernel folds a tile into each token's running
maximum and sums (online softmax). Backward: the tile is computed again, one kernel turns it into the gradient with
respect to the logits, and two products give the tile's rows of dW, whole and rounded once, and its part of dX, summed
over tiles in fp32. The equations are those of policy/logprobs.py, which does the rest, tensor parallelism included.

    operations      8 T H V: the logits twice, dX, dW
    memory          T C (4 + 2) bytes for a tile and its gradient, T H 4 for dX

Legend: T tokens, H hidden size, v real vocabulary rows of this rank, C columns of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_nft.policy.logprobs_torch import NO_LOGIT

MULTIPLE = 128  # of a tile's columns: whole tiles of the matrix units
MAX_BLOCK = 4096  # columns that a program holds at a time
NUM_WARPS = 8
TILE_SHARE = 2  # a tile has half of the logits that may exist: its gradient and dX stand beside it
CHUNK_FACTOR = 1.75  # tokens of a chunk in one pass, for one of chunk_tokens: a gradient takes the place of its logits


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _statistics(  # type: ignore[no-untyped-def]  # Triton evaluates annotations, and knows only its own
    logits,  # fp32 [T, C]
    labels,  # int64 [T], as columns of this rank
    maximum,  # fp32 [T], of l so far
    total,  # fp32 [T], of exp(l - maximum)
    label_logit,  # fp32 [T]
    weighted,  # fp32 [T], of exp(l - maximum) (l - maximum)
    first,  # column of this rank at which the tile begins
    columns,  # C
    inverse_temperature,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BLOCK columns: C / BLOCK, rounded up
):
    """One program per token: fold its row of the tile into what is known of the row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    m, s, w = tl.load(maximum + row), tl.load(total + row), tl.load(weighted + row)
    for i in range(BLOCKS):
        offsets = i * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < columns
        l = tl.load(logits + offsets, mask=inside, other=float("-inf")) * inverse_temperature  # noqa: E741
        largest = tl.maximum(m, tl.max(l, 0))
        shift, l = m - largest, l - largest  # noqa: E741
        scale, e = tl.exp(shift), tl.exp(l)
        if WITH_ENTROPY:
            w = (w + shift * s) * scale + tl.sum(tl.where(inside, e * l, 0.0), 0)
        s = s * scale + tl.sum(e, 0)
        m = largest
    tl.store(maximum + row, m)
    tl.store(total + row, s)
    tl.store(weighted + row, w)
    label = tl.load(labels + row) - first
    mine = (label >= 0) & (label < columns)
    tl.store(label_logit + row, tl.load(logits + label, mask=mine, other=0.0) * inverse_temperature, mask=mine)


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _logit_gradients(  # type: ignore[no-untyped-def]  # Triton evaluates annotations, and knows only its own
    logits,  # fp32 [T, C]
    labels,  # int64 [T], as columns of this rank
    log_z,  # fp32 [T]
    entropy,  # fp32 [T]
    grad_logprobs,  # fp32 [T]
    grad_entropy,  # fp32 [T]; not read without WITH_ENTROPY
    gradients,  # 16-bit [T, C], written
    first,
    columns,
    inverse_temperature,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and BLOCK columns: the gradient with respect to the undivided logits."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    l = tl.load(logits + row * columns + offsets, mask=inside, other=0.0) * inverse_temperature  # noqa: E741
    log_p = l - tl.load(log_z + row)
    g = tl.load(grad_logprobs + row)
    factor = -g
    if WITH_ENTROPY:
        factor -= tl.load(grad_entropy + row) * (log_p + tl.load(entropy + row))
    label = tl.load(labels + row) - first
    grad = tl.exp(log_p) * factor + tl.where(offsets == label, g, 0.0)
    grad = (grad * inverse_temperature).to(gradients.dtype.element_ty)
    tl.store(gradients + row * columns + offsets, grad, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _logit_gradients_in_place(  # type: ignore[no-untyped-def]  # Triton evaluates annotations, and knows only its own
    logits,  # fp32 [C, v]
    labels,  # int64 [C], as columns of this rank
    log_z,  # fp32 [C]
    grad_logprobs,  # fp32 [C]
    gradients,  # the same memory as 16-bit [C, 2 v]; the first v of a row are written
    columns,  # v
    inverse_temperature,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BLOCK columns: v / BLOCK, rounded up
):
    """One program per token: its gradient with respect to the undivided logits over the first half of its logits.

    Block i is written to bytes 2 i BLOCK on, behind what has been read, up to byte 4 (i + 1) BLOCK; the barrier holds
    all threads until the block is read.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    gradients += 2 * row * columns
    z, g, label = tl.load(log_z + row), tl.load(grad_logprobs + row), tl.load(labels + row)
    for i in range(BLOCKS):
        offsets = i * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < columns
        l = tl.load(logits + offsets, mask=inside, other=0.0) * inverse_temperature  # noqa: E741
        grad = tl.where(offsets == label, g, 0.0) - tl.exp(l - z) * g
        tl.debug_barrier()
        tl.store(gradients + offsets, (grad * inverse_temperature).to(gradients.dtype.element_ty), mask=inside)


def local_sums(
    hidden: Tensor, weight: Tensor, local_labels: Tensor, *, temperature: float, max_logits: int, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """See `logprobs_kernels.Kernels.local_sums`; hidden and weight of 16 bits, sums in fp32."""
    tokens = hidden.size(0)
    maximum = torch.full((tokens,), NO_LOGIT, dtype=torch.float32, device=hidden.device)
    sums = torch.zeros(3, tokens, dtype=torch.float32, device=hidden.device)
    for columns in tiles(weight.size(0), tokens, max_logits // TILE_SHARE):
        logits = _product_f32(hidden, weight[columns].T)
        width = logits.size(1)
        block = _block(width)
        _statistics[(tokens,)](
            logits, local_labels, maximum, sums[0], sums[1], sums[2], columns.start, width, 1.0 / temperature,
            WITH_ENTROPY=with_entropy, BLOCK=block, BLOCKS=triton.cdiv(width, block), num_warps=NUM_WARPS,
        )  # fmt: skip
        del logits  # before the next one is made
    return maximum, sums


def token_chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """See `logprobs_kernels.Kernels.token_chunks`. T 8192 and 1024: 1792 fit, 5 chunks of 1664 tokens at most."""
    return tiles(tokens, 1, int(CHUNK_FACTOR * chunk_tokens))


def chunk_logits(
    hidden: Tensor, weight: Tensor, local_labels: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `logprobs_kernels.Kernels.chunk_logits`; hidden and weight of 16 bits, undivided logits and sums in fp32."""
    tokens, width = hidden.size(0), weight.size(0)
    maximum = torch.full((tokens,), NO_LOGIT, dtype=torch.float32, device=hidden.device)
    sums = torch.zeros(3, tokens, dtype=torch.float32, device=hidden.device)
    logits = _product_f32(hidden, weight.T)
    if width:
        block = _block(width)
        _statistics[(tokens,)](
            logits, local_labels, maximum, sums[0], sums[1], sums[2], 0, width, 1.0 / temperature,
            WITH_ENTROPY=False, BLOCK=block, BLOCKS=triton.cdiv(width, block), num_warps=NUM_WARPS,
        )  # fmt: skip
    return logits, maximum, sums


def chunk_gradients(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    local_labels: Tensor,
    log_z: Tensor,
    grad_logprobs: Tensor,
    *,
    temperature: float,
    grad_hidden: Tensor,
    grad_weight: Tensor,
) -> None:
    """See `logprobs_kernels.Kernels.chunk_gradients`; the gradient of the logits takes the place of the logits."""
    tokens, width = logits.shape
    if not width:
        grad_hidden.zero_()
        return
    both = logits.view(hidden.dtype)  # [C, 2 v] of 16 bits
    block = _block(width)
    _logit_gradients_in_place[(tokens,)](
        logits, local_labels, log_z, grad_logprobs, both, width, 1.0 / temperature,
        BLOCK=block, BLOCKS=triton.cdiv(width, block), num_warps=NUM_WARPS,
    )  # fmt: skip
    grad = both[:, :width]
    torch.mm(grad, weight, out=grad_hidden)
    if logits.is_cuda and _adds_in_place(hidden.device, hidden.dtype):
        _add_product(grad_weight, grad.T, hidden)
        return
    for rows in tiles(width, hidden.size(1), logits.numel() // TILE_SHARE):  # the sum needs a product beside it
        _add_product(grad_weight[rows], grad.T[rows], hidden)


def gradients(
    hidden: Tensor,
    weight: Tensor,
    local_labels: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    *,
    temperature: float,
    max_logits: int,
    grad_weight: Tensor,
) -> Tensor:
    """See `logprobs_kernels.Kernels.gradients`; hidden and weight of 16 bits, all other vectors in fp32."""
    tokens = hidden.size(0)
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    with_entropy = grad_entropy is not None
    grad_logprobs = grad_logprobs.contiguous()
    grad_entropy = grad_logprobs if grad_entropy is None else grad_entropy.contiguous()
    for columns in tiles(weight.size(0), tokens, max_logits // TILE_SHARE):
        logits = _product_f32(hidden, weight[columns].T)
        width = logits.size(1)
        grad = torch.empty_like(logits, dtype=hidden.dtype)
        block = _block(width)
        _logit_gradients[(tokens, triton.cdiv(width, block))](
            logits, local_labels, log_z, entropy, grad_logprobs, grad_entropy, grad,
            columns.start, width, 1.0 / temperature,
            WITH_ENTROPY=with_entropy, BLOCK=block, num_warps=NUM_WARPS,
        )  # fmt: skip
        del logits
        _add_product(grad_hidden, grad, weight[columns])
        torch.mm(grad.T, hidden, out=grad_weight[columns])
    return grad_hidden.to(hidden.dtype)


def tiles(rows: int, tokens: int, tile_numel: int) -> Iterator[slice]:
    """Vocabulary rows of each tile: about equal, in multiples of MULTIPLE but for the last, within `tile_numel` where
    that leaves at least MULTIPLE.

    tiles(1000, 4, 2000): 500 columns fit, 3 tiles of 334, rounded up to 384 -> 0:384, 384:768, 768:1000
    """
    widest = max(MULTIPLE, tile_numel // max(tokens, 1) // MULTIPLE * MULTIPLE)
    count = max(1, -(-rows // widest))
    width = -(-rows // count // MULTIPLE) * MULTIPLE
    return (slice(start, min(start + width, rows)) for start in range(0, rows, max(width, 1)))


def _block(width: int) -> int:
    return min(MAX_BLOCK, int(triton.next_power_of_2(width)))


def _product_f32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of 16-bit matrices, never rounded to 16 bits: at a logit of 20 bf16 is 0.06 off."""
    if left.is_cuda:
        product: Tensor = torch.ops.aten.mm.dtype(left, right, torch.float32)
        return product
    return left.float() @ right.float()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, total fp32."""
    if left.is_cuda and _adds_in_place(left.device, left.dtype):
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        total += _product_f32(left, right)


@functools.cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a 16-bit product to an fp32 matrix inside the product; the first releases that have the
    operator want all matrices of one dtype."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, ones, ones, torch.float32, out=total)
    except (RuntimeError, AttributeError):
        return False
    return bool((total == 17).all())
