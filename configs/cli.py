"""How every command is built: `--help` from its settings, key=value arguments, errors as one line."""

from __future__ import annotations

import getpass
import importlib
import inspect
import json
import os
import shlex
import sys
from typing import Literal, get_args, get_origin

import click

from configs.granted import granted_cores
from configs.loader import FOLDER, Settings, load_settings
from shards.errors import UserError, printable
from shards.files import described


def add_command(group: click.Group, name: str, settings: type[Settings], config: str, runs: str) -> None:
    """Adds command `name`, which loads `settings` and calls `runs` ("module:function") with them. What that returns is
    the command that follows, if any: it is said, but for a step of `just workflow`, which calls it itself.

    The module is imported only when the command runs, so that `--help` stays quick.
    """

    @click.option("--check", is_flag=True, help="Only check the settings.")
    @click.option("--step", hidden=True, default="", help="What `just workflow` puts before its keys.")
    @click.argument("overrides", nargs=-1, metavar="[key=value]...")
    def body(overrides: tuple[str, ...], check: bool, step: str) -> None:
        try:
            resolved = load_settings(settings, config, overrides, step)
            resolved.check()
            if check:
                return
            _prepare_environment()
            module, function = runs.split(":")
            following = getattr(importlib.import_module(module), function)(resolved)
            if following and not step:
                click.echo(f"next: {shlex.join(following)}")
        except UserError as error:
            _fail(str(error))
            sys.exit(error.exit_code)
        except BrokenPipeError:  # of `head` that has read enough: click ends without a word
            raise
        except OSError as error:
            _fail(described(error))
            sys.exit(1)

    body.__doc__ = f"{inspect.cleandoc(settings.__doc__ or '')}\n\n{_keys(settings, config)}"
    group.command(name)(body)


def _prepare_environment() -> None:
    """What PyTorch wants to find in a container, before it is imported: a thread for each core of the quota, and a name
    of its user, who may be a mere number, when it makes an optimizer.
    """
    if (cores := granted_cores()) < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def _fail(message: str) -> None:
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)


def _keys(settings: type[Settings], config: str) -> str:
    """The settings as click prints them: key, default, meaning."""
    defaults = load_defaults(settings, config)
    lines = [f"\b\nSettings (defaults: configs/{config}; on top: config=FILE)"]
    for key, field in settings.model_fields.items():
        lines.append(f"  {key}={defaults.get(key, '(needed)')}{_others(field.annotation, defaults.get(key))}")
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def _others(annotation: object, default: str | None) -> str:
    """The other values of a setting that has a few."""
    values = map(str, get_args(annotation)) if get_origin(annotation) is Literal else ()
    others = [value for value in values if value != default]
    return f" (or {', '.join(others)})" if others else ""


def load_defaults(settings: type[Settings], config: str) -> dict[str, str]:
    written = json.loads((FOLDER / config).read_text())
    declared = {key: field.default for key, field in settings.model_fields.items() if not field.is_required()}
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in {**declared, **written}.items()
    }
