"""A synthetic data folder in the competition's layout, drawn from anatomy, with the answers beside it."""

from lsdc_utils.phantom.write import fingerprint, write_phantom

__all__ = ["fingerprint", "write_phantom"]
