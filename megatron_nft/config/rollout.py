"""Questions, the engines that answer them, and the grading of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_nft.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class DataConfig(Section):
    """Questions to train on."""

    train: list[Path] = Field(min_length=1)
    """Parquet files in the verl layout or JSONL files (see docs of tools/prepare_data.py)."""
    max_prompt_tokens: PositiveInt = 512
    over_long: Literal["drop", "refuse"] = "drop"
    """What to do with longer prompts: drop and count them, or stop."""
    shuffle: bool = True
    """A new order per epoch, from the seed."""


class ServerConfig(Section):
    """SGLang or vLLM servers: given by URL, or started and watched by the run."""

    urls: list[str] = Field(default=[])
    """Servers that are already up; empty starts `num_servers` of them."""
    registry: Path | None = None
    """Folder in which engine nodes announce their servers (engines/discovery.py); used in place of `urls`."""
    registry_nodes: PositiveInt = 1
    """Engine nodes that are waited for in `registry`."""
    num_servers: PositiveInt = 1
    """Servers that are started on each machine."""
    tensor_parallel_size: PositiveInt = 1
    python: Path | None = None
    """Interpreter of the engine's own environment; None looks for .venv-sglang or .venv-vllm, then uses our own."""
    host: str = "127.0.0.1"
    """Interface that started servers listen on."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto follows policy.precision."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: the engine quantizes what it loads. With sglang for dense models without query/key norms (Qwen2, Llama)."""
    mem_fraction_static: Annotated[float, Field(gt=0, lt=1)] = 0.6
    max_total_tokens: PositiveInt | None = None
    """KV-cache size in tokens; None lets the engine choose (32768 on a CPU)."""
    max_running_requests: PositiveInt | None = None
    memory_saver: bool = False
    """Release the engine's memory while the trainer works on the same GPU."""
    sleep_level: Literal["kv_cache", "all"] = "all"
    """What memory_saver releases: the KV cache alone, or the weights too, which the next weight sync brings back."""
    cuda_graphs: bool = True
    """Decode in CUDA graphs, where the engine runs on a GPU. False saves their memory and seconds at the start."""
    fp32_lm_head: bool = False
    deterministic: bool = False
    """Batch-invariant kernels, where the engine has them."""
    extra_args: list[str] = Field(default=[])
    """Passed to the server as they are."""
    env: dict[str, str] = Field(default={})
    """Added to the environment of started servers, for example PYTHONPATH of an offline bundle."""
    router: bool = False
    """Spread requests by sglang-router, one on each trainer machine, in place of our own client (SGLang)."""
    router_args: list[str] = Field(default=[])
    """Passed to the router as they are, for example ["--policy=random"]."""
    max_in_flight: PositiveInt = 256
    """Requests under way at once, from each trainer rank."""
    max_retries: NonNegativeInt = 3
    """Further tries of a request that a server failed or dropped."""
    start_timeout_s: PositiveFloat = 300.0
    request_timeout_s: PositiveFloat = 1800.0
    max_restarts: NonNegativeInt = 2
    """How often a started server that died is started again."""


class RolloutConfig(Section):
    """Generation of answers."""

    engine: Literal["embedded", "sglang", "vllm"] = "embedded"
    answers_per_question: Annotated[int, Field(ge=2)] = 16
    questions_per_batch: PositiveInt = 1536
    """Questions sampled per generation batch."""
    max_generation_batches: PositiveInt = 10
    """Bound on generation batches per step; reaching it without a full batch ends the run with an error."""
    max_response_tokens: PositiveInt = 3584
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    """-1 means all tokens."""
    allow_biased_sampling: bool = False
    """Permit top_p < 1 or top_k in training, although the ratio is then biased."""
    max_staleness: NonNegativeInt = 1
    """Training steps for which surplus groups are kept; 0 throws them away."""
    embedded_batch_tokens: PositiveInt = 65536
    """Embedded engine: rows x longest possible row of one generate call."""
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _unbiased(self) -> RolloutConfig:
        biased = [f"top_p={self.top_p}"] * (self.top_p < 1) + [f"top_k={self.top_k}"] * (self.top_k != -1)
        if biased and not self.allow_biased_sampling:
            raise ValueError(
                f"{' and '.join(biased)}: samples from a cut distribution bias the likelihood ratio. "
                "Train with top_p=1.0 and top_k=-1, or set rollout.allow_biased_sampling=true"
            )
        if self.top_k == 0 or self.top_k < -1:
            raise ValueError(f"top_k={self.top_k}: must be -1 (all tokens) or at least 1")
        return self

    @model_validator(mode="after")
    def _server_settings(self) -> RolloutConfig:
        server = self.server
        if server.memory_saver and (self.engine == "embedded" or server.urls or server.registry):
            where = "engine=embedded" if self.engine == "embedded" else "servers that others run"
            raise ValueError(
                f"server.memory_saver needs engine=sglang or vllm and servers that the run starts, not {where}"
            )
        if server.router and self.engine != "sglang":
            raise ValueError(f"server.router is sglang-router: it needs engine=sglang, not {self.engine}")
        return self


class VerifyConfig(Section):
    """Grading of answers, in worker processes that can be killed."""

    grader: str = "maths"
    """Names, comma-separated; the first decides. Built in: maths, math_verify_plain, dapo_boxed, dapo_minerva, numeric
    (or numeric:TOLERANCE). A dotted path names a function of your own. docs/verify.md says what each accepts."""
    workers: PositiveInt = 1
    """Worker processes per trainer rank."""
    timeout_s: PositiveFloat = 3.0
    """Time for one verdict, after which the worker is killed and the verdict is `timeout`."""
    memory_bytes: PositiveInt = 1 << 30
    """Address space that grading one answer may add to a worker."""
    on_disagreement: Literal["trust_first", "drop", "not_negative"] = "trust_first"
    """Several graders that differ: believe the first, leave the answer out, or leave it out if it would be wrong."""
    shuffle_within_groups: bool = False
    """Negative control: a group keeps its correct rate, but which of its answers are correct is drawn at random."""
