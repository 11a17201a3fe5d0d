"""DICOM files to series, slices with their pixels and their place in the patient: headers.py reads a file up to its
pixels, pixels.py decodes them, series.py sorts the images of a folder."""

from lsdc_utils.dicom.headers import DicomError, NotDicomError, Tags, read_all_tags, read_tags
from lsdc_utils.dicom.series import Frames, Series, Slice, Source, read_series, series_files

__all__ = ["DicomError", "Frames", "NotDicomError", "Series", "Slice", "Source", "Tags"]
__all__ += ["read_all_tags", "read_series", "read_tags", "series_files"]
