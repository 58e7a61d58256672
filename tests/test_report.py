"""`just report`: what stands in the page, and that data cannot become markup or script."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from shards.contract import TARGET_RATE
from shards.errors import UserError
from tests.helpers import TINY_SNAC, speechlike
from tests.training_helpers import call, small_training
from trainer.report.charts import WIDTH, Axis, histograms, training_curves
from trainer.report.listening import listening, matching_gains, spectrogram
from trainer.signals import rms_db

pytest.importorskip("jinja2", reason="needs the extra report: just extras")

EVIL_KEYS = ["<img src=x onerror=hacked=1>&\"'", "</script><b>bold", "{{ 7 * 7 }}", "=1+1"]
EVIL_SYSTEM = "<i>'other"


def evaluate_and_report(words: list[str], out: Path, *report_words: str) -> Path:
    quick = ["metrics=lsd,level", "num_workers=0", "gpu=cpu", f"pretrained_model={TINY_SNAC}", f"out={out / 'eval'}"]
    code, output = call("eval", *words, *quick)
    assert code == 0, output
    code, output = call("report", f"eval={out / 'eval'}", f"out={out / 'report.html'}", *report_words)
    assert code == 0, output
    assert "opens in a browser, without a network" in output
    return out / "report.html"


@pytest.fixture(scope="module")
def page(work: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a run on the validation split, with curves and targets."""
    folder = tmp_path_factory.mktemp("report")
    small_training(work, folder / "run")
    words = [f"models={folder / 'run'}", f"shards={work / 'shards'}"]
    return evaluate_and_report(words, folder, "seconds=0.5").read_text()


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Names of recordings, folders and systems that would be markup, script or a template."""
    folder = tmp_path_factory.mktemp("evil")
    for number, name in enumerate(EVIL_KEYS):
        path = folder / "audio" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, speechlike(0.5, 48_000, number), 48_000)
    other = folder / "other"
    shutil.copytree(folder / "audio", other)
    return evaluate_and_report([f"audio={folder / 'audio'}", f"systems.{EVIL_SYSTEM}={other}"], folder).read_text()


class Elements(HTMLParser):
    """Counts what a parser sees, and what stands in each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: dict[str, str] = {}
        self._script = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        self._script = dict(attrs).get("id") or "code" if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        self._script = ""

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Elements(page).scripts["data"])
    return found


def test_names_cannot_become_markup(evil_page: str) -> None:
    elements = Elements(evil_page)
    assert "i" not in elements.names
    assert elements.names.count("b") == evil_page.count('<b class="star"')
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    images = [value for name, value in elements.attributes if name == "src"]
    assert images
    assert all(str(value).startswith("data:image/webp;base64,") for value in images)
    assert "{{ 7 * 7 }}" in evil_page
    data = data_of(evil_page)
    assert {clip["key"] for clip in data["clips"]} == set(EVIL_KEYS)
    assert {"name": EVIL_SYSTEM, "label": EVIL_SYSTEM} in data["systems"]
    assert "&lt;/script&gt;&lt;b&gt;bold" in evil_page


def test_nothing_is_fetched(page: str, evil_page: str) -> None:
    for text in (page, evil_page):
        elements = Elements(text)
        assert not {"iframe", "object", "embed", "audio", "video", "form"} & set(elements.names)
        for name, value in elements.attributes:
            if name in ("src", "href", "srcset", "action", "data"):
                assert str(value).startswith(("data:", "#")), (name, value)
        policy = next(value for name, value in elements.attributes if name == "content" and "default-src" in str(value))
        assert str(policy).startswith("default-src 'none'; img-src data:; style-src 'sha256-")
        assert "unsafe" not in str(policy)
        assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org)", Elements(text).scripts["code"])


def test_the_page_is_the_same_every_time(work: Path, tmp_path: Path) -> None:
    first = evaluate_and_report([f"shards={work / 'shards'}"], tmp_path, "clips=1")
    assert call("report", f"eval={tmp_path / 'eval'}", "clips=1")[0] == 0
    assert (tmp_path / "eval" / "report.html").read_bytes() == first.read_bytes()


def test_a_stand_in_says_so(page: str) -> None:
    assert "<strong>The codec is a stand-in or has custom weights.</strong>" in page
    assert "Codes by stand-in or custom weights snac_tiny_24khz" in page


def test_a_clip_without_its_recording_shows_the_others(tmp_path: Path) -> None:
    systems = ["source", "stock", "target"]
    for number, system in enumerate(systems[1:]):
        (tmp_path / system).mkdir()
        soundfile.write(tmp_path / system / "a.flac", speechlike(0.5, TARGET_RATE, number), TARGET_RATE)
    assert [version.system for version in listening(tmp_path, "a", systems, 1.0).versions] == systems[1:]
    (tmp_path / "target" / "a.flac").unlink()
    with pytest.raises(UserError, match=r"target/a\.flac is not readable"):
        listening(tmp_path, "a", systems, 1.0)


@pytest.mark.parametrize("key", ["../../mine/a", "linked"])
def test_a_page_holds_no_audio_of_elsewhere(key: str, tmp_path: Path) -> None:
    """The clips' names come with the evaluation, and pages are passed on."""
    (tmp_path / "mine").mkdir()
    soundfile.write(tmp_path / "mine" / "a.flac", speechlike(0.5, TARGET_RATE, 0), TARGET_RATE)
    audio = tmp_path / "audio"
    (audio / "target").mkdir(parents=True)
    (audio / "target" / "linked.flac").symlink_to(tmp_path / "mine" / "a.flac")
    with pytest.raises(UserError, match=r"\.flac lies outside of"):
        listening(audio, key, ["target"], 1.0)


def test_clips_that_are_cut_say_so(page: str) -> None:
    assert "first 0.5 of" in page
    for number, clip in enumerate(data_of(page)["clips"]):
        audio = json.loads(Elements(page).scripts[f"audio-{number}"])
        assert (
            list(audio)
            == [version["system"] for version in clip["versions"]]
            == ["stock", "warm_start", "run", "target"]
        )
        lengths = {len(soundfile.read(io.BytesIO(base64.b64decode(flac)))[0]) for flac in audio.values()}
        assert lengths == {round(clip["seconds"] * TARGET_RATE)}


def test_clips_are_named_by_their_recordings(page: str, evil_page: str, work: Path) -> None:
    index = pq.read_table(work / "shards" / "index.parquet", filters=[("split", "=", "validation")])
    rows = {row["key"]: row for row in index.to_pylist()}
    for clip in data_of(page)["clips"]:
        row = rows[clip["key"]]
        name = row["recording"] + (f", from {row['start_seconds']:.1f} s" if row["start_seconds"] else "")
        assert f">{name}</h3>" in page
        for label in ("Play {}", "Position in {}, seconds", "Versions of {}"):
            assert f'aria-label="{label.format(name)}"' in page
        assert clip["name"] == name
        assert {row["name"] for row in data_of(page)["values"] if row["clip"] == clip["key"]} == {name}
        assert f'<p class="note">{clip["key"]} · {row["group"]} · ' in page
    titles = re.findall(r"<h3 id=.*?>(.*?)</h3>", evil_page)
    assert sorted(map(unescape, titles)) == sorted(f"{key}.wav" for key in EVIL_KEYS)


def test_a_clip_that_is_its_own_group_is_named_once(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "audio").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "audio" / f"{number}.wav", speechlike(0.5, 48_000, number), 48_000)
    words = [f"audio={tmp_path / 'audio'}", f"systems.other={tmp_path / 'audio'}", r"group_pattern=(.*\.wav)"]
    page = evaluate_and_report(words, tmp_path).read_text()
    found = re.findall(r'<p class="note">(.*?)</p>', page)
    assert "2 clips of 2 recordings (groups)," in page
    assert "they take 5 recordings, and these clips are of 2 recordings (groups)." in page
    assert found.count("0.5 s") == 2
    assert not any(".wav" in note for note in found)


def test_curves_targets_and_provenance_are_there(page: str) -> None:
    for text in ("<h3>run</h3>", "<figcaption>lsd_hf</figcaption>", "<figcaption>level_db</figcaption>", "validation"):
        assert text in page
    for section in ("listen", "blind", "figures", "training", "targets", "provenance"):
        assert f'<section id="{section}"' in page
        assert f'href="#{section}"' in page


def test_the_page_says_of_how_many_voices_it_is(page: str, evil_page: str, tmp_path: Path) -> None:
    assert "clips of 1 voice (group)," in page
    assert "Means over clips; no intervals and no *: they take 5 voices, and these clips are of 1 voice" in page
    assert f"{len(EVIL_KEYS)} clips of 2 voices (groups)," in evil_page, "one name begins a folder"
    for number in range(5):
        path = tmp_path / "audio" / f"voice_{number}" / "a.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, speechlike(0.5, 48_000, number), 48_000)
    several = evaluate_and_report([f"audio={tmp_path / 'audio'}"], tmp_path).read_text()
    assert "5 clips of 5 voices (groups)," in several
    assert "Means over clips with 95 % bootstrap intervals over voices (1000 resamples)." in several
    assert '<b class="star" title' in several


def test_an_evaluation_of_another_version_is_refused(work: Path, tmp_path: Path) -> None:
    evaluate_and_report([f"shards={work / 'shards'}"], tmp_path)
    path = tmp_path / "eval" / "summary.parquet"
    pq.write_table(pq.read_table(path).drop_columns("groups"), path)
    code, output = call("report", f"eval={tmp_path / 'eval'}")
    assert (code, output) == (1, f"error: {path} is of another version of `just eval`: run it again\n")


def test_versions_are_matched_in_level_and_none_clips() -> None:
    voice = speechlike(1.0, 48_000, 0)
    wavs = {"quiet": 0.01 * voice, "loud": 0.9 * voice, "peaky": voice.copy(), "silent": 0 * voice}
    wavs["peaky"][0] = 1.0
    gains = matching_gains(wavs)
    assert gains["silent"] == 0
    matched = {name: wav * 10 ** (gains[name] / 20) for name, wav in wavs.items() if name != "silent"}
    assert np.ptp([rms_db(wav) for wav in matched.values()]) < 1e-3
    assert max(np.abs(wav).max() for wav in matched.values()) <= 1.0001


def test_a_version_that_is_all_but_silent_silences_no_other() -> None:
    voice = speechlike(1.0, 48_000, 0)
    gains = matching_gains({"voice": 0.5 * voice, "broken": 1e-4 * voice})
    assert gains["voice"] == pytest.approx(0)
    assert gains["broken"] == pytest.approx(74, abs=0.1)


@pytest.mark.parametrize("frequency", [1000, 12_000, 21_000])
def test_a_spectrogram_shows_a_tone_where_it_is(frequency: int) -> None:
    """Row 0 is 24 kHz; the scale's ends are its colour map's."""
    time = np.arange(TARGET_RATE) / TARGET_RATE
    tone = (0.5 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)
    image = np.asarray(Image.open(io.BytesIO(spectrogram(tone))).convert("L"), dtype=float)
    assert image.shape[0] == 256
    brightest = int(image[:, 100:-100].mean(axis=1).argmax())
    assert abs((255.5 - brightest) / 256 * 24_000 - frequency) < 200
    assert image[:, 100:-100].max() > 200
    silent = np.asarray(Image.open(io.BytesIO(spectrogram(np.zeros(TARGET_RATE, np.float32)))))
    assert silent.max() < 16


def test_curves_keep_what_was_logged(tmp_path: Path) -> None:
    rows = [{"kind": "train", "step": step, "loss": 1 / (1 + step), "phase": 1} for step in range(1000)]
    rows += [{"kind": "validation", "step": 999, "loss": 0.5, "lsd": float("nan")}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "st')
    (chart,) = training_curves(path)
    assert chart.title == "loss"
    train, validation = chart.lines
    assert (train.name, validation.name) == ("train", "validation")
    assert train.path.count("L") == 399, "a thousand steps in 400 points"
    assert chart.note == "last: train 0.001; validation 0.5"
    assert validation.path.count("L") == 1, "a single point is a dash that is seen"
    left, right = (float(corner.split(",")[0]) for corner in validation.path.removeprefix("M").split("L"))
    assert (left + right, right - left) == (2 * WIDTH, 4)


def test_a_histogram_counts_and_summarises() -> None:
    values = np.concatenate([np.zeros(300), np.ones(100), [np.nan]])
    (chart,) = histograms({"lag": values, "empty": np.array([np.nan])})
    assert chart.note == "400 targets; median 0; 5 … 95 %: 0 … 1"
    assert chart.lines[0].path.startswith("M0.0,150.0L0.0,0.0")


@pytest.mark.parametrize("span", [(0, 1), (-3.2, 17.9), (0.0001, 0.0002), (5, 5.5), (-1e6, 3e7)])
def test_ticks_are_few_round_and_inside(span: tuple[float, float]) -> None:
    ticks = Axis(*span, 100).ticks()
    assert 3 <= len(ticks) <= 9
    assert all(-1e-6 <= place <= 100 + 1e-6 for place, _ in ticks)
    steps = np.diff([float(label) for _, label in ticks])
    assert steps == pytest.approx(steps[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval={empty}"], "expected clips.parquet and summary.parquet"),
        (["eval={eval}", "out={eval}/settings.json"], "exists: choose another file"),
        (["eval={eval}", "shards={empty}", "out={empty}/x.html"], "has no index.parquet"),
        (["eval={eval}", "run={empty}", "out={empty}/x.html"], "holds no metrics.jsonl"),
        (["eval={silent}"], "holds no audio to listen to"),
    ],
)
def test_what_cannot_be_shown_is_refused(words: list[str], message: str, work: Path, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("empty", "eval", "silent")}
    places["empty"].mkdir()
    used = "silent" if "silent" in words[0] else "eval"
    keep = "keep_audio=0" if used == "silent" else "keep_audio=1"
    quick = ["metrics=level", "num_workers=0", f"pretrained_model={TINY_SNAC}", f"out={places[used]}", keep]
    assert call("eval", f"shards={work / 'shards'}", *quick)[0] == 0
    code, output = call("report", *(word.format(**places) for word in words))
    assert code == 1
    assert message in output
    assert not list(tmp_path.rglob("*.html*"))


def test_a_missing_jinja_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trainer.report.page.find_spec", lambda name: None)
    code, output = call("report", f"eval={tmp_path}")
    assert code == 1
    assert output == "error: the report needs jinja2, which is not installed: `just extras` installs it\n"
