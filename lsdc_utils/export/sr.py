"""Grades of one study as a DICOM structured report: template TID 1500 (PS3.16) with codes of SNOMED CT."""

from datetime import datetime

import numpy as np
import pandas as pd
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from lsdc_utils.export.images import Key, new_uid
from lsdc_utils.files import git_commit
from lsdc_utils.grading.marks import SHORT_NAMES
from lsdc_utils.grading.run_tables import SOURCE_NAMES
from lsdc_utils.vocabulary import LEVEL_NAMES, LEVELS, SEVERITIES, SEVERITY_NAMES

NAME = "lsdc_utils: grading of lumbar-spine MRI"
NOTICE = "Research software, not for clinical use"
SCHEME = "99LSDC"  # private codes, for what has no known code in SNOMED CT
FINDINGS = {
    "scs": codes.SCT.Stenosis,
    "nfn": Code("NFN", SCHEME, "Neural foraminal narrowing"),
    "ss": Code("SAS", SCHEME, "Subarticular stenosis"),
}
SITES = {"scs": codes.SCT.SpinalCanalStructure, "nfn": codes.SCT.LumbarSpine, "ss": codes.SCT.LumbarSpine}
LEVEL_CODES = {n: getattr(codes.SCT, f"LevelOf{n.upper().replace('_', '')}IntervertebralDisc") for n in LEVELS}
SIDE_CODES = {"left": codes.SCT.Left, "right": codes.SCT.Right, "": None}
GRADES = (Code("NORMALMILD", SCHEME, "Normal or mild"), codes.SCT.Moderate, codes.SCT.Severe)
CHANCES = tuple(Code(f"P{k}", SCHEME, f"Probability of {name.lower()}") for k, name in enumerate(SEVERITY_NAMES))
SOURCES = {name: Code(f"FROM{k}", SCHEME, words) for k, (name, words) in enumerate(SOURCE_NAMES.items())}


def make_report(rows: pd.DataFrame, keys: dict[str, Key], when: datetime) -> sr.ComprehensiveSR:
    """The 25 rows of a study as an unverified structured report by TID 1500, observed by a device."""
    study_uid, version = next(iter(keys.values())).header.StudyInstanceUID, git_commit()
    device = sr.DeviceObserverIdentifyingAttributes(new_uid(NAME), NAME, "lsdc_utils", model_name=NOTICE)
    context = sr.ObservationContext(observer_device_context=sr.ObserverContext(codes.DCM.Device, device))
    scheme = CodingSchemeIdentificationItem(SCHEME, f"Private codes of {NAME}", responsible_organization="lsdc_utils")
    procedure = Code("113091000", "SCT", "Magnetic resonance imaging")
    findings = [_finding(row, keys.get(row.row_id), study_uid, version) for row in rows.itertuples()]
    content = sr.MeasurementReport(context, procedure, findings, title=codes.DCM.ImagingMeasurementReport)
    report = sr.ComprehensiveSR(
        evidence=list({key.header.SOPInstanceUID: key.header for key in keys.values()}.values()),
        content=content[0],
        series_instance_uid=new_uid(f"{study_uid}/report"),
        series_number=1,
        sop_instance_uid=new_uid(f"{study_uid}/report/{rows.to_csv(index=False)}"),
        instance_number=1,
        manufacturer="lsdc_utils",
        manufacturer_model_name=NAME,
        software_versions=version,
        series_description=NOTICE,
        coding_schemes=[scheme],
        is_complete=True,
    )
    # The time of the scores, not of the export: the same grades give the same file.
    for dataset in (report, *report.ContributingEquipmentSequence):
        for element in dataset:
            if element.value and element.VR in ("DA", "TM", "DT"):
                element.value = when.strftime({"DA": "%Y%m%d", "TM": "%H%M%S", "DT": "%Y%m%d%H%M%S"}[element.VR])
    return report


def _finding(row, key: Key | None, study_uid: str, version: str) -> sr.MeasurementsAndQualitativeEvaluations:
    """One row: site, level and side, grade, three probabilities, source, and its point."""
    name = f"{LEVEL_NAMES[LEVELS.index(row.level)]} {SHORT_NAMES[row.condition]}"
    chances = {code: round(getattr(row, column), 6) for code, column in zip(CHANCES, SEVERITIES, strict=True)}
    severity = sr.QualitativeEvaluation(codes.SCT.Severity, GRADES[row.grade])
    source = sr.QualitativeEvaluation(Code("SOURCE", SCHEME, "Source of the row"), SOURCES[row.source])
    common = {
        "tracking_identifier": sr.TrackingIdentifier(new_uid(f"{study_uid}/{row.condition}/{row.level}"), name),
        "finding_type": FINDINGS[row.group],
        "finding_sites": [sr.FindingSite(SITES[row.group], SIDE_CODES[row.side], LEVEL_CODES[row.level])],
        "algorithm_id": sr.AlgorithmIdentification(NAME, version=version),
        "measurements": [sr.Measurement(code, chance, codes.UCUM.NoUnits) for code, chance in chances.items()],
        "qualitative_evaluations": [severity, source],
    }
    if key is None:
        return sr.MeasurementsAndQualitativeEvaluations(**common)
    frames = [key.image.frame + 1] if key.several else None
    uids = (str(key.header.SOPClassUID), str(key.header.SOPInstanceUID))
    place = np.array([key.point]) + 0.5  # SCOORD counts from the corner of the first pixel (PS3.3, C.18.6)
    region = sr.ImageRegion(sr.GraphicTypeValues.POINT, place, sr.SourceImageForRegion(*uids, frames))
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_region=region, **common)
