"""The packages' metrics, against the packages' own way from files, and without a network."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

from codec.audio import Samples
from demo.voice import synthesize
from shards.contract import TARGET_RATE
from shards.errors import UserError
from trainer import perceptual
from trainer.scores import METRICS, check_installed, score
from trainer.signals import Undefined

EXTRA = "needs the extra eval: just extras"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a metric wants the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def pair() -> tuple[Samples, Samples]:
    """A voice with noise, and the voice."""
    voice = synthesize(2, 0, 3.0)
    noise = np.random.default_rng(0).standard_normal(len(voice))
    return (voice + 0.003 * noise).astype(np.float32), voice


def test_a_metric_that_can_keep_its_code_nowhere_says_the_way_out(
    pair: tuple[Samples, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:  # numba's words, where neither home nor the package's folder can be written
        raise RuntimeError("cannot cache function 'f': no locator available for file '/opt/f.py'")

    monkeypatch.setattr(perceptual, "_visqol", refuse)
    with pytest.raises(UserError, match=r"^visqol has no folder for its compiled code.*NUMBA_CACHE_DIR"):
        score(*pair, ["visqol"])


def at_16_khz(wav: Samples) -> Samples:
    """By SciPy with the filter that resampy calls kaiser_best, to check our own resampling with."""
    filter_ = scipy.signal.firwin(3 * 128 + 1, 0.9476 / 3, window=("kaiser", 14.77))
    resampled: Samples = scipy.signal.resample_poly(wav.astype(np.float64), 1, 3, window=filter_).astype(np.float32)
    return resampled


def test_visqol_is_that_of_files_at_48_khz(pair: tuple[Samples, Samples], tmp_path: Path) -> None:
    visqol = pytest.importorskip("visqol", reason=EXTRA)
    paths = [tmp_path / "output.wav", tmp_path / "reference.wav"]
    for path, wav in zip(paths, pair, strict=True):
        soundfile.write(path, wav, TARGET_RATE, "FLOAT")
    api = visqol.VisqolApi()
    api.create(mode="audio")
    expected = api.measure(str(paths[1]), str(paths[0])).moslqo
    assert perceptual.visqol(*pair) == pytest.approx(expected, abs=1e-6)
    assert perceptual.visqol(pair[1], pair[1]) == pytest.approx(4.732, abs=0.001)
    assert perceptual.visqol(*pair) < 4.5
    with pytest.raises(Undefined, match="patch"):
        perceptual.visqol(pair[0][40_000:60_000], pair[1][40_000:60_000])


def test_pesq_is_that_of_16_khz(pair: tuple[Samples, Samples]) -> None:
    pesq = pytest.importorskip("pesq", reason=EXTRA)
    expected = pesq.pesq(16_000, at_16_khz(pair[1]), at_16_khz(pair[0]), "wb")
    assert perceptual.pesq_wb(*pair) == pytest.approx(expected, abs=0.02)
    assert perceptual.pesq_wb(pair[1], pair[1]) == pytest.approx(4.644, abs=0.001)
    with pytest.raises(Undefined, match="1/4 of a second"):
        perceptual.pesq_wb(pair[0][40_000:50_000], pair[1][40_000:50_000])


def test_stoi_is_that_of_10_khz(pair: tuple[Samples, Samples]) -> None:
    pystoi = pytest.importorskip("pystoi", reason=EXTRA)
    x, y = (scipy.signal.resample_poly(wav.astype(np.float64), 5, 24) for wav in pair)
    assert perceptual.stoi(*pair) == pytest.approx(pystoi.stoi(y, x, 10_000), abs=0.002)
    assert perceptual.stoi(pair[1], pair[1]) == pytest.approx(1, abs=1e-6)
    with pytest.raises(Undefined, match="30 frames"):
        perceptual.stoi(pair[0][40_000:50_000], pair[1][40_000:50_000])


def test_dnsmos_is_that_of_16_khz(pair: tuple[Samples, Samples]) -> None:
    package = pytest.importorskip("speechmos.dnsmos", reason=EXTRA)
    expected = package.run(at_16_khz(pair[0]), 16_000)
    found = perceptual.dnsmos(pair[0])
    assert found["dnsmos_ovrl"] == pytest.approx(expected["ovrl_mos"], abs=0.02)
    assert found["dnsmos_sig"] == pytest.approx(expected["sig_mos"], abs=0.02)
    assert found["dnsmos_bak"] == pytest.approx(expected["bak_mos"], abs=0.02)
    assert found["dnsmos_p808"] == pytest.approx(expected["p808_mos"], abs=0.02)
    assert perceptual.dnsmos(3 * pair[1])["dnsmos_ovrl"] > 0, "beyond full scale it is clipped, not refused"


@pytest.mark.parametrize("name", ["visqol", "pesq", "stoi"])
def test_level_is_not_heard(name: str, pair: tuple[Samples, Samples]) -> None:
    for package in METRICS[name].packages:
        pytest.importorskip(package, reason=EXTRA)
    equal, quieter = (score(wav, pair[1], [name]) for wav in (pair[1], (0.1 * pair[1]).astype(np.float32)))
    (column,) = METRICS[name].columns
    assert quieter[column] == pytest.approx(equal[column], abs=1e-3)


@pytest.mark.parametrize("name", ["visqol", "pesq", "stoi"])
def test_silence_has_a_reason_not_a_value(name: str, pair: tuple[Samples, Samples]) -> None:
    """But STOI, which of a silent output is 0."""
    for package in METRICS[name].packages:
        pytest.importorskip(package, reason=EXTRA)
    voice, silence = pair[1], np.zeros_like(pair[1])
    for row, who in ((score(voice, silence, [name]), "reference"), (score(silence, voice, [name]), "output")):
        if (name, who) == ("stoi", "output"):
            assert row == {"stoi": 0, "undefined": []}
        else:
            assert row.pop("undefined") == [f"{name}: the {who} is silent"]
            assert set(row.values()) == {None}


def test_a_missing_package_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from shards.errors import UserError

    monkeypatch.setattr("trainer.scores.find_spec", lambda name: None if name == "pesq" else name)
    check_installed(["lsd", "stoi"])
    with pytest.raises(UserError, match=r"^pesq need packages .* `just extras` .*; metrics=lsd,stoi does without$"):
        check_installed(["lsd", "pesq", "stoi"])
