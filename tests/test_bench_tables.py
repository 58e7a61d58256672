"""Tables in the documents are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile

from benchmarks import tables
from benchmarks.harness import readable
from benchmarks.quality import by_system


def test_documents_show_the_committed_results() -> None:
    stale = [path.name for path in tables.DOCUMENTS if tables.filled(path.read_text()) != path.read_text()]
    assert not stale, "run `just bench-report`"
    assert sum(len(tables.BLOCK.findall(path.read_text())) for path in tables.DOCUMENTS) > 5


def test_a_table_is_filled_from_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = [{"way": "ours", "threads": 2, "x": 12345.6, "y": None}, {"way": "theirs", "threads": 1, "x": 0.12345}]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    text = "before\n<!-- a.json [threads=2]: way=way, called; x=x; y=y -->\nold\n<!-- end -->\nafter\n"
    expected = "| way, called | x | y |\n| - | - | - |\n| ours | 12,346 |  |\n"
    assert tables.filled(text) == text.replace("old\n", expected)
    with pytest.raises(KeyError, match="z"):
        tables.filled(text.replace("y=y", "z=z"))


def test_speech_may_hold_files_that_are_refused(recordings: Path, tmp_path: Path) -> None:
    whole = sorted(recordings.rglob("*.wav"))[0]
    (tmp_path / "text.wav").write_text("no sound")
    assert [recording.frames for recording in readable([tmp_path / "text.wav", whole])] == [
        soundfile.info(whole).frames
    ]


def test_recipes_are_shown_with_their_intervals_where_there_are_any() -> None:
    rows: list[dict[str, Any]] = [
        {"system": "mel", "metric": "lsd", "mean": 1.234, "low": 1.2, "high": 1.3},
        {"system": "mel", "metric": "level_db", "mean": -1.84, "low": None, "high": None},
        {"system": "mel", "metric": "visqol", "mean": None, "low": None, "high": None},
    ]
    assert by_system(rows) == [{"system": "mel", "lsd": "1.23 [1.20, 1.30]", "level_db": "-1.8"}]
    rows = [{"system": "base", "metric": "lsd", "difference": 0.06, "difference_low": 0.01, "difference_high": 0.16}]
    assert by_system(rows, "difference") == [{"system": "base", "lsd": "0.06 [0.01, 0.16]"}]
