"""Who calls whom in a weight sync, in cases worked out by hand. test_weights_many_hosts.py simulates a large one."""

from __future__ import annotations

import pytest

from megatron_nft.config import Config
from megatron_nft.engines import transports
from megatron_nft.weights.routes import Places, RankPlace, ServerPlace
from megatron_nft.weights.transport import WeightSyncError
from megatron_nft.weights.transports.disk import DiskTransport
from megatron_nft.weights.transports.distributed import DistributedTransport, _refuse_shared_gpus


def two_hosts(*servers: ServerPlace) -> Places:
    ranks = [RankPlace(host, (f"GPU-{host}-{n}", str(n))) for host in ("a", "b") for n in range(2)]
    return Places(tuple(ranks), servers)


def test_engines_whose_gpus_are_unknown_or_no_trainers_read_from_the_caller():
    unknown, beyond = ServerPlace("http://b:1", "b"), ServerPlace("http://b:2", "b", ("GPU-b-1", "7"))
    places = two_hosts(unknown, beyond)
    assert places.sources(unknown, 2) == (2, 2)
    assert places.sources(beyond, 2) == (3, 2)
    assert places.meetings(2) == {"b": [2, 3]}


def test_a_server_whose_ranks_find_their_gpus_is_told_of_all_ranks_of_its_host():
    finding = ServerPlace("http://b:1", "b", finds_gpu=True)
    places = two_hosts(finding, ServerPlace("http://a:1", "a", ("0",)))
    assert places.sources(finding, 1) == places.sources(finding, 4) == (2, 3)
    assert places.meetings(1) == {"b": [2, 3], "a": [0]}


def test_a_server_elsewhere_is_called_by_rank_0_and_gets_no_shared_memory():
    places = two_hosts(ServerPlace("http://b:1", "b"), ServerPlace("http://c:1", None))
    assert [places.caller(server) for server in places.servers] == [2, 0]
    assert places.foreign == ["http://c:1"]
    assert transports.server_transport("auto", places) is DistributedTransport
    assert transports.server_transport("disk", places) is DiskTransport
    with pytest.raises(WeightSyncError, match=r"http://c:1: not on a trainer's host \(a, b\).*auto, distributed, disk"):
        transports.server_transport("tensor", places)


def test_nccl_is_refused_where_an_engine_is_on_the_gpu_of_a_rank_that_sends():
    """Host a has the leaders of both stages; b's engines, and one on a's third GPU, share with none of them."""
    apart = two_hosts(ServerPlace("http://b:1", "b", ("0", "1")), ServerPlace("http://a:2", "a", ("2",)))
    _refuse_shared_gpus(apart, (0, 1))
    shared = two_hosts(ServerPlace("http://b:1", "b", ("0",)), ServerPlace("http://a:1", "a", ("GPU-a-1",)))
    with pytest.raises(WeightSyncError, match=r"http://a:1 with rank 1\).*Duplicate GPU.*Allowed here: tensor, disk"):
        _refuse_shared_gpus(shared, (0, 1))
    mixed = two_hosts(ServerPlace("http://c:1", None), ServerPlace("http://a:1", "a", ("0",)))
    with pytest.raises(WeightSyncError, match=r"rank 0\).*Allowed here: disk$"):
        _refuse_shared_gpus(mixed, (0,))


def test_addresses_of_this_host():
    assert transports.is_own_address("127.0.0.1") and transports.is_own_address("localhost")
    assert not transports.is_own_address("192.0.2.1")  # for documentation, on no machine
    assert not transports.is_own_address("no-such-host.invalid") and not transports.is_own_address("")


@pytest.mark.parametrize(
    ("device", "transport", "server", "refused"),
    [
        ("cuda", "distributed", {}, "two ranks on one GPU.*Allowed here: auto, tensor, disk"),
        ("cuda", "auto", {}, ""),
        ("cpu", "distributed", {}, ""),
        ("cuda", "distributed", {"urls": ["http://elsewhere:1"]}, ""),  # known once the engine is opened
        ("cuda", "auto", {"device": "cpu"}, "rollout.server.device=cpu: the trainer's weights are on cuda.*: disk"),
        ("cuda", "disk", {"device": "cpu"}, ""),
    ],
)
def test_what_is_refused_before_any_rank_starts(device, transport, server, refused):
    required = {"run_dir": "run", "model": {"path": "model"}, "data": {"train": ["unused"]}}
    given = {"rollout": {"engine": "sglang", "server": server}, "sync": {"transport": transport}}
    config = Config.model_validate(required | given)
    if refused:
        with pytest.raises(ValueError, match=refused):
            transports.check_transport(config, device)
    else:
        transports.check_transport(config, device)
