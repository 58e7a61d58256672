"""A bar on a terminal, whole lines in a file."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakSet

import pytest
from tqdm import tqdm

from configs import progress
from configs.progress import progress_bar
from trainer.log import RunLog


def work(steps: int) -> None:
    with progress_bar(total=steps, desc="doing", unit="step") as bar:
        for step in range(steps):
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()


def test_in_a_file_each_state_is_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    work(3)
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert text.endswith("\n")
    assert "\r" not in text
    assert all(line.startswith("doing: ") for line in lines)
    assert [line for line in lines if "2/3" in line and "loss 1" in line]
    assert [line.partition("|")[0] for line in lines[-2:]] == ["doing:  67%", "doing: 100%"], "its last state once"


def test_in_a_file_the_first_minute_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert progress.SECONDS_BETWEEN_LINES == 60
    assert list(progress_bar(range(1000), desc="doing")) == list(range(1000))
    work(3)
    with progress_bar(total=2) as bar:
        assert bar.maxinterval == 60, "tqdm's monitor asks for a line after so long"
        tqdm.write("said amid it")
        bar.update()
    told = capsys.readouterr()
    assert (told.out, told.err) == ("said amid it\n", "")


def test_in_a_file_a_bar_within_another_moves_no_cursor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    for _ in progress_bar(range(2), desc="outer"):
        assert list(progress_bar(range(2), desc="inner")) == [0, 1]
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(":")[0] for line in lines} == {"outer", "inner"}


def test_a_training_shows_its_steps_with_their_values_in_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    values = {"phase": 1, "loss": 0.5, "audio_seconds_per_second": 3, "data_wait_share": 0, "memory_gib": 1}
    for writes in (False, True):
        log = RunLog(tmp_path, 0, 2, writes)
        log.progress(values)
        assert bool(capsys.readouterr().err) == writes
        log.progress({**values, "loss": 0.25})
        log.close()
    for line in capsys.readouterr().err.splitlines():
        assert "| 2/2 " in line
        assert "loss 0.2500" in line


def test_a_terminal_has_one_line_that_moves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(tqdm, "_instances", WeakSet())  # of bars that others left
    work(3)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.count("\r") > 1


def test_in_a_file_no_state_is_shown_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """The thread with which tqdm watches its bars shows each once more that lets several updates pass unseen."""
    clock = iter(range(0, 10_000, 20))
    with progress_bar(total=100, desc="doing") as bar:
        bar.start_t = bar.last_print_t = 0
        bar._time = lambda: next(clock)
        for _ in range(100):
            bar.update()
            assert bar.miniters <= 1
    assert len(capsys.readouterr().err.splitlines()) > 10


def test_in_a_file_the_end_is_shown_where_the_last_line_was_earlier(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter((61, 62))
    with progress_bar(total=2, desc="doing") as bar:
        bar.start_t = bar.last_print_t = 0
        for time in clock:
            bar._time = lambda time=time: time
            bar.update()
    assert [line.partition("|")[0] for line in capsys.readouterr().err.splitlines()] == ["doing:  50%", "doing: 100%"]
