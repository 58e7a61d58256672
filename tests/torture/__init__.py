"""Faults on purpose: what may break, how often it was broken, and that nothing was lost. `just torture`."""
