"""Work that several processes or machines share: each piece is measured once and kept in an Optuna storage.

A piece is a point, named by whole numbers. Whoever is free claims one that nobody has: it writes a running trial, then
reads all of them, and of several the lowest number has the point. So nothing hangs on locks, which not every database
has. A piece whose worker has ended, or was not heard of for a while, is claimed anew. Failures are kept with their
reason. What this gives up: Optuna's samplers and its queue, since which points there are is decided before; and a
worker that hangs is waited for.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.cache import cache_dir
from regrow.errors import BrokenModel, OutputError, SettingsError
from regrow.settings import hidden

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

Point = Mapping[Any, int]
Work = Callable[[Point], dict[str, Any]]
"""What is measured at a point, as JSON. Raises `BrokenModel` when there is nothing to measure."""

QUIET = 900  # seconds after which a worker elsewhere that was not heard of counts as dead
BEAT = 30  # seconds between two signs of life
WAIT = 2  # seconds between two looks, while others work on what is left
OPENING = 5  # seconds in which a database is tried again: of several that make its tables at once, one succeeds
LOCKED = 60  # seconds that SQLite waits for another's write
FILE, RECORD = "study.journal", b'{"op_code":'  # how each line of it begins
PROC = Path("/proc")
CALLS, OPEN = itertools.count(1), set[int]()  # calls of `measure` in this process; those that have not ended


class Study:
    """Points measured under one name in a storage; `name` must hold everything that the results hang on.

    Threads that work along have one each.
    """

    def __init__(self, storage: str | None, name: str) -> None:
        import optuna

        self.name, self.storage, self.call = name, _held(storage), 0
        with _reached():
            optuna.create_study(storage=self.storage, study_name=name, load_if_exists=True)
            self.id = self.storage.get_study_id_from_name(name)

    def measure(
        self, points: Sequence[Point], work: Work, *, say: Callable[[int, int], None] | None = None
    ) -> list[dict[str, Any]]:
        """The result at each point, in order; one with `failed` where nothing could be measured.

        Measures what is missing, the first of `points` first, waits for what others measure, and calls `say` with
        (done, in all). Raises `OutputError` when the storage is full, damaged or cannot be reached any more.
        """
        with self._present():
            while True:
                found = self._finished()
                if say is not None:
                    say(sum(key(point) in found for point in points), len(points))
                if all(key(point) in found for point in points):
                    return [found[key(point)] for point in points]
                claimed = self._claimed([point for point in points if key(point) not in found])
                if claimed is None:
                    time.sleep(WAIT)
                else:
                    self._work(*claimed, work)

    @contextmanager
    def _present(self) -> Iterator[None]:
        """What is claimed holds while this is open; what it leaves unfinished, whatever ended it, is free at once."""
        call = self.call = next(CALLS)
        OPEN.add(call)
        try:
            yield
        finally:
            OPEN.discard(call)
            with suppress(OutputError):
                self._bury()

    def _trials(self) -> list[FrozenTrial]:
        """Those that this module wrote; others, without a point, are somebody else's."""
        with _reached():
            trials = self.storage.get_all_trials(self.id, deepcopy=False)
        return [trial for trial in trials if {"point", "worker"} <= trial.user_attrs.keys()]

    def _finished(self) -> dict[str, dict[str, Any]]:
        """Results by point; of several the first."""
        trials = reversed(self._trials())
        return {key(t.user_attrs["point"]): r for t in trials if (r := t.user_attrs.get("result"))}

    def _claimed(self, points: Sequence[Point]) -> tuple[int, Point] | None:
        """A trial, and the point that is now this worker's; None while others have all of them."""
        self._bury()
        taken = {key(trial.user_attrs["point"]) for trial in self._running()}
        for point in points:
            if key(point) not in taken and (trial := self._claim(point)) is not None:
                return trial, point
        return None

    def _claim(self, point: Point) -> int | None:
        """A running trial of this point; None when another was quicker."""
        from optuna.trial import TrialState

        mine = self._write(point, TrialState.RUNNING)
        with _reached():
            number = self.storage.get_trial_number_from_id(mine)
        earlier = any(t.number < number and key(t.user_attrs["point"]) == key(point) for t in self._running())
        if earlier or key(point) in self._finished():
            self._end(mine)
            return None
        return mine

    def _running(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return [trial for trial in self._trials() if trial.state is TrialState.RUNNING]

    def _write(self, point: Point, state: Any, loss: float | None = None, **facts: Any) -> int:
        """A new trial, whole from the start."""
        from optuna.trial import create_trial

        known = {"point": dict(point), "worker": _sign(self.call), **facts}
        trial = create_trial(state=state, value=loss, user_attrs=known)
        with _reached():
            return int(self.storage.create_new_trial(self.id, template_trial=trial))

    def _work(self, trial: int, point: Point, work: Work) -> None:
        try:
            with self._alive(trial):
                result = work(point)
        except BrokenModel as broken:
            result = {"failed": broken.came}
        self._keep(trial, point, result)

    def _keep(self, trial: int, point: Point, result: dict[str, Any]) -> None:
        """A result counts even of a worker that was taken for dead, unless another has one by now."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        loss = result.get("loss")
        state = TrialState.FAIL if loss is None else TrialState.COMPLETE
        try:
            with _reached():
                self.storage.set_trial_user_attr(trial, "result", result)
                self.storage.set_trial_state_values(trial, state, None if loss is None else [float(loss)])
        except UpdateFinishedTrialError:
            if key(point) not in self._finished():
                self._write(point, state, loss, result=result)

    def _end(self, trial: int) -> None:
        """Without a result, unless it has ended already."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with _reached(), suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(trial, TrialState.FAIL)

    @contextmanager
    def _alive(self, trial: int) -> Iterator[None]:
        """A thread signs the trial while this is open; what it cannot write does not stop the work."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT):
                with suppress(Exception):
                    self.storage.set_trial_user_attr(trial, "worker", _sign(self.call))

        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()

    def _bury(self) -> None:
        """What a dead worker had claimed may be claimed again."""
        for trial in self._running():
            if _dead(trial.user_attrs["worker"]):
                with _reached():
                    found = self.storage.get_trial_id_from_study_id_trial_number(self.id, trial.number)
                self._end(found)


def key(point: Point) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(point.items()))


def _sign(call: int) -> dict[str, Any]:
    """Who works, and when that was so."""
    process = os.getpid()
    return {"place": _place(), "process": process, "began": _began(process), "call": call, "at": time.time()}


def _place() -> str:
    """Where a process number means one process: a machine since it was started, or a container on it."""
    names = [socket.gethostname()]
    with suppress(OSError):
        names += [(PROC / "sys/kernel/random/boot_id").read_text().strip(), os.readlink(PROC / "self/ns/pid")]
    return " ".join(names)


def _began(process: int) -> str | None:
    """When a process of this place began, as Linux tells it; "" where nobody does; None when it has ended."""
    if os.name != "posix":
        return ""  # looking at a process would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's lives too
    try:
        state, *_, began = (PROC / f"{process}/stat").read_text().rpartition(")")[2].split()[:20]
    except OSError:
        return ""
    return None if state in ("Z", "X") else began


def _dead(worker: Mapping[str, Any]) -> bool:
    """Whether a worker has ended, as far as this process can see, or else was silent for long."""
    if worker["place"] == _place():
        now, then = _began(worker["process"]), worker["began"]
        if worker["process"] == os.getpid() and now == then:
            return worker["call"] not in OPEN
        if now is None or (now and then):
            return bool(now != then)
    return bool(time.time() - worker["at"] > QUIET)


@contextmanager
def _reached() -> Iterator[None]:
    """Raises `OutputError` when a storage that was open fails."""
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except UpdateFinishedTrialError:  # a RuntimeError too, and no failure of the storage
        raise
    except (OSError, RuntimeError, SQLAlchemyError, StorageInternalError) as error:  # a lost lock is the second
        raise OutputError(
            f"the study cannot be read or written any more: {_why(error.__cause__ or error)}",
            "a disk with room, or a database that can be reached",
            "mend that and give the same command again: it goes on, and nothing is measured twice",
        ) from error
    except (ValueError, LookupError, AssertionError) as error:  # optuna met what it did not write
        raise OutputError(
            f"the study is damaged: {_why(error)}",
            "a file or database that nothing else writes to",
            "move it away, or name another with search.storage, and give the same command again: it begins anew",
        ) from error


def _why(error: BaseException) -> str:
    """The first line of what it says, without passwords."""
    return hidden((str(error).strip() or type(error).__name__).splitlines()[0])


def check_storage(storage: str | None) -> None:
    """Raise `SettingsError` when a storage cannot be opened."""
    _held(storage)


def _held(storage: str | None) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    where = storage or str(cache_dir("search") / FILE)
    try:
        return _database(where) if "://" in where else _file(Path(where).expanduser())
    except Exception as error:  # whatever a driver of a database raises
        raise SettingsError(
            f"study storage {hidden(where)!r} cannot be opened: {_why(error)}",
            "a new file or a study's, or the URL of a database, such as sqlite:///FILE or postgresql://USER@HOST/NAME",
            "correct search.storage, or move a damaged file away; databases want their driver installed",
        ) from error


def _database(url: str) -> Any:
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError

    driver: dict[str, Any] = {"connect_args": {"timeout": LOCKED}} if url.startswith("sqlite") else {}
    until = time.monotonic() + OPENING
    while True:
        try:
            return RDBStorage(url, engine_kwargs=driver)
        except (ImportError, ArgumentError):
            raise
        except Exception:
            if time.monotonic() > until:
                raise
            time.sleep(random.uniform(0.05, 0.5))


def _file(path: Path) -> Any:
    """Raises `OutputError` for a file of something else, which is left as it is."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open("rb") as file:
            if not RECORD.startswith(file.read(len(RECORD))):
                raise OutputError("it is a file of something else", "a new file or a study's", "name another")
    return JournalStorage(JournalFileBackend(str(path), lock_obj=Whole(path)))


class Whole:
    """The lock under which optuna writes a journal; who gets it finds whole lines.

    A line that a full disk cut short is passed over while it is the last, and spoils all when another follows it.
    """

    def __init__(self, path: Path) -> None:
        from optuna.storages.journal import JournalFileOpenLock

        self.path, self.lock = path, JournalFileOpenLock(str(path))

    def acquire(self) -> bool:
        self.lock.acquire()
        try:
            with self.path.open("r+b") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
                if file.read() not in (b"", b"\n"):
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        except BaseException:
            self.lock.release()
            raise
        return True

    def release(self) -> None:
        self.lock.release()
