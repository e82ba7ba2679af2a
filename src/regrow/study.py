"""Work that several processes or machines share: each piece is measured once and kept in an Optuna storage.

A piece is a point, named by whole numbers. Whoever is free takes the next that nobody has; a piece whose worker died,
or has not been heard of for a while, is taken anew. Failures are kept with their reason.
What this gives up: the suggestions of Optuna's samplers; which points there are is decided before.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.cache import cache_dir
from regrow.errors import BrokenModel, SettingsError

if TYPE_CHECKING:
    import optuna

Point = Mapping[Any, int]
Beat = Callable[[], None]
"""Says that the work goes on."""
Work = Callable[[Point, Beat], dict[str, Any]]
"""What is measured at a point, as JSON. Raises `BrokenModel` when there is nothing to measure."""

QUIET = 900  # seconds after which a worker that was not heard of counts as dead
BEAT = 30  # seconds between two signs of life
WAIT = 2  # seconds between two looks, while others work on what is left
FILE = "study.journal"


class Study:
    """Points measured under one name in a storage; `name` must hold everything that the results hang on."""

    def __init__(self, storage: str | None, name: str) -> None:
        self.name, self.study = name, _opened(storage, name)

    def measure(
        self, points: Sequence[Point], work: Work, *, say: Callable[[int, int], None] | None = None
    ) -> list[dict[str, Any]]:
        """The result at each point, in order; one with `failed` where nothing could be measured.

        Measures what is missing, waits for what others measure, and calls `say` with (done, in all).
        """
        while True:
            found = self._finished()
            if say is not None:
                say(sum(key(point) in found for point in points), len(points))
            if all(key(point) in found for point in points):
                return [found[key(point)] for point in points]
            self._bury()
            self._ask_for(points, found)
            trial = self._taken()
            if trial is None:
                time.sleep(WAIT)
            else:
                self._work(trial, work)

    def _finished(self) -> dict[str, dict[str, Any]]:
        """Results by point."""
        trials = self.study.get_trials(deepcopy=False)
        return {key(trial.user_attrs["point"]): r for trial in trials if (r := trial.user_attrs.get("result"))}

    def _ask_for(self, points: Sequence[Point], found: Mapping[str, Any]) -> None:
        """Every point that is neither measured nor taken nor waiting is put into the queue."""
        trials = self.study.get_trials(deepcopy=False)
        known = {key(t.user_attrs["point"]) for t in trials if not t.state.is_finished()} | set(found)
        for point in points:
            if key(point) not in known:
                self.study.enqueue_trial({}, user_attrs={"point": dict(point)})

    def _taken(self) -> optuna.Trial | None:
        """The next point of the queue, which is now this process's; None when there is none."""
        from optuna.trial import TrialState

        if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return None
        trial = self.study.ask()
        if "point" not in trial.user_attrs or self._elsewhere(trial):
            self.study.tell(trial, state=TrialState.FAIL)  # another was quicker
            return None
        self._sign(trial)
        return trial

    def _elsewhere(self, trial: optuna.Trial) -> bool:
        """Whether the point of a trial is measured, or being measured by one that took it before."""
        from optuna.trial import TrialState

        point = trial.user_attrs["point"]
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        taken = any(t.number < trial.number and t.user_attrs["point"] == point for t in running)
        return taken or key(point) in self._finished()

    def _work(self, trial: optuna.Trial, work: Work) -> None:
        from optuna.trial import TrialState

        heard = time.monotonic()

        def beat() -> None:
            nonlocal heard
            if time.monotonic() - heard > BEAT:
                heard = time.monotonic()
                self._sign(trial)

        try:
            result = work(trial.user_attrs["point"], beat)
        except BrokenModel as broken:
            trial.set_user_attr("result", {"failed": broken.came})
            self.study.tell(trial, state=TrialState.FAIL)
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)  # the next may take it at once
            raise
        else:
            trial.set_user_attr("result", result)
            self.study.tell(trial, float(result["loss"]))

    def _sign(self, trial: optuna.Trial) -> None:
        trial.set_user_attr("worker", {"host": socket.gethostname(), "process": os.getpid(), "at": time.time()})

    def _bury(self) -> None:
        """What a dead worker had taken may be taken again."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get("worker")
            since = time.time() - (worker["at"] if worker else trial.datetime_start.timestamp())
            if (worker and _gone(worker)) or since > QUIET:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def key(point: Point) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(point.items()))


def _gone(worker: Mapping[str, Any]) -> bool:
    """Whether a worker of this machine has ended."""
    if worker["host"] != socket.gethostname():
        return False
    try:
        os.kill(worker["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def check_storage(storage: str | None) -> None:
    """Raise `SettingsError` when a storage cannot be opened."""
    _held(storage)


def _opened(storage: str | None, name: str) -> optuna.Study:
    import optuna

    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.create_study(storage=_held(storage), study_name=name, load_if_exists=True, sampler=sampler)


def _held(storage: str | None) -> Any:
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    where = storage or str(cache_dir("search") / FILE)
    try:
        if "://" in where:
            return RDBStorage(where)
        path = Path(where).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    except Exception as error:  # whatever a driver of a database raises
        raise SettingsError(
            f"study storage {where!r} cannot be opened: {str(error).splitlines()[0]}",
            "a file that can be written, or the URL of a database, such as sqlite:///FILE or postgresql://USER@HOST/NAME",
            "correct search.storage; databases want their driver installed",
        ) from error
