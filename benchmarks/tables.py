"""Results → the tables in README.md and docs/: `python -m benchmarks.tables` (`just bench-report`).

A table stands between two comments, the first of which says what it shows:

    <!-- decoding.json [threads=2]: way=tokens → 48 kHz; times_faster=times faster -->
    <!-- end -->

A file of results/, those of its rows where a column has a value, and columns with their titles. Figures have three
significant digits.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from shards.files import write_whole

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(
    r"(<!-- (?P<file>[\w.]+\.json)(?: \[(?P<column>\w+)=(?P<value>[^\]]+)\])?: (?P<titles>[^>]+?) -->\n)"
    r"(?P<table>.*?)(?=<!-- end -->)",
    re.DOTALL,
)


def filled(text: str) -> str:
    """The document with every table made again from its result."""
    return BLOCK.sub(lambda match: match[1] + table(match), text)


def table(block: re.Match[str]) -> str:
    rows: list[dict[str, Any]] = json.loads((RESULTS / block["file"]).read_text())["rows"]
    chosen = [row for row in rows if not block["column"] or str(row[block["column"]]) == block["value"]]
    columns = dict(part.strip().split("=", 1) for part in block["titles"].split(";"))
    for column in columns.keys() - {name for row in rows for name in row}:
        raise KeyError(f"{block['file']} has no column {column}")
    lines = [list(columns.values()), ["-"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in chosen]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,d}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def main() -> None:
    for path in DOCUMENTS:
        text = path.read_text()
        if filled(text) != text:
            write_whole(path, filled(text))
            print(f"{path.relative_to(ROOT)}: tables made anew")


if __name__ == "__main__":
    main()
