"""Shards on Ray are the bytes of one process, whatever dies: an actor, or the node that it runs on."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import on_ray
from pipeline.codes import shard_codes
from pipeline.on_ray import Maker, _connected, actors, ask
from pipeline.processes import MAX_DEATHS
from pipeline.settings import CalibrateSettings, TargetsSettings
from pipeline.stage import Stage
from pipeline.targets import shard_targets
from shards.contract import PLAN_NAME
from shards.errors import UserError
from tests.command_helpers import refused
from tests.helpers import codes_settings, targets_settings, targets_words
from tests.test_calibrate import assert_same_without_a_model, coded, settings, standin
from tests.test_execute import SMALL, Fatal, Slow, made, progress_of, same, small, whole

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and processes to the collector
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
__all__ = ["coded", "settings", "small", "standin", "whole"]

ray = pytest.importorskip("ray", reason="Ray is not installed (just extras)")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that computes nothing, and two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"object_store_memory": 80 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 10}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon, **small}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(num_cpus=1, **small)
        cluster.wait_for_nodes()
        yield cluster
        assert not [thread for thread in threading.enumerate() if "usage" in thread.name], (
            "Ray collects what it is used for"
        )
        ray.shutdown()
        cluster.shutdown()


class DiesOnce(Maker):
    """The first actor that has made a shard is killed over its next."""

    def make(self, number: int | None) -> tuple[str | None, str]:
        died = self._settings.work / "died"
        if self._stage and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().make(number)


def meanwhile(action: Callable[[], bool]) -> threading.Thread:
    """Repeats `action` until it succeeds."""

    def repeat() -> None:
        while not action():
            time.sleep(0.005)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    return thread


def test_an_actor_and_a_node_are_killed(
    cluster: Any, recordings: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    words = ["execute=ray", f"ray_address={cluster.address}", "workers=2"]
    with monkeypatch.context() as patched:
        patched.setattr(on_ray, "Maker", DiesOnce)
        shard_codes(codes_settings(recordings, work, SMALL, *words))
    (work / "died").unlink()

    def remove_a_node() -> bool:
        if not list((work / "shards").glob("*/*.parquet")):
            return False
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        return True

    killing = meanwhile(remove_a_node)
    shard_targets(targets_settings(work, *words))
    killing.join(timeout=60)
    assert not killing.is_alive()
    same(work, whole)
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)  # for whoever comes next


def test_a_head_that_computes_nothing_loads_no_model(
    cluster: Any, settings: Callable[..., CalibrateSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ray = ["execute=ray", f"ray_address={cluster.address}", "workers=1"]
    assert_same_without_a_model(settings, on_ray, monkeypatch)


def test_what_an_actor_refuses_is_one_line(cluster: Any, whole: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(whole, tmp_path / "work", ignore=shutil.ignore_patterns("shards")))
    assert (work / PLAN_NAME).exists()
    (work / "shards" / "train" / "000000.tar").mkdir(parents=True)
    words = ["execute=ray", f"ray_address={cluster.address}"]
    refused(targets_words(work, *words), "000000.tar is a folder: take another name, or delete it")


def test_without_an_address_no_cluster_that_stands_here_is_joined(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own words of "local": start one, even if there is one already; of None: the latest, or RAY_ADDRESS."""
    asked: list[str] = []
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))
    with _connected(codes_settings(recordings, tmp_path, "execute=ray")):
        assert asked == ["local"]


def test_sigterm_does_what_it_does_without_ray(cluster: Any, recordings: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with _connected(codes_settings(recordings, tmp_path, "execute=ray", f"ray_address={cluster.address}")):
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_cluster_that_is_not_there_is_one_line(whole: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(whole, tmp_path / "work", ignore=shutil.ignore_patterns("shards")))
    refused(targets_words(work, "execute=ray", "ray_address=nowhere"), "ray_address=nowhere: ")


def test_a_shard_that_keeps_killing_ends_the_run(cluster: Any, small: Callable[..., Stage]) -> None:
    stage = small(Fatal, "die", "execute=ray", f"ray_address={cluster.address}", "workers=1")
    with pytest.raises(UserError, match=r"3 actors died over shard train/000001, the last because of: .*process has d"):
        actors(stage, range(len(stage.plan.shards)), progress_of(stage))
    assert made(stage) == {0}


class DiesWhereItStarts(Maker):
    """As actors do whose node dies: MAX_DEATHS of them at once."""

    def make(self, number: int | None) -> tuple[str | None, str]:
        folder = self._settings.work / "slow"
        if number is None and len(list(folder.glob("*.died"))) < MAX_DEATHS:
            (folder / f"{os.getpid()}.died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().make(number)


def test_actors_that_die_with_their_node_before_they_begin_do_not_end_the_run(
    cluster: Any, small: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor does a place that is long in coming, of which is told."""
    monkeypatch.setattr(on_ray, "Maker", DiesWhereItStarts)
    monkeypatch.setattr(on_ray, "PATIENCE_SECONDS", 0.01)
    stage = small(Slow, "", "execute=ray", f"ray_address={cluster.address}", "workers=2")
    actors(stage, range(3), progress_of(stage))
    assert made(stage) == {0, 1, 2}
    assert "no answer of Ray for 0.01 s" in capfd.readouterr().out


class Broken(Slow):
    """Where shards are made, not here."""

    def __init__(self, settings: TargetsSettings) -> None:
        super().__init__(settings)
        if settings.execute == "local":
            raise ZeroDivisionError("planted")


def test_what_a_node_did_not_foresee_is_said(cluster: Any, small: Callable[..., Stage]) -> None:
    stage = small(Broken, "", "execute=ray", f"ray_address={cluster.address}")
    with pytest.raises(UserError, match=r"^Ray gave up: ZeroDivisionError: planted; the same command goes on$"):
        ask(Broken, stage.settings)
