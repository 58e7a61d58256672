from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch

from shards.index import load
from shards.order import Order, permutation, random_words, rank_slice
from shards.stream import Stage, Stream
from trainer.data import Batch, training_batches

MASK = 2**64 - 1
STEPS, LENGTH = 6, 3
ORDERS = [
    Order((5, 3, 4, 1, 7), seed=0, window=2),
    Order((5, 3, 4, 1, 7), seed=1, window=1),
    Order((2,) * 9, seed=2, window=4),
    Order((6, 6), seed=3, window=16),
    Order((1,), seed=4, window=1),
    Order((100, 1, 1, 50), seed=2**63 - 1, window=3),
]
each_order = pytest.mark.parametrize("order", ORDERS, ids=[str(order.counts) for order in ORDERS])


def stream(order: Order, samples: int) -> list[int]:
    """The first `samples` sample numbers."""
    return [order.sample_at(position) for position in range(samples)]


def in_batches(order: Order, batch: int) -> Stream:
    return Stream((order,), (1,), (Stage(0, LENGTH, batch),), order.seed)


# The same in whole numbers, slowly and without NumPy


def philox(key: tuple[int, int], n: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), counter from 1 on."""
    words: list[int] = []
    for counter in range(1, -(-n // 4) + 1):
        block, (k0, k1) = (counter, 0, 0, 0), key
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * block[0], 0xCA5A826395121157 * block[2]
            block = (p1 >> 64) ^ block[1] ^ k0, p1 & MASK, (p0 >> 64) ^ block[3] ^ k1, p0 & MASK
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
        words += block
    return words[:n]


def slow_words(n: int, *key: int | str) -> list[int]:
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return philox((int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")), n)


def slow_permutation(n: int, *key: int | str) -> list[int]:
    words = slow_words(n, *key)
    return sorted(range(n), key=lambda i: words[i])


def slow_epoch(order: Order, epoch: int) -> list[int]:
    numbers = [list(range(sum(order.counts[:i]), sum(order.counts[: i + 1]))) for i in range(len(order.counts))]
    shards = slow_permutation(len(order.counts), order.seed, "shards", epoch)
    samples = []
    for window, first in enumerate(range(0, len(shards), order.window)):
        pool = [number for shard in shards[first : first + order.window] for number in numbers[shard]]
        samples += [pool[i] for i in slow_permutation(len(pool), order.seed, "samples", epoch, window)]
    return samples


@pytest.mark.parametrize("n", [1, 3, 4, 5, 100])
def test_random_words_are_philox(n: int) -> None:
    assert random_words(n, 7, "shards", 3).tolist() == slow_words(n, 7, "shards", 3)
    assert permutation(n, "a", n).tolist() == slow_permutation(n, "a", n)


@each_order
def test_order_equals_the_slow_one(order: Order) -> None:
    expected = [sample for epoch in range(3) for sample in slow_epoch(order, epoch)]
    assert stream(order, 3 * order.samples_per_epoch) == expected


def test_order_is_what_it_was() -> None:
    """A run must go on where it stopped: these values are part of the format of a checkpoint."""
    order = Order((3, 4, 2, 5), seed=0, window=2)
    assert random_words(3, 0, "crop", 5).tolist() == [
        12866315341243220751,
        11927680845450274148,
        11677801105674886747,
    ]
    assert [[place.sample for place in in_batches(order, 4).batch(step)] for step in range(7)] == [
        [4, 2, 3, 5],
        [6, 0, 1, 9],
        [13, 12, 7, 8],
        [11, 10, 1, 3],
        [0, 4, 5, 2],
        [6, 8, 10, 7],
        [13, 9, 12, 11],
    ]


# What it promises


@each_order
def test_every_sample_once_per_epoch(order: Order) -> None:
    n = order.samples_per_epoch
    found = stream(order, 4 * n)
    for epoch in range(4):
        assert sorted(found[epoch * n : (epoch + 1) * n]) == list(range(n))


@each_order
def test_no_more_than_a_window_of_shards_is_open_at_a_time(order: Order) -> None:
    """A shard is open from its first sample in an epoch to its last."""
    shard_of = [shard for shard, count in enumerate(order.counts) for _ in range(count)]
    n = order.samples_per_epoch
    for epoch in range(3):
        shards = [shard_of[order.sample_at(epoch * n + place)] for place in range(n)]
        first = {shard: shards.index(shard) for shard in shards}
        last = {shard: place for place, shard in enumerate(shards)}
        for place in range(n):
            assert sum(first[shard] <= place <= last[shard] for shard in first) <= order.window


def test_samples_of_a_window_are_mixed() -> None:
    order = Order((50, 50, 50, 50), seed=0, window=4)
    shards = [sample // 50 for sample in stream(order, 200)]
    assert all(len(set(shards[start : start + 20])) >= 3 for start in range(0, 200, 20))
    assert stream(order, 200)[:50] != sorted(stream(order, 200)[:50])


def test_a_batch_may_hold_the_end_of_an_epoch_and_the_beginning_of_the_next() -> None:
    order = Order((3, 4), seed=0, window=2)
    batches = [in_batches(order, 5).batch(step) for step in range(3)]
    epochs = [[place.position // 7 for place in batch] for batch in batches]
    assert epochs == [[0] * 5, [0, 0, 1, 1, 1], [1, 1, 1, 1, 2]]
    samples = [place.sample for batch in batches for place in batch]
    assert samples == (slow_epoch(order, 0) + slow_epoch(order, 1) + slow_epoch(order, 2))[:15]


def test_seeds_epochs_and_windows_give_different_orders() -> None:
    counts = (20, 20, 20)
    orders = [stream(Order(counts, seed, window), 60) for seed in (0, 1, 10) for window in (1, 3)]
    orders.append(stream(Order(counts, 0, 3), 120)[60:])
    for a, b in itertools.combinations(orders, 2):
        assert a != b


def test_a_step_depends_on_nothing_before_it() -> None:
    batches = in_batches(ORDERS[0], 4)
    forwards = [batches.batch(step) for step in range(20)]
    permutation.cache_clear()
    assert [batches.batch(step) for step in reversed(range(20))] == forwards[::-1]


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "steps"),
    [
        (100, 10, 1, 10),
        (101, 10, 1, 11),
        (99, 10, 1, 10),
        (1, 32, 1, 1),
        (100, 32, 15, 47),  # 1500 / 32 = 46.875
        (100, 10, 0.5, 5),
        (100, 10, 0.55, 6),
        (100, 10, 0.001, 1),
        (100, 7, 0.07, 1),  # in floats, 100 × 0.07 is a little more than 7
        (10**9, 1, 0.1, 10**8),
    ],
)
def test_steps_are_the_least_that_hold_the_epochs(samples: int, batch: int, epochs: float, steps: int) -> None:
    assert in_batches(Order((samples,), 0, 1), batch).steps(epochs) == steps


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("n", [8, 13, 32])
def test_ranks_share_a_batch_without_gap_or_overlap(n: int, world_size: int) -> None:
    shares = [rank_slice(n, rank, world_size) for rank in range(world_size)]
    assert [place for share in shares for place in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Through the reader, the DataLoader and its workers


def small_stream(shards: Path, batch: int) -> Stream:
    order = Order(load(shards, "train").counts, seed=5, window=2)
    assert (STEPS - 1) * batch > order.samples_per_epoch, "the steps below should reach into the second epoch"
    return in_batches(order, batch)


def global_batches(work: Path, batch: int, ranks: int, workers: int, steps: range = range(STEPS)) -> list[Batch]:
    """What `ranks` processes with `workers` workers each train on, put together again."""
    index, stream = load(work / "shards", "train"), small_stream(work / "shards", batch)
    shares = [list(training_batches((index,), stream, steps, workers, rank, ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(steps)}
    return [joined(parts) for parts in zip(*shares, strict=True)]


def joined(parts: tuple[Batch, ...]) -> Batch:
    keys = [key for part in parts for key in part.keys]
    names = ("tokens_BT7", "target_BN", "valid_B")
    return Batch(keys, *(torch.cat([getattr(part, name) for part in parts]) for name in names))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for a, b in zip(found, expected, strict=True):
        for name in ("tokens_BT7", "target_BN", "valid_B"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.fixture(scope="module")
def reference(work: Path) -> list[Batch]:
    return global_batches(work, 6, ranks=1, workers=0)


def test_batches_hold_the_samples_of_the_order(work: Path, reference: list[Batch]) -> None:
    index, stream = load(work / "shards", "train"), small_stream(work / "shards", 6)
    keys = index.table["key"].to_pylist()
    assert [batch.keys for batch in reference] == [
        [keys[place.sample] for place in stream.batch(step)] for step in range(STEPS)
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (3, 0), (4, 0), (1, 1), (1, 2), (1, 3), (2, 2), (3, 1), (4, 3)])
def test_the_same_global_batches_for_any_number_of_ranks_and_workers(
    ranks: int, workers: int, work: Path, reference: list[Batch]
) -> None:
    assert_same(global_batches(work, 6, ranks, workers), reference)


@pytest.mark.parametrize(("first", "workers"), [(1, 0), (4, 0), (3, 2), (5, 2)])
def test_going_on_at_a_step_gives_the_rest(first: int, workers: int, work: Path, reference: list[Batch]) -> None:
    assert_same(global_batches(work, 6, 1, workers, range(first, STEPS)), reference[first:])


def test_a_crop_is_another_one_in_the_next_epoch(reference: list[Batch]) -> None:
    first_of: dict[str, torch.Tensor] = {}
    again = []
    for batch in reference:
        for key, target_N in zip(batch.keys, batch.target_BN, strict=True):
            if key in first_of:
                again.append(torch.equal(first_of[key], target_N))
            first_of.setdefault(key, target_N)
    assert again
    assert not all(again)
