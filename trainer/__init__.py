"""Shards → a 48 kHz decoder for the same tokens."""
