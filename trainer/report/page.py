"""The page: template, style and scripts of this folder, filled by jinja2 with autoescape.

Everything that comes from data (file names, metadata, settings) passes through the template's escaping or through
`tojson`, which leaves no `<` in a script. A content security policy lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shards.errors import UserError
from trainer.report.charts import Chart
from trainer.report.listening import CEILING_DB, FLOOR_DB, HEIGHT, WIDTH, Listening
from trainer.report.reading import Evaluation, Targets
from trainer.scores import COLUMNS, METRICS
from trainer.summary import differs, fixed, title, voices_of

FOLDER = Path(__file__).parent
STYLES = ("page.css", "controls.css", "players.css", "tables.css", "narrow.css")
SCRIPTS = ("player.js", "keys.js", "tables.js", "blind.js")


def check_installed() -> None:
    if find_spec("jinja2") is None:
        raise UserError("the report needs jinja2, which is not installed: `just extras` installs it")


def render(
    evaluation: Evaluation,
    heard: Sequence[Listening],
    curves: Mapping[str, Sequence[Chart]],
    targets: Targets | None,
) -> str:
    """The whole HTML file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, scripts = ("\n".join((FOLDER / name).read_text() for name in names) for names in (STYLES, SCRIPTS))
    rows = evaluation.clips.to_pylist()
    clips = {row["clip"]: row for row in rows}  # what all rows of a clip share
    script = f'(() => {{\n"use strict";\n{scripts}}})();\n'
    return environment.get_template("page.html.jinja").render(
        about=evaluation.about,
        settings=evaluation.about["settings"],
        failed=evaluation.failed,
        seconds=sum(row["seconds"] for row in clips.values()),
        clips=clips,
        name=_name,
        voices=voices_of(rows),
        systems=evaluation.systems,
        heard=heard,
        picture={"width": WIDTH, "height": HEIGHT, "floor_db": FLOOR_DB, "ceiling_db": CEILING_DB},
        figures=_figures(evaluation),
        curves=curves,
        targets=targets,
        data=_data(evaluation, clips, heard),
        style=style,
        style_hash=_csp_hash(style),
        script=script,
        script_hash=_csp_hash(script),
        pretty=lambda value: json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True),
    )


def _csp_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _name(row: Mapping[str, Any]) -> str:
    """Of a clip, as people know it."""
    return row["recording"] + (f", from {row['start_seconds']:.1f} s" if row["start_seconds"] else "")


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    """The table of means: metrics with titles and definitions, and for each system its cells in that order."""
    rows = evaluation.summary.to_pylist()
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    by_place = {(row["system"], row["metric"]): row for row in rows}
    table = {system: [_cell(by_place[system, metric]) for metric in metrics] for system in evaluation.systems}
    definitions = [
        (", ".join(COLUMNS[column].label for column in metric.columns), metric.definition)
        for metric in METRICS.values()
        if set(metric.columns) <= set(metrics)
    ]
    titles = [{"name": metric, "title": title(metric)} for metric in metrics]
    return {"metrics": titles, "rows": table, "definitions": definitions}


def _cell(row: Mapping[str, Any]) -> dict[str, Any]:
    digits = COLUMNS[row["metric"]].digits
    texts = {name: None if row[name] is None else _number(row[name], digits) for name in ("mean", "low", "high")}
    return {**texts, "value": row["mean"], "clips": row["clips"], "differs": differs(row)}


def _number(value: float, digits: int) -> str:
    return fixed(value, digits).replace("-", "\u2212")


def _data(evaluation: Evaluation, clips: Mapping[str, Any], heard: Sequence[Listening]) -> dict[str, Any]:
    """What the scripts read; the audio stands apart, clip by clip."""
    metrics = [name for name in evaluation.clips.column_names if name in COLUMNS]
    identity = json.dumps([evaluation.about, [clip.key for clip in heard]], sort_keys=True)
    return {
        "id": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "systems": [{"name": name, "label": label} for name, label in evaluation.systems.items()],
        "metrics": [{"name": name, "title": title(name), "digits": COLUMNS[name].digits} for name in metrics],
        "clips": [
            {
                "key": clip.key,
                "name": _name(clips[clip.key]),
                "seconds": clip.seconds,
                "versions": [{"system": version.system, "gainDb": version.gain_db} for version in clip.versions],
            }
            for clip in heard
        ],
        "values": [
            {"clip": row["clip"], "name": _name(row), "system": row["system"], **{name: row[name] for name in metrics}}
            for row in evaluation.clips.to_pylist()
        ],
    }
