"""DICOM files to series: slices with their pixels and their place in the patient.

headers.py reads a file up to its pixels, pixels.py decodes them, series.py sorts the images of a folder.
"""

from lsdc_utils.dicom.headers import DicomError, NotDicomError, Tags, read_tags
from lsdc_utils.dicom.series import Series, Slice, read_series

__all__ = ["DicomError", "NotDicomError", "Series", "Slice", "Tags", "read_series", "read_tags"]
