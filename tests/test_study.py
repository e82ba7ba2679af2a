"""Measurements that several share: each is made once, whoever dies."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from regrow import study as studies
from regrow.errors import BrokenModel, SettingsError
from regrow.study import Beat, Point, Study, key

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

    def __call__(self, point: Point, beat: Beat) -> dict[str, Any]:
        beat()
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
        def slow(point: Point, beat: Beat) -> dict[str, Any]:
            time.sleep(0.05)
            return worker(point, beat)

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
    def work(point: Point, _: Beat) -> dict[str, Any]:
        if point["layer"] == 2:
            raise BrokenModel("NaN", "numbers", "look")
        return {"loss": 1.0}

    found = Study(storage, "a").measure(POINTS, work)
    assert found == [{"loss": 1.0}, {"failed": "NaN"}, {"loss": 1.0}]
    assert Study(storage, "a").measure(POINTS, lambda *_: pytest.fail("measured again")) == found


def test_an_interruption_loses_nothing(storage: str) -> None:
    def torn(point: Point, _: Beat) -> dict[str, Any]:
        if point["layer"] == 2:
            raise KeyboardInterrupt
        return {"loss": 1.0}

    with pytest.raises(KeyboardInterrupt):
        Study(storage, "a").measure(POINTS, torn)
    worker = Worker()
    assert [row["loss"] for row in Study(storage, "a").measure(POINTS, worker)] == [1.0, 2.0, 3.0]
    assert sorted(worker.seen) == [key(point) for point in POINTS[1:]]


@pytest.mark.parametrize(
    ("worker", "taken"),
    [
        ({"host": socket.gethostname(), "process": 2**22 + 1, "at": time.time()}, True),
        ({"host": "elsewhere", "process": 1, "at": time.time() - 2 * studies.QUIET}, True),
        ({"host": "elsewhere", "process": 1, "at": time.time()}, False),
        ({"host": socket.gethostname(), "process": os.getppid(), "at": time.time()}, False),
    ],
    ids=["dead", "silent", "far away", "alive"],
)
def test_what_the_dead_had_taken(tmp_path: Path, worker: dict[str, Any], taken: bool) -> None:
    study = Study(str(tmp_path / "journal"), "a")
    study.study.enqueue_trial({}, user_attrs={"point": POINTS[0]})
    study.study.ask().set_user_attr("worker", worker)
    study._bury()
    study._ask_for(POINTS[:1], {})
    assert (study._taken() is not None) == taken


def test_storages_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in (str(tmp_path / "file" / "study"), "nosuch://here"):
        with pytest.raises(SettingsError, match="cannot be opened"):
            Study(bad, "a")
