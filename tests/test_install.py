"""What every `just` command does first: .venv comes to hold what a lock file names, one command at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

UV = """#!/bin/sh
# Stands in for uv: packages are the lock file itself, and the network is there while a file `network` is.
if [ "$1" = venv ]; then mkdir -p .venv/bin && touch .venv/bin/python && chmod +x .venv/bin/python; exit; fi
for lock; do :; done
case "$*" in
*--offline*) cmp -s "$lock" .venv/packages || exit 2 ;;
*) test -e network || exit 2 ;;
esac
echo begun >> log
sleep 0.2
cp "$lock" .venv/packages
echo done >> log
"""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for tool in ("just", "flock"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    (tmp_path / "justfile").write_text("where := just_executable()\n")
    asked = ["just", "--evaluate", "where"]  # a shim of pyenv's would put the real uv before ours
    where = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    shutil.copy(ROOT / "justfile", tmp_path)
    for name in ("requirements", "requirements-all"):
        (tmp_path / f"{name}.lock").write_text(f"{name}\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "just").symlink_to(where)
    (tmp_path / "bin" / "uv").write_text(UV)
    (tmp_path / "bin" / "uv").chmod(0o755)
    (tmp_path / "network").touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def just(clone: Path, recipe: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["just", recipe], cwd=clone, stderr=subprocess.DEVNULL)


def installed(clone: Path) -> str:
    return (clone / ".venv" / "packages").read_text().strip()


def test_two_commands_at_once_install_one_after_the_other(clone: Path) -> None:
    """Whichever comes first: extras that one installs, the other does not take away again."""
    commands = [just(clone, recipe) for recipe in ("extras", "_env", "_env")]
    assert [command.wait(30) for command in commands] == [0, 0, 0]
    lines = (clone / "log").read_text().split()
    assert lines == ["begun", "done"] * (len(lines) // 2)
    assert installed(clone) == "requirements-all"
    assert just(clone, "_env").wait(30) == 0
    assert (clone / "log").read_text().split() == lines, "there is nothing left to do"


def test_what_others_write_into_uvs_own_lock_is_not_run(clone: Path) -> None:
    """uv makes .venv/.lock, which every user of the machine may write."""
    assert just(clone, "_env").wait(30) == 0
    (clone / ".venv" / ".lock").write_text("requirements.lock; touch made; true")
    assert just(clone, "_env").wait(30) == 0
    assert not (clone / "made").exists()


@pytest.mark.parametrize("recipe", ["extras", "_env"])
def test_without_a_network_what_was_installed_stays_of_use(recipe: str, clone: Path) -> None:
    """Once the lock file is what it was, or at once where other packages were only asked for."""
    assert just(clone, "_env").wait(30) == 0
    (clone / "network").unlink()
    if recipe == "_env":
        (clone / "requirements.lock").write_text("newer\n")
    assert just(clone, recipe).wait(30) != 0
    (clone / "requirements.lock").write_text("requirements\n")
    assert just(clone, "_env").wait(30) == 0
    assert installed(clone) == "requirements"


def test_what_a_killed_command_left_is_not_taken_for_whole(clone: Path) -> None:
    assert just(clone, "_env").wait(30) == 0
    (clone / "requirements.lock").write_text("newer\n")
    (clone / "bin" / "uv").write_text("#!/bin/sh\necho half > .venv/packages\nkill -9 $$\n")
    assert just(clone, "_env").wait(30) != 0
    (clone / "requirements.lock").write_text("requirements\n")
    (clone / "bin" / "uv").write_text(UV)
    assert just(clone, "_env").wait(30) == 0
    assert installed(clone) == "requirements"


@pytest.mark.parametrize("recipe", ["decode", "test", "torture", "bench", "bench-gpu", "fuzz", "soak"])
def test_an_argument_is_one_word_and_no_code(recipe: str, clone: Path) -> None:
    assert just(clone, "_env").wait(30) == 0
    python = clone / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    word = 'a b "$(touch made)" `touch made` \''
    words = [word, "c"] if recipe in ("fuzz", "soak") else [word]
    told = subprocess.run(["just", recipe, *words], cwd=clone, capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-len(words) :] == words
    assert not (clone / "made").exists()


def test_commands_are_found_where_python_leaves_out_their_folder(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert just(clone, "_env").wait(30) == 0
    (clone / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (clone / "trainer.py").touch()
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert just(clone, "status").wait(30) == 0
