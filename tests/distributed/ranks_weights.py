"""Import, export, folder writing and the in-process sync, in one parallel layout: args TP PP VPP EP CP."""

from __future__ import annotations

import json
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import Ranks, run_checks
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from processes import wait_until
from tiny import make_model

from megatron_nft.config import Config, PolicyConfig
from megatron_nft.data.packing import pack
from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.policy import cpu, parallel
from megatron_nft.policy.family import read_family
from megatron_nft.policy.model import build_chunks, packed_params
from megatron_nft.types import TrainingSample
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.export import Buffers, export_buckets
from megatron_nft.weights.export_hf import ExportError, save_hf
from megatron_nft.weights.hf_folder import HFFolder
from megatron_nft.weights.import_hf import load_hf
from megatron_nft.weights.names import hf_shapes
from megatron_nft.weights.offline.convert import hf_to_megatron
from megatron_nft.weights.offline.megatron_writer import TargetLayout
from megatron_nft.weights.receivers import Receivers, everyone, nobody, open_receivers
from megatron_nft.weights.sync import WeightSync
from megatron_nft.weights.transport import WeightSyncError

DENSE = [(family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (True, False)]
MOE = [("qwen3_moe", False)]
VOCAB = 263  # odd: TP 2 pads it


class World:
    """One layout, and the models that were made for it."""

    layout: parallel.ParallelLayout
    policy: PolicyConfig
    cases: list[tuple[str, bool]]


def check_start(ranks: Ranks) -> None:
    tp, pp, vpp, ep, cp = map(int, ranks.args)
    World.policy = PolicyConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp or None,
        expert_model_parallel_size=ep,
        context_parallel_size=cp,
        precision="fp32",
    )
    World.layout = parallel.initialize(World.policy, seed=0)
    World.cases = MOE if ep > 1 else DENSE + MOE
    if ranks.rank == 0:
        for family, tied in World.cases:
            path = make_model(folder(ranks, family, tied), family, tied=tied, layers=4, ffn=96, vocab=VOCAB)
            hf_to_megatron(path, path / "megatron", TargetLayout(tp, pp, vpp or 1))
    dist.barrier()


def folder(ranks: Ranks, family: str, tied: bool):
    return ranks.scratch / f"{family}-{'tied' if tied else 'untied'}"


def loaded(path):
    spec = read_family(path)
    chunks = build_chunks(spec, World.policy, World.layout)
    load_hf(chunks, path, spec, World.layout)
    return spec, chunks


def converted(path):
    """Chunks with the weights of the checkpoint that the converter made, loaded by Megatron."""
    chunks = build_chunks(read_family(path), World.policy, World.layout)
    with cpu.on_cpu():
        wanted = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
        for entries in wanted.values():
            for name in [name for name in entries if name.endswith("_extra_state")]:
                del entries[name]
        found = dist_checkpointing.load(wanted, str(path / "megatron"))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(found[f"model{i}"])
    return chunks


def check_every_parameter_is_filled(ranks: Ranks) -> None:
    for family, tied in World.cases:
        _, chunks = loaded(folder(ranks, family, tied))
        assert not any(p.isnan().any() for chunk in chunks for p in chunk.parameters()), family


def check_logits_equal_transformers(ranks: Ranks) -> None:
    for family, tied in World.cases:
        if (family, tied) not in MOE:
            compare_logits(ranks, family, tied)


def compare_logits(ranks: Ranks, family: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, VOCAB, (24,), generator=torch.Generator().manual_seed(1))
    path = folder(ranks, family, tied)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path).eval()(tokens[None]).logits[0]
    for chunks in (loaded(path)[1], converted(path)):
        logits = megatron_logits([chunk.eval() for chunk in chunks], tokens)
        if logits is not None:
            assert (logits[:, :VOCAB] - expected).abs().max() < 1e-4, family


def megatron_logits(chunks, tokens: torch.Tensor) -> torch.Tensor | None:
    """[L] -> [L, V padded] on the last stage, None elsewhere; through the real pipeline schedule."""
    ids = tokens.numpy().astype(np.int32)
    zeros = np.zeros(len(ids) - 1, dtype=np.float32)
    batch = pack([TrainingSample(0, 0, ids, 1, zeros, zeros, True, 0.5)], [0])
    outputs = []

    def forward(_, chunk):
        hidden = chunk(
            batch.tokens[None], batch.position_ids[None], None, packed_seq_params=packed_params(batch, False)
        )
        if chunk.post_process:
            shard = hidden[:, 0] @ chunk.output_weight.T  # [L, V / tp]
            shards = [torch.empty_like(shard) for _ in range(World.layout.tp.size)]
            dist.all_gather(shards, shard, group=World.layout.tp.group)
            outputs.append(torch.cat(shards, dim=1))
        return hidden, lambda output, **_: output.sum()

    with torch.no_grad(), cpu.on_cpu():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=World.layout.pp.size,
            seq_length=len(ids),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[0] if outputs else None


def check_export_gives_back_what_was_imported(ranks: Ranks) -> None:
    """Bit for bit, for buckets smaller than a tensor and larger than the model, to nobody, some or all."""
    for family, tied in World.cases:
        path = folder(ranks, family, tied)
        spec, chunks = loaded(path)
        source, expected = HFFolder(path), set(hf_shapes(spec))
        assert expected == set(source.shapes)
        for bucket_bytes in (4096, 100_000, 1 << 30):
            for receivers in audiences():
                names = []
                stream = export_buckets(chunks, spec, World.layout, buffers_of(bucket_bytes), receivers=receivers)
                for bucket in stream:
                    assert bucket.nbytes <= bucket_bytes or len(bucket.metas) <= 3, "a large parameter goes alone"
                    for name, tensor in bucket.tensors:
                        assert torch.equal(tensor, source.read(name)), name
                        names.append(name)
                gathered = [None] * World.layout.world_size
                dist.all_gather_object(gathered, names)
                receivers.close()
                for rank in receivers.ranks:
                    assert gathered[rank] == gathered[max(receivers.ranks)]
                    assert len(gathered[rank]) == len(set(gathered[rank])) and set(gathered[rank]) == expected
                leads = ranks.rank in World.layout.stage_leaders
                assert bool(names) == (leads or ranks.rank in receivers.ranks)
                leaders = [gathered[leader] for leader in World.layout.stage_leaders if leader not in receivers.ranks]
                of_leaders = [name for of_rank in leaders for name in of_rank]
                assert len(of_leaders) == len(set(of_leaders)) and set(of_leaders) <= expected
                assert receivers.ranks or set(of_leaders) == expected


def audiences() -> tuple:
    """Nobody, the last rank alone, everyone."""
    last = open_receivers({World.layout.world_size - 1}, World.layout, 60)
    return nobody(World.layout), last, everyone(World.layout)


def check_export_casts(ranks: Ranks) -> None:
    family, tied = World.cases[0]
    path = folder(ranks, family, tied)
    spec, chunks = loaded(path)
    source = HFFolder(path)
    buffers, all_ranks = buffers_of(50_000), everyone(World.layout)
    stream = export_buckets(chunks, spec, World.layout, buffers, dtype=torch.bfloat16, receivers=all_ranks)
    for bucket in stream:
        for name, tensor in bucket.tensors:
            assert tensor.dtype is torch.bfloat16 and torch.equal(tensor, source.read(name).bfloat16()), name


def check_buckets_stay_as_long_as_they_are_used(ranks: Ranks) -> None:
    """Held by a slow reader, a bucket keeps its bytes while the next one is gathered; every one is asked after once."""
    for family, tied in World.cases:
        path = folder(ranks, family, tied)
        spec, chunks = loaded(path)
        source = HFFolder(path)
        for bucket_bytes in (4096, 60_000, 200_000):
            held, settled, together = deque(), 0, 0

            def used() -> None:
                nonlocal settled
                bucket = held.popleft()  # noqa: B023
                assert all(torch.equal(tensor, source.read(name)) for name, tensor in bucket.tensors)  # noqa: B023
                settled += 1

            buffers = Buffers(bucket_bytes, World.layout.device, used=used)
            count = 0
            for bucket in export_buckets(chunks, spec, World.layout, buffers, receivers=everyone(World.layout)):
                held.append(bucket)
                together = max(together, len(held))
                count += 1
            assert not held and settled == count > 2
            assert together == (1 if bucket_bytes == 4096 else 2), "two, but for parameters larger than a bucket"


def check_memory_is_bounded(ranks: Ranks) -> None:
    """Bytes that the export asks for at any time while all buckets are in use as long as they may be: at most two
    buckets and the largest tensor; for a reader that takes one at a time, one bucket less."""
    family, tied = World.cases[-1]
    spec, chunks = loaded(folder(ranks, family, tied))
    largest = max(math.prod(shape) for shape in hf_shapes(spec).values()) * 4
    for bucket_bytes in (30_000, 60_000, 200_000):
        for overlap in (True, False):
            for receivers in audiences()[1:]:
                peak_is_bounded(ranks, (chunks, spec), bucket_bytes, overlap, receivers, largest)
                receivers.close()


def peak_is_bounded(
    ranks: Ranks, model: tuple, bucket_bytes: int, overlap: bool, receivers: Receivers, largest: int
) -> None:
    bound = (1 + overlap) * bucket_bytes + largest
    with counted_bytes(bound) as peak:
        held = deque()
        used = held.popleft if overlap else None
        buffers = Buffers(bucket_bytes, World.layout.device, used=used)
        for bucket in export_buckets(*model, World.layout, buffers, receivers=receivers):
            held.append(bucket)
            if not overlap:
                held.clear()
            del bucket
    assert peak[0] <= bound, (bucket_bytes, overlap, largest)
    if ranks.rank in World.layout.stage_leaders or ranks.rank in receivers.ranks:
        assert peak[0] > 0
    else:
        assert peak[0] <= min(largest, bucket_bytes), "what it sends, and no bucket"


@contextmanager
def counted_bytes(bound: int) -> Iterator[list[int]]:
    """[most bytes of uint8 tensors from torch.empty that lived at once]. Above `bound` it waits for an end:
    gloo's thread may still hold the tensor of an operation that is over."""
    live, peak = {}, [0]
    original = torch.empty

    def counted(*args, **kwargs):
        tensor = original(*args, **kwargs)
        if kwargs.get("dtype") is torch.uint8:
            storage = tensor.untyped_storage()
            live[id(storage)] = tensor.nbytes
            weakref.finalize(storage, live.pop, id(storage), None)
            wait_until(lambda: sum(live.values()) <= bound, what=f"no more than {bound} bytes")
            peak[0] = max(peak[0], sum(live.values()))
        return tensor

    torch.empty = counted
    try:
        yield peak
    finally:
        torch.empty = original


def buffers_of(bucket_bytes: int) -> Buffers:
    return Buffers(bucket_bytes, World.layout.device)


def check_folder_round_trip(ranks: Ranks) -> None:
    """HF -> Megatron -> HF: every tensor bit-identical, config and tokenizer carried, transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for family, tied in World.cases:
        path, out = folder(ranks, family, tied), ranks.scratch / "out" / f"{family}-{tied}"
        spec, chunks = loaded(path)
        save_hf(chunks, spec, World.layout, path, out, bucket_bytes=50_000, max_file_bytes=150_000)
        source, written = HFFolder(path), HFFolder(out)
        assert written.shapes == source.shapes and written.dtypes == source.dtypes
        assert all(torch.equal(written.read(n), source.read(n)) for n in source.shapes)
        assert json.loads((out / "config.json").read_text()) == json.loads((path / "config.json").read_text())
        assert len(list(out.glob("*.safetensors"))) > 1 and (out / "model.safetensors.index.json").exists()
        assert not out.with_name(out.name + ".partial").exists()
        if ranks.rank == 0:
            _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
            assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(path).chat_template
        with pytest.raises(ExportError, match="exists already"):
            save_hf(chunks, spec, World.layout, path, out)
        save_hf(chunks, spec, World.layout, path, out, torch.bfloat16, replace=True)
        written = HFFolder(out)
        assert set(written.dtypes.values()) == {torch.bfloat16}
        assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
        dist.barrier()


def check_failed_export_leaves_no_folder(ranks: Ranks) -> None:
    family, tied = World.cases[0]
    path, out = folder(ranks, family, tied), ranks.scratch / "never"
    spec, chunks = loaded(path)
    with pytest.raises(ExportError, match=r"config\.json"):
        save_hf(chunks, spec, World.layout, ranks.scratch / "no-such-model", out)
    assert not out.exists()


def settings(ranks: Ranks, path, **sync) -> Config:
    return Config.model_validate(
        {
            "run_dir": ranks.scratch / "run",
            "model": {"path": path},
            "data": {"train": ["unused.jsonl"]},
            "policy": World.policy.model_dump() | {"micro_batch_tokens": 8192},
            "sync": {"bucket_bytes": 60_000, **sync},
        }
    )


def reference_logprobs(path, ids: np.ndarray) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path).eval()(torch.tensor(ids)[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None].long())[:, 0].numpy()


def check_sync_into_embedded_engine(ranks: Ranks) -> None:
    ids = np.arange(5, 25, dtype=np.int32)
    for family, tied in World.cases:
        path = folder(ranks, family, tied)
        spec, chunks = loaded(path)
        engine = EmbeddedEngine.create(path, load_weights=False)
        sync = open_weight_sync(settings(ranks, path), spec, World.layout, engine)
        receipt = sync.sync(chunks, version=7, probe=(ids, reference_logprobs(path, ids)))
        assert engine.weight_version == 7
        source = HFFolder(path)
        assert all(torch.equal(engine.tensors()[name], source.read(name)) for name in source.shapes)
        assert receipt.nbytes == sum(source.read(n).nbytes for n in source.shapes)
        assert set(receipt.checksums) == set(source.shapes)
        assert receipt.engine_checked == len(source.shapes) * World.layout.world_size
        assert receipt.probe_difference < 1e-3
        dist.barrier()
        written = json.loads((ranks.scratch / "run" / "sync" / "version_000007.json").read_text())
        assert written["checksums"] == receipt.checksums and written["seconds"] == receipt.seconds


def spoil(sync: WeightSync, change) -> None:
    """From here on `change(tensors)` alters each bucket on its way to the engine."""
    transport = sync._transport
    original = transport.send

    def send(bucket: Bucket) -> None:
        metas, flat = change(list(bucket.metas), bucket.flat.clone())
        original(replace(bucket, metas=metas, flat=flat))

    transport.send = send


def check_faults_stop_the_sync_on_every_rank(ranks: Ranks) -> None:
    """One tensor dropped, sent twice, swapped with another, or with one bit flipped; only the last rank is at fault."""
    path = folder(ranks, *World.cases[0])
    spec, chunks = loaded(path)
    guilty = ranks.rank == ranks.world_size - 1
    victim, other = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "kv")

    def drop(metas, flat):
        return [m for m in metas if m.name != victim], flat

    def twice(metas, flat):
        return metas + [m for m in metas if m.name == victim], flat

    def swap(metas, flat):
        names = {victim: other, other: victim}
        return [replace(m, name=names.get(m.name, m.name)) for m in metas], flat

    def flip(metas, flat):
        for m in metas:
            if m.name == victim:
                flat[m.start] ^= 1
        return metas, flat

    def rename(metas, flat):
        return [replace(m, name=m.name.replace("layers.1.self_attn.k", "layers.9.self_attn.k")) for m in metas], flat

    expected = {drop: victim, twice: victim, swap: victim, flip: victim, rename: "model.layers.9.self_attn.k_proj"}
    for change, message in expected.items():
        engine = EmbeddedEngine.create(path, load_weights=False)
        sync = open_weight_sync(settings(ranks, path), spec, World.layout, engine)
        if guilty:
            spoil(sync, change)
        with pytest.raises(WeightSyncError, match=message) as caught:
            sync.sync(chunks, version=3)
        assert f"rank {ranks.world_size - 1}" in str(caught.value)


def check_a_bucket_is_sent_while_the_next_is_gathered(ranks: Ranks) -> None:
    """No bucket but the last is through before the next one is put together."""
    path = folder(ranks, *World.cases[0])
    spec, chunks = loaded(path)
    engine = EmbeddedEngine.create(path, load_weights=False)
    sync = open_weight_sync(settings(ranks, path, bucket_bytes=100_000), spec, World.layout, engine)
    buffers = buffers_of(100_000)
    total = sum(1 for _ in export_buckets(chunks, spec, World.layout, buffers, receivers=everyone(World.layout)))
    gathered, sent = threading.Semaphore(0), []
    send, hashed = sync._transport.send, sync._hash

    def slow_send(bucket: Bucket) -> None:
        sent.append(bucket.metas[0].name)
        assert gathered.acquire(timeout=60), "this bucket"
        if len(sent) < total:
            assert gathered.acquire(timeout=60), "the next bucket was not gathered while this one was sent"
            gathered.release()
        send(bucket)

    def counted(*args):
        gathered.release()
        return hashed(*args)

    sync._transport.send, sync._hash = slow_send, counted
    sync.sync(chunks, version=3)
    assert len(sent) == total > 2
    sync.close()


def check_a_sync_that_breaks_off_is_not_waited_for(ranks: Ranks) -> None:
    """Ctrl-C while a bucket is being sent: `close` returns although the send goes on."""
    path = folder(ranks, *World.cases[0])
    spec, chunks = loaded(path)
    engine = EmbeddedEngine.create(path, load_weights=False)
    sync = open_weight_sync(settings(ranks, path, bucket_bytes=100_000), spec, World.layout, engine)
    under_way, answered, sent = threading.Event(), threading.Event(), []

    def send(bucket: Bucket) -> None:
        sent.append(bucket)
        under_way.set()
        answered.wait(600)

    def interrupt() -> None:
        under_way.wait(60)
        raise KeyboardInterrupt

    sync._transport.send, sync._buffers._used = send, interrupt
    with pytest.raises(KeyboardInterrupt):
        sync.sync(chunks, version=3)
    start = time.monotonic()
    sync.close()
    assert time.monotonic() - start < 60 and not answered.is_set()
    answered.set()
    sync._sending.shutdown()
    assert len(sent) == 1, "what was waiting to be sent is left out"


def check_probe_stops_the_sync(ranks: Ranks) -> None:
    path = folder(ranks, *World.cases[0])
    spec, chunks = loaded(path)
    engine = EmbeddedEngine.create(path, load_weights=False)
    sync = open_weight_sync(settings(ranks, path), spec, World.layout, engine)
    ids = np.arange(5, 25, dtype=np.int32)
    wrong = reference_logprobs(path, ids) + 0.002
    with pytest.raises(WeightSyncError, match=r"probe_tolerance \(0\.001\)"):
        sync.sync(chunks, version=3, probe=(ids, wrong))


def check_import_refuses_a_folder_that_disagrees(ranks: Ranks) -> None:
    """Missing, unknown and misshapen tensors are named, and nothing is written before that."""
    from safetensors.torch import load_file, save_file

    path = folder(ranks, *World.cases[0])
    spec, chunks = loaded(path)
    before = [p.clone() for chunk in chunks for p in chunk.parameters()]
    name = "model.layers.2.mlp.up_proj.weight" if spec.num_experts == 0 else "model.layers.2.mlp.gate.weight"
    tensors = load_file(path / "model.safetensors")
    broken = {
        rf"lacks {name}": {n: t for n, t in tensors.items() if n != name},
        r"does not know: model\.layers\.2\.mlp\.extra": tensors | {"model.layers.2.mlp.extra": torch.ones(3)},
        rf"{name} has shape \[3, 3\]": tensors | {name: torch.ones(3, 3)},
    }
    for number, (message, changed) in enumerate(broken.items()):
        other = ranks.scratch / f"broken-{number}"
        if ranks.rank == 0:
            other.mkdir()
            save_file(changed, other / "model.safetensors", {"format": "pt"})
        dist.barrier()
        with pytest.raises(ValueError, match=message):
            load_hf(chunks, other, spec, World.layout)
        assert all(torch.equal(a, b) for a, b in zip(before, (p for c in chunks for p in c.parameters())))


def check_unknown_megatron_parameter_is_named(ranks: Ranks) -> None:
    path = folder(ranks, *World.cases[0])
    spec, chunks = loaded(path)
    chunks[0].decoder.layers[0].register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"decoder\.layers\.\d+\.scale"):
        load_hf(chunks, path, spec, World.layout)


def check_moe_logits_equal_transformers(ranks: Ranks) -> None:
    for family, tied in MOE:
        compare_logits(ranks, family, tied)


def check_stop(ranks: Ranks) -> None:
    assert parallel_state.model_parallel_is_initialized()
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    run_checks(globals())
