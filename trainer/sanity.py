"""What a training would end badly for: said before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from shards.errors import SettingsError

if TYPE_CHECKING:
    from trainer.settings import TrainSettings

PHASES_AGREE_DB = 0.0  # SI-SDR: there, the amplitude that is best for a squared error is 3 dB below the target's


def check_that_the_decoder_learns(settings: TrainSettings, phase1_steps: int, total_steps: int) -> None:
    """Raises SettingsError where the steps before it does take more than all; to take all of them may be meant."""
    length = f"max_steps={total_steps}" if settings.max_steps else f"num_epochs={settings.num_epochs:g}"
    if settings.is_adversarial and settings.discriminator_start > total_steps:
        raise SettingsError(
            f"the discriminators would learn alone for all of {total_steps} steps ({length}): take "
            f"discriminator_start={total_steps // 10}, a tenth, or max_steps= above {settings.discriminator_start}"
        )
    if phase1_steps <= total_steps:
        return
    given, tenth = f"phase1_steps={phase1_steps}", f"phase1_steps={max(total_steps // 10, 1)}"
    if settings.phase1_epochs is not None:
        given = f"phase1_epochs={settings.phase1_epochs:g}"
        tenth = f"phase1_epochs={settings.phase1_epochs * total_steps / phase1_steps / 10:.2g}"
    raise SettingsError(
        f"phase 1 would take {phase1_steps} of {total_steps} steps ({given}, {length}), and only the new layers "
        f"would learn: take {tenth}, a tenth, and warmup_steps= as short, or max_steps= above {phase1_steps}"
    )


def warnings(
    settings: TrainSettings, left_for_phase_2: int, in_both: Sequence[str], agreement_db: float
) -> Iterator[str]:
    """Of its length, its voices (`in_both` splits) and, by the first validation's `si_sdr_lf_db`, its losses."""
    if 0 < left_for_phase_2 <= settings.warmup_steps:
        yield (
            f"warning: {left_for_phase_2} steps are left for the whole decoder, no more than "
            f"warmup_steps={settings.warmup_steps}: its rate still rises when training ends; take more steps, or a "
            "shorter phase 1 or warm-up"
        )
    if in_both:
        yield (
            f"warning: {len(in_both)} groups such as {in_both[0]!r} train in one folder and validate in another: where "
            "they are the same speakers, validation is no judge of unseen voices; make shards with one seed"
        )
    if settings.l1_weight and agreement_db < PHASES_AGREE_DB:  # what is best for it is weak where phases are unknown
        yield (
            f"warning: below 12 kHz the waveforms of codec and targets differ (SI-SDR {agreement_db:.0f} dB): L1 will "
            "pull the level down; docs/training.md says what to choose instead"
        )
