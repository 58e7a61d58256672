"""A JSON file of `configs/`, merged with key=value overrides, validated by a pydantic model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
)

from shards.errors import SettingsError
from shards.files import write_whole
from shards.storage import SCHEMES, Location, Url, locate

FOLDER = Path(__file__).parent
OURS = ("value_error", "string_pattern_mismatch")  # problems that are told in words of the settings


def _at_home(value: Any) -> Any:
    """What shells leave as it is after `key=`, or after a comma: ~ is the home. Raises ValueError for no path at all,
    as `work=$UNSET` gives: it would be taken for the folder where the command runs.
    """
    if value == "":
        raise ValueError("is empty; the folder where the command runs is .")
    if isinstance(value, str) and re.match(rf"({'|'.join(SCHEMES)}):/(?!/[^/])", value):
        raise ValueError("names no bucket: a URL is written s3://bucket/folder")
    return Path(value).expanduser() if isinstance(value, str) and value.startswith("~/") else value


def _location(value: Any) -> Location:
    value = _at_home(value)
    if not isinstance(value, str | Path | Url):
        raise ValueError("should be a path (./5 if its name is a number) or a URL such as s3://bucket/folder")
    if str(value).startswith("[") and str(value).endswith("]"):
        raise ValueError("""is no list without the quotes that the shell took: write 'KEY=["a", "b"]'""")
    place = locate(value)
    if isinstance(place, Path):  # it is written down, and read from other folders
        return Path(os.path.normpath(place.absolute()))
    _, _, *names = place.text.split("/")
    if names[1:2] == [""] or not {".", ".."}.isdisjoint(names):
        raise ValueError("names in a bucket are taken as they are written, // and . too: write s3://bucket/folder")
    return place


def _no_url(value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise ValueError("should be a path (./5 if its name is a number)")
    if isinstance(value, str) and "://" in value:
        raise ValueError("should be a path on this machine, not a URL")
    return _at_home(value)


def _in_a_row(gpus: Any) -> Any:
    """0,1 of [0, 1], as other lists are written."""
    return ",".join(map(str, gpus)) if isinstance(gpus, list) else gpus


def _different(gpus: str) -> str:
    numbers = gpus.split(",")
    if len(set(numbers)) < len(numbers):
        raise ValueError("names a GPU twice")
    return gpus


Local = Annotated[Path, BeforeValidator(_no_url)]  # a setting: a path, and no URL that would be taken for one
Place = Annotated[Location, PlainValidator(_location), PlainSerializer(str)]  # a setting: a path or a URL
Gpu = Literal["cpu"] | Annotated[int, Field(ge=0)]  # a setting: where it is computed
Several = Annotated[str, BeforeValidator(_in_a_row), Field(pattern=r"^\d+(,\d+)+$"), AfterValidator(_different)]
Gpus = Gpu | Several


class Settings(BaseModel):
    """Base of every command's settings: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @classmethod
    def hint(cls, key: str, value: Any) -> str:
        """What is said of a key that there is not, after that."""
        return ""

    def check(self) -> None:
        """Raises SettingsError for what the command would refuse at its start, as far as it is known before."""

    def write(self, path: Location) -> None:
        """The resolved settings, beside what they produced."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")


S = TypeVar("S", bound=Settings)


def load_settings(model: type[S], default_file: str, overrides: Iterable[str], step: str = "") -> S:
    """`default_file`, on it the file that a `config=` override names, on top the other overrides.

    Values are parsed as JSON, else taken as text. Raises SettingsError with one line that names the key, as it is
    written where they are settings of one `step` (`train.`).
    """
    values, chosen = _split(overrides)
    merged = _read(FOLDER / default_file) | (_read(Path(chosen)) if chosen is not None else {})
    for key in sorted(values, key=lambda key: key.count(".")):  # train={…} first, train.seed=1 into it
        _put(merged, key, values[key])
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        raise SettingsError(_explain(error, model, step)) from None


def _split(overrides: Iterable[str]) -> tuple[dict[str, Any], str | None]:
    """Values by key, and the file that `config=` names."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise SettingsError(f"{override!r} is not key=value")
        if key in values:
            raise SettingsError(f"{key} is given twice")
        values[key] = _parse(text)
    chosen = values.pop("config", None)
    return values, None if chosen is None else str(chosen)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise SettingsError(f"config {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"config {path} is not a readable JSON file: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"config {path} should hold one JSON object")
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for number, (key, _) in enumerate(pairs):
        if key in dict(pairs[:number]):
            raise ValueError(f"{key} stands there twice")
    return dict(pairs)


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise SettingsError(f"{dotted}: {parent} is not a group of settings")
    values[last] = value


def _key(loc: tuple[int | str, ...]) -> str:
    """As it was given, without the names of a union's alternatives."""
    return ".".join(part for n, part in enumerate(map(str, loc)) if n == 0 or part.isidentifier() or part.isdigit())


def _explain(error: ValidationError, model: type[Settings], step: str) -> str:
    """In one line: what is wrong with which keys, and which there are where one is unknown or missing; or with how they
    go together.
    """
    problems: dict[str, list[Any]] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(_key(problem["loc"]), []).append(problem)
    for key in [key for key in problems if any(other.startswith(f"{key}.") for other in problems)]:
        del problems[key]  # what is wrong with an item says more than that its list is no path, or too short without it
    told = "; ".join((step if key else "") + _told(key, found, model) for key, found in problems.items())
    kinds = {problem["type"] for found in problems.values() for problem in found}
    return told + (f". Known keys: {', '.join(model.model_fields)}" if kinds & {"extra_forbidden", "missing"} else "")


def _told(key: str, problems: list[Any], model: type[Settings]) -> str:
    """Of a union's alternatives that which says most, else those that take such a value at all."""
    meant = [problem for problem in problems if not problem["type"].endswith("_type")] or problems
    explained = [problem for problem in meant if problem["type"] in OURS] or meant
    first, *others = dict.fromkeys(_text(key, problem, model) for problem in explained)
    text = ", or ".join([first, *(other.removeprefix("should be ") for other in others)])
    no_value = problems[0]["type"] in ("missing", "extra_forbidden")
    given = "" if no_value else f" (given: {problems[0]['input']!r})"
    return f"{key}: {text}{given}" if key else text


def _text(key: str, problem: Any, model: type[Settings]) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key{model.hint(key, problem['input'])}"
    if problem["type"] == "string_pattern_mismatch" and key in model.model_fields:
        return f"should be {model.model_fields[key].description}"
    text, _, _ = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")
    text, _, _ = text.removeprefix("Tuple ").partition(" after validation")
    return str(text.replace("valid tuple", "list in brackets"))
