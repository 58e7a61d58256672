from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import Field

from configs.loader import FOLDER, Settings, load_settings
from pipeline.settings import CodesSettings, InspectSettings, PushShardsSettings, VerifySettings, WorkflowSettings
from shards.errors import SettingsError
from shards.storage import Url
from tests.helpers import ROOT, run_command
from trainer.settings import EvalSettings, TrainSettings

MODULES = ("pipeline", "trainer", "demo")


class Some(Settings):
    """A model with one of everything."""

    count: int = Field(ge=1, le=10, description="a number")
    rate: float = Field(gt=0, description="another")
    name: str = Field(description="a word")
    where: Path | None = Field(default=None, description="a path")
    group: dict[str, Any] = Field(default={}, description="further settings")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "some.json"
    path.write_text('{"count": 1, "rate": 0.5, "name": "file", "group": {"a": 1}}')
    return f"config={path}"


def refusal(*overrides: str) -> str:
    """The one line with which Some refuses these."""
    with pytest.raises(SettingsError) as error:
        load_settings(Some, "unused.json", overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# The loader


def test_the_file_then_the_command_line(config: str) -> None:
    settings = load_settings(Some, "unused.json", [config, "count=7", "where=a/b=c", "group.b=[1, 2]", "group.c.d=x"])
    assert settings.model_dump() == {
        "count": 7,
        "rate": 0.5,
        "name": "file",
        "where": Path("a/b=c"),
        "group": {"a": 1, "b": [1, 2], "c": {"d": "x"}},
    }


@pytest.mark.parametrize("overrides", [["group.b=2", 'group={"c": 3}'], ['group={"c": 3}', "group.b=2"]])
def test_a_group_and_its_members_add_up_in_any_order(config: str, overrides: list[str]) -> None:
    assert load_settings(Some, "unused.json", [config, *overrides]).group == {"c": 3, "b": 2}


@pytest.mark.parametrize("text", ["null", "true", "1.5", "word", "", '"1"', "[1,2]", "{", "nan", "01", "1,2"])
def test_values_are_json_else_text(config: str, text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = text
    assert load_settings(Some, "unused.json", [config, f"group.a={text}"]).group == {"a": expected}


@pytest.mark.parametrize(
    ("override", "key", "reason"),
    [
        ("cuont=2", "cuont", "unknown key"),
        ("Count=2", "Count", "unknown key"),
        ("count.a=2", "count.a", "not a group"),
        ("count=two", "count", "valid integer"),
        ("count=1.5", "count", "valid integer"),
        ("count=null", "count", "valid integer"),
        ("count=[1]", "count", "valid integer"),
        ("count=", "count", "valid integer"),
        ("count=0", "count", "greater than or equal to 1"),
        ("count=-3", "count", "given: -3"),
        ("count=11", "count", "less than or equal to 10"),
        ("count=1e400", "count", "finite"),
        ("rate=0", "rate", "greater than 0"),
        ("rate=fast", "rate", "given: 'fast'"),
        ("rate=NaN", "rate", "finite"),
        ("rate=Infinity", "rate", "finite"),
        ("rate=-Infinity", "rate", "finite"),
        ("rate=1e999", "rate", "finite"),
        ("name=1", "name", "valid string"),
        ("where=1", "where", "path"),
        ("group=1", "group", "valid dictionary"),
    ],
)
def test_a_wrong_value_is_named_with_the_known_keys(config: str, override: str, key: str, reason: str) -> None:
    line = refusal(config, override)
    assert re.search(rf"(?<!\w){re.escape(key)}: ", line)
    assert reason in line
    if "not a group" not in line:
        assert line.endswith("Known keys: count, rate, name, where, group")


def test_all_wrong_values_are_named_at_once(config: str) -> None:
    line = refusal(config, "count=0", "rate=NaN", "typo=1")
    assert all(f"{key}: " in line for key in ("count", "rate", "typo"))


@pytest.mark.parametrize("word", ["count", "", "=", "=3", "--count"])
def test_what_is_not_key_value_is_named(config: str, word: str) -> None:
    assert refusal(config, word) == f"{word!r} is not key=value"


@pytest.mark.parametrize("words", [["count=1", "count=1"], ["group.a=1", "group.a=2"], ["config=b.json"]])
def test_a_key_given_twice_is_named(config: str, words: list[str]) -> None:
    assert refusal(config, *words) == f"{words[0].partition('=')[0]} is given twice"


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "1", "{'a': 1}", '{"count": 1,}'])
def test_a_file_that_is_no_json_object_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    assert f"config {path} " in refusal(f"config={path}")


def test_a_wrong_value_in_the_file_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"count": 99, "rate": NaN, "name": "x", "more": 1}')
    line = refusal(f"config={path}")
    assert all(f"{key}: " in line for key in ("count", "rate", "more"))


def test_needed_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text("{}")
    line = refusal(f"config={path}")
    assert all(f"{key}: Field required" in line for key in ("count", "rate", "name"))
    assert "where: " not in line


def test_settings_are_frozen_and_written_as_they_are_read(config: str, tmp_path: Path) -> None:
    settings = load_settings(Some, "unused.json", [config, "where=a"])
    with pytest.raises(ValueError, match="frozen"):
        settings.count = 2  # type: ignore[misc]
    settings.write(tmp_path / "folder" / "settings.json")
    assert load_settings(Some, "unused.json", [f"config={tmp_path / 'folder' / 'settings.json'}"]) == settings


# The commands' own settings


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
            "segment_length: Input should be greater than 0 (given: -1)",
        ),
        (["pipeline", "shard-codes", "segment_lenght=4"], "segment_lenght: unknown key"),
        (["pipeline", "shard-targets", "target_bits=20"], "target_bits: Input should be 16 or 24 (given: 20)"),
        (["trainer", "train", "learning_rate=NaN"], "learning_rate: Input should be a finite number (given: nan)"),
        (["trainer", "train", "batch_size"], "'batch_size' is not key=value"),
        (["demo", "demo", "max_steps=0"], "max_steps: Input should be greater than or equal to 40 (given: 0)"),
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


def test_a_key_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.json").write_text('{"rows": 1, "rows": 2}')
    with pytest.raises(SettingsError, match="rows stands there twice"):
        load_settings(InspectSettings, "inspect.json", ["path=x", f"config={tmp_path / 'twice.json'}"])


def test_a_url_is_not_taken_for_a_folder_of_this_machine() -> None:
    with pytest.raises(SettingsError, match=r"shards: .* a path on this machine, not a URL \(given: 's3://corpus/x'\)"):
        load_settings(PushShardsSettings, "push_shards.json", ["repo=a/b", "shards=s3://corpus/x"])
    workflow = load_settings(WorkflowSettings, "workflow.json", ["audio=s3://corpus/a", "work=s3://corpus/w"])
    assert (workflow.audio, workflow.work) == (Url("s3://corpus/a"), Url("s3://corpus/w"))


def test_the_home_is_found_where_no_shell_has_found_it() -> None:
    home = Path.home()
    words = ["run=~/runs/a", 'shards=["~/a", "s3://corpus/b"]', "cache=~user/x"]
    training = load_settings(TrainSettings, "decoder_48khz.json", words)
    assert (training.run, training.folders, training.cache) == (
        home / "runs" / "a",
        (home / "a", Url("s3://corpus/b")),
        Path("~user/x"),
    )
    judged = load_settings(EvalSettings, "eval.json", ["models=~/a,~/b", "audio=x"])
    assert list(judged.models.values()) == [home / "a", home / "b"]


@pytest.mark.parametrize("word", ["shards=", 'shards=["a", ""]', "run=", "init_from="])
def test_an_unset_variable_is_not_taken_for_the_folder_where_the_command_runs(word: str) -> None:
    with pytest.raises(SettingsError, match=r"is empty; the folder where the command runs is \. \(given: ''\)"):
        load_settings(TrainSettings, "decoder_48khz.json", [word])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("shards=s3://", "shards: should name a bucket, as s3://bucket/folder does (given: 's3://')"),
        ("n_ffts=1024,2048", "n_ffts: Input should be a list in brackets (given: '1024,2048')"),
        ("gpu=0;1", "gpu: should be number of the GPU, several (0,1,2,3), or cpu (given: '0;1')"),
    ],
)
def test_a_wrong_value_is_answered_in_words_of_the_settings(word: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(TrainSettings, "decoder_48khz.json", [word])
    assert said in str(caught.value)
    assert not re.search("tuple|pattern", str(caught.value))


def test_a_repository_is_no_work_folder() -> None:
    with pytest.raises(SettingsError, match=r"work: every file in a repository of the hub is a commit"):
        load_settings(CodesSettings, "shard_codes.json", ["audio=hf://datasets/a/b", "work=hf://datasets/a/c"])


def test_a_url_without_a_bucket_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"shards: should name a bucket, .* \(given: 's3://'\)"):
        load_settings(VerifySettings, "verify.json", ["shards=s3://"])
