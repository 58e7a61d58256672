"""Whether a validation segment is one of training's, filed under another group, too."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from shards.contract import INDEX_NAME, OK, SPLITS
from shards.errors import printable
from shards.storage import Location
from shards.writer import read_table

SAME = ["n_samples", "peak", "level_db", "speech_share", "source_bandwidth_hz"]  # float32 to the last bit


def say_twins(folder: Location) -> None:
    """Prints how many there are, by what was measured of them: there validation says what training knows by heart."""
    training, validation = (_usable(folder, split) for split in SPLITS)
    twins = training.join(validation, SAME, join_type="right semi")  # the table on the right is held as a hash table
    if len(twins):
        such = printable(min(twins["recording"].to_pylist()))
        tqdm.write(
            f"warning: {len(twins)} of {len(validation)} validation segments are in training too, under another group, "
            f"such as {such}: put its copies into one group, or remove them"
        )


def _usable(folder: Location, split: str) -> pa.Table:
    """Those that are measured: silence has no bandwidth, and is like any other."""
    of_split = (pc.field("split") == split) & (pc.field("status") == OK) & pc.field("source_bandwidth_hz").is_valid()
    columns = [*SAME, "recording"] if split == "validation" else SAME
    return read_table(folder / INDEX_NAME, columns=columns, filters=of_split)
