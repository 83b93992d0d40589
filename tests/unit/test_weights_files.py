"""Reading tensors out of the middle of files: against torch.load and against slices of the tensor that was written."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch

from megatron_nft import file_array
from megatron_nft.file_array import FileArray
from megatron_nft.policy.checkpoint_item import find_item
from megatron_nft.weights.offline.reused_memory import ReusedMemory

WHOLE = torch.arange(6 * 5 * 4, dtype=torch.float32).view(6, 5, 4)
PARTS = [
    (slice(0, 6), slice(0, 5), slice(0, 4)),
    (slice(2, 5), slice(0, 5), slice(0, 4)),
    (slice(2, 5), slice(1, 4), slice(0, 4)),
    (slice(1, 2), slice(0, 5), slice(1, 3)),
    (slice(0, 6), slice(4, 5), slice(3, 4)),
]


@pytest.fixture
def stored(tmp_path) -> FileArray:
    """`WHOLE` 13 bytes into a file: not aligned."""
    (tmp_path / "file").write_bytes(b"x" * 13 + WHOLE.numpy().tobytes() + b"after")
    return FileArray(tmp_path / "file", 13, torch.float32, tuple(WHOLE.shape))


@pytest.mark.parametrize("index", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 40, 1 << 18])
def test_parts_are_read_in_place(stored, monkeypatch, index, dtype, block):
    """Into contiguous memory and into columns of something larger, in blocks of a row, of two, and of all."""
    monkeypatch.setattr(file_array, "BLOCK_BYTES", block)
    expected = WHOLE[index].to(dtype)
    plain = torch.full(expected.shape, -1.0, dtype=dtype)
    stored.read_into(plain, index)
    assert torch.equal(plain, expected)
    around = torch.full((*expected.shape[:-1], expected.shape[-1] + 2), -1.0, dtype=dtype)
    stored.read_into(around[..., 1:-1], index)
    assert torch.equal(around[..., 1:-1], expected) and around[..., 0].eq(-1).all() and around[..., -1].eq(-1).all()


def test_views_scalars_and_ends_of_files(stored):
    flat = torch.empty(7)
    stored.view(120).read_into(flat, (slice(10, 17),))
    assert flat.tolist() == [10, 11, 12, 13, 14, 15, 16]
    scalar = torch.tensor(0.0)
    FileArray(stored.path, 13 + 4 * 9, torch.float32, ()).read_into(scalar, ())
    assert scalar.item() == 9
    with pytest.raises(ValueError, match=r"\[6, 5, 4\] cannot be seen as \[7, 17\]"):
        stored.view(7, 17)
    beyond = FileArray(stored.path, 13, torch.float32, (200,))
    with pytest.raises(ValueError, match=r"file is cut off: 315 bytes are missing at 13"):  # of 800: 480 and "after"
        beyond.read_into(torch.empty(200), (slice(0, 200),))


def item(value: object, path: Path, before: int = 100) -> tuple[Path, int, int]:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(b"x" * before + buffer.getvalue() + b"y" * 50)
    return path, before, len(buffer.getvalue())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (1, 4, 5), (2, 3, 4)])
def test_items_of_torch_save_are_found(tmp_path, dtype, shape):
    value = (torch.rand(shape) * 5).to(dtype)
    for tensor in (value, value.transpose(0, -1) if shape else value):  # as it lies in memory, and turned
        array, order = find_item(*item(tensor, tmp_path / "file"))
        read = torch.zeros(tensor.shape, dtype=dtype)
        array.read_into(read.permute(order), tuple(slice(0, n) for n in array.shape))
        assert array.dtype is dtype and torch.equal(read, tensor)


def test_a_part_of_a_larger_storage_is_found(tmp_path):
    array, _ = find_item(*item(WHOLE[2:4], tmp_path / "file"))
    read = torch.empty(2, 5, 4)
    array.read_into(read, (slice(0, 2), slice(0, 5), slice(0, 4)))
    assert torch.equal(read, WHOLE[2:4])
    with pytest.raises(ValueError, match=r"a tensor of shape \(6, 5, 2\) with strides \(20, 4, 2\) is not read"):
        find_item(*item(WHOLE[..., ::2], tmp_path / "strided"))


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


def test_nothing_but_a_tensor_is_accepted(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"at 100 holds no plain tensor: it wants __builtin__\.print"):
        find_item(*item(Harmful(), tmp_path / "harmful"))
    with pytest.raises(ValueError, match="at 100 holds no plain tensor: it is a list"):
        find_item(*item([1, 2], tmp_path / "list"))
    assert not capsys.readouterr().out
    path, start, length = item(WHOLE, tmp_path / "file")
    with pytest.raises(ValueError, match="file is cut off or damaged at 100"):
        find_item(path, start, length - 30)
    (tmp_path / "pickle").write_bytes(pickle.dumps(1))
    with pytest.raises(ValueError, match="pickle is cut off or damaged at 0"):
        find_item(tmp_path / "pickle", 0, 10)


def test_scratch_tensors_share_memory_and_are_saved_without_the_rest(tmp_path):
    scratch = ReusedMemory(4000)
    first = scratch.tensor((10, 100), torch.float32)
    first.fill_(1)
    second = scratch.tensor((5,), torch.bfloat16)
    assert second.data_ptr() == first.data_ptr() and second.untyped_storage().nbytes() == 10
    torch.save(second, tmp_path / "second")
    assert (tmp_path / "second").stat().st_size < 2000
    with pytest.raises(ValueError):
        scratch.tensor((1001,), torch.float32)
