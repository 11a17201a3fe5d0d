"""DICOM files to series: slices with pixels, each with its place in the patient.

headers.py reads a file up to its pixels, pixels.py decodes them, series.py puts the images of a folder in order.
"""

from lsdc_utils.dicom.headers import DicomError, NotDicomError, Tags, read_tags
from lsdc_utils.dicom.series import Series, Slice, read_series

__all__ = ["DicomError", "NotDicomError", "Series", "Slice", "Tags", "read_series", "read_tags"]
