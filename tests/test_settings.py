"""The commands' own settings, and the commands as a user runs them."""

from __future__ import annotations

import getpass
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from configs.loader import FOLDER, load_settings
from pipeline.settings import CodesSettings
from shards.errors import SettingsError
from tests.helpers import ROOT, no_such_user, run_command
from tests.training_helpers import call
from trainer.settings import TrainSettings

MODULES = ("pipeline", "trainer", "demo")


def commands() -> dict[str, dict[str, Any]]:
    """`MODULE COMMAND` → what `add_command` was given for it."""
    found = {}
    for module in MODULES:
        group: click.Group = importlib.import_module(f"{module}.__main__").main
        for name, command in group.commands.items():
            assert command.callback
            found[f"{module} {name}"] = dict(inspect.getclosurevars(command.callback).nonlocals)
    return found


COMMANDS = commands()
each_command = pytest.mark.parametrize("command", COMMANDS)


@each_command
def test_a_command_names_a_function_that_takes_its_settings(command: str) -> None:
    module, function = COMMANDS[command]["runs"].split(":")
    (parameter,) = inspect.signature(getattr(importlib.import_module(module), function)).parameters.values()
    assert parameter.annotation == COMMANDS[command]["settings"].__name__


@each_command
def test_a_config_is_valid_or_only_lacks_what_the_user_must_name(command: str) -> None:
    model, config = COMMANDS[command]["settings"], COMMANDS[command]["config"]
    try:
        load_settings(model, config, [])
    except SettingsError as error:
        problems, _, known = str(error).partition(". Known keys: ")
        assert known == ", ".join(model.model_fields)
        for problem in problems.split("; "):
            assert re.fullmatch(r"\w+: Field required", problem)


@each_command
def test_every_number_of_a_command_is_bounded_below_and_every_key_explained(command: str) -> None:
    for key, field in COMMANDS[command]["settings"].model_fields.items():
        assert field.description, key
        if field.annotation in (int, float):
            assert any(hasattr(bound, "ge") or hasattr(bound, "gt") for bound in field.metadata), key


def test_every_config_belongs_to_a_command() -> None:
    used = {entry["config"] for entry in COMMANDS.values()}
    assert {path.name for path in FOLDER.glob("*.json")} == used | {"weights.json", "decoder_48khz_adversarial.json"}
    pins = json.loads((FOLDER / "weights.json").read_text())
    for entry in (pin for pin in pins.values() if pin.get("backend") != "native"):  # no hash of which is known yet
        assert re.fullmatch(r"[0-9a-f]{40}", entry["revision"])
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in entry["files"].values())


def test_the_justfile_calls_every_command_under_its_name() -> None:
    called = re.findall(
        r'^([a-z-]+) \*args: _env\n    @exec \{\{ python \}\} -m (\w+ [\w-]+) "\$@"$',
        (ROOT / "justfile").read_text(),
        flags=re.MULTILINE,
    )
    assert {command for _, command in called} == set(COMMANDS)
    assert all(command.split()[1] == recipe for recipe, command in called)


def test_the_recipe_keeps_the_names_that_users_know() -> None:
    known = "pretrained_model batch_size eval_batch_size num_epochs learning_rate segment_length l1_weight stft_weight"
    settings = load_settings(TrainSettings, "decoder_48khz.json", [])
    values = settings.model_dump(include={*known.split(), "n_ffts"})
    assert values == {
        "pretrained_model": "hubertsiuzdak/snac_24khz",
        "batch_size": 32,
        "eval_batch_size": 32,
        "num_epochs": 15,
        "learning_rate": 1e-4,
        "segment_length": 4.0,
        "l1_weight": 1.0,
        "stft_weight": 1.0,
        "n_ffts": (1024, 2048, 4096, 8192),
    }


@pytest.mark.parametrize("gpu", ["0", "3", "cpu", "0,1", "0,1,2,3"])
def test_gpu_takes_a_number_several_or_cpu(gpu: str) -> None:
    settings = load_settings(TrainSettings, "decoder_48khz.json", [f"gpu={gpu}"])
    assert str(settings.gpu) == gpu


@pytest.mark.parametrize("gpu", ["cuda", "0,", "0;1", "1.5", "null", ""])
def test_gpu_takes_nothing_else(gpu: str) -> None:
    with pytest.raises(SettingsError, match="gpu"):
        load_settings(TrainSettings, "decoder_48khz.json", [f"gpu={gpu}"])


# As a user runs them


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["pipeline", "shard-codes", "segment_length=-1"],
            "segment_length: should be greater than 0 (given: -1)",
        ),
        (["pipeline", "shard-codes", "segment_lenght=4"], "segment_lenght: unknown key"),
        (["pipeline", "shard-targets", "target_bits=20"], "target_bits: should be 16 or 24 (given: 20)"),
        (["trainer", "train", "learning_rate=NaN"], "learning_rate: should be a finite number (given: nan)"),
        (["trainer", "train", "batch_size"], "'batch_size' is not key=value"),
        (["demo", "demo", "max_steps=0"], "max_steps: should be greater than or equal to 40 (given: 0)"),
    ],
)
def test_wrong_settings_end_with_2_one_line_and_nothing_written(
    words: list[str], message: str, recordings: Path, tmp_path: Path
) -> None:
    places = {
        "shard-codes": [f"audio={recordings}", f"work={tmp_path / 'work'}", "gpu=cpu"],
        "shard-targets": [f"work={tmp_path / 'work'}", "gpu=cpu"],
        "train": [f"shards={tmp_path}", f"run={tmp_path / 'run'}", "gpu=cpu"],
        "demo": [f"out={tmp_path / 'out'}"],
    }
    process = run_command(*words, *places[words[1]])
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("error: ")
    assert message in process.stderr
    assert list(tmp_path.iterdir()) == []


HELP = """
import importlib, sys
from click.testing import CliRunner
main = importlib.import_module(sys.argv[1] + ".__main__").main
for name in [None, *main.commands]:
    result = CliRunner().invoke(main, ["--help"] if name is None else [name, "--help"])
    assert result.exit_code == 0, result.output
    print(result.output)
heavy = {"torch", "torchaudio", "transformers", "pyarrow", "snac", "webdataset", "soundfile", "numpy", "matplotlib"}
print("HEAVY", sorted(heavy & sys.modules.keys()))
"""


@pytest.mark.parametrize("module", MODULES)
def test_help_names_every_key_and_imports_nothing_heavy(module: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", HELP, module], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "HEAVY []"
    for command, entry in COMMANDS.items():
        if command.startswith(f"{module} "):
            for key in entry["settings"].model_fields:
                assert re.search(rf"^ +{key}=", process.stdout, flags=re.MULTILINE), key


def test_help_as_a_user_asks_for_it() -> None:
    process = run_command("pipeline", "shard-codes", "--help")
    assert process.returncode == 0
    assert process.stdout.startswith("Usage: just shard-codes [OPTIONS] [key=value]...")
    assert "segment_length=4.0" in process.stdout
    assert "audio=(needed)" in process.stdout
    assert "retry=none (or failed)\n" in process.stdout


def test_output_that_nobody_reads_to_its_end_ends_a_command_without_a_word(work: Path) -> None:
    """As `head` reads it."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "pipeline", "inspect", f"path={work}"]
    process = subprocess.run(words, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (process.returncode, process.stderr) == (1, "")


def test_a_repository_is_no_work_folder() -> None:
    with pytest.raises(SettingsError, match=r"work: every file in a repository of the hub is a commit"):
        load_settings(CodesSettings, "shard_codes.json", ["audio=hf://datasets/a/b", "work=hf://datasets/a/c"])


def test_a_user_who_is_a_mere_number_gets_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container. PyTorch asks for it when it makes an optimizer."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("pwd.getpwuid", no_such_user)
    call("status", f"run={tmp_path}")
    assert getpass.getuser() == str(os.getuid())
