"""Exports of a phantom's grades: points and numbers, legal UIDs, privacy, and validation by other tools."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_files import write_slice
from highdicom import sr

from lsdc_utils import phantom
from lsdc_utils.data import competition
from lsdc_utils.dicom import Slice, read_series
from lsdc_utils.dicom.series import Frames
from lsdc_utils.export import images, studies
from lsdc_utils.export import sr as reports
from lsdc_utils.grading.marks import REACH
from lsdc_utils.grading.run_tables import RunError
from lsdc_utils.vocabulary import GROUPS, SEVERITIES, parse_row_id

SECRETS = {
    "PatientName": "Hidden^Person",
    "PatientBirthDate": "19530817",
    "AccessionNumber": "ACC77",
    "StudyDescription": "Secret words",
    "InstitutionName": "Some Hospital",
}


def write_graded(folder: Path, rng: np.random.Generator) -> Path:
    """A run of a phantom's one test study, graded at random at the true points; some rows have no point."""
    root = phantom.write_phantom(folder / "data/phantom", 1, 1, seed=4)
    run = folder / "run"
    (run / "predictions").mkdir(parents=True)
    (run / "data.json").write_text(json.dumps({"data_dir": "../data/phantom", "kind": "phantom"}))
    (run / "scores.json").write_text("{}")
    recipe = {"format": 4, "kind": "fitted", "folds": [], "vit_views": 1, "threads": 1, "prior": {}}
    (run / "blend.json").write_text(json.dumps(recipe))
    truth = pd.read_csv(root / "anatomy.csv")
    solution = pd.read_csv(root / "solution.csv")
    names = [parse_row_id(row) for row in solution["row_id"]]
    natural = pd.DataFrame(rng.dirichlet([1, 1, 1], len(solution)), columns=list(SEVERITIES))
    table = solution[["row_id"]].join(natural)
    for model in ("ensemble", "yolo", "vit3d"):
        table.to_parquet(run / f"predictions/{model}_test.parquet")
    solution[["row_id"]].assign(source="yolo+vit3d", own_series=True).to_parquet(
        run / "predictions/sources_test.parquet"
    )
    places = truth[truth["study_id"].astype(str) == names[0][0]].drop_duplicates(["condition", "level"])
    groups = {group.base: key for key, group in GROUPS.items()}
    side = places["condition"].str.extract(r"^(left|right)_")[0]
    base = places["condition"].str.replace(r"^(left|right)_", "", regex=True)
    points = places[["study_id", "level", "X", "Y", "Z"]].assign(side=side, confidence=0.9, condition=base.map(groups))
    points["level_confidence"] = 0.9
    points[points["level"] != "l1_l2"].to_parquet(run / "predictions/points_test.parquet")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_graded(tmp_path_factory.mktemp("outputs"), np.random.default_rng(2))


@pytest.fixture(scope="module")
def study(run) -> Path:
    written = studies.export_studies(run)
    assert len(written) == 1 and written["problem"].eq("").all() and written["images_written"].gt(3).all()
    return run / "exports" / str(written["study_id"].iloc[0])


def findings(report: pydicom.Dataset) -> dict[str, dict]:
    """What a reader of the SR finds: by tracking identifier the codes, numbers, and the image with the point."""
    found = {}
    for group in sr.MeasurementReport.from_sequence([report]).get_planar_roi_measurement_groups() + [
        group for group in sr.MeasurementReport.from_sequence([report]).get_image_measurement_groups()
    ]:
        site = group.finding_sites[0]
        line = {
            "grade": group.get_qualitative_evaluations(name=pydicom.sr.codedict.codes.SCT.Severity)[0].value.meaning,
            "chances": [measurement.value for measurement in group.get_measurements()],
            "level": site.topographical_modifier.meaning,
            "side": site.laterality.meaning if site.laterality else None,
        }
        if isinstance(group, sr.PlanarROIMeasurementsAndQualitativeEvaluations):
            region = group.roi
            line["image"] = region.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
            line["point"] = list(region.GraphicData)
        found[group.tracking_identifier] = line
    return found


def test_the_report_says_what_the_table_says(study):
    table, found = pd.read_csv(study / "grades.csv"), findings(pydicom.dcmread(study / "sr.dcm"))
    assert len(table) == 25 and len(found) == 25
    names = ("Normal or mild", "Moderate", "Severe")
    for row in table.itertuples():
        side = "" if row.side != row.side else row.side
        level = row.level.upper().replace("_", "/")
        part = {"nfn": "foraminal", "scs": "Spinal canal", "ss": "subarticular"}[row.group]
        line = found[f"{level} {f'{side.capitalize()} {part}' if side else part}"]
        assert level in line["level"] and (line["side"] or "").lower() == side
        assert line["grade"] == names[row.grade]
        np.testing.assert_allclose(line["chances"], [getattr(row, name) for name in SEVERITIES], atol=2e-6)
        assert ("image" in line) == (row.level != "l1_l2")


def test_a_point_lies_on_the_nearest_slice_of_its_series(run, study):
    comp = competition.read(competition.data_dir(run))
    table, found = pd.read_csv(study / "grades.csv").dropna(subset=["X"]), findings(pydicom.dcmread(study / "sr.dcm"))
    renamed = pd.read_csv(study / "uids.csv", dtype=str).set_index("SOPInstanceUID")
    by_place = {(line["level"], line["side"], line["chances"][0]): line for line in found.values() if "image" in line}
    for row in table.itertuples():
        [line] = [line for (_, _, chance), line in by_place.items() if abs(chance - row.normal_mild) < 2e-6]
        described = comp.series[comp.series["series_type"] == GROUPS[row.group].series_type]
        offs = []
        for series_id in described.loc[described["study_id"] == int(study.name), "series_id"]:
            series = read_series(comp.source("test", int(study.name), series_id), pixels=False)
            n, x, y, off = series.to_pixel(row.X, row.Y, row.Z)
            offs.append((off, series.slices[n].file.name, str(series_id), x, y))
        _, file, series_id, x, y = min(offs)
        assert renamed.loc[line["image"], "file"].split("/")[1:] == [series_id, file]
        np.testing.assert_allclose(line["point"], [x + 0.5, y + 0.5], atol=1e-3)
        image = pydicom.dcmread(study / renamed.loc[line["image"], "image"])
        place = np.array([float(v) for v in image.ImagePositionPatient])
        place += (line["point"][0] - 0.5) * float(image.PixelSpacing[1]) * np.array(image.ImageOrientationPatient[:3])
        place += (line["point"][1] - 0.5) * float(image.PixelSpacing[0]) * np.array(image.ImageOrientationPatient[3:])
        assert np.linalg.norm(place - [row.X, row.Y, row.Z]) < REACH


def test_written_images_hold_the_sources_values(run, study):
    for line in pd.read_csv(study / "uids.csv", dtype=str).itertuples():
        image = pydicom.dcmread(study / line.image)
        source = competition.data_dir(run) / "test_images" / line.file
        assert np.array_equal(image.pixel_array, pydicom.dcmread(source).pixel_array)
        assert images.LEGAL_UID.fullmatch(image.SOPInstanceUID) and len(image.SOPInstanceUID) <= 64
        assert image.SOPInstanceUID == line.SOPInstanceUID and line.SOPInstanceUID_before != line.SOPInstanceUID
        assert (
            image.PatientID == study.name
            and image.StudyInstanceUID == pydicom.dcmread(study / "sr.dcm").StudyInstanceUID
        )


def test_padding_is_written_as_background():
    pixels = np.array([[-np.inf, -300.0], [40.0, 1000.0]], "float32")
    header = pydicom.Dataset()
    header.StudyInstanceUID = header.SOPClassUID = header.SOPInstanceUID = "1.2"
    header.Rows = header.Columns = 2
    key = images.Key(Slice(Path("1.dcm"), 0, 1, np.eye(4), (2, 2), 0), pixels, header, {}, (0, 0))
    written = np.frombuffer(images._make_image(key, 1, datetime(2024, 5, 3)).PixelData, "<i2")
    assert written.tolist() == [-300, -300, 40, 1000]


def test_exporting_again_gives_the_same_bytes(run, study, tmp_path):
    studies.export_studies(run, [int(study.name)], tmp_path / "again")
    files = sorted(file.relative_to(study) for file in study.rglob("*") if file.is_file())
    assert files == sorted(f.relative_to(tmp_path / "again" / study.name) for f in (tmp_path / "again").rglob("*.*"))
    for file in files:
        assert (study / file).read_bytes() == (tmp_path / "again" / study.name / file).read_bytes(), file


def relabel(run: Path, folder: Path, **tags: str) -> Path:
    """A copy of a run and its data, whose files carry other header values; {n} is the number of a file."""
    shutil.copytree(run.parent, folder, ignore=shutil.ignore_patterns("exports"))
    for n, file in enumerate(sorted((folder / "data/phantom/test_images").rglob("*.dcm"))):
        dataset = pydicom.dcmread(file)
        for name, text in tags.items():
            setattr(dataset, name, text.format(n=n, series=file.parent.name))
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(file)
    return folder / "run"


LEGAL = {"StudyInstanceUID": "1.2.3.4", "SeriesInstanceUID": "1.2.3.4.{series}", "SOPClassUID": images.MRImageStorage}


def test_legal_and_unique_uids_are_referred_to_as_they_are(run, study, tmp_path):
    made = studies.export_studies(relabel(run, tmp_path / "legal", SOPInstanceUID="1.2.3.4.5.{n}", **LEGAL))
    assert made["images_written"].tolist() == [0] and made["images_referred"].gt(3).all()
    folder = tmp_path / "legal/run/exports" / study.name
    assert sorted(file.name for file in folder.iterdir()) == ["grades.csv", "sr.dcm"]
    report = pydicom.dcmread(folder / "sr.dcm")
    assert report.StudyInstanceUID == "1.2.3.4"
    assert all(line["image"].startswith("1.2.3.4.5.") for line in findings(report).values() if "image" in line)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_frame_of_a_file_with_several_is_named_also_the_first(frames, tmp_path):
    """As the report refers to it; of a file with one frame the reference is to the file."""
    pixels = np.zeros((frames, 8, 8), "uint16") if frames > 1 else np.zeros((8, 8), "uint16")
    tags = LEGAL | {"SeriesInstanceUID": "1.2.3.4.7", "SOPInstanceUID": "1.2.3.4.5.6", "PatientID": "7"}
    file = write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0), pixels=pixels, rle=False, **tags)
    series = SimpleNamespace(slices=[Slice(file, 0, 1, np.eye(4), (8, 8), 0)], pixels=[np.zeros((8, 8))])
    key = images._key(True, 7, 8, series, 0, (2.0, 3.0))
    names = {"condition": "spinal_canal_stenosis", "level": "l4_l5", "side": "", "group": "scs", "source": "prior"}
    row = SimpleNamespace(**names, grade=0, **dict.fromkeys(SEVERITIES, 1 / 3))
    region = reports._finding(row, key, "1.2.3.4", "x").roi
    [referred] = region.ContentSequence[0].ReferencedSOPSequence
    assert referred.get("ReferencedFrameNumber") == (1 if frames > 1 else None)


def test_of_series_with_a_slice_through_a_point_the_one_that_shows_it_is_referred_to(tmp_path):
    """An image that ends before the point is not, although the point lies in its plane."""
    places = {1: (50.0, 0.0, 0.0), 2: (0.0, 0.0, 1.0)}
    for number, place in places.items():
        pixels = np.random.default_rng(number).integers(0, 900, (40, 40), "uint16")
        write_slice(tmp_path / f"{number}/1.dcm", 1, place, pixels=pixels, rle=False, spacing=(2.5, 2.5))
    rows = pd.DataFrame(
        {"row_id": ["7_a"], "study_id": 7, "block": "test", "group": "ss", "X": 4.0, "Y": 4.0, "Z": 0.0}
    )
    for numbers, found in (([1, 2], [2]), ([1], [])):
        series = pd.DataFrame({"split": "test", "study_id": 7, "series_id": numbers, "series_type": "Axial T2"})
        comp = SimpleNamespace(series=series, source=lambda split, study, number: tmp_path / str(number))
        keys, problems = images.find_keys(comp, dict, rows)
        assert [int(key.image.file.parent.name) for key in keys.values()] == found and problems == []


def test_uids_that_collide_are_replaced_and_then_all_are_since_a_report_is_of_one_study(run, study, tmp_path):
    made = studies.export_studies(relabel(run, tmp_path / "same", SOPInstanceUID="1.2.3.4.5.6", **LEGAL))
    assert made["images_written"].gt(3).all() and made["images_written"].equals(made["images_referred"])
    some = relabel(run, tmp_path / "some", SOPInstanceUID="1.2.3.4.5.{n}", **LEGAL)
    for file in (tmp_path / "some/data/phantom/test_images").glob("*/*/*.dcm"):
        if (dataset := pydicom.dcmread(file)).Columns == dataset.Rows:  # the axial series alone
            dataset.SeriesInstanceUID = "1.02.3"
            dataset.save_as(file)
    made = studies.export_studies(some)
    assert made["images_written"].equals(made["images_referred"]) and made["images_written"].gt(3).all()
    written = (some / "exports" / study.name / "images").glob("*.dcm")
    report = pydicom.dcmread(some / "exports" / study.name / "sr.dcm")
    assert {pydicom.dcmread(file).StudyInstanceUID for file in written} == {report.StudyInstanceUID}


def test_images_that_grading_left_out_are_not_referred_to(run, study, tmp_path):
    """Of another patient, and axial ones that the table calls sagittal T1, which lie as near to points."""
    shutil.copytree(run.parent, tmp_path / "more", ignore=shutil.ignore_patterns("exports"))
    root = tmp_path / "more/data/phantom"
    table = pd.read_csv(root / "test_series_descriptions.csv")
    [axial] = table.loc[table["series_description"] == "Axial T2", "series_id"]
    own = root / "test_images" / study.name
    for number, kind, tags in ((1, "Axial T2", {"PatientID": "other"}), (2, "Sagittal T1", {})):
        for file in shutil.copytree(own / str(axial), own / str(number)).iterdir():
            dataset = pydicom.dcmread(file)
            for name, text in tags.items():
                setattr(dataset, name, text)
            dataset.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], dataset.ImagePositionPatient[2] + 1e-3]
            dataset.save_as(file)
        table.loc[len(table)] = [int(study.name), number, kind]
    for file in (root / "test_images").glob("*/*/*.dcm"):
        if file.parent.name != "1":
            dataset = pydicom.dcmread(file)
            dataset.PatientID = "own"
            dataset.save_as(file)
    table.to_csv(root / "test_series_descriptions.csv", index=False)
    made = studies.export_studies(tmp_path / "more/run")
    assert "another patient" in made["problem"].iloc[0] and "its images are axial" in made["problem"].iloc[0]
    sources = pd.read_csv(tmp_path / "more/run/exports" / study.name / "uids.csv")["file"].str.split("/").str[1]
    assert len(sources) > 3 and not set(sources) & {"1", "2"} and str(axial) in set(sources)


def test_no_export_replaces_what_is_not_one(run, study, tmp_path):
    shutil.copytree(run.parent, tmp_path / "kept", ignore=shutil.ignore_patterns("exports"))
    root = tmp_path / "kept/data/phantom"
    files = sorted(root.rglob("*"))
    for out in (root / "test_images", root / "new"):
        with pytest.raises(studies.ExportError, match="lies in the folder of the data"):
            studies.export_studies(tmp_path / "kept/run", out=out)
    assert sorted(root.rglob("*")) == files
    other = tmp_path / "other" / study.name / "1.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    (other.parent / "grades.csv").write_text("of predict, which writes one as well")
    with pytest.raises(studies.ExportError, match=f"{study.name} is there, and no export wrote it"):
        studies.export_studies(tmp_path / "kept/run", out=tmp_path / "other")
    assert other.read_text() == "mine"
    inside = shutil.copytree(run, root / "run", ignore=shutil.ignore_patterns("exports"))  # data around the repository
    (inside / "data.json").write_text(json.dumps({"data_dir": str(root), "kind": "phantom"}))
    for _ in range(2):  # its own export is replaced
        assert len(studies.export_studies(inside)) == 1


def test_nothing_private_is_copied(run, study, tmp_path):
    made = relabel(run, tmp_path / "private", SOPInstanceUID="12345{n}", **SECRETS)
    studies.export_studies(made)
    files = [file for file in (made / "exports").rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        for secret in SECRETS.values():
            assert secret.encode() not in content, (file, secret)


def test_an_unreadable_series_costs_its_images_alone(run, study, tmp_path):
    shutil.copytree(run.parent, tmp_path / "broken", ignore=shutil.ignore_patterns("exports"))
    comp = competition.read(tmp_path / "broken/data/phantom")
    mine = comp.series[(comp.series["study_id"] == int(study.name)) & (comp.series["series_type"] == "Axial T2")]
    for series_id in mine["series_id"]:
        for file in comp.source("test", int(study.name), series_id).iterdir():
            file.write_bytes(b"no DICOM")
    made = studies.export_studies(tmp_path / "broken/run")
    assert str(mine["series_id"].iloc[0]) in made["problem"].iloc[0]
    found = findings(pydicom.dcmread(tmp_path / "broken/run/exports" / study.name / "sr.dcm"))
    assert len(found) == 25 and not any("image" in line for name, line in found.items() if "subarticular" in name)
    shutil.rmtree(tmp_path / "broken/data/phantom/test_images")
    made = studies.export_studies(tmp_path / "broken/run")
    assert "no sr.dcm" in made["problem"].iloc[0]
    folder = tmp_path / "broken/run/exports" / study.name
    assert [file.name for file in folder.iterdir()] == ["grades.csv"]


def test_what_cannot_be_exported_is_named(run, tmp_path):
    with pytest.raises(studies.ExportError, match="did not grade 99"):
        studies.export_studies(run, [99])
    (tmp_path / "blend.json").write_text((run / "blend.json").read_text())
    with pytest.raises(studies.ExportError, match="has no grades to export: run it to 05_ensemble_inference"):
        studies.export_studies(tmp_path)


def test_unfinished_and_older_runs_are_refused(run, tmp_path):
    with pytest.raises(RunError, match=r"is not finished: it lacks blend\.json"):
        studies.export_studies(tmp_path)
    recipe = json.loads((run / "blend.json").read_text())
    (tmp_path / "blend.json").write_text(json.dumps(recipe | {"format": 1}))
    with pytest.raises(RunError, match="was made by an older version of the code: run it again"):
        studies.export_studies(tmp_path)
    assert not (tmp_path / "exports").exists()


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: dicom3tools and dcmtk)")
    return found


def test_dciodvfy_finds_no_error(study):
    for file in study.rglob("*.dcm"):
        said = subprocess.run([tool("dciodvfy"), file], capture_output=True, text=True)
        assert "Error" not in said.stdout + said.stderr, (file.name, said.stderr)
        assert re.search("ComprehensiveSR|MRImage", said.stdout + said.stderr)


def test_dsrdump_prints_the_grades(study):
    said = subprocess.run([tool("dsrdump"), study / "sr.dcm"], capture_output=True, text=True, check=True).stdout
    grades = re.findall(r'"Severity \(attribute\)"\)=\((\w+),(\w+),"([^"]+)"\)', said)
    words = {"NORMALMILD": "Normal or mild", "6736007": "Moderate", "24484000": "Severe"}
    assert len(grades) == 25 and all(words[code] == meaning for code, _, meaning in grades)
    assert said.count("Probability of severe") == 25 and "UNVERIFIED" in said


def test_uids_are_counted_of_files_and_of_files_in_frames(tmp_path):
    write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0), SOPInstanceUID="1.2.3.4")
    series = pd.DataFrame({"split": "test", "study_id": [1, 2], "series_id": [1, 2]})
    source = {1: tmp_path, 2: [Frames(tmp_path / "1.dcm", (0,)), Frames(tmp_path / "1.dcm", (1,))]}
    comp = SimpleNamespace(series=series, source=lambda split, study, number: source[number])
    assert images.count_uids(comp) == {"1.2.3.4": 2}  # once a series, whatever frames it takes
