"""A command in a process of its own is waited for, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

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
