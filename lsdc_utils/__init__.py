"""Grading of degenerative change on lumbar-spine MRI: what the notebooks of this repository share."""

__version__ = "0.1.0"
