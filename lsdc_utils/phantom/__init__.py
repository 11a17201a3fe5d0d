"""A synthetic data folder in the competition's layout, drawn from anatomy, with the answers beside it."""

from lsdc_utils.phantom.spoil import ALL_DIRT
from lsdc_utils.phantom.write import fingerprint, write_phantom

__all__ = ["ALL_DIRT", "fingerprint", "write_phantom"]
