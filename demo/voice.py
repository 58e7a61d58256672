"""A full-band voice made by code, for the demo: a source-filter synthesiser that strings syllables into phrases.

Glottal pulses and breath pass through a vocal tract that moves from phone to phone; fricatives and bursts are hiss
in a moving band. The words mean nothing, but pitch, formants, hiss and pauses lie where speech has them, to 20 kHz.
"""

import io
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from shards.files import write_whole

SAMPLE_RATE = 48_000
STEP = 48  # samples between targets: 1 ms
HOP, FFT = 5 * STEP, 40 * STEP  # frames of 2 × HOP; the rest of the FFT holds the ringing of the narrowest formant
NASAL_POLE = 280.0  # Hz; a zero at the same place cancels it
NOISE_FLOOR = 3e-5  # one PCM_16 step

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]

LABIAL, ALVEOLAR, VELAR = (320, 950, 2250, 3300), (320, 1750, 2650, 3650), (300, 2050, 2450, 3450)
ORAL = (NASAL_POLE, 3000, 9000)
PHONES: dict[str, tuple[float, ...]] = {  # ms; gains of voice, breath and hiss; four formants, nasal zero, band (Hz)
    ".": (350, 0, 0, 0, 500, 1500, 2500, 3500, *ORAL),
    "a": (130, 1, 0, 0, 730, 1150, 2450, 3450, *ORAL),
    "æ": (130, 1, 0, 0, 640, 1700, 2450, 3500, *ORAL),
    "e": (120, 1, 0, 0, 530, 1850, 2500, 3550, *ORAL),
    "i": (110, 1, 0, 0, 290, 2250, 2950, 3700, *ORAL),
    "o": (130, 1, 0, 0, 470, 850, 2400, 3350, *ORAL),
    "u": (110, 1, 0, 0, 320, 800, 2250, 3300, *ORAL),
    "l": (60, 0.7, 0, 0, 360, 1100, 2700, 3400, *ORAL),
    "w": (60, 0.7, 0, 0, 310, 650, 2200, 3300, *ORAL),
    "j": (60, 0.7, 0, 0, 280, 2200, 3000, 3700, *ORAL),
    "m": (75, 0.8, 0, 0, *LABIAL, 900, 3000, 9000),
    "n": (75, 0.8, 0, 0, *ALVEOLAR, 1400, 3000, 9000),
    "h": (50, 0, 0.12, 0, 500, 1500, 2500, 3500, *ORAL),
    "s": (110, 0, 0, 0.28, *ALVEOLAR, NASAL_POLE, 5000, 14000),
    "ʃ": (110, 0, 0, 0.32, *VELAR, NASAL_POLE, 2600, 7000),
    "f": (95, 0, 0, 0.09, *LABIAL, NASAL_POLE, 3000, 20000),
    "z": (80, 0.4, 0, 0.15, *ALVEOLAR, NASAL_POLE, 4500, 14000),
    "p": (60, 0, 0, 0, *LABIAL, *ORAL),  # closures in lower case, the bursts that end them in upper case
    "t": (60, 0, 0, 0, *ALVEOLAR, *ORAL),
    "k": (60, 0, 0, 0, *VELAR, *ORAL),
    "b": (60, 0.1, 0, 0, *LABIAL, 1200, 3000, 9000),
    "d": (50, 0.1, 0, 0, *ALVEOLAR, 1200, 3000, 9000),
    "g": (55, 0.1, 0, 0, *VELAR, 1200, 3000, 9000),
    "P": (9, 0, 0, 0.3, *LABIAL, NASAL_POLE, 500, 7000),
    "T": (11, 0, 0, 0.4, *ALVEOLAR, NASAL_POLE, 3500, 14000),
    "K": (13, 0, 0, 0.4, *VELAR, NASAL_POLE, 1600, 6000),
}
ONSETS = ("s", "ʃ", "f", "z", "m", "n", "l", "w", "j", "h", "pPh", "tTh", "kKh", "bP", "dT", "gK", "stT")
CODAS = ("", "", "", "s", "ʃ", "f", "m", "n", "tT")


def _traits(speaker: int) -> tuple[float, float, float]:
    """Mean pitch (Hz), formant scale and breathiness; golden-ratio steps keep any few speakers well apart."""
    height, breath = (0.618034 * speaker) % 1.0, (0.754878 * speaker) % 1.0
    return 95.0 * 2.4**height, 0.95 + 0.22 * height, 0.006 + 0.024 * breath


def _score(rng: Generator, milliseconds: int) -> Floats:
    """Stepwise targets, [milliseconds, 11]: the ten of PHONES and pitch (of the speaker's mean), in phrases."""
    score: list[Floats] = []

    def say(phones: str, gain: float, pitch: float) -> None:
        for duration, *targets in map(PHONES.__getitem__, phones):
            row = np.array([*targets, pitch]) * np.repeat([gain, 1.0], [3, 8])
            score.append(np.tile(row, (round(duration * rng.uniform(0.75, 1.4)), 1)))

    while sum(map(len, score)) < milliseconds:
        say(".", 0.0, 1.0)
        for declination in np.linspace(1.0, 0.7, rng.integers(3, 8)):
            syllable = rng.choice(ONSETS) + rng.choice(list("aæeiou")) + rng.choice(CODAS)
            say(syllable, declination * rng.uniform(0.8, 1.0), (0.35 + 0.8 * declination) * rng.uniform(0.92, 1.12))
    joined = np.concatenate(score)[:milliseconds]
    joined[-100:, :3] = 0.0  # the last syllable fades instead of being cut
    return joined


def _articulate(score: Floats) -> Floats:
    """Round the steps of a score, each track at its own pace, as articulators take time; returns [11, milliseconds]."""
    paces = np.repeat([45, 10, 80, 10, 140], [2, 1, 5, 2, 1])  # ms; hiss is quick, for bursts
    windows = (np.hanning(pace + 2) for pace in paces)
    return np.stack([np.convolve(t, w / w.sum(), mode="same") for t, w in zip(score.T, windows, strict=True)])


def _pulses(rng: Generator, phase: Floats, gain: Floats) -> Floats:
    """Glottal pulses, [samples], one a cycle of phase [samples], with jitter and shimmer."""
    taps = 1024
    cycles = np.arange(1.0, phase[-1])
    times = np.interp(cycles + rng.normal(0.0, 0.006, len(cycles)), phase, np.arange(len(phase)))
    starts = times.astype(np.int64)
    jf = 1j * np.fft.rfftfreq(taps, 1.0 / SAMPLE_RATE)
    flow = jf / (180.0 + jf) ** 2 / (1.0 + jf / 6000.0)
    # Drawn in the frequency domain, a pulse can lie between two samples without aliasing.
    delay = np.exp(-2 * np.pi * np.outer((times - starts) / SAMPLE_RATE, jf))
    pulses = np.fft.irfft(flow / np.abs(np.fft.irfft(flow)).max() * delay)
    pulses *= (gain[starts] * rng.normal(1.0, 0.05, len(starts)))[:, None]
    train = np.zeros(len(phase) + taps)
    np.add.at(train, starts[:, None] + np.arange(taps), pulses)
    return train[: len(phase)]


def _resonance(jf: Complexes, centre: Floats) -> Complexes:
    """Response, [..., f], of resonators of unit gain at 0 Hz and centres [..., 1] (Hz)."""
    width = 60.0 + 0.03 * centre
    return 1.0 / (1.0 + jf * (jf + width) / (centre**2 + width**2 / 4.0))


def _tract(jf: Complexes, formants: Floats, zero: Floats, scale: float) -> Complexes:
    """Response of the vocal tract, [frames, f], from formants [4, frames] and the nasal zero [frames] (Hz)."""
    # A uniform tube resonates at 500, 1500, 2500 Hz and so on up; the moving formants replace its first four.
    # Four resonators alone would fall by 48 dB an octave past the last.
    loss = 30.0 + 0.015 * jf.imag
    tube = 1.0 / np.cosh(np.pi * (jf / scale + loss) / 1000.0)
    response = tube * _resonance(jf, np.array([NASAL_POLE])) / _resonance(jf, zero[:, None])
    for formant, neutral in zip(formants[:, :, None], np.arange(500.0, 4000.0, 1000.0)[:, None], strict=True):
        response *= _resonance(jf, scale * formant) / _resonance(jf, scale * neutral)
    return response


def _band(frequency: Floats, low: Floats, high: Floats) -> Floats:
    """Magnitude of hiss, [frames, f], between two edges [frames] (Hz)."""
    rise = 1.0 + (low[:, None] / np.maximum(frequency, 1.0)) ** 6
    return 1.0 / np.sqrt(rise * (1.0 + (frequency / high[:, None]) ** 4))


def _filtered(signal: Floats, response: Complexes | Floats) -> Floats:
    """Pass signal [frames × HOP] through one response a frame, [frames, f], cross-fading from each to the next."""
    blocks = np.pad(signal, (HOP, 0)).reshape(-1, HOP)
    frames = np.hstack([blocks[:-1], blocks[1:]]) * np.hanning(2 * HOP + 1)[:-1]
    ringing = np.fft.irfft(np.fft.rfft(frames, FFT) * response).reshape(len(frames), -1, HOP)
    output = np.zeros((len(frames) + FFT // HOP, HOP))
    for block in range(FFT // HOP):
        output[block : block + len(frames)] += ringing[:, block]
    return output[1 : len(blocks)].ravel()


def synthesize(speaker: int, utterance: int, seconds: float) -> NDArray[np.float32]:
    """Return [seconds × SAMPLE_RATE] mono samples of peak 0.55 to 0.75, the same bytes for the same arguments."""
    if seconds < 1.0:
        raise ValueError(f"an utterance lasts at least 1 s, not {seconds} s")
    rng, (mean_pitch, scale, breathiness) = Generator(Philox(key=[speaker, utterance])), _traits(speaker)
    length = round(seconds * SAMPLE_RATE)
    frames = -(-length // HOP)
    tracks = _articulate(_score(rng, frames * HOP // STEP))
    clock = np.arange(frames * HOP) / STEP
    voice, breath, hiss, pitch = (np.interp(clock, np.arange(len(t)), t) for t in tracks[[0, 1, 2, 10]])
    phase = np.cumsum(mean_pitch * pitch) / SAMPLE_RATE
    puffs = 1.0 + np.cos(2 * np.pi * phase)  # the glottis lets air through once a cycle
    air = (breath + breathiness * voice * puffs) * rng.standard_normal(len(clock))

    frequency = np.linspace(0.0, SAMPLE_RATE / 2, FFT // 2 + 1)
    *formants, zero, low, high = tracks[3:10, :: HOP // STEP]
    tract = _tract(np.multiply(1j, frequency), np.stack(formants), zero, scale)
    speech = _filtered(_pulses(rng, phase, voice) + air, tract)[:length]
    speech += _filtered(hiss * rng.standard_normal(len(clock)), _band(frequency, low, high))[:length]
    speech *= rng.uniform(0.55, 0.75) / np.abs(speech).max()
    return (speech + NOISE_FLOOR * rng.standard_normal(length)).astype(np.float32)


def write_voices(folder: Path, speakers: int = 6, utterances: int = 6, seconds: float = 5.0) -> list[Path]:
    """Write folder/speaker_0/utterance_0.wav and so on (PCM_16), each complete or not there at all; return them."""
    paths = []
    for speaker, utterance in np.ndindex(speakers, utterances):
        path = folder / f"speaker_{speaker}" / f"utterance_{utterance}.wav"
        file = io.BytesIO()  # libsndfile says little of a disk that is full
        sf.write(file, synthesize(speaker, utterance, seconds), SAMPLE_RATE, subtype="PCM_16", format="WAV")
        write_whole(path, file.getvalue())
        paths.append(path)
    return paths
