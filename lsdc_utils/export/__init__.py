"""Grades for other systems: CSV tables and DICOM structured reports."""
