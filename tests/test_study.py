"""Measurements that several share: each is made once, whoever dies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from limits import files_up_to
from regrow import study as studies
from regrow.errors import BrokenModel, OutputError, SettingsError
from regrow.study import Point, Study, key

POINTS = [{"layer": layers, "neuron": 8 * layers} for layers in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "WAIT", 0.02)


@pytest.fixture(params=["file", "database"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "study.journal") if request.param == "file" else f"sqlite:///{tmp_path / 'study.db'}"


class Worker:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, point: Point) -> dict[str, Any]:
        self.seen.append(key(point))
        return {"loss": float(point["layer"]), "note": "measured"}


def test_each_point_once(storage: str) -> None:
    worker = Worker()
    said: list[tuple[int, int]] = []
    found = Study(storage, "a").measure(POINTS, worker, say=lambda *done: said.append(done))
    assert found == [{"loss": float(n), "note": "measured"} for n in (1, 2, 3)]
    assert worker.seen == [key(point) for point in POINTS]
    assert said == [(0, 3), (1, 3), (2, 3), (3, 3)]
    again = Worker()
    assert Study(storage, "a").measure([POINTS[2], POINTS[0]], again) == [found[2], found[0]]
    assert not again.seen
    Study(storage, "b").measure(POINTS[:1], again)
    assert again.seen == [key(POINTS[0])]


def test_two_share_the_work(storage: str) -> None:
    workers, results = [Worker(), Worker()], []

    def run(worker: Worker) -> None:
        def slow(point: Point) -> dict[str, Any]:
            time.sleep(0.05)
            return worker(point)

        results.append(Study(storage, "a").measure(POINTS * 2, slow))

    Study(storage, "a")
    threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    assert results[0] == results[1]
    assert sorted(workers[0].seen + workers[1].seen) == sorted(key(point) for point in POINTS)


def test_what_breaks_is_kept_with_its_reason(storage: str) -> None:
    def work(point: Point) -> dict[str, Any]:
        if point["layer"] == 2:
            raise BrokenModel("NaN", "numbers", "look")
        return {"loss": 1.0}

    found = Study(storage, "a").measure(POINTS, work)
    assert found == [{"loss": 1.0}, {"failed": "NaN"}, {"loss": 1.0}]
    assert Study(storage, "a").measure(POINTS, lambda *_: pytest.fail("measured again")) == found


def test_an_interruption_loses_nothing(storage: str) -> None:
    def torn(point: Point) -> dict[str, Any]:
        if point["layer"] == 2:
            raise KeyboardInterrupt
        return {"loss": 1.0}

    with pytest.raises(KeyboardInterrupt):
        Study(storage, "a").measure(POINTS, torn)
    worker = Worker()
    assert [row["loss"] for row in Study(storage, "a").measure(POINTS, worker)] == [1.0, 2.0, 3.0]
    assert sorted(worker.seen) == [key(point) for point in POINTS[1:]]


@pytest.mark.parametrize("where", ["_write", "_work", "storage.get_trial_number_from_id"])
def test_a_claim_that_an_interruption_left_is_free(storage: str, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """In a process that lives on, as a notebook's does, and for others, who see it live."""
    study, worker = Study(storage, "a"), Worker()
    *path, name = where.split(".")
    owner = getattr(study, path[0]) if path else study
    real = getattr(owner, name)

    def interrupted(*given: Any, **facts: Any) -> None:
        if name == "_write":
            real(*given, **facts)
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            study.measure(POINTS[:1], worker)
    assert not study._running()
    assert Study(storage, "a").measure(POINTS[:1], worker)
    assert worker.seen == [key(POINTS[0])]


def test_a_claim_that_could_not_be_ended_is_free_too(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next call here; one of a call that goes on is not."""
    study, worker = Study(storage, "a"), Worker()

    def torn(_: Point) -> dict[str, Any]:
        assert Study(storage, "a")._claimed(POINTS[:1]) is None
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr(study, "_end", lambda _: (_ for _ in ()).throw(OutputError("gone", "here", "wait")))
        with pytest.raises(KeyboardInterrupt):
            study.measure(POINTS[:1], torn)
    assert len(study._running()) == 1
    assert study.measure(POINTS[:1], worker)
    assert worker.seen == [key(POINTS[0])]


PROCESS = """
import pathlib, sys, time
from regrow import study

study.WAIT = 0.02
storage, seen, when = sys.argv[1:]
time.sleep(max(0, float(when) - time.time()))

def work(point):
    with open(seen, "a") as file:
        file.write(f"{study.key(point)}\\n")
    time.sleep(0.02)
    return {"loss": float(point["layer"])}

found = study.Study(storage, "a").measure([{"layer": n} for n in range(8)], work)
assert [row["loss"] for row in found] == list(range(8)), found
"""


def test_processes_share_a_fresh_storage(storage: str, tmp_path: Path) -> None:
    """All begin at once: none fails on tables that another makes, and no point is measured twice."""
    seen, when = tmp_path / "seen", time.time() + 6
    words = [sys.executable, "-c", PROCESS, storage, str(seen), str(when)]
    workers = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], said
    assert sorted(seen.read_text().split()) == [f"layer={n}" for n in range(8)]


def test_of_two_that_claim_at_once_one_has_it(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wrote first has it, though neither had seen the other."""
    first, second = Study(storage, "a"), Study(storage, "a")
    late, real = [], Study._write

    def write(study: Study, *given: Any, **facts: Any) -> int:
        trial = real(study, *given, **facts)
        if study is first:
            late.append(second._claim(POINTS[0]))
        return trial

    monkeypatch.setattr(Study, "_write", write)
    assert first._claim(POINTS[0]) is not None
    assert late == [None]
    assert second._claim(POINTS[1]) is not None


def test_what_is_measured_is_not_claimed(storage: str) -> None:
    """Nor by one that looked before the result was there."""
    study = Study(storage, "a")
    study.measure(POINTS[:1], Worker())
    assert study._claim(POINTS[0]) is None
    assert not study._running()


HERE = studies._sign(0)


@pytest.mark.parametrize(
    ("worker", "taken"),
    [
        ({"process": 2**22 + 1}, True),
        ({"began": "long ago"}, True),
        ({"place": "elsewhere", "at": HERE["at"] - 2 * studies.QUIET}, True),
        ({"place": "elsewhere", "process": 2**22 + 1}, False),
        ({"process": os.getppid(), "began": studies._began(os.getppid())}, False),
        ({}, True),
    ],
    ids=["dead", "another of that number", "silent", "far away", "alive", "this one, which has left it"],
)
def test_what_the_dead_had_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: dict[str, Any], taken: bool
) -> None:
    study, now = Study(str(tmp_path / "journal"), "a"), studies._sign(0)
    with monkeypatch.context() as then:
        then.setattr(studies, "_sign", lambda _: {**now, **worker})
        assert study._claim(POINTS[0]) is not None
    assert (study._claimed(POINTS[:1]) is not None) == taken


def test_who_sleeps_here_is_not_buried() -> None:
    """A process that lives is seen to live, however long it was silent."""
    parent = {**HERE, "process": os.getppid(), "began": studies._began(os.getppid())}
    assert not studies._dead({**parent, "at": 0})
    assert studies._dead({**parent, "at": 0, "place": "elsewhere"})


def test_a_process_that_ended_and_was_not_taken_leave_of() -> None:
    """It keeps its number until then."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert studies._began(child.pid)
    until = time.monotonic() + 20
    while studies._began(child.pid) is not None and time.monotonic() < until:
        time.sleep(0.02)
    assert studies._dead({**HERE, "process": child.pid})
    child.wait()


def test_where_nobody_tells_when_a_process_began(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It counts that it lives, and that it was heard of."""
    monkeypatch.setattr(studies, "PROC", tmp_path)
    there = {**studies._sign(0), "process": os.getppid()}
    assert there["began"] == ""
    assert not studies._dead(there)
    assert studies._dead({**there, "at": 0})
    assert studies._dead({**there, "process": 2**22 + 1})


def test_a_storage_that_fails_while_work_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign that cannot be written stops nothing."""
    monkeypatch.setattr(studies, "BEAT", 0.02)
    study, tried = Study(str(tmp_path / "journal"), "a"), threading.Event()
    real = study.storage.set_trial_user_attr

    def fail(trial: int, name: str, value: Any) -> None:
        if name == "worker":
            tried.set()
            raise OSError(28, "No space left on device")
        real(trial, name, value)

    monkeypatch.setattr(study.storage, "set_trial_user_attr", fail)
    assert study.measure(POINTS[:1], lambda _: {"loss": float(tried.wait(20))}) == [{"loss": 1.0}]


def test_work_signs_all_the_while(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "BEAT", 0.02)
    study, signs = Study(storage, "a"), []

    def long(_: Point) -> dict[str, Any]:
        signs.append(study._running()[0].user_attrs["worker"]["at"])
        until = time.monotonic() + 20
        while study._running()[0].user_attrs["worker"]["at"] == signs[0] and time.monotonic() < until:
            time.sleep(0.02)
        signs.append(study._running()[0].user_attrs["worker"]["at"])
        return {"loss": 1.0}

    study.measure(POINTS[:1], long)
    assert signs[1] > signs[0]


def test_a_result_of_one_that_was_buried_counts(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: what another has measured meanwhile is kept."""
    monkeypatch.setattr(studies, "BEAT", 0.02)
    mine, other, beaten = Study(storage, "a"), Study(storage, "a"), Worker()

    def buried(point: Point) -> dict[str, Any]:
        with monkeypatch.context() as later:
            later.setattr(studies, "_dead", lambda _: True)
            other._bury()
        if point["layer"] == 2:
            other.measure([point], beaten)
        time.sleep(0.1)  # and what is signed now does no harm
        return {"loss": 10.0 * point["layer"]}

    assert [row["loss"] for row in mine.measure(POINTS, buried)] == [10.0, 2.0, 30.0]
    assert beaten.seen == [key(POINTS[1])]


def test_trials_of_others_are_passed_over(storage: str) -> None:
    import optuna

    study = Study(storage, "a")
    foreign = optuna.load_study(study_name="a", storage=study.storage)
    foreign.ask()
    assert [row["loss"] for row in study.measure(POINTS, Worker())] == [1.0, 2.0, 3.0]


def test_storages_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in (str(tmp_path / "file" / "study"), "nosuch://here"):
        with pytest.raises(SettingsError, match="cannot be opened"):
            Study(bad, "a")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), "lost", RuntimeError("Error: did not possess lock")]
)
def test_a_storage_that_fails_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    from sqlalchemy.exc import OperationalError

    study = Study(str(tmp_path / "journal"), "a")
    fails = OperationalError("select", {}, Exception("connection lost")) if error == "lost" else error

    def fail(*_: Any) -> None:
        raise fails

    monkeypatch.setattr(study.storage, "set_trial_user_attr", fail)
    with pytest.raises(OutputError, match=r"(No space left|connection lost|possess lock)(.*\n)+.*same command again"):
        study.measure(POINTS, Worker())


@pytest.mark.parametrize("error", [ValueError("no JSON"), KeyError("worker_id"), AssertionError()])
def test_a_storage_that_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    study = Study(str(tmp_path / "journal"), "a")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(study.storage, "get_all_trials", fail)
    with pytest.raises(OutputError, match=r"damaged: .*(no JSON|worker_id|AssertionError)(.*\n)+.*move it away"):
        study.measure(POINTS, Worker())


def test_errors_of_a_storage_have_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(str(tmp_path / "journal"), "a")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("postgresql://me:se/cret@host/name is gone")

    monkeypatch.setattr(study.storage, "get_all_trials", fail)
    with pytest.raises(OutputError) as told:
        study.measure(POINTS, Worker())
    assert "postgresql://me:***@host/name is gone" in str(told.value)


@pytest.mark.parametrize("torn", [b"{", b'{"op_code":4,"wor'])
def test_a_journal_that_was_torn_goes_on(tmp_path: Path, torn: bytes) -> None:
    """As a full disk tears it, between two runs or in its first line."""
    journal = tmp_path / "journal"
    journal.write_bytes(torn)
    Study(str(journal), "a").measure(POINTS[:1], Worker())
    with journal.open("ab") as file:
        file.write(torn)
    worker = Worker()
    Study(str(journal), "a").measure(POINTS, worker)
    assert worker.seen == [key(point) for point in POINTS[1:]]
    assert Study(str(journal), "a").measure(POINTS, lambda _: pytest.fail("measured again"))


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sign of life leaves of its line goes before the next is written."""
    monkeypatch.setattr(studies, "BEAT", 0.02)
    journal = tmp_path / "journal"

    def work(point: Point) -> dict[str, Any]:
        whole, until = journal.read_bytes(), time.monotonic() + 20
        with files_up_to(len(whole) + 40):
            while journal.read_bytes().endswith(b"\n") and time.monotonic() < until:
                time.sleep(0.01)
        return {"loss": float(point["layer"])}

    found = Study(str(journal), "a").measure(POINTS, work)
    assert [row["loss"] for row in found] == [1.0, 2.0, 3.0]
    assert Study(str(journal), "a").measure(POINTS, lambda _: pytest.fail("measured again")) == found


@pytest.mark.parametrize("notes", [b"a line without an end", b"a line\nanother\n", b"[]\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, notes: bytes) -> None:
    (tmp_path / "notes").write_bytes(notes)
    with pytest.raises(SettingsError, match=r"a file of something else\n.*a new file or a study's"):
        Study(str(tmp_path / "notes"), "a")
    assert (tmp_path / "notes").read_bytes() == notes


def test_a_journal_with_a_line_that_is_spoilt(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    study = Study(str(journal), "a")
    study.measure(POINTS[:1], Worker())
    with journal.open("ab") as file:
        file.write(b'{"op_code":8,"tri{"op_code":8}\n{"op_code":99,"worker_id":"x"}\n')
    with pytest.raises(OutputError, match="damaged"):
        study.measure(POINTS, Worker())
    with pytest.raises(SettingsError, match=r"cannot be opened(.*\n)+.*move a damaged file away"):
        Study(str(journal), "a")
