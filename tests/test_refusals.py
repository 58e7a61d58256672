"""What a command cannot do ends in one line, with everything left as it stood; a full disk too."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.errors import UserError
from shards.files import exclusive
from shards.writer import read_metadata
from tests.command_helpers import assert_one_line, in_process, refused, stamps, without_settings
from tests.helpers import TINY_SNAC, codes_words, run_command, targets_words


@pytest.fixture
def copy(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work, tmp_path / "work"))


def other_snac(tmp_path: Path, **changes: Any) -> str:
    folder = shutil.copytree(TINY_SNAC, tmp_path / "snac")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return f"pretrained_model={folder}"


def test_shards_of_other_settings_are_refused_and_left_alone(recordings: Path, copy: Path, tmp_path: Path) -> None:
    before = stamps(copy)
    refused(codes_words(recordings, copy, "segment_length=0.7"), "segment_length is 0.6, now 0.7")
    refused(codes_words(tmp_path / "other", copy), f"audio is {recordings}, now {tmp_path / 'other'}")
    refused(codes_words(recordings, copy, other_snac(tmp_path)), "snac_sha256: config.json is ")
    refused(targets_words(copy, "target_bits=24"), "made by another run (target_bits is 16, now 24)")
    assert stamps(copy) == before


@pytest.mark.parametrize("stage", ["codes", "targets"])
def test_shards_of_another_version_of_the_program_are_refused(
    stage: str, recordings: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = codes_words(recordings, copy) if stage == "codes" else targets_words(copy)
    before = stamps(copy)
    monkeypatch.setattr(f"pipeline.{stage}.{stage.upper()}_VERSION", 99)
    refused(
        words, f"made by another run ({stage}_version is 1, now 99): use the settings of that run, or a second work"
    )
    assert stamps(copy) == before


def test_another_release_of_a_library_is_told_and_not_refused(
    copy: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, *others = sorted(copy.glob("shards/train/*.parquet"))
    then = read_metadata(one)["made_with"]
    one.unlink()
    monkeypatch.setattr("soundfile.__libsndfile_version__", "99.0")
    assert in_process(codes_words(recordings, copy)).exit_code == 0
    assert in_process(targets_words(copy)).exit_code == 0
    assert read_metadata(one)["made_with"] == {**then, "libsndfile": "99.0"}
    assert {str(read_metadata(other)["made_with"]) for other in others} == {str(then)}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"sampling_rate": 24000, "enc', "config.json"),
        ("config.json", "[]", "config.json"),
        ("pytorch_model.bin", "text", "pytorch_model.bin"),
        ("pytorch_model.bin", None, "has no pytorch_model.bin; expected config.json, pytorch_model.bin"),
    ],
)
def test_a_damaged_snac_is_one_line(
    file: str, content: str | None, message: str, recordings: Path, tmp_path: Path
) -> None:
    word = other_snac(tmp_path)
    path = tmp_path / "snac" / file
    path.unlink() if content is None else path.write_text(content)
    refused(codes_words(recordings, tmp_path / "work", word), message)
    assert not (tmp_path / "work").exists()


def test_a_snac_that_is_not_pinned_is_refused(recordings: Path, tmp_path: Path) -> None:
    words = codes_words(recordings, tmp_path / "work", "pretrained_model=someone/snac")
    refused(words, "someone/snac is neither a directory nor a repository listed in")


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_rate": 44_100},
        {"vq_strides": [8, 4, 2, 1]},
        {"codebook_size": 64},
    ],
)
def test_a_snac_of_another_geometry_is_refused(changes: dict[str, Any], recordings: Path, tmp_path: Path) -> None:
    refused(codes_words(recordings, tmp_path / "work", other_snac(tmp_path, **changes)), "is not a SNAC 24 kHz")


@pytest.mark.parametrize("teacher", ["sidon", "auto", "hybrid"])
def test_another_teacher_is_refused_before_sidon_is_fetched(
    teacher: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.teachers.load_sidon", lambda *_: pytest.fail("it is asked for"))
    before = stamps(copy)
    refused(targets_words(copy, f"teacher={teacher}"), "made by another run (teacher is recording, now ")
    assert stamps(copy) == before
    shutil.rmtree(copy / "codes")
    refused(targets_words(copy, f"teacher={teacher}"), "codes/train/000000.parquet is missing: run `just shard-codes`")


def test_a_sidon_with_a_wrong_hash_is_refused(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "shards")
    before, sidon, pins = stamps(copy), tmp_path / "sidon", tmp_path / "weights.json"
    sidon.mkdir()
    for name in ("feature_extractor_cpu.pt", "decoder_cpu.pt"):
        (sidon / name).write_text(name)
    pins.write_text(json.dumps({str(sidon): {"revision": None, "files": {"decoder_cpu.pt": "0" * 64}}}))
    words = targets_words(copy, "teacher=sidon", f"sidon={sidon}", f"weights={pins}")
    refused(words, "feature_extractor_cpu.pt: sha256 is ")
    assert stamps(copy) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_asked_for_in_vain(recordings: Path, copy: Path) -> None:
    message = "gpu=0: no GPU is usable here ("
    refused(codes_words(recordings, copy, "gpu=0"), message)
    shutil.rmtree(copy / "shards")
    refused(targets_words(copy, "gpu=0", "teacher=sidon"), message)


def test_a_folder_that_another_process_holds_is_refused(recordings: Path, copy: Path) -> None:
    before = stamps(copy)
    with exclusive(copy):
        process = run_command("pipeline", *targets_words(copy))
        assert process.returncode == 1
        assert_one_line(process.stderr, f"{copy}: another process is writing here")
        refused(codes_words(recordings, copy), f"{copy}: another process is writing here")
    assert stamps(copy) == before


def test_missing_codes_name_the_command(copy: Path) -> None:
    shutil.rmtree(copy / "shards")
    (copy / "codes" / "train" / "000001.parquet").unlink()
    refused(
        targets_words(copy), f"{copy}/codes/train/000001.parquet is missing: run `just shard-codes` to its end first"
    )
    (copy / "plan.parquet").unlink()
    refused(targets_words(copy), f"{copy}/plan.parquet is missing: run `just shard-codes` first")
    assert not (copy / "shards").exists()
    refused(targets_words(copy / "nowhere"), "run `just shard-codes` first")


DISK, PAGE = 4 << 20, 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount") or pytest.skip("there is no mount command here")
    mounted = subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("stage", ["codes", "shards"])
def test_a_full_disk_is_one_line_and_space_mends_it(stage: str, recordings: Path, work: Path, disk: Path) -> None:
    """The disk grows from nothing to one page too little; each run goes on where the one before was stopped."""
    mine, filler = disk / "work", disk / "filler"
    words = codes_words(recordings, mine) if stage == "codes" else targets_words(mine)
    whole = {name: data for name, (_, data) in stamps(work).items() if stage == "shards" or "shards/" not in name}
    if stage == "shards":
        shutil.copytree(work, mine, ignore=shutil.ignore_patterns("shards"))
    begun = sum(-(-path.stat().st_size // PAGE) for path in mine.rglob("*") if path.is_file())
    needed = sum(-(-len(data) // PAGE) for data in whole.values())
    reached = set()
    for pages in [*np.linspace(begun, needed - 1, 9).astype(int), None]:
        if pages is not None:
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, DISK - PAGE * int(pages))
            refused(words, "No space left on device")
        else:
            assert in_process(words).exit_code == 0
        filler.unlink(missing_ok=True)
        found = {name: data for name, (_, data) in stamps(mine).items()}
        assert without_settings(found).items() <= whole.items()
        reached.add(len(found))
    assert found.keys() == whole.keys()
    assert len(reached) > 3


@pytest.mark.parametrize("stands", [None, "a", "a/b", "a/b/file"])
def test_a_folder_that_was_made_for_nothing_goes_again(stands: str | None, tmp_path: Path) -> None:
    """What stood before, or was written meanwhile, stays."""
    folder = tmp_path / "a" / "b"
    if stands in ("a", "a/b"):
        (tmp_path / stands).mkdir(parents=True)
    with suppress(UserError), exclusive(folder):
        if stands == "a/b/file":
            (folder / "file").touch()
        raise UserError("planted")
    stay = {str(path) for path in (Path(stands or ""), *Path(stands or "").parents)} - {"."}
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == stay | ({"a/b/.lock"} if "a/b" in stay else set())
    with exclusive(folder):
        pass


def test_a_lock_is_closed_before_its_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS and FUSE keep under another name what is deleted while it is open."""
    rmdir = Path.rmdir

    def of_nfs(folder: Path) -> None:
        opened = [os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
        if any(name.startswith(f"{folder}/") for name in opened):
            raise OSError(errno.ENOTEMPTY, "planted")
        rmdir(folder)

    monkeypatch.setattr(Path, "rmdir", of_nfs)
    with exclusive(tmp_path / "a" / "b"):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["mkdir", "open", "flock"])
def test_a_folder_that_goes_is_not_held_by_who_came_meanwhile(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has made sure of the folder, opened the lock, or got it."""
    folder, first = tmp_path / "work", ExitStack()
    owner = fcntl if step == "flock" else Path
    take = getattr(owner, step)

    def and_it_goes(*words: Any, **options: Any) -> Any:
        monkeypatch.undo()
        if step != "flock":
            result = take(*words, **options)
        first.close()
        return result if step != "flock" else take(*words, **options)

    first.enter_context(exclusive(folder))
    monkeypatch.setattr(owner, step, and_it_goes)
    with pytest.raises(UserError, match="another process has just written here; try again"), exclusive(folder):
        pytest.fail("too early")
    assert not folder.exists()
    with exclusive(folder):
        assert folder.exists()


def test_a_lock_that_others_hold_stays(tmp_path: Path) -> None:
    """Of those that share it, whoever made the folder may be the first to go; or another folder stands there by now."""
    folder, others = tmp_path / "work", ExitStack()
    with others:
        with exclusive(folder, shared=True):
            others.enter_context(exclusive(folder, shared=True))
        with pytest.raises(UserError, match="another process is writing here"), exclusive(folder):
            pytest.fail("beside others")
    shutil.rmtree(folder)
    with others:
        with exclusive(folder):
            shutil.rmtree(folder)
            others.enter_context(exclusive(folder))
        with pytest.raises(UserError, match="another process is writing here"), exclusive(folder):
            pytest.fail("beside another")
