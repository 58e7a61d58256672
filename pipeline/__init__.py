"""Recordings → shards: plan, codes, targets."""
