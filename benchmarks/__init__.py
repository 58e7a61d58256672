"""Measurements that README quotes; each module answers one question."""
