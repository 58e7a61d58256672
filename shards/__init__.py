"""The contract between `pipeline` and `trainer`: what a shard is, how it is written, ordered, read and checked."""
