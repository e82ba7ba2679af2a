"""Trackers that cannot begin are refused in plain words, whatever transformers raises, and nothing else is said."""

from __future__ import annotations

import gc

import pytest
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from regrow.engines.trackers import check_trackers
from regrow.errors import SettingsError


@pytest.mark.parametrize("name", ["mlflow", "dagshub", "neptune", "kubeflow", "wandb"])
def test_what_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:  # type: ignore[type-arg]
    for other in ("mlflow", name):  # which dagshub is built upon
        monkeypatch.setattr(integration_utils, f"is_{other}_available", lambda: False)
    with pytest.raises(SettingsError, match=rf"report_to = {name}, which cannot be used: .+(.*\n)+.*install or set up"):
        check_trackers([name])
    gc.collect()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError("no key\nat all"), KeyError("KEY"), Exception()])
def test_whatever_a_tracker_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", fails)
    with pytest.raises(SettingsError, match=r"cannot be used: (no key|'KEY'|Exception)\n"):
        check_trackers(["wandb"])


def test_one_that_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that ends a run when it goes, where transformers finds it."""

    class Told:
        def __del__(self) -> None:
            pass

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mlflow", Told)
    monkeypatch.setattr(integration_utils, "is_mlflow_available", lambda: True)
    check_trackers(["mlflow"])
