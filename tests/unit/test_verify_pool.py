"""The pool: one verdict per row whatever a row does, no process left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_nft.config import VerifyConfig
from megatron_nft.types import Verdict
from megatron_nft.verify import GraderError, VerifierError, VerifierPool
from megatron_nft.verify import stopwatch as stopwatch_module
from megatron_nft.verify.dispatch import WINDOW_ROWS
from megatron_nft.verify.stopwatch import Stopwatch, Usage, usage_of

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes are watched through /proc here")


def config(**values) -> VerifyConfig:
    return VerifyConfig(**{"grader": "verify_graders.act", "timeout_s": 1.0, "memory_bytes": 256 << 20, **values})


def verdicts(pool: VerifierPool, responses: list[str], answer: str = "yes") -> list[Verdict]:
    futures = [pool.submit(response, answer) for response in responses]
    return [future.result(300).verdict for future in futures]


def children(pid: int) -> list[int]:
    """All processes below `pid`, zombies left out. (/proc/PID/task/*/children may miss some on a busy machine.)"""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[0] != "Z":
            parents[int(path.parent.name)] = int(fields[1])
    below = [pid]
    for parent in below:
        below.extend(child for child, its_parent in parents.items() if its_parent == parent)
    return below[1:]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, limit_s: float = 60.0) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(config(workers=2)) as started:
        started.wait_ready()
        yield started


def test_verdicts_belong_to_their_rows(pool):
    responses = ["yes" if index % 3 == 0 else f"no {index}" for index in range(500)]
    expected = [Verdict.CORRECT if response == "yes" else Verdict.WRONG for response in responses]
    assert verdicts(pool, responses) == expected


def test_a_hostile_row_costs_nobody_else_a_verdict(pool):
    hostile = {
        "sleep 30": Verdict.TIMEOUT,
        "spin 30": Verdict.TIMEOUT,
        "deaf": Verdict.TIMEOUT,
        f"memory {1 << 30}": Verdict.TIMEOUT,
        "segfault": Verdict.NO_VERDICT,
        "exit 3": Verdict.NO_VERDICT,
        "raise": Verdict.NO_VERDICT,
        "nonsense": Verdict.NO_VERDICT,
    }
    responses = [response for bad in hostile for response in (bad, "yes", "no", "yes")]
    expected = [v for bad in hostile.values() for v in (bad, Verdict.CORRECT, Verdict.WRONG, Verdict.CORRECT)]
    assert verdicts(pool, responses) == expected


def test_reasons_say_what_happened(pool):
    def reason(response):
        return pool.submit(response, "yes").result(60).reason

    assert "no verdict after 1 s" in reason("sleep 30")
    assert "bytes of memory" in reason(f"memory {1 << 30}")
    assert "SIGSEGV" in reason("segfault")
    assert "exit code 3" in reason("exit 3")
    assert "KeyError" in reason("raise")
    assert "verify_graders.act returned 'correct'" in reason("nonsense")
    assert reason("yes") == ""


def test_memory_within_the_bound_is_allowed(pool):
    assert verdicts(pool, [f"memory {60 << 20}"] * 3) == [Verdict.WRONG] * 3


def test_a_row_whose_worker_was_killed_from_outside_is_graded_again(pool, tmp_path):
    assert verdicts(pool, [f"killed_once {tmp_path / 'mark'}", "yes"]) == [Verdict.CORRECT, Verdict.CORRECT]


def test_workers_are_reused_and_replaced():
    others = set(children(os.getpid()))
    with VerifierPool(config(workers=1)) as pool:
        pool.wait_ready()
        forkserver = next(pid for pid in children(os.getpid()) if pid not in others)
        assert verdicts(pool, ["yes"] * 50) == [Verdict.CORRECT] * 50
        first = children(forkserver)
        assert verdicts(pool, ["yes"] * 50) == [Verdict.CORRECT] * 50
        assert children(forkserver) == first, "a worker is reused"
        verdicts(pool, ["sleep 30"])
        assert verdicts(pool, ["yes"]) == [Verdict.CORRECT]
        assert wait_until(lambda: len(children(forkserver)) == 1)
        second = children(forkserver)
        assert second != first, "a killed worker is replaced"


def test_a_dead_fork_server_is_started_again():
    others = set(children(os.getpid()))
    with VerifierPool(config(workers=2, timeout_s=60.0)) as pool:
        pool.wait_ready()
        futures = [pool.submit("sleep 0.05", "yes") for _ in range(20)]
        os.kill(next(pid for pid in children(os.getpid()) if pid not in others), signal.SIGKILL)
        assert [future.result(60).verdict for future in futures] == [Verdict.WRONG] * 20
        assert verdicts(pool, ["yes"]) == [Verdict.CORRECT]


def test_close_ends_all_processes_and_fails_what_is_left():
    others = set(children(os.getpid()))
    pool = VerifierPool(config(workers=2, timeout_s=600.0))
    pool.wait_ready()
    future = pool.submit("sleep 600", "yes")
    assert wait_until(future.running)
    assert wait_until(lambda: len(set(children(os.getpid())) - others) == 3)
    processes = set(children(os.getpid())) - others
    pool.close()
    pool.close()
    assert wait_until(lambda: not any(map(alive, processes)))
    with pytest.raises(VerifierError, match="closed"):
        future.result(60)
    with pytest.raises(VerifierError, match="closed"):
        pool.submit("yes", "yes")


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "exit"])
def test_no_orphans_when_the_owner_ends(end):
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(HERE)!r})
        from megatron_nft.config import VerifyConfig
        from megatron_nft.verify import VerifierPool
        pool = VerifierPool(VerifyConfig(grader="verify_graders.act", workers=2, timeout_s=60.0))
        pool.wait_ready()
        pool.submit("deaf", "yes")
        pool.submit("sleep 60", "yes")
        print("ready", flush=True)
        sys.stdin.readline()
    """)
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "ready\n"
        assert wait_until(lambda: len(children(owner.pid)) == 3)
        processes = children(owner.pid)
        if end == "exit":
            owner.stdin.close()
        else:
            os.kill(owner.pid, getattr(signal, end))
        owner.wait(30)
    assert processes
    assert wait_until(lambda: not any(map(alive, processes)))


def test_interrupts_are_left_to_the_owner():
    """Ctrl-C and a Slurm time limit reach every process of the group; the owner still needs its verdicts."""
    others = set(children(os.getpid()))
    with VerifierPool(config(workers=2)) as pool:
        pool.wait_ready()
        processes = set(children(os.getpid())) - others
        for pid in processes:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(pid, number)
        assert verdicts(pool, ["yes"] * 20) == [Verdict.CORRECT] * 20
        assert processes and processes <= set(children(os.getpid()))


def test_threads_and_asyncio(pool):
    def submit(name):
        return verdicts(pool, [name, "other"], answer=name)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(submit, [f"thread {index}" for index in range(8)]))
    assert found == [[Verdict.CORRECT, Verdict.WRONG]] * 8

    async def grade_all():
        futures = [asyncio.wrap_future(pool.submit(str(index), "3")) for index in range(10)]
        return [graded.verdict for graded in await asyncio.gather(*futures)]

    assert asyncio.run(grade_all()).count(Verdict.CORRECT) == 1


def test_a_pool_made_in_a_thread_outlives_it():
    made = []
    thread = threading.Thread(target=lambda: made.append(VerifierPool(config())))
    thread.start()
    thread.join()
    with made[0] as pool:
        assert verdicts(pool, ["yes", "no"]) == [Verdict.CORRECT, Verdict.WRONG]


def test_cancelled_rows_are_not_graded(tmp_path):
    """The first row holds the one worker, and what it may hold beside it is less than what waits."""
    go, mark = tmp_path / "go", tmp_path / "mark"
    with VerifierPool(config(workers=1, timeout_s=600.0)) as pool:
        first = pool.submit(f"until {go}", "yes")
        futures = [pool.submit("no", "yes") for _ in range(2 * WINDOW_ROWS)]
        last = pool.submit(f"touch {mark}", "yes")
        assert wait_until(first.running)
        assert last.cancel()
        go.touch()
        assert all(future.result(60).verdict is Verdict.WRONG for future in (first, *futures))
        assert verdicts(pool, ["yes"]) == [Verdict.CORRECT] and not mark.exists()


def test_what_the_users_function_receives_and_may_return(pool):
    assert pool.submit("extra", "x", "gsm8k", {"index": 7}).result(60).verdict is Verdict.CORRECT
    assert verdicts(pool, ["verdict timeout", "verdict wrong"]) == [Verdict.TIMEOUT, Verdict.WRONG]


def test_workers_import_no_torch(pool):
    assert verdicts(pool, ["modules"]) == [Verdict.CORRECT]


def test_lone_surrogates_and_nulls_survive(pool):
    text = "\ud800 \x00 \N{SNOWMAN} " * 100
    assert pool.submit(text, text).result(60).verdict is Verdict.CORRECT


def test_large_rows(pool):
    text = "x" * (5 << 20)
    assert verdicts(pool, [text, "b", text], answer=text) == [Verdict.CORRECT, Verdict.WRONG, Verdict.CORRECT]


def test_wrong_arguments(pool):
    with pytest.raises(TypeError, match="not NoneType and str"):
        pool.submit(None, "5")
    with pytest.raises(TypeError, match="not str and float"):
        pool.submit("5", 5.0)
    with pytest.raises((TypeError, AttributeError), match=r"pickle|lambda"):
        pool.submit("a", "b", extra={"function": lambda: None})
    assert verdicts(pool, ["yes"]) == [Verdict.CORRECT]


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ("nope", "unknown grader 'nope'"),
        ("", "no grader"),
        ("maths,maths", "named twice"),
        ("maths,math_verify", "named twice"),
        ("numeric:x", "relative tolerance"),
    ],
)
def test_names_are_checked_at_once(grader, message):
    with pytest.raises(GraderError, match=message):
        VerifierPool(config(grader=grader))


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ("no_such_module.f", "cannot import no_such_module"),
        ("verify_graders.no_such_function", "has no no_such_function"),
        ("verify_graders.not_a_function", "is a int, not a function"),
    ],
)
def test_a_grader_that_cannot_be_loaded(grader, message):
    with VerifierPool(config(grader=grader)) as pool:
        future = pool.submit("a", "b")
        with pytest.raises(VerifierError, match=message):
            pool.wait_ready()
        with pytest.raises(VerifierError, match=message):
            future.result(5)


@pytest.mark.parametrize(
    ("policy", "ignored_when_first_says_wrong", "ignored_when_first_says_correct"),
    [("trust_first", False, False), ("drop", True, True), ("not_negative", True, False)],
)
def test_graders_that_disagree(policy, ignored_when_first_says_wrong, ignored_when_first_says_correct):
    with VerifierPool(config(grader="dapo_boxed,verify_graders.always_right", on_disagreement=policy)) as pool:
        wrong = pool.submit("\\boxed{3}", "5").result(60)
        assert wrong.verdict is Verdict.WRONG
        assert wrong.by_grader == {"dapo_boxed": Verdict.WRONG, "verify_graders.always_right": Verdict.CORRECT}
        assert wrong.ignored is ignored_when_first_says_wrong
        assert pool.submit("\\boxed{5}", "5").result(60).ignored is False
    with VerifierPool(config(grader="verify_graders.always_right,dapo_boxed", on_disagreement=policy)) as pool:
        right = pool.submit("\\boxed{3}", "5").result(60)
        assert (right.verdict, right.grader) == (Verdict.CORRECT, "verify_graders.always_right")
        assert right.ignored is ignored_when_first_says_correct


def test_a_timeout_of_one_grader_leaves_the_others_verdict():
    with VerifierPool(config(grader="verify_graders.act,verify_graders.always_right")) as pool:
        graded = pool.submit("sleep 30", "yes").result(60)
    assert graded.by_grader == {"verify_graders.act": Verdict.TIMEOUT, "verify_graders.always_right": Verdict.CORRECT}
    assert graded.verdict is Verdict.TIMEOUT


def watch_at(monkeypatch, clock):
    monkeypatch.setattr(stopwatch_module.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(stopwatch_module, "usage_of", lambda pid: clock["usage"])
    watch = Stopwatch(1.0)
    watch.start()
    return watch


def test_waiting_for_a_processor_does_not_count_while_it_runs(monkeypatch):
    """0.1 s until the first look, then 0.4 s of work in 2.9 s: half a second is left."""
    clock = {"now": 100.0, "usage": Usage(ran_s=5.0, waited_s=7.0, ready=True)}
    watch = watch_at(monkeypatch, clock)
    clock["now"] += 0.1
    assert not watch.expired(1)
    clock.update(now=103.0, usage=Usage(ran_s=5.4, waited_s=7.0, ready=True))
    assert not watch.expired(1)
    assert watch.deadline == pytest.approx(103.5)
    clock.update(now=104.0, usage=Usage(ran_s=5.95, waited_s=9.0, ready=True))
    assert watch.expired(1)


def test_sleeping_counts(monkeypatch):
    """Of 1.4 s on the clock 0.3 s were spent waiting for a processor: 1.1 s of a bound of 1 s are used."""
    clock = {"now": 100.0, "usage": Usage(ran_s=5.0, waited_s=7.0, ready=False)}
    watch = watch_at(monkeypatch, clock)
    clock["now"] += 0.1
    assert not watch.expired(1)
    clock.update(now=101.25, usage=Usage(ran_s=5.0, waited_s=7.3, ready=False))
    assert not watch.expired(1)
    clock.update(now=101.4)
    assert watch.expired(1)


def test_without_proc_the_wall_clock_decides(monkeypatch):
    clock = {"now": 100.0, "usage": None}
    watch = watch_at(monkeypatch, clock)
    clock["now"] += 0.99
    assert not watch.expired(1)
    clock["now"] += 0.02
    assert watch.expired(1)


def test_usage_of_this_process():
    usage = usage_of(os.getpid())
    assert usage is None or (usage.ready and usage.ran_s > 0)
