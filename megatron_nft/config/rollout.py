"""Questions, the engines that answer them, and the grading of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from megatron_nft.config.engines import known_engine
from megatron_nft.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class DataConfig(Section):
    """Questions to train on."""

    train: list[Path] = Field(min_length=1)
    """Parquet or JSONL files in verl's layout; `megatron-nft prepare` makes them of public question sets."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt in tokens, chat template included."""
    over_long: Literal["drop", "refuse"] = "drop"
    """What to do with prompts that are longer: drop and count them, or refuse to start."""
    shuffle: bool = True
    """Draw the questions in a new order each epoch, which follows from `seed`; false keeps the order of the files."""
    choose: str | None = None
    """What may skip drawn questions, from how they were answered before: skip_solved (a question whose last two groups
    were all right is skipped with probability 0.75, or P as skip_solved:P), or the dotted path of a function of your
    own (docs/extending.md). null asks every question that is drawn."""


class ServerConfig(Section):
    """SGLang or vLLM servers: given by URL, or started and watched by the run."""

    urls: list[str] = Field(default=[])
    """Addresses of servers that are already up, for example http://node7:30000. Empty: the run starts its own, or waits
    for those of `registry`."""
    registry: Path | None = None
    """Folder in which engine nodes announce their servers (engines/discovery.py); read where `urls` is empty."""
    registry_nodes: PositiveInt = 1
    """Number of engine nodes to wait for in `registry`."""
    key_file: Path | None = None
    """File with the key that the servers of `urls` or `registry` ask for, as `Authorization: Bearer KEY`. null:
    the file `key` of `registry`, or no key. Servers that the run starts get a key of their own (docs/cluster.md)."""
    num_servers: PositiveInt = 1
    """Servers to start on each machine."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs of one server, each with a part of every matrix."""
    python: Path | None = None
    """Interpreter of the engine's own environment; null looks for .venv-sglang or .venv-vllm, then uses our own."""
    host: str = "auto"
    """Address that started servers listen on. auto: 127.0.0.1 where the run has one host, else the address at which the
    other hosts reach this one, as docs/cluster.md describes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of started servers; auto takes the trainer's."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the engine's weights; auto follows policy.precision."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: the engine quantizes the weights it loads. With sglang up to 0.5.20 for Qwen2 and Llama, from 0.5.22 on for
    Qwen2 and Qwen3; dense models alone."""
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = "auto"
    """dtype of the engine's KV cache: that of its weights (auto), or FP8 without scales, which holds twice the tokens
    and reads half the bytes. On a GPU."""
    mem_fraction_static: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of a GPU's memory that the engine takes for weights and KV cache: with sglang of what is free beside the
    trainer when the server starts, with vllm of the whole GPU. `megatron-nft plan` names the largest that fits."""
    max_total_tokens: PositiveInt | None = None
    """Size of the KV cache in tokens (sglang only); null lets the engine choose (32768 on a CPU)."""
    max_running_requests: PositiveInt | None = None
    """Requests that a server decodes at once; null lets the engine choose (64 on a CPU)."""
    memory_saver: bool = False
    """Release the engine's memory while the trainer works on the same GPU."""
    sleep_level: Literal["kv_cache", "all"] = "all"
    """What `memory_saver` releases: the KV cache alone, or the weights too, which the next weight sync brings back."""
    cuda_graphs: bool = True
    """Decode in CUDA graphs, where the engine runs on a GPU. false saves their memory and some seconds at the start."""
    fp32_lm_head: bool = False
    """Compute the logits in fp32 (sglang only), which brings the engine's log-probs closer to the trainer's."""
    deterministic: bool = False
    """Use the engine's batch-invariant kernels, on a GPU: an answer then does not depend on what else is decoded beside
    it. Slower. policy.batch_invariant sets it, with the trainer's own."""
    extra_args: list[str] = Field(default=[])
    """Further arguments for the server's command line, passed as they are."""
    env: dict[str, str] = Field(default={})
    """Variables added to the environment of started servers, for example PYTHONPATH of an offline bundle."""
    router: bool = False
    """Spread requests by sglang-router, one on each trainer machine, in place of our own client (sglang only)."""
    router_args: list[str] = Field(default=[])
    """Further arguments for the router's command line, for example ["--policy=random"]."""
    max_in_flight: PositiveInt = 512
    """Answers under way at once, from each trainer rank. Each is a request of its own. With mode=overlapped held-out
    questions have as many beside those of the training."""
    max_retries: NonNegativeInt = 3
    """Further tries of an answer that a server failed or dropped."""
    start_timeout_s: PositiveFloat | None = None
    """Seconds that a server may take to start, or to wake up. null: 300, and for the bytes of the model 1 s per 0.2 GB
    where the server reads them (from a disk that all hosts share), or 1 s per GB and GPU where it only makes room for
    what the first weight sync brings."""
    stall_timeout_s: PositiveFloat = 120.0
    """Seconds that a server may work on no request at all while answers are under way. These are then asked elsewhere,
    and a server that the run or its engine nodes started is started again. An answer may take as long as it takes."""
    max_restarts: NonNegativeInt = 2
    """How often a server that the run or its engine nodes started and that died or hangs is started again between two
    complete training steps."""


def _check_router_lets_sleep(server: ServerConfig) -> None:
    """ValueError where the router's health checks would ask a sleeping engine for a token, which ends it."""
    if not (server.router and server.memory_saver):
        return
    health = server.env.get("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "false")
    if health.lower() not in ("false", "0"):
        raise ValueError(
            f"server.router with server.memory_saver: SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION={health} in server.env "
            "lets the router's health checks wake a sleeping engine; leave it out"
        )
    if wrong := [a for a in server.router_args if a.startswith("--health-check-endpoint")]:
        raise ValueError(
            f"server.router with server.memory_saver: {wrong[0]} in server.router_args may wake a sleeping engine; "
            "/health, the default, does not"
        )


class RolloutConfig(Section):
    """Generation of answers."""

    engine: Annotated[str, AfterValidator(known_engine)] = "embedded"
    """What generates the answers: embedded (transformers in the trainer's own processes, for small models), sglang or
    vllm (servers)."""
    mode: Literal["synchronous", "streaming", "overlapped"] = "synchronous"
    """synchronous: all questions of a batch are answered to their end. streaming: generation ends when the step's
    groups are known; answers under way go on in the next step, from the tokens that they have. overlapped: servers
    answer while the trainer trains, and sync.in_flight says what a weight sync does to answers under way. docs/nft.md
    says what that does to the ratio."""
    answers_per_question: Annotated[int, Field(ge=2)] = 16
    """Answers sampled for each question: the size of a group."""
    questions_per_batch: PositiveInt = 1536
    """Questions sampled per generation batch. Batches are generated until a step has `train.questions_per_step` groups
    that are neither all right nor all wrong. The other modes have no batches: they sample as many questions as
    max_staleness allows to be open."""
    max_generation_batches: PositiveInt = 10
    """Most generation batches per step, in the other modes as many questions; when they do not fill a step, the run
    ends with an error."""
    max_response_tokens: PositiveInt = 3584
    """Tokens after which an answer is cut off."""
    stop_token_ids: list[NonNegativeInt] = Field(default=[])
    """Further tokens that end an answer, beside those that the model folder names (generation_config.json, config.json
    and tokenizer). The end token belongs to the answer."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The trainer's log-probs are taken at the same temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the probability mass that tokens are drawn from. 1 draws from all of it."""
    top_k: int = -1
    """Number of most likely tokens to draw from; -1 draws from all tokens."""
    allow_biased_sampling: bool = False
    """Permit top_p < 1 or top_k in training, although the likelihood ratio is then biased."""
    max_staleness: NonNegativeInt = 1
    """Training steps for which groups beyond a full step are kept to be trained later; 0 throws them away, as the
    published runs do. In the other modes: most weight syncs between the first token of an answer and its
    training, at least 1. docs/nft.md says what stale groups change."""
    embedded_batch_tokens: PositiveInt = 65536
    """Size of one batch of the embedded engine: rows x tokens of the longest possible row. Lower it where memory is
    short."""
    server: ServerConfig = ServerConfig()
    """SGLang or vLLM servers: given by their addresses, or started and watched by the run."""

    @property
    def uses_servers(self) -> bool:
        """Whether answers come from engine servers, rather than from a model inside each rank."""
        return self.engine != "embedded"

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
    def _mode(self) -> RolloutConfig:
        if self.mode != "synchronous" and self.max_staleness < 1:
            raise ValueError(
                f"max_staleness={self.max_staleness} with mode={self.mode}: its answers may go on under the weights of "
                "the next step, so that they are trained one step after they began; set max_staleness to at least 1, "
                "or mode=synchronous"
            )
        if self.mode == "overlapped" and not self.uses_servers:
            raise ValueError(
                "mode=overlapped with engine=embedded: it generates in the trainer's own processes, which cannot train "
                "meanwhile; use engine=sglang or vllm, or mode=streaming"
            )
        if self.mode == "overlapped" and self.server.memory_saver:
            raise ValueError(
                "mode=overlapped with server.memory_saver: an engine without its memory cannot generate while the "
                "trainer trains; leave memory_saver off, or use mode=streaming"
            )
        return self

    @model_validator(mode="after")
    def _server_settings(self) -> RolloutConfig:
        server = self.server
        if server.memory_saver and (not self.uses_servers or server.urls or server.registry):
            where = "servers that others run" if self.uses_servers else "engine=embedded"
            raise ValueError(
                f"server.memory_saver needs engine=sglang or vllm and servers that the run starts, not {where}"
            )
        if server.router and self.engine != "sglang":
            raise ValueError(f"server.router is sglang-router: it needs engine=sglang, not {self.engine}")
        _check_router_lets_sleep(server)
        return self


class VerifyConfig(Section):
    """Grading of answers, in worker processes that can be killed."""

    grader: str = "maths"
    """Names, comma-separated; the first decides. Built in: maths, math_verify_plain, dapo_boxed, dapo_minerva, numeric
    (or numeric:TOLERANCE). A dotted path names a function of your own. docs/verify.md says what each accepts."""
    workers: PositiveInt = 1
    """Worker processes per trainer rank."""
    timeout_s: PositiveFloat = 3.0
    """Seconds for one verdict, after which the worker is killed and the verdict is `timeout`."""
    memory_bytes: PositiveInt = 1 << 30
    """Bytes of address space that grading one answer may add to a worker."""
    on_disagreement: Literal["trust_first", "drop", "not_negative"] = "trust_first"
    """What to do with an answer on which several graders differ: believe the first grader, leave the answer out, or
    leave it out only where it would be trained as wrong."""
    on_failure: Literal["drop", "negative"] = "drop"
    """What to do with an answer that got no verdict because grading took too long, raised or crashed: leave it out, so
    that the correct rate is that of the others, or train it as wrong."""
    max_failure_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Largest share of a step's answers without a verdict, in [0, 1]; the run stops above it."""
    shuffle_within_groups: bool = False
    """Negative control of an experiment: a group keeps its correct rate, but which of its answers are correct is drawn
    at random."""
