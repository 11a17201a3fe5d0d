"""Stress tests: what only a phantom can show of the frozen models of a run."""
