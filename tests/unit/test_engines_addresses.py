"""The address at which other hosts reach this one, for the ways in which clusters name their nodes."""

import pytest

from megatron_nft.engines import addresses
from megatron_nft.engines.engine import EngineError


class Cluster:
    """Hosts, one rank on each, whose collectives run in this process: `routes` has each host's address towards another
    (by name or address), `environment` its variables."""

    def __init__(self, monkeypatch, routes, environment):
        self.monkeypatch, self.routes, self.environment = monkeypatch, routes, environment

    def address_of(self, rank):
        """What `host_address` returns on a rank, given what the other ranks bring to the collectives."""
        guesses = [self._on(r, addresses._towards_master) for r in range(len(self.routes))]
        calls = iter([guesses, None])

        def gather(value, _group):
            everyone = next(calls)
            if everyone is None:  # the second time: what the others found in the same way
                others = [g for g in guesses if not addresses.is_local(g)]
                found = [g if not addresses.is_local(g) else self._towards(r, others) for r, g in enumerate(guesses)]
                assert found[rank] == value
                return found
            assert everyone[rank] == value
            return everyone

        self.monkeypatch.setattr(addresses, "gather_objects", gather)
        names = [f"node{r}" for r in range(len(self.routes))]
        return self._on(rank, lambda: addresses.host_address(names, rank, None))

    def _towards(self, rank, others):
        return self.routes[rank].get(f"http://{others[0]}", "") if others else ""

    def _on(self, rank, call):
        def route(url):
            try:
                return self.routes[rank][url]
            except KeyError:
                raise OSError("no route") from None

        self.monkeypatch.setattr(addresses, "address_towards", route)
        for name in ("NFT_ADDRESS", "MASTER_ADDR"):
            self.monkeypatch.delenv(name, raising=False)
        for name, value in self.environment[rank].items():
            self.monkeypatch.setenv(name, value)
        return call()


MASTER = {"MASTER_ADDR": "node0"}


def test_one_host_is_called_over_loopback():
    assert addresses.host_address(["node0", "node0"], 1, None) == "127.0.0.1"


def test_the_way_to_the_master(monkeypatch):
    routes = [{"http://node0": "10.0.0.1"}, {"http://node0": "10.0.0.2"}]
    cluster = Cluster(monkeypatch, routes, [MASTER, MASTER])
    assert [cluster.address_of(r) for r in range(2)] == ["10.0.0.1", "10.0.0.2"]


def test_a_master_that_knows_its_own_name_at_loopback(monkeypatch):
    """As Debian sets it up: 127.0.1.1 in /etc/hosts."""
    routes = [{"http://node0": "127.0.0.1", "http://10.0.0.2": "10.0.0.1"}, {"http://node0": "10.0.0.2"}]
    cluster = Cluster(monkeypatch, routes, [MASTER, MASTER])
    assert [cluster.address_of(r) for r in range(2)] == ["10.0.0.1", "10.0.0.2"]


def test_nft_address_wins_where_it_is_an_address(monkeypatch):
    routes = [{"http://node0": "10.0.0.1"}, {"http://node0": "10.0.0.2"}]
    environment = [{**MASTER, "NFT_ADDRESS": "192.168.0.1"}, {**MASTER, "NFT_ADDRESS": "node1"}]
    cluster = Cluster(monkeypatch, routes, environment)
    assert [cluster.address_of(r) for r in range(2)] == ["192.168.0.1", "10.0.0.2"]


def test_a_host_without_a_way_is_named_on_every_rank(monkeypatch):
    cluster = Cluster(monkeypatch, [{"http://node0": "10.0.0.1"}, {}], [MASTER, MASTER])
    for rank in range(2):
        with pytest.raises(EngineError, match="other hosts reach node1: set NFT_ADDRESS"):
            cluster.address_of(rank)


@pytest.mark.parametrize(
    ("host", "names", "refused"),
    [
        ("auto", ["a", "b"], False),
        ("0.0.0.0", ["a", "b"], False),
        ("127.0.0.1", ["a", "a"], False),
        ("127.0.0.1", ["a", "b"], True),
        ("localhost", ["a", "b"], True),
        ("::1", ["a", "b"], True),
    ],
)
def test_loopback_on_several_hosts_is_refused(host, names, refused):
    if refused:
        with pytest.raises(EngineError, match=r"the run has 2 hosts \(a, b\)"):
            addresses.check_reachable(host, names)
    else:
        addresses.check_reachable(host, names)
