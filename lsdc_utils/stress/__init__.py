"""Stress tests: what only a phantom can show of frozen models."""
