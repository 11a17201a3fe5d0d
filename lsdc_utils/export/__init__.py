"""Grades for other systems: CSV and DICOM structured reports."""
