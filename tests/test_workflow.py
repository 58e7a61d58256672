"""Settings of each step are checked and passed on; a command in a process of its own is waited for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from configs.loader import FOLDER, load_settings
from pipeline.__main__ import main
from pipeline.settings import CodesSettings, TargetsSettings, WorkflowSettings
from pipeline.workflow import _written, run_module, workflow
from shards.errors import SettingsError
from shards.storage import Url
from tests.helpers import ROOT, codes_words, run_command, targets_words
from trainer.settings import TrainSettings

SLOW = """
import signal, sys, time

def leave(number, frame):
    time.sleep(0.5)
    open("saved", "w").close()
    sys.exit(int(sys.argv[1]))

signal.signal(signal.SIGINT, leave)
signal.signal(signal.SIGTERM, leave)
print("started", flush=True)
for _ in range(600):  # a signal that comes just before a sleep waits for its end
    time.sleep(0.1)
"""
RUN = "import sys; from pipeline.workflow import run_module; run_module('slow', sys.argv[1])"


@pytest.mark.parametrize(
    ("sent", "to_all", "leaves", "expected"),
    [(signal.SIGINT, True, 0, 130), (signal.SIGINT, True, 5, 5), (signal.SIGTERM, False, 7, 7)],
)
def test_what_it_has_to_save_is_saved_first(
    sent: signal.Signals, to_all: bool, leaves: int, expected: int, tmp_path: Path
) -> None:
    """Ctrl-C reaches the whole group, `kill` one process."""
    (tmp_path / "slow.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    interruptible = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # also in the background
    )
    words = [sys.executable, "-c", interruptible + RUN, str(leaves)]
    with subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "started\n"
        os.killpg(process.pid, sent) if to_all else process.send_signal(sent)
        assert process.wait(30) == expected
    assert (tmp_path / "saved").exists()


def test_a_command_that_was_killed_does_not_end_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_module("timeit", "-n1", "-r1", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert left.value.code == 128 + signal.SIGKILL
    assert "error: `python -m timeit -n1` was killed" in capsys.readouterr().err


def test_workflow_checks_every_commands_settings_first(tmp_path: Path) -> None:
    work = tmp_path / "work"
    words = [f"audio={tmp_path / 'audio'}", f"work={work}", "gpu=cpu", "train.typo=1", "train.batch_size=x"]
    result = run_command("pipeline", "workflow", *words)
    assert result.returncode == 2
    assert "error: train.batch_size: should be a valid integer (given: 'x'); train.typo: unknown key." in result.stderr
    assert not work.exists()


def test_workflow_gives_each_command_what_all_share_and_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio, work, run = (tmp_path / name for name in ("a", "w", "r"))
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr("pipeline.workflow.run_module", lambda *words: called.append(words))
    shared = [f"audio={audio}", f"work={work}", f"run={run}", "gpu=3", "pretrained_model=m"]
    own = ["codes.seed=5", "targets.gpu=[0,1]", "targets.teacher=auto", "train.max_steps=7", "train.resume=never"]
    workflow(load_settings(WorkflowSettings, "workflow.json", [*shared, *own]))
    both = ("pretrained_model=m", "gpu=3")
    expected = [
        ("pipeline", "shard-codes", {f"audio={audio}", f"work={work}", *both, "seed=5"}),
        ("pipeline", "shard-targets", {f"work={work}", "gpu=[0, 1]", "teacher=auto"}),
        ("trainer", "train", {f"shards={work / 'shards'}", f"run={run}", *both, "max_steps=7", "resume=never"}),
    ]
    words = [(module, command, set(options)) for module, command, *options in called]
    steps = [{f"--step={step}."} for step in ("codes", "targets", "train")]
    named = [(module, command, step | given) for (module, command, given), step in zip(expected, steps, strict=True)]
    assert words == [*((module, command, {"--check"} | given) for module, command, given in named), *named]
    called.clear()
    workflow(load_settings(WorkflowSettings, "workflow.json", shared))
    assert "resume=auto" in called[-1]


def test_a_stage_names_the_command_that_follows_unless_a_workflow_calls_it(
    recordings: Path, work: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "my work"
    shutil.copytree(work, copy)
    for words, following in (
        (codes_words(recordings, copy), f"shard-targets 'work={copy}' gpu=cpu"),
        (targets_words(copy), f"train 'shards={copy}/shards' run=RUN gpu=cpu"),
    ):
        alone, within = (CliRunner().invoke(main, [*words, *more]).output for more in ([], ["--step=of."]))
        assert alone == f"{within}next: just {following}\n"


def test_a_training_too_short_is_refused_before_anything_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = [f"audio={tmp_path / 'a'}", f"work={tmp_path / 'work'}", f"run={tmp_path / 'run'}", "gpu=cpu"]
    with pytest.raises(SystemExit):
        workflow(load_settings(WorkflowSettings, "workflow.json", [*places, "train.max_steps=500"]))
    assert capfd.readouterr().err.startswith("error: phase 1 would take 2000 of 500 steps (phase1_steps=2000, max_")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "places"),
    [
        ("max_steps", "train.max_steps="),
        ("teacher", "targets.teacher="),
        ("retry", "codes.retry= or targets.retry="),
        ("segment_length", "codes.segment_length= or train.segment_length="),
        ("threads", "codes.threads= or targets.threads="),
    ],
)
def test_workflow_says_whose_setting_a_key_is(key: str, places: str) -> None:
    expected = rf"^{key}: unknown key; a setting of one step is written {places}\. Known keys: audio, work, run, "
    with pytest.raises(SettingsError, match=expected):
        load_settings(WorkflowSettings, "workflow.json", ["audio=a", "work=w", "run=r", "gpu=cpu", f"{key}=5"])


def test_a_step_that_there_is_not_is_no_setting_of_one() -> None:
    with pytest.raises(SettingsError, match=r"^training: unknown key\. Known keys: audio, "):
        load_settings(WorkflowSettings, "workflow.json", ["audio=a", "training.max_steps=5"])


def test_the_keys_that_training_has_too_are_told_from_its_defaults() -> None:
    """`WorkflowSettings` knows no others of it."""
    of_stages = CodesSettings.model_fields.keys() | TargetsSettings.model_fields.keys()
    defaults = json.loads((FOLDER / "decoder_48khz.json").read_text())
    assert of_stages & TrainSettings.model_fields.keys() <= defaults.keys()


def test_how_settings_go_together_is_said_without_the_step() -> None:
    with pytest.raises(SettingsError, match=r"^execute=slice "):
        load_settings(CodesSettings, "shard_codes.json", ["audio=a", "work=w", "execute=slice"], "codes.")


def test_a_setting_that_steps_share_is_named_as_it_is_written() -> None:
    with pytest.raises(SettingsError, match=r"^work: every file in a repository of the hub is a commit"):
        load_settings(WorkflowSettings, "workflow.json", ["audio=a", "work=hf://datasets/a/b", "run=r"])


def test_workflow_passes_settings_on_as_commands_read_them() -> None:
    values = [Path('/tmp/ünï "cödé"'), Url("s3://corpus/work"), 0, "recording", [1024, 2048]]
    expected = ['/tmp/ünï "cödé"', "s3://corpus/work", "0", "recording", "[1024, 2048]"]
    assert [_written(value) for value in values] == expected
