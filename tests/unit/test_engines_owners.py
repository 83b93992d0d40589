"""Who started servers hears that one hangs, and that a step is complete, from ranks elsewhere."""

import os
import signal
import threading
from contextlib import contextmanager

import pytest
from answering import engine, good, requests, run, serving
from processes import server_of, wait_until
from test_engines_server import make_server

from megatron_nft.engines.owners import Owners
from megatron_nft.engines.server import ServerGroup


@contextmanager
def owned(tmp_path, restarts=1):
    """A server, by an owner that listens in `tmp_path`."""
    group = ServerGroup([make_server(tmp_path)], start_timeout_s=120.0, max_restarts=restarts, owners=Owners(tmp_path))
    try:
        yield group, group.servers[0]
    finally:
        group.close()


def test_what_is_told_is_heard_once(tmp_path):
    told, heard = Owners(tmp_path, tells_steps=True), Owners(tmp_path)
    assert heard.take_hanging("http://a:1") is None and not heard.hear_good_step()
    told.tell_hanging("http://a:1/", 120.0)
    told.tell_good_step()
    assert heard.take_hanging("http://a:2") is None
    assert heard.take_hanging("http://a:1") == 120.0
    assert heard.take_hanging("http://a:1") is None
    assert heard.hear_good_step() and not heard.hear_good_step()
    told.tell_good_step()
    assert heard.hear_good_step()
    assert not Owners(tmp_path).hear_good_step(), "what was told before it listened is of no interest"
    Owners(tmp_path).tell_good_step()
    assert not heard.hear_good_step(), "one rank is enough for it"


def test_a_server_that_hangs_is_ended_by_its_owner_elsewhere_and_steps_renew_the_bound(tmp_path):
    """Twice with a bound of one restart: the second time only because a step was completed in between."""
    told = Owners(tmp_path, tells_steps=True)
    with owned(tmp_path) as (group, server):
        for starts in (2, 3):
            before = server.starts_allowed
            told.tell_hanging(server.url, 0.1)
            wait_until(lambda n=starts: server.starts == n and server.is_healthy(), 120, "a new start")
            assert "made no progress for 0.1 s" in server.deaths[-1]
            told.tell_good_step()
            wait_until(lambda n=before: server.starts_allowed > n, 60, "the bound")
        for _ in range(2):
            os.kill(server_of(server._supervisor.pid), signal.SIGKILL)
            wait_until(lambda: group.given_up or (server.starts == 4 and server.is_healthy()), 120, "the end")
        assert server.starts == 4


def test_a_server_that_was_started_since_is_not_the_one_that_hung(tmp_path):
    """A second rank says so late, or it is what an earlier run left for a server on the same port."""
    told = Owners(tmp_path)
    with owned(tmp_path) as (_, server):
        told.tell_hanging(server.url, 600.0)
        wait_until(lambda: not any((tmp_path / "hanging").iterdir()), 60, "the owner")
        wait_until(lambda: not server._supervisor.poll() and server.is_healthy())
        assert (server.starts, server.deaths) == (1, [])


@pytest.mark.parametrize("has_owner", [True, False])
def test_the_owner_of_a_server_that_hangs_is_told(tmp_path, has_owner):
    with serving(good) as a, serving(good) as b:
        enough = threading.Event()
        a.answer, a.moves = (lambda body: enough.wait(60) and None), lambda: False
        options = {"owners": Owners(tmp_path)} if has_owner else {}
        with engine(a, b, stall_timeout_s=0.8, options=options) as client:
            assert len(run(client, requests(8))) == 16
        enough.set()
        assert Owners(tmp_path).take_hanging(a.url) == (0.8 if has_owner else None)
        assert Owners(tmp_path).take_hanging(b.url) is None
