"""Where servers that a run starts listen, and under which address the ranks of all its hosts call them."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_nft.distributed import gather_objects
from megatron_nft.engines.engine import EngineError
from megatron_nft.weights.transports.broadcast_group import address_towards

if TYPE_CHECKING:
    import torch.distributed as dist

LOOPBACK = "127.0.0.1"
ALL_INTERFACES = "0.0.0.0"


def host_address(names: Sequence[str], rank: int, group: dist.ProcessGroup | None) -> str:
    """The address at which the other hosts of the run reach this one; loopback where there is one host. Collective.

    names: the host name of each rank. The address is NFT_ADDRESS where that is set to one, else that of the interface
    from which this host reaches MASTER_ADDR, or from which the master's host reaches another one. No host name is
    looked up for it: many hosts know their own name at a loopback address. EngineError, on every rank, where a host
    has no such address.
    """
    if len(set(names)) == 1:
        return LOOPBACK
    guesses = gather_objects(_towards_master(), group)
    mine = guesses[rank]
    if is_local(mine):  # this is the master's host
        mine = next((_towards(other) for other in guesses if not is_local(other)), "")
    found = gather_objects(mine, group)
    if nowhere := sorted({name for name, address in zip(names, found, strict=True) if is_local(address)}):
        raise EngineError(
            f"no address was found at which other hosts reach {', '.join(nowhere)}: set NFT_ADDRESS to one there"
        )
    return mine


def node_address() -> str:
    """The address of a node that runs engines alone, as the trainer's nodes reach it; empty where nothing says so.

    NFT_ADDRESS where that is an IP address, else the one from which this node reaches NFT_MASTER_ADDR, the trainer's
    first node; loopback only where that is this node. NFT_ADDRESS may be this node's name, which is not looked up: here
    it may stand for loopback. EngineError where neither gives an address.
    """
    given, master = os.environ.get("NFT_ADDRESS", ""), os.environ.get("NFT_MASTER_ADDR", "")
    if not given and not master:
        return ""
    address = given if _is_ip(given) else _towards(master)
    if not address:
        raise EngineError(
            f"no address was found at which the trainer reaches the engines of this node (NFT_ADDRESS={given!r}, "
            f"NFT_MASTER_ADDR={master!r}): set NFT_IFNAME to the network interface, or NFT_ADDRESS to an IP address"
        )
    return address


def is_local(address: str) -> bool:
    """Whether nobody but this host can call the address; so for an empty one."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address in ("", "localhost")


def check_reachable(host: str, names: Sequence[str]) -> None:
    """EngineError where servers would listen on loopback, though ranks on other hosts must call them.

    host: rollout.server.host. names: the host name of each rank.
    """
    hosts = list(dict.fromkeys(names))
    if host != "auto" and is_local(host) and len(hosts) > 1:
        raise EngineError(
            f"rollout.server.host={host}: the run has {len(hosts)} hosts ({', '.join(hosts)}), and ranks of one "
            "call the servers of another whose own are lost; leave it at auto, or set it to 0.0.0.0"
        )


def _towards_master() -> str:
    """This host's address as the master sees it; empty where it cannot be told."""
    given = os.environ.get("NFT_ADDRESS", "")
    # Where it is no IP address, it is the name of a node, which may stand for loopback here.
    return given if _is_ip(given) else _towards(os.environ.get("MASTER_ADDR", ""))


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _towards(host: str) -> str:
    try:
        return address_towards(f"http://{host}") if host else ""
    except OSError:
        return ""
