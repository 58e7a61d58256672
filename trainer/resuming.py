"""What a training goes on from, and whether all of its processes go on from the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from configs.loader import load_settings
from shards.errors import UserError
from shards.writer import differences
from trainer import checkpoint
from trainer.distributed import Process
from trainer.settings import TrainSettings

OF_A_MACHINE = {  # settings that may differ between the processes of a training
    "shards", "cache", "cache_gib", "run", "pretrained_model", "init_from", "gpu", "micro_batch", "compile",
    "num_workers", "eval_batch_size", "wandb",
}  # fmt: skip
OF_STEPS = {"learning_rate", "gradient_clip", "discriminator_learning_rate", "discriminator_clip", "precision"}
OF_JUDGING = {"eval_samples", "best_metric"}  # after whose change no new best is compared with the one before
FORMER_SAMPLES = "former_samples"
BEGUN_FROM = "begun_from"  # what the model that training began with, init_from, says of its own data
FREE_TO_CHANGE = {  # settings that may differ between a run and its resumption
    *OF_A_MACHINE, *OF_STEPS, *OF_JUDGING, "num_epochs", "max_steps", "eval_every", "patience", "checkpoint_every",
    "checkpoint_minutes", "keep_last", "keep_best", "log_every", "eval_clips", "resume",
}  # fmt: skip


def newest_state(settings: TrainSettings, data: dict[str, Any], snac_sha256: dict[str, str]) -> dict[str, Any] | None:
    """The newest checkpoint of this run, if it may and can be resumed with `data`; None where training begins."""
    run = settings.run
    newest, best = checkpoint.newest(run), checkpoint.folder(run) / checkpoint.BEST
    path = newest or best
    if not path.exists():
        return None
    if settings.resume == "never":
        raise UserError(f"{run} holds checkpoints: resume=auto goes on from them, run= names another")
    state = checkpoint.load(path)
    if not newest and state["step"] > 0:
        raise UserError(
            f"{path} is of step {state['step']}, but there is no checkpoint to go on from: take another run=, with "
            f"init_from={path} to begin with its decoder; or delete it, and training begins anew here"
        )
    if newest and "optimizer" not in state:
        raise UserError(f"{path} holds no optimizer: it is no checkpoint to resume from")
    before = _samples(state["data"])
    samples = before if settings.resume == "other_samples" else _samples(data)
    then = {**state["settings"], **before, "snac": state["snac_sha256"]}
    if then.pop("rate_schedule", None) == "constant":  # a former setting, for what final_rate=1 gives
        then["final_rate"] = 1.0
    now = {**settings.model_dump(mode="json"), **samples, "snac": snac_sha256}
    if settings.resume == "other_samples":  # of which there may be more folders, or fewer
        then["shard_weights"] = now["shard_weights"]
    if changed := changes(then, now):
        other = "" if samples == before else ", or with resume=other_samples go on with what shards hold now"
        raise UserError(f"{path} cannot be resumed with other settings or data: {changed}; take another run={other}")
    return state if newest else None  # it ended before its first checkpoint: the same training begins anew


def _samples(data: dict[str, Any]) -> dict[str, Any]:
    return {"samples": data.get("samples_sha256"), "teacher": data.get("teacher")}


def with_former_samples(data: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Where the data comes from that a checkpoint goes on with, that of the model it began with, and the samples before
    where they were others.
    """
    then: dict[str, Any] = state["data"]
    if BEGUN_FROM in then:
        data = {**data, BEGUN_FROM: then[BEGUN_FROM]}
    former = dict(then.get(FORMER_SAMPLES, {}))
    if _samples(then) != _samples(data):
        former[f"until step {state['step']}"] = _samples(then)
    return {**data, FORMER_SAMPLES: former} if former else data


def changed_settings(then: dict[str, Any], settings: TrainSettings) -> str:
    """`learning_rate is 0.0001, now 5e-05` for each that was free to change and did; empty when none did."""
    now = settings.model_dump(mode="json", include={*then} - {"resume"})
    return differences({name: then[name] for name in now}, now)


def judges_alike(settings: TrainSettings, data: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether the next validation can be compared with the best before."""
    same = all(state["settings"].get(name) == getattr(settings, name) for name in OF_JUDGING)
    return same and all(state["data"].get(name, data[name]) == data[name] for name in ("validation_sha256", "teacher"))


def check_that_all_begin_alike(process: Process, settings: TrainSettings, begins_with: dict[str, Any]) -> None:
    """Raises UserError where processes on several machines would train different things as if they were one."""
    compared = {**begins_with, **settings.model_dump(mode="json", exclude=OF_A_MACHINE)}
    if not all(process.all_have([number_of(list(compared))])):  # else their messages would not be of one length
        raise UserError("the processes of this training run different versions of this program: bring all to the same")
    same = process.all_have(list(map(number_of, compared.values())))
    different = [name for name, is_same in zip(compared, same, strict=True) if not is_same]
    if different:
        raise UserError(
            f"the processes of this training differ in {', '.join(different)}; this one goes on from step "
            f"{begins_with['step']} of {begins_with['last step']}: start all with the same settings; "
            f"run={settings.run} should be one folder for all machines, and all should see its newest checkpoint"
        )


def changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What keeps a checkpoint of the settings `then` from going on with those of `now`; empty when nothing does.

    One that was written before there was a setting goes on where that has its default.
    """
    defaults = load_settings(TrainSettings, "decoder_48khz.json", []).model_dump(mode="json")
    known = {name: value for name, value in then.items() if name not in FREE_TO_CHANGE}
    new = [name for name in now if name not in then and name not in FREE_TO_CHANGE and now[name] != defaults[name]]
    unknown = [f"{name}, which the checkpoint does not know, is now {now[name]}" for name in new]
    return "; ".join(filter(None, [differences(known, {name: now.get(name) for name in known}), *unknown]))


def number_of(value: Any) -> int:
    """Another one, of 64 bits, for another value."""
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:8], "big", signed=True)
