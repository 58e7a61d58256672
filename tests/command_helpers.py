"""Commands as words, run in this process, and what they leave behind."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from click.testing import CliRunner, Result

from pipeline.__main__ import main


def in_process(words: list[str]) -> Result:
    result = CliRunner().invoke(main, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def assert_one_line(stderr: str, message: str) -> None:
    """Progress may stand before it."""
    lines = stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], stderr
    assert message in lines[-1]
    assert "Traceback" not in stderr


def refused(words: list[str], message: str) -> None:
    result = in_process(words)
    assert result.exit_code == 1
    assert_one_line(result.stderr, message)


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Recording → its rows in the tables of all splits."""
    rows = defaultdict(list)
    for path in sorted(folder.glob("*/*.parquet")):
        for row in pq.ParquetFile(path).read().to_pylist():
            rows[row["recording"]].append(row)
    return rows


def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def without_settings(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not name.endswith("settings.json")}
