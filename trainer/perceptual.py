"""Metrics of other people's packages, each given the sampling rate that it is defined for.

Packages are the extra `eval` and load nothing from a network: their models lie in their wheels. Signals are mono at
48 kHz and of one length. Raises Undefined where a package refuses the signals, with its reason.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from codec.audio import Samples
from codec.resample import sinc_resampler
from shards.contract import TARGET_RATE
from trainer.signals import Undefined, check_sounds

SPEECH_RATE = 16_000  # of PESQ-WB and DNSMOS


def visqol(wav: Samples, reference: Samples) -> float:
    """ViSQOL v3 (arXiv 2004.09584), MOS-LQO of audio mode at 48 kHz with the SVR model; 4.73 for signals that
    are equal but for their level, which it does not hear."""
    check_sounds(reference=reference, output=wav)
    try:
        result = _visqol().measure_from_arrays(reference.astype(np.float64), wav.astype(np.float64), TARGET_RATE)
    except ValueError as error:  # too short for a patch
        raise Undefined(str(error)) from error
    return float(result.moslqo)


def pesq_wb(wav: Samples, reference: Samples) -> float:
    """PESQ, wide band (ITU-T P.862.2), MOS-LQO of both resampled to 16 kHz; 4.64 for signals that are equal but for
    their level, which it does not hear."""
    from pesq import BufferTooShortError, NoUtterancesError, pesq

    check_sounds(reference=reference, output=wav)
    try:
        return float(pesq(SPEECH_RATE, at_16_khz(reference), at_16_khz(wav), "wb"))
    except (BufferTooShortError, NoUtterancesError) as error:
        raise Undefined(error.args[0].decode()) from error


def stoi(wav: Samples, reference: Samples) -> float:
    """STOI (Taal et al., 2011), 0 … 1; the package resamples to the 10 kHz that it is defined for."""
    from pystoi import stoi as measure

    check_sounds(reference=reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return float(measure(reference.astype(np.float64), wav.astype(np.float64), TARGET_RATE))
        except (RuntimeWarning, np.exceptions.AxisError) as error:  # it would go on with 1e-5, or has no frame
            raise Undefined("fewer than 30 frames of speech") from error


def dnsmos(wav: Samples) -> dict[str, float]:
    """DNSMOS P.835 (arXiv 2110.01763) and P.808 (arXiv 2010.15258), 1 … 5, of the signal at 16 kHz.

    They need no reference. Beyond full scale the signal is clipped, as in a WAV; one shorter than 9 s is repeated, as
    its authors do. The low-pass of the resampling moves it by up to 0.1; ours is resampy's kaiser_best, librosa's when
    it was published.
    """
    from speechmos import dnsmos as package

    found = package.run(np.clip(at_16_khz(wav), -1, 1), SPEECH_RATE)
    names = {"ovrl_mos": "dnsmos_ovrl", "sig_mos": "dnsmos_sig", "bak_mos": "dnsmos_bak", "p808_mos": "dnsmos_p808"}
    return {ours: float(found[theirs]) for theirs, ours in names.items()}


def at_16_khz(wav: Samples) -> Samples:
    resampled: Samples = sinc_resampler(3, 1)(torch.from_numpy(wav)).numpy()
    return resampled


@lru_cache(maxsize=1)
def _visqol() -> Any:
    from visqol import VisqolApi

    api = VisqolApi()
    api.create(mode="audio")
    return api
