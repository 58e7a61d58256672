"""The picture of `just inspect` shows accepted and rejected segments, the latter made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codec.weights import PINS
from pipeline import gallery
from pipeline.inspect import inspect
from pipeline.settings import InspectSettings
from shards.errors import UserError
from tests.sidon_standin import build


def test_a_picture_of_real_shards(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(InspectSettings(path=work, picture=tmp_path / "a.png", rows=0))
    height, width, _ = matplotlib.image.imread(tmp_path / "a.png").shape
    assert height < 0.6 * width  # no room for rejected segments, as there are none
    assert str(tmp_path / "a.png") in capsys.readouterr().out


def test_a_picture_of_shards_without_an_index(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where too many segments were rejected, or the run is still at it."""
    copy = tmp_path / "work"
    shutil.copytree(work, copy)
    (copy / "shards" / "index.parquet").unlink()
    expected = pq.read_table(work / "shards" / "index.parquet")
    assert gallery.segments(copy / "shards").equals(expected)
    inspect(InspectSettings(path=copy, picture=tmp_path / "a.png", rows=0))
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "codes of" in capsys.readouterr().out


def test_a_picture_names_recordings(work: Path) -> None:
    rows = pq.read_table(work / "shards" / "index.parquet").to_pylist()
    row = next(row for row in rows if row["status"] == "ok" and row["start_seconds"])
    matplotlib.use("Agg")
    figure = plt.figure()
    gallery._sheet(figure.subfigures(1, 1, squeeze=False)[0, 0], work / "shards", {"ok": [row]})
    drawn = [axis for axis in figure.get_axes() if axis.axison]
    title = f"ok: {row['recording']}, from {row['start_seconds']:.1f} s; target: recording"
    assert [axis.get_title().replace("\n", " ") for axis in drawn] == [title, ""]
    assert [axis.get_ylabel() for axis in drawn] == ["recording, kHz", "target, kHz"]
    assert drawn[1].get_xlabel() == "s"
    plt.close(figure)


def test_one_segment_has_a_bar() -> None:
    """On a logarithmic axis that begins at 1 it would have no height."""
    few = pa.table({name: pa.array([1.0, 2.0, 2.0]) for name in gallery.MEASURES} | {"n_samples": [48_000] * 3})
    matplotlib.use("Agg")
    figure = plt.figure()
    gallery._distributions(figure.subfigures(1, 1, squeeze=False)[0, 0], {"ok": few, "rejected": few[:0]})
    assert all(axis.get_ylim()[0] == 0.5 for axis in figure.get_axes())
    plt.close(figure)


def test_a_spectrogram_shows_a_tone_at_its_frequency_and_level() -> None:
    matplotlib.use("Agg")
    figure = plt.figure()
    tone = 0.1 * np.sin(2 * np.pi * 18_000 / 48_000 * np.arange(24_000))
    image = gallery.spectrogram(figure.subplots(), tone.astype(np.float32), 48_000)
    assert tuple(image.get_extent()) == (0, 0.5, 0, 24)
    assert image.origin == "lower"
    level_db = np.asarray(image.get_array())[:, 10]
    assert level_db.max() == pytest.approx(-20, abs=0.1)
    assert level_db.argmax() / (len(level_db) - 1) == 18 / 24
    plt.close(figure)


def test_accepted_segments_are_what_the_shards_hold(work: Path) -> None:
    rows = [row for row in pq.read_table(work / "shards" / "index.parquet").to_pylist() if row["status"] == "ok"][:3]
    for source, target in gallery._pairs(work / "shards", rows):
        assert isinstance(source, np.ndarray)
        assert isinstance(target, np.ndarray)
        assert np.allclose(source, target, atol=2**-15)  # the recording is its own target


def test_rejected_targets_are_made_again(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work, tmp_path / "work")
    shards = tmp_path / "work" / "shards"
    rows = [row for row in pq.read_table(shards / "index.parquet").to_pylist() if row["status"] == "ok"][:3]
    for row in rows:
        row["status"] = "rejected"
    pairs = list(gallery._pairs(shards, rows))
    assert len(pairs) == 3
    for source, target in pairs:
        assert isinstance(target, np.ndarray)
        assert isinstance(source, np.ndarray)
        assert np.allclose(source, target, atol=1e-6)
    settings = json.loads((shards / "settings.json").read_text())
    (shards / "settings.json").write_text(json.dumps({**settings, "teacher": "sidon", "sidon": str(tmp_path)}))
    for _, problem in gallery._pairs(shards, rows):
        assert isinstance(problem, str)
        assert problem.startswith("its teacher cannot be had")


def test_a_folder_does_not_say_whose_code_may_run(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(work, tmp_path / "work")
    shards, theirs = tmp_path / "work" / "shards", tmp_path / "theirs"
    pins = build(theirs)
    settings = json.loads((shards / "settings.json").read_text())
    asked = {"teacher": "sidon", "sidon": str(theirs), "weights": str(pins)}
    (shards / "settings.json").write_text(json.dumps({**settings, **asked}))
    rows = [{**row, "status": "rejected"} for row in pq.read_table(shards / "index.parquet").to_pylist()[:1]]
    ((_, refused),) = gallery._pairs(shards, rows)
    assert f"{theirs} is not listed in {PINS}" in str(refused)
    monkeypatch.setattr(gallery, "PINS", pins)  # listed by the reader
    ((_, made),) = gallery._pairs(shards, rows)
    assert isinstance(made, np.ndarray)


def test_kinds_take_turns() -> None:
    rows = [{"teacher": "sidon", "reason": "often", "key": n} for n in range(100)]
    rows.append({"teacher": "sidon", "reason": "once", "key": 100})
    chosen = gallery._spread(pa.Table.from_pylist(rows))
    assert [(row["reason"], row["key"]) for row in chosen] == [
        ("often", 0), ("once", 100), ("often", 20), ("often", 40), ("often", 60),
    ]  # fmt: skip
    assert gallery._spread(pa.Table.from_pylist(rows)[:0]) == []


def test_what_is_no_png_is_not_called_otherwise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"picture=.*a\.jpg: what is drawn is a PNG; name it a\.png"):
        inspect(InspectSettings(path=tmp_path, picture=tmp_path / "a.jpg", rows=0))


def test_a_folder_without_shards_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"picture= shows finished shards, and .*/shards holds none"):
        inspect(InspectSettings(path=tmp_path, picture=tmp_path / "a.png", rows=0))
