"""Windows, seams and threads: what comes out is what one plain pass would give."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from codec.audio import Recording, probe
from codec.held import Held
from demo.voice import synthesize
from pipeline.ahead import Ahead, Clock, chained_ahead, map_ahead, thread_count
from pipeline.seams import differences_db, points
from pipeline.sidon import Native, Sidon
from pipeline.teachers import Teacher
from pipeline.windows import CROSSFADE, Grid, Joiner
from tests import sidon_native_standin
from tests.helpers import restored, targets_settings


@pytest.mark.parametrize("total", [1, 31_999, 56_000, 56_001, 64_000, 200_123])
def test_windows_cover_what_is_asked_for_and_join_to_the_whole(total: int) -> None:
    """Through a model that triples samples and sees nothing around them, a recording comes back."""
    grid = Grid.of(4.0, 0.5)
    whole = np.random.default_rng(total).standard_normal(3 * total + 3 * 320).astype(np.float32)
    for a, b in [(0, 3 * total), (3 * total // 2, 3 * total), (min(3 * 48_000 + 100, 3 * total - 1), 3 * total)]:
        windows, joiner = grid.windows(total, a, b), Joiner()
        held = Held(windows[0].first_48k)
        for window in windows:
            first = 3 * (window.start - window.left)
            held.append(joiner.add(window, whole[first : first + 3 * 320 * window.frames]))
        assert np.allclose(held.read(a, b), whole[a:b], atol=1e-6)
        assert windows[-1].stop == total
        assert all(window.padded[1] - window.padded[0] <= 4 * 16_000 + 320 for window in windows[:-1])


def test_a_seam_leads_from_one_window_to_the_next() -> None:
    """Of a model whose first window is all 0 and whose second is all 1."""
    windows, joiner = Grid.of(4.0, 0.5).windows(90_000, 0, 270_000), Joiner()
    ones = [np.full(3 * 320 * window.frames, number, np.float32) for number, window in enumerate(windows)]
    joined = np.concatenate([joiner.add(*pair) for pair in zip(windows, ones, strict=True)])
    seam = 3 * windows[1].start
    assert np.allclose(joined, np.interp(np.arange(270_000), [seam - 480, seam + 479], [0, 1]), atol=1e-6)


def test_only_windows_that_are_needed_are_asked_for() -> None:
    grid = Grid.of(4.0, 0.5)  # a window owns 3 s, 144,000 samples of the output
    assert [w.start for w in grid.windows(480_000, 150_000, 280_000)] == [48_000]
    assert [w.start for w in grid.windows(480_000, 144_000, 288_000)] == [0, 48_000, 96_000]  # both seams are blended
    assert [w.start for w in grid.windows(480_000, 144_000 + CROSSFADE, 288_000 - CROSSFADE)] == [48_000]


def test_held_lets_go_of_what_is_past_and_knows_zeros_only_beyond_the_ends() -> None:
    held = Held(0)
    held.append(np.arange(1, 6, dtype=np.float32))
    assert held.read(-2, 3).tolist() == [0, 0, 1, 2, 3]
    assert held.read(3, 8).tolist() == [4, 5, 0, 0, 0]
    with pytest.raises(AssertionError, match="in order"):
        held.read(1, 3)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Sidon:
    """Random weights of a small SIDON: an attention over the whole window, a decoder with a real receptive field."""
    folder = tmp_path_factory.mktemp("native")
    pins = sidon_native_standin.build(folder)
    cpu = torch.device("cpu")
    return Sidon(Native(str(folder / "raw"), str(folder / "base"), pins, cpu, "fp32"), cpu)


def test_seams_differ_no_more_than_anywhere_else(
    native: Sidon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.teachers.match", lambda *_: (1.0, 0.0)
    )  # random weights speak at no recording's level
    audio = np.concatenate([synthesize(speaker % 3, speaker, 10.0) for speaker in range(4)])
    path = tmp_path / "a.wav"
    soundfile.write(path, audio, 48_000, "FLOAT")
    settings = targets_settings(tmp_path, "teacher=sidon", "window_seconds=8", "overlap_seconds=2", "batch_seconds=30")
    teacher = Teacher(settings, native)
    recording = Recording(path, probe(path))
    gain = teacher.survey(recording).gain
    seams, between = points(teacher.grid, recording.length(16_000))
    assert len(seams) >= 8
    joined = restored(path, teacher)
    at_seams, elsewhere = (differences_db(joined, recording, gain, native, teacher.grid, at) for at in (seams, between))
    assert max(at_seams) <= max(elsewhere) + 1
    assert np.median(at_seams) <= np.median(elsewhere) + 3
    broken = joined.copy()
    for seam in seams:  # what a seam without overlap would leave: 20 ms of another sound
        broken[3 * seam - 480 : 3 * seam + 480] = 0
    assert np.median(differences_db(broken, recording, gain, native, teacher.grid, seams)) > max(at_seams)


def test_a_recording_of_any_length_takes_bounded_memory(
    native: Sidon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows that wait for company never hold more audio than the settings say."""
    soundfile.write(tmp_path / "a.wav", np.tile(synthesize(0, 0, 10.0), 5), 48_000, "FLOAT")
    settings = targets_settings(tmp_path, "teacher=sidon", "window_seconds=4", "overlap_seconds=1", "batch_seconds=1")
    teacher = Teacher(settings, native)
    waiting: list[float] = []
    restore_all = teacher._restore_all

    def counted(items, clock):  # type: ignore[no-untyped-def]
        waiting.append(sum(len(item.padded) for item in items) / 16_000)
        return restore_all(items, clock)

    monkeypatch.setattr(teacher, "_restore_all", counted)
    assert len(restored(tmp_path / "a.wav", teacher)) == 50 * 48_000
    assert max(waiting) < 8 * 1 * 2 + 4.1  # PENDING_BATCHES × batch_seconds, twice that with the overlaps


def test_ahead_keeps_order_and_raises_where_it_is_heard() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("broken")

    ahead = Ahead(items(), 2, cores=1)
    assert [next(ahead) for _ in range(5)] == list(range(5))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            next(ahead)


def test_no_more_is_read_ahead_than_allowed() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    ahead = Ahead(items(), 3, cores=1)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert len(made) <= 1 + 3 + 1  # given away, waiting, in the thread's hand
    ahead.close()
    assert not ahead._thread.is_alive()
    assert len(made) <= 1 + 3 + 1


def test_who_leaves_early_leaves_no_thread_and_no_work_behind() -> None:
    others, begun, opened = set(threading.enumerate()), list[int](), list[int]()

    def source(number: int) -> Iterator[int]:
        opened.append(number)
        yield from range(100)

    def slow(number: int) -> int:
        begun.append(number)
        time.sleep(0.05)
        return number

    sources = chained_ahead((source(number) for number in range(9)), threads=3, size=1)
    mapped = map_ahead(slow, range(100), threads=1, size=50)
    assert [next(sources), next(mapped)] == [0, 0]
    mapped.close()
    sources.close()
    assert set(threading.enumerate()) <= others
    assert sorted(opened) == [0, 1, 2]
    assert len(begun) < 10


def test_sources_run_at_once_and_come_out_one_after_the_other() -> None:
    barrier = threading.Barrier(3, timeout=120)

    def source(number: int) -> Iterator[tuple[int, int]]:
        barrier.wait()  # passes only while three sources run
        for item in range(4):
            yield number, item

    found = list(chained_ahead((source(n) for n in range(3)), threads=3, size=1))
    assert found == [(n, item) for n in range(3) for item in range(4)]


def test_map_ahead_is_map() -> None:
    def slow_square(x: int) -> int:
        time.sleep(0.001 * (7 - x % 7))
        return x * x

    assert list(map_ahead(slow_square, range(50), threads=4, size=8)) == [x * x for x in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda x: 1 // x, [1, 0], threads=2, size=4))
    given = iter(range(9))
    next(map_ahead(abs, given, threads=2, size=3))
    assert next(given) == 3, "no more is taken than may lie ready"


def test_threads_share_the_cores() -> None:
    def cores_of(_: int) -> int:
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        assert set(map_ahead(cores_of, range(8), threads=2, size=4)) == {3}
        assert set(map_ahead(cores_of, range(8), threads=8, size=8)) == {1}
        assert set(chained_ahead((map(cores_of, range(2)) for _ in range(3)), threads=3, size=1)) == {2}
        ahead = Ahead(map(cores_of, range(2)), 2, cores=torch.get_num_threads())
        assert list(ahead) == [6, 6]  # though threads before it have set theirs
        assert (thread_count("auto"), thread_count(9)) == (6, 9)
        torch.set_num_threads(1)
        assert (thread_count("auto"), thread_count(1)) == (4, 1)  # reading waits for disks
        torch.set_num_threads(6)

        def while_others_set_theirs() -> Iterator[int]:
            other = threading.Thread(target=torch.set_num_threads, args=(1,))
            other.start()
            other.join()
            yield torch.get_num_threads()

        assert list(Ahead(while_others_set_theirs(), 1, cores=6)) == [6]
    finally:
        torch.set_num_threads(before)


def test_a_clock_knows_how_long_a_device_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 4.0, 5.0, 6.0, 8.0])
    monkeypatch.setattr("pipeline.ahead.time.perf_counter", lambda: next(times))
    clock = Clock(threads=2)
    for audio_seconds in (10.0, 20.0):
        with clock.busy(audio_seconds):
            pass
    assert clock.figures() == (30.0, 8.0, 0.75)  # 4 s of 2 · 8 s
