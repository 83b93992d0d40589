"""What differs between engines, in one record per engine (engines/NAME/kind.py). open.py has the table of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_nft.engines.client import HttpEngine
from megatron_nft.engines.engine import Engine, OpenOptions
from megatron_nft.engines.routed import RequestRouter
from megatron_nft.engines.sleep import MemoryCalls

if TYPE_CHECKING:
    from megatron_nft.config import RolloutConfig, ServerConfig
    from megatron_nft.policy.family import ModelSpec


class EngineKind(Protocol):
    """A kind of engine, as `rollout.engine` names it."""

    def open(self, model_path: Path, rollout: RolloutConfig, options: OpenOptions, /) -> Engine:
        """This rank's engine for a model folder. Collective. EngineError, on every rank, where none can be had."""
        ...

    def check_updates(self, rollout: RolloutConfig, spec: ModelSpec, engine: Engine, /) -> None:
        """ValueError where live weight updates of such a model come out wrong in `engine` with these settings."""
        ...

    def version(self, model_path: Path, server: ServerConfig, /) -> str:
        """Name and version of the software that answers. ValueError where a given server has another model."""
        ...


class CommandLine(Protocol):
    """The command that starts a server, without --port. EngineError for settings that the engine does not have."""

    def __call__(
        self,
        python: Path,
        model_path: Path,
        config: ServerConfig,
        *,
        device: str,
        dtype: str,
        gpu: int,
        weight_version: int,
    ) -> list[str]:
        """config: its `host` is an address. device: cpu | cuda. dtype: float32 | bfloat16. gpu: the first of its GPUs.
        weight_version: at the start; NO_WEIGHTS where the first weight sync brings the weights (see `patience`)."""
        ...


class Environment(Protocol):
    """Variables that a server needs, added to the environment that it inherits."""

    def __call__(self, config: ServerConfig, *, device: str, gpu: int) -> dict[str, str]:
        """See `CommandLine` for the arguments."""
        ...


def _as_it_is(server: ServerConfig) -> ServerConfig:
    """One server takes weights from its own host and from others."""
    return server


def _any_model(rollout: RolloutConfig, spec: ModelSpec, engine: Engine) -> None:
    """Do nothing: updates of every model come out right."""


@dataclass(frozen=True, kw_only=True)
class ServerKind:
    """What is specific to an engine that answers from servers; http.py makes an `EngineKind` of it."""

    name: str
    packages: tuple[str, ...]
    """Distributions that bring it; the first one that is installed counts."""
    client: type[HttpEngine]
    """Asks for answers and log-probs, and makes the clients that bring weights (`HttpEngine._weight_client`)."""
    command_line: CommandLine
    environment: Environment
    guarded: Callable[[list[str]], list[str]]
    """The command of a server that answers only those who send the key in `keys.VARIABLE`."""
    set_version: Callable[[str, int, str | None], None]
    """(URL, version, key): tell a server that has just started which version its weights are."""
    memory_calls: Mapping[str, MemoryCalls]
    """rollout.server.sleep_level -> how memory is released and resumed."""
    served_version: Callable[[str, Path, str | None], str]
    """(URL, model folder, key): name and version that a running server gives. ValueError where it has another model."""
    for_other_hosts: Callable[[ServerConfig], ServerConfig] = _as_it_is
    """The settings of a server on a GPU that trainers on other hosts bring weights to, by `distributed`."""
    router: type[RequestRouter] | None = None
    """What spreads requests with rollout.server.router, where the engine has something for it."""
    check_updates: Callable[[RolloutConfig, ModelSpec, Engine], None] = _any_model
    """See `EngineKind.check_updates`."""
