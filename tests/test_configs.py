"""Settings: a file, then the command line, then types and bounds; what is wrong is said in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from configs.loader import Settings, load_settings
from pipeline.settings import InspectSettings, PushShardsSettings, WorkflowSettings
from shards.errors import SettingsError
from shards.storage import Url
from trainer.settings import EvalSettings, TrainSettings


class Some(Settings):
    """A model with one of everything."""

    count: int = Field(ge=1, le=10, description="a number")
    rate: float = Field(gt=0, description="another")
    name: str = Field(description="a word")
    where: Path | None = Field(default=None, description="a path")
    group: dict[str, Any] = Field(default={}, description="further settings")


@pytest.fixture
def defaults(tmp_path: Path) -> str:
    path = tmp_path / "some.json"
    path.write_text('{"count": 1, "rate": 0.5, "name": "file", "group": {"a": 1}}')
    return str(path)


def refusal(defaults: str, *overrides: str) -> str:
    """The one line with which Some refuses these."""
    with pytest.raises(SettingsError) as error:
        load_settings(Some, defaults, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_file_then_the_command_line(defaults: str) -> None:
    settings = load_settings(Some, defaults, ["count=7", "where=a/b=c", "group.b=[1, 2]", "group.c.d=x"])
    assert settings.model_dump() == {
        "count": 7,
        "rate": 0.5,
        "name": "file",
        "where": Path("a/b=c"),
        "group": {"a": 1, "b": [1, 2], "c": {"d": "x"}},
    }


def test_a_file_lies_on_the_defaults_and_below_the_command_line(defaults: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"rate": 0.25, "name": "mine", "group": {"b": 2}}')
    settings = load_settings(Some, defaults, [f"config={path}", "name=word"])
    assert settings == Some(count=1, rate=0.25, name="word", group={"b": 2})


@pytest.mark.parametrize("overrides", [["group.b=2", 'group={"c": 3}'], ['group={"c": 3}', "group.b=2"]])
def test_a_group_and_its_members_add_up_in_any_order(defaults: str, overrides: list[str]) -> None:
    assert load_settings(Some, defaults, overrides).group == {"c": 3, "b": 2}


@pytest.mark.parametrize("text", ["null", "true", "1.5", "word", "", '"1"', "[1,2]", "{", "nan", "01", "1,2"])
def test_values_are_json_else_text(defaults: str, text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = text
    assert load_settings(Some, defaults, [f"group.a={text}"]).group == {"a": expected}


@pytest.mark.parametrize(
    ("override", "key", "reason"),
    [
        ("cuont=2", "cuont", "unknown key"),
        ("Count=2", "Count", "unknown key"),
        ("co-unt=2", "co-unt", "unknown key"),
        ("count =2", "count ", "unknown key"),
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
def test_a_wrong_value_is_named(defaults: str, override: str, key: str, reason: str) -> None:
    line = refusal(defaults, override)
    assert re.search(rf"(?<!\w){re.escape(key)}: ", line)
    assert reason in line
    keys = "Known keys: count, rate, name, where, group"
    assert line.endswith(keys) == (reason == "unknown key") == (keys in line)


def test_all_wrong_values_are_named_at_once(defaults: str) -> None:
    line = refusal(defaults, "count=0", "rate=NaN", "typo=1")
    assert all(f"{key}: " in line for key in ("count", "rate", "typo"))


@pytest.mark.parametrize("word", ["count", "", "=", "=3", "--count", ".a=1", "group.=1", "group..a=1"])
def test_what_is_not_key_value_is_named(defaults: str, word: str) -> None:
    assert refusal(defaults, word) == f"{word!r} is not key=value"


@pytest.mark.parametrize("words", [["count=1", "count=1"], ["group.a=1", "group.a=2"], ["config=a", "config=b"]])
def test_a_key_given_twice_is_named(defaults: str, words: list[str]) -> None:
    assert refusal(defaults, *words) == f"{words[0].partition('=')[0]} is given twice"


def test_a_file_of_an_editor_that_marks_utf_8_is_read(defaults: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"count": 2}', "utf-8-sig")
    assert load_settings(Some, defaults, [f"config={path}"]).count == 2


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "1", "{'a': 1}", '{"count": 1,}'])
def test_a_file_that_is_no_json_object_is_named(content: str | None, defaults: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    assert f"config {path} " in refusal(defaults, f"config={path}")


def test_a_wrong_value_in_the_file_is_refused_too(defaults: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"count": 99, "rate": NaN, "name": "x", "more": 1}')
    line = refusal(defaults, f"config={path}")
    assert all(f"{key}: " in line for key in ("count", "rate", "more"))


def test_needed_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text("{}")
    line = refusal(str(path))
    assert all(f"{key}: Field required" in line for key in ("count", "rate", "name"))
    assert "where: " not in line


def test_settings_are_frozen_and_written_as_they_are_read(defaults: str, tmp_path: Path) -> None:
    settings = load_settings(Some, defaults, ["where=a"])
    with pytest.raises(ValueError, match="frozen"):
        settings.count = 2  # type: ignore[misc]
    settings.write(tmp_path / "folder" / "settings.json")
    assert load_settings(Some, defaults, [f"config={tmp_path / 'folder' / 'settings.json'}"]) == settings


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
        ("shards=s3://", "shards: names no bucket: a URL is written s3://bucket/folder (given: 's3://')"),
        (
            "shards=s3://bucket//a",
            "shards: names in a bucket are taken as they are written, // and . too: write s3://bucket/folder (given: "
            "'s3://bucket//a')",
        ),
        ("n_ffts=1024,2048", "n_ffts: should be a list in brackets (given: '1024,2048')"),
        ("n_ffts=[]", "n_ffts: should have at least 1 item (given: [])"),
        ("n_ffts=[8]", "n_ffts.0: should be greater than or equal to 16 (given: 8)"),
        ("run=5", "run: should be a path (./5 if its name is a number) (given: 5)"),
        (
            'shards=["a", 5]',
            "shards.1: should be a path (./5 if its name is a number) or a URL such as s3://bucket/folder (given: 5)",
        ),
        (
            "shards=[a,b]",
            """shards: is no list without the quotes that the shell took: write 'KEY=["a", "b"]' (given: '[a,b]')""",
        ),
        ("gpu=[[0, 1]]", "gpu: should be number of the GPU, several (0,1,2,3), or cpu (given: [[0, 1]])"),
        ("gpu=0;1", "gpu: should be number of the GPU, several (0,1,2,3), or cpu (given: '0;1')"),
        ("gpu=CPU", "gpu: should be number of the GPU, several (0,1,2,3), or cpu (given: 'CPU')"),
        ("gpu=1,1", "gpu: names a GPU twice (given: '1,1')"),
        ("micro_batch=all", "micro_batch: should be 'auto', or a valid integer (given: 'all')"),
    ],
)
def test_a_wrong_value_is_answered_in_words_of_the_settings(word: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(TrainSettings, "decoder_48khz.json", [word])
    assert str(caught.value) == said
    assert not re.search("tuple|pattern", str(caught.value))


@pytest.mark.parametrize("word", ["gpu=0,1", "gpu=[0,1]"])
def test_several_gpus_may_be_a_list_as_others_are(word: str) -> None:
    assert load_settings(TrainSettings, "decoder_48khz.json", [word]).gpu == "0,1"
