"""The engine inside the trainer's process: a transformers model of its own, for small models.

Every rank holds a full copy of the weights, so it refuses a model for which the memory is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from megatron_nft.engines.embedded.decode import Batch, decode, row_width
from megatron_nft.engines.embedded.sampling import row_keys
from megatron_nft.engines.embedded.stream import EmbeddedStream
from megatron_nft.engines.embedded.weights import InProcess
from megatron_nft.engines.engine import Completion, EngineError, OnWait, Request, SamplingParams, WeightUpdateError

if TYPE_CHECKING:
    from megatron_nft.config import Config
    from megatron_nft.policy.family import ModelSpec
    from megatron_nft.policy.parallel import ParallelLayout
    from megatron_nft.weights.transport import Ledger, Transport

MEMORY_SHARE = 0.8
"""Share of the free memory that the copies of the weights may take; the rest is for the KV cache and the trainer."""


def hf_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The parameters by their names in a Hugging Face checkpoint, as views: writing to them writes to the model.

    transformers keeps a mixture's experts in fused tensors (gate_up_proj [E, 2 F, H], down_proj [E, H, F]); a
    checkpoint has one tensor per expert and projection. A tied output layer appears under both of its names.
    """
    table: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(".experts") and last == "gate_up_proj":
            for e, (gate, up) in enumerate(fused.chunk(2) for fused in parameter.data):
                table[f"{prefix}.{e}.gate_proj.weight"] = gate
                table[f"{prefix}.{e}.up_proj.weight"] = up
        elif prefix.endswith(".experts") and last == "down_proj":
            for e, down in enumerate(parameter.data):
                table[f"{prefix}.{e}.down_proj.weight"] = down
        else:
            table[name] = parameter.data
    return table


def _empty_model(hf_config: Any, **options: Any) -> Any:
    """A model whose weights were not read."""
    return AutoModelForCausalLM.from_config(hf_config, **options)  # type: ignore[no-untyped-call]  # transformers' own


def check_memory(model_path: Path, hf_config: Any, dtype: torch.dtype, device: torch.device, num_copies: int) -> None:
    """EngineError where `num_copies` of the model's weights do not fit the free memory of this host or device."""
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in _empty_model(hf_config).parameters())
    needed = num_parameters * dtype.itemsize * num_copies
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        raise EngineError(
            f"the embedded engine cannot hold {model_path}: {num_copies} x {num_parameters:,} parameters in "
            f"{str(dtype).removeprefix('torch.')} are {needed / 2**30:.2f} GiB, and {device.type} has "
            f"{free / 2**30:.2f} GiB free, of which it may take {MEMORY_SHARE:.0%}. "
            "Set rollout.engine to sglang or vllm, or start fewer processes on this machine"
        )


def end_tokens(generation_config: Any) -> frozenset[int]:
    """The tokens that end an answer by themselves, as the model's generation config names them."""
    ids = generation_config.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def refuse_gaps(model_path: Path, found: Mapping[str, Iterable[str]]) -> None:
    """EngineError where transformers did not find tensors of the model, which it would fill with random numbers.

    found: its loading info.
    """
    missing = sorted(found.get("missing_keys", ()))
    if missing:
        names = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise EngineError(f"model folder {model_path} lacks {names}")


class EmbeddedEngine:
    """Decodes with a transformers model and its KV cache. See `engine.Engine`."""

    def __init__(self, model: Any, *, batch_tokens: int, weight_version: int) -> None:
        self._model = model.eval().requires_grad_(False)
        self._batch_tokens = batch_tokens
        self._tensors = hf_tensors(model)
        self._received: dict[int, str] = {}  # of the update under way: address of the tensor -> the name that came
        self._complete = weight_version >= 0
        self._end_tokens = end_tokens(model.generation_config)
        self.weight_version = weight_version

    @classmethod
    def create(
        cls,
        model_path: Path | str,
        *,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        batch_tokens: int = 65536,
        num_copies: int = 1,
        load_weights: bool = True,
    ) -> EmbeddedEngine:
        """Engine for the model folder. `num_copies` engines are made on this host (or device) at the same time.

        load_weights=False leaves the weights undefined until a weight sync has written all of them: the trainer has
        read the folder already.
        """
        path, device, torch_dtype = Path(model_path), torch.device(device), getattr(torch, dtype)
        model: Any
        try:
            hf_config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError) as e:
            raise EngineError(f"model folder {path}: {e}") from None
        check_memory(path, hf_config, torch_dtype, device, num_copies)
        options = {"dtype": torch_dtype, "attn_implementation": "sdpa", "trust_remote_code": False}
        if load_weights:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
            model, found = loaded  # the stubs know only the model
            refuse_gaps(path, found)
        else:
            with no_init_weights():
                model = _empty_model(hf_config, **options)
            model.tie_weights()
            if (path / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(path)
        return cls(model.to(device), batch_tokens=batch_tokens, weight_version=0 if load_weights else -1)

    # ---- answers

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, on_wait: OnWait | None = None
    ) -> Iterator[tuple[int, int, Completion]]:
        """Batches of questions of similar length, each batch decoded to its end. See `engine.Engine.generate`."""
        self._check_ready()
        stops = self._end_tokens | frozenset(sampling.stop_token_ids)
        for rows in self._batches(requests, sampling.max_tokens):
            numbers = sorted({request for request, _ in rows}, key=[request for request, _ in rows].index)
            prompt_of = {request: i for i, request in enumerate(numbers)}
            answers = decode(
                self._model,
                [requests[request].prompt_ids for request in numbers],
                np.array([prompt_of[request] for request, _ in rows], dtype=np.int64),
                row_keys((*requests[request].seed_key, sample) for request, sample in rows),
                sampling,
                stops,
            )
            for answer in answers:
                if answer is not None:
                    row, token_ids, logprobs, reason = answer
                    yield *rows[row], Completion(token_ids, logprobs, reason, self.weight_version)
                elif on_wait is not None:
                    on_wait(True)

    is_deterministic = True

    def stream(self, sampling: SamplingParams) -> EmbeddedStream:
        """See `engine.Engine.stream`."""
        self._check_ready()
        batch = Batch(self._model, sampling, self._end_tokens | frozenset(sampling.stop_token_ids))
        limit = self._model.config.max_position_embeddings
        return EmbeddedStream(batch, sampling, self.weight_version, batch_tokens=self._batch_tokens, limit=limit)

    def _batches(self, requests: Sequence[Request], max_tokens: int) -> Iterator[list[tuple[int, int]]]:
        """(request, sample) of every answer, in batches of at most `batch_tokens` (one answer at the least).

        Prompts of one length stand together, so that they need no padding and no mask.
        """
        limit = self._model.config.max_position_embeddings
        rows: list[tuple[int, int]] = []
        for request in sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids)):
            width = row_width(len(requests[request].prompt_ids), max_tokens, limit)
            for sample in range(requests[request].num_samples):
                if rows and (len(rows) + 1) * width > self._batch_tokens:
                    yield rows
                    rows = []
                rows.append((request, sample))
        if rows:
            yield rows

    def _check_ready(self) -> None:
        if self._model is None:
            raise EngineError("the embedded engine is closed")
        if not self._complete:
            raise EngineError("the embedded engine's weights are incomplete: a weight update has not been finished")

    @torch.inference_mode()
    def prompt_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """int32 [L] -> float32 [L - 1]. See `engine.Engine.prompt_logprobs`."""
        self._check_ready()
        tokens_1L = torch.from_numpy(np.asarray(token_ids, dtype=np.int64))[None].to(self._model.device)
        logits_LV = self._model(input_ids=tokens_1L, use_cache=False).logits[0, :-1].double()
        logprobs_L = logits_LV.log_softmax(-1).gather(-1, tokens_1L[0, 1:, None])[:, 0]
        logprobs: np.ndarray = logprobs_L.float().cpu().numpy()
        return logprobs

    # ---- weights

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by Hugging Face name, as they are now; views, not copies."""
        return self._tensors

    def begin_update(self) -> None:
        """Starts an update from nothing, also where an earlier one was not finished."""
        self._received, self._complete = {}, False

    @torch.no_grad()
    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies tensors (Hugging Face names) into the model; `finish_update` ends the update.

        WeightUpdateError for a name that the model lacks or that came before in this update, for another shape or
        dtype, and for tied tensors that differ. No answers are given from here until the update is finished.
        """
        self._complete = False
        for name, tensor in tensors:
            target = self._tensors.get(name)
            if target is None:
                raise WeightUpdateError(f"tensor {name}: the embedded engine's model has none of that name")
            if name in self._received.values():
                raise WeightUpdateError(f"tensor {name}: came twice in one update")
            if tensor.shape != target.shape or tensor.dtype != target.dtype:
                raise WeightUpdateError(
                    f"tensor {name}: came as {tensor.dtype} {list(tensor.shape)}, "
                    f"the embedded engine has {target.dtype} {list(target.shape)}"
                )
            twin = self._received.setdefault(target.data_ptr(), name)
            if twin != name and not torch.equal(target, tensor.to(target.device)):
                raise WeightUpdateError(f"tensor {name}: is tied to {twin}, which came with other values")
            target.copy_(tensor)

    def finish_update(self, version: int) -> None:
        """Ends an update under its version. WeightUpdateError, naming them, where tensors did not come."""
        missing = [name for name, tensor in self._tensors.items() if tensor.data_ptr() not in self._received]
        if missing:
            names = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise WeightUpdateError(f"{len(missing)} of {len(self._tensors)} tensors did not come: {names}")
        self._received, self._complete, self.weight_version = {}, True, version

    def left_behind(self) -> list[str]:
        """Names nobody. See `engine.Engine.left_behind`."""
        return []

    def note_good_step(self) -> None:
        """Does nothing. See `engine.Engine.note_good_step`."""

    def open_transport(self, config: Config, spec: ModelSpec, layout: ParallelLayout, ledger: Ledger) -> Transport:
        """See `engine.Engine.open_transport`."""
        return InProcess(self, ledger, layout)

    memory_released = False  # the weights stay: every rank holds a small model of its own

    def release_memory(self) -> None:
        """Does nothing. See `engine.Engine.release_memory`."""

    def resume_memory(self) -> None:
        """Does nothing. See `engine.Engine.resume_memory`."""

    def close(self) -> None:
        """Gives the model's memory back."""
        self._model = None
        self._tensors = {}
