"""The phantom: labels against the real ones, its folder, its points, and that only the anatomy tells a grade."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from scipy.stats import spearmanr
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import GroupKFold

from lsdc_utils import dicom, geometry, metric, vocabulary
from lsdc_utils.phantom import fingerprint, labels, study, write, write_phantom
from lsdc_utils.phantom.body import Body
from lsdc_utils.phantom.scanner import plan_series
from lsdc_utils.vocabulary import AXIAL, COLUMNS, LEVEL_NAMES, LEVELS, MISSING, SERIES_TYPES, SEVERITIES, T1, T2

CLEAN = dict.fromkeys(study.Dirt.__dataclass_fields__, 0.0)
ANATOMY = ("anatomy.csv", "discs.csv", "spines.csv")
ANSWERS = (*("solution.csv", "solution_coordinates.csv", "latents.csv", "oracle.csv", "wrong_labels.csv"), *ANATOMY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four studies with images and the kinds of dirt that need a look at files."""
    root = tmp_path_factory.mktemp("phantom") / "small"
    return write_phantom(root, 3, 1, 5, second_axial=1.0, axial_split=1.0, axial_reversed=1.0, number_gaps=1.0)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """Tables of 240 studies without a picture."""
    return write_phantom(tmp_path_factory.mktemp("phantom") / "tables", 200, 40, 2, workers=2, images=False)


def digests(root: Path) -> dict[str, str]:
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def test_layout(folder):
    train = pd.read_csv(folder / "train.csv")
    assert list(train.columns) == ["study_id", *COLUMNS]
    assert set(np.unique(train[list(COLUMNS)].fillna("").to_numpy())) <= {*vocabulary.SEVERITY_NAMES, ""}
    points = pd.read_csv(folder / "train_label_coordinates.csv")
    assert set(points["level"]) <= set(LEVEL_NAMES)
    assert set(points["condition"]) == {c.title for c in vocabulary.CONDITIONS.values()}
    for split in ("train", "test"):
        series = pd.read_csv(folder / f"{split}_series_descriptions.csv")
        assert set(series["series_description"]) == set(SERIES_TYPES)
        on_disk = {(int(p.parent.name), int(p.name)) for p in (folder / f"{split}_images").glob("*/*")}
        assert on_disk == set(zip(series["study_id"], series["series_id"], strict=True))
    clicked = {(r.study_id, r.series_id, r.instance_number) for r in points.itertuples()}
    for study_id, series_id, number in clicked:
        assert (folder / "train_images" / str(study_id) / str(series_id) / f"{number}.dcm").is_file()


def test_answers_lie_beside_the_test_tables(folder):
    sample = pd.read_csv(folder / "sample_submission.csv")
    test = pd.read_csv(folder / "test_series_descriptions.csv")["study_id"].unique()
    assert list(sample["row_id"]) == [row for study_id in test for row in vocabulary.study_row_ids(study_id)]
    solution = pd.read_csv(folder / "solution.csv")
    assert set(solution["severity"]) <= {0, 1, 2}
    assert set(solution["row_id"]) <= set(sample["row_id"])
    for name in ("latents.csv", "oracle.csv"):
        told = pd.read_csv(folder / name)
        assert list(told.loc[told["split"] == "test", "row_id"]) == list(sample["row_id"])
        assert told["row_id"].nunique() == 4 * len(COLUMNS)
    oracle = pd.read_csv(folder / "oracle.csv")
    score = metric.score(solution, metric.weight_table(oracle[oracle["split"] == "test"]))
    assert 0 < score["total"] < 2


def test_measures_grow_with_the_narrowing(tables):
    latents = pd.read_csv(tables / "latents.csv")
    keys = [vocabulary.parse_row_id(row) for row in latents["row_id"]]
    latents["group"] = [vocabulary.CONDITIONS[condition].group for _, condition, _ in keys]
    for _, rows in latents.groupby("group"):
        assert spearmanr(rows["narrowing"], rows["measure"]).statistic < -0.99


def test_same_seed_same_bytes_whatever_the_workers(tmp_path):
    one = write_phantom(tmp_path / "one", 2, 1, 7, tilted_blocks=0.5)
    two = write_phantom(tmp_path / "two", 2, 1, 7, workers=2, tilted_blocks=0.5)
    plain = write_phantom(tmp_path / "plain", 2, 1, 7, images=False, tilted_blocks=0.5)
    assert digests(one) == digests(two)
    of_tables = {name: digest for name, digest in digests(one).items() if name.endswith(".csv")}
    assert of_tables == {name: digest for name, digest in digests(plain).items() if name.endswith(".csv")}
    assert len(of_tables) == 6 + len(ANSWERS)


def test_the_bytes_of_a_phantom_do_not_change(tmp_path):
    """The hash of its tables changes when bodies, frames or readers do: change it only on purpose."""
    root, digest = write_phantom(tmp_path / "p", 8, 2, 3, images=False, second_axial=0.5), hashlib.sha256()
    for file in sorted(root.glob("*.csv")):
        if file.name not in ("wrong_labels.csv", *ANATOMY):
            digest.update(file.read_bytes())
    assert digest.hexdigest() == "d6258c3dc631f2f97c9078140b0c7df9610ae8fbb58bf77179ec8e10aa1b2314"


def test_fingerprint_tells_arguments_apart():
    told = {
        fingerprint(2, 1, 7),
        fingerprint(2, 2, 7),
        fingerprint(2, 1, 8),
        fingerprint(2, 1, 7, images=False),
        fingerprint(2, 1, 7, non_square=0.5),
        fingerprint(2, 1, 7, scoliosis=15),
    }
    assert len(told) == 6
    assert fingerprint(2, 1, 7) in told and fingerprint(2, 1, 7, scoliosis=0) in told


# ---- one thing changed, all else the same ----------------------------------------------------------------------------

SERIES = dict.fromkeys(
    ("series_missing", "second_axial", "short_stack", "levels_cut"), 0.0
)  # one of each type, all levels
BARE = {"images": False, **SERIES}


def table(root: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(root / f"{name}.csv", keep_default_na=False)


def test_narrowings_that_are_given_are_those_that_would_be_drawn(tmp_path):
    drawn = write_phantom(tmp_path / "drawn", 1, 1, 7)
    narrowing = pd.read_csv(drawn / "latents.csv")["narrowing"].to_numpy().reshape(2, -1)
    given = write_phantom(tmp_path / "given", 1, 1, 7, narrowing=narrowing)
    one, other = digests(drawn), digests(given)
    assert one.pop("phantom.json") != other.pop("phantom.json")
    assert one == other


def test_studies_of_one_body_differ_by_their_narrowing_alone(tmp_path):
    narrowing = np.full((3, len(COLUMNS)), 0.2)
    narrowing[2, COLUMNS.index("spinal_canal_stenosis_l1_l2")] = 0.9
    root = write_phantom(tmp_path / "p", 0, 3, 7, narrowing=narrowing, bodies=[4, 4, 4], **SERIES)
    studies = sorted((root / "test_images").iterdir(), key=lambda folder: int(folder.name))
    series = table(root, "test_series_descriptions").set_index(["study_id", "series_description"])["series_id"]
    pixels = [
        {kind: np.stack(dicom.read_series(study / str(series[int(study.name), kind])).pixels) for kind in SERIES_TYPES}
        for study in studies
    ]
    for kind in SERIES_TYPES:
        assert np.array_equal(pixels[0][kind], pixels[1][kind])
    change = np.abs(pixels[0][T2].astype(int) - pixels[2][T2])
    changed = (change > 0.05 * pixels[0][T2].max()).any(axis=0)  # an edge rings faintly through the image
    rows = np.flatnonzero(changed.any(axis=1))
    assert 0 < changed.mean() < 0.04 and np.ptp(rows) < changed.shape[0] / 4  # one level, and loops of roots above it


@pytest.mark.parametrize(
    ("choice", "changed"),
    [
        ({"noise": 2.0}, set()),
        ({"field": 3.0}, set()),
        ({"gain": 0.5}, set()),
        ({"stir": 1.0}, {"spines"}),
        ({"motion": 3.0}, {"anatomy", "discs", "solution_coordinates"}),
        ({"step": 1.5}, {"solution_coordinates"}),
        ({"pixel": 1.3}, {"solution_coordinates"}),
        ({"scale": "realistic"}, {"solution_coordinates"}),
        ({"population": "grey"}, set()),
        (
            {"population": "narrow"},
            {"anatomy", "discs", "solution", "solution_coordinates"},
        ),  # upper levels lie outside
        ({"population": "steep"}, {"anatomy", "discs", "solution_coordinates"}),
        ({"slip": True}, {"spines", "anatomy", "discs", "solution_coordinates"}),
        ({"transitional": True}, {"spines"}),
        ({"scoliosis": 15.0}, {"spines", "anatomy", "discs", "solution_coordinates"}),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_a_choice_changes_what_it_names_and_nothing_else(tmp_path, choice, changed):
    names = ("spines", "anatomy", "discs", "solution_coordinates", "latents", "oracle", "solution")
    usual = write_phantom(tmp_path / "usual", 0, 4, 7, slip=False, **BARE)
    other = write_phantom(tmp_path / "other", 0, 4, 7, **{"slip": False, **BARE, **choice})
    assert {name for name in names if not table(usual, name).equals(table(other, name))} == changed
    assert fingerprint(0, 4, 7, slip=False, **BARE) != fingerprint(0, 4, 7, **{"slip": False, **BARE, **choice})


def test_no_scoliosis_changes_no_byte(tmp_path):
    usual = write_phantom(tmp_path / "usual", 0, 1, 7)
    assert digests(usual) == digests(write_phantom(tmp_path / "none", 0, 1, 7, scoliosis=0))


def test_a_scoliosis_bends_every_spine_by_its_size_and_readers_see_all_its_points(tmp_path):
    root = write_phantom(tmp_path / "p", 0, 40, 7, scoliosis=15.0, **BARE)
    assert (table(root, "spines")["scoliosis_mm"] == 15).all()
    assert table(root, "solution_coordinates").groupby("study_id").size().tolist() == [len(COLUMNS)] * 40
    anatomy = table(root, "anatomy")
    assert (anatomy[anatomy["series_type"] == T1].groupby("study_id").size() == len(COLUMNS)).mean() > 0.9
    canal = anatomy[(anatomy["series_type"] == T2) & (anatomy["condition"] == vocabulary.SPINAL_CANAL)]
    studies = [(rows["Z"], rows["X"]) for _, rows in canal.groupby("study_id")]
    bows = [x - np.polyval(np.polyfit(z, x, 1), z) for z, x in studies]
    ranges = [np.ptp(bow) for bow in bows]
    assert 5 < np.median(ranges) < 15 and max(ranges) < 25  # the lumbar spine is a part of the wave


def test_a_choice_is_seen_in_the_images(tmp_path):
    clean = SERIES | {"non_square": 0.0}
    choices = {
        "usual": {},
        "noise": {"noise": 4.0},
        "step": {"step": 2.0},
        "pixel": {"pixel": 1.4},
        "gain": {"gain": 0.5},
    }
    found = {}
    for name, choice in choices.items():
        root = write_phantom(tmp_path / name, 0, 1, 7, **clean, **choice)
        kinds = table(root, "test_series_descriptions").set_index("series_description")
        place = kinds.loc[T2]
        found[name] = dicom.read_series(root / "test_images" / str(place["study_id"]) / str(place["series_id"]))
    air = {name: np.stack(series.pixels)[:, :8, :8].astype(float) for name, series in found.items()}
    scale = {name: np.percentile(np.stack(series.pixels), 99) for name, series in found.items()}
    assert air["noise"].mean() > 2.5 * air["usual"].mean()
    assert len(found["step"].slices) == round(len(found["usual"].slices) / 2)
    spacing = [found[name].slices[0].spacing[0] for name in ("usual", "pixel")]
    assert spacing[1] == pytest.approx(1.4 * spacing[0], rel=0.02)
    assert scale["gain"] == pytest.approx(scale["usual"] / 2, rel=0.01)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"narrowing": np.zeros((2, 25))}, ValueError, "narrowing has 2 entries for 1 studies"),
        ({"bodies": [1, 2, 3]}, ValueError, "bodies has 3 entries for 1 studies"),
        ({"narrowing": np.full((1, 25), 1.5)}, ValueError, "25 numbers"),
        ({"nosie": 2.0}, TypeError, "nosie"),
        ({"population": "odd"}, ValueError, "population is one of"),
        ({"scoliosis": -1}, ValueError, "0 to 30 mm, not -1"),
        ({"scoliosis": np.nan}, ValueError, "0 to 30 mm"),
    ],
)
def test_choices_that_make_no_sense_are_refused(tmp_path, choices, error, message):
    with pytest.raises(error, match=message):
        write_phantom(tmp_path / "p", 0, 1, 7, images=False, **choices)
    assert not (tmp_path / "p").exists()


def test_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="from 0 to 1"):
        write_phantom(tmp_path / "p", 1, 0, 0, images=False, non_square=3)
    with pytest.raises(ValueError, match="cannot be written"):
        write_phantom(tmp_path / "p", 0, 0, 0)
    monkeypatch.setattr(write, "make_study", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_phantom(tmp_path / "p", 1, 0, 0, images=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "p").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        write_phantom(tmp_path / "p", 1, 0, 0, images=False)


def test_headers_are_as_sparse_as_the_real_ones(folder):
    files = sorted((folder / "train_images").rglob("*.dcm"))
    by_study: dict[str, set] = {}
    for file in files[::5]:
        ds = pydicom.dcmread(file)
        assert ds.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless
        assert (ds.BitsAllocated, ds.BitsStored, ds.PixelRepresentation) == (16, 12, 0)
        assert ds.pixel_array.shape == (ds.Rows, ds.Columns)
        assert ds.pixel_array.max() < 4096
        assert len(ds) <= 28
        assert not {"Modality", "SOPClassUID", "RescaleSlope", "Manufacturer", "StudyDate"} & set(ds.dir())
        assert ds.SeriesDescription in ("T1", "T2")
        assert file.stem == str(ds.InstanceNumber)
        assert file.parent.parent.name == ds.StudyInstanceUID
        by_study.setdefault(ds.StudyInstanceUID, set()).add(ds.FrameOfReferenceUID)
    assert all(len(frames) > 1 for frames in by_study.values())


def in_patient(folder: Path) -> pd.DataFrame:
    """Clicked points of the training studies with X, Y, Z."""
    points = pd.read_csv(folder / "train_label_coordinates.csv")
    parts = []
    for (study_id, series_id), rows in points.groupby(["study_id", "series_id"]):
        series = dicom.read_series(folder / "train_images" / str(study_id) / str(series_id), pixels=False)
        places = [series.to_patient(r.instance_number, r.x, r.y) for r in rows.itertuples()]
        parts.append(rows.assign(**dict(zip("XYZ", np.transpose(places), strict=True))))
    return pd.concat(parts)


def test_points_of_a_level_lie_together_and_left_is_left(folder):
    points = in_patient(folder)
    for (study_id, _), rows in points.groupby(["study_id", "level"]):
        assert rows["Z"].max() - rows["Z"].min() < 26, study_id  # the foramen's point lies above the disc's
        canal = rows[rows["condition"] == "Spinal Canal Stenosis"]
        for side, sign in (("Left", 1), ("Right", -1)):
            for _, row in rows[rows["condition"].str.startswith(side)].iterrows():
                if len(canal):
                    assert sign * (row["X"] - canal["X"].iloc[0]) > 0
    for _, rows in points.groupby(["study_id", "condition"]):
        assert rows.sort_values("level")["Z"].is_monotonic_decreasing


def seen_points(folder: Path) -> pd.DataFrame:
    """anatomy.csv by study, series, condition and level."""
    keys = ["study_id", "series_id", "condition", "level"]
    return pd.read_csv(folder / "anatomy.csv", keep_default_na=False).set_index(keys)


def test_anatomy_is_where_readers_click_in_the_same_series(folder):
    clicked, anatomy = in_patient(folder), seen_points(folder)
    names = {c.title: c.name for c in vocabulary.CONDITIONS.values()}
    clicked["condition"] = clicked["condition"].map(names)
    clicked["level"] = clicked["level"].map(dict(zip(vocabulary.LEVEL_NAMES, vocabulary.LEVELS, strict=True)))
    both = clicked.merge(anatomy.reset_index(), on=anatomy.index.names, how="left", suffixes=("", "_true"))
    off = np.linalg.norm(both[[*"XYZ"]].to_numpy() - both[["X_true", "Y_true", "Z_true"]].to_numpy(float), axis=1)
    assert len(off) > 60 and np.isfinite(off).all()  # every point that was clicked is one that the series shows
    assert np.median(off) < 3.5  # 2 mm in the plane, and up to half a step to the slice
    assert off.max() < 13  # a slice beside the nearest, of up to 6 mm, and five deviations in the plane


def test_anatomy_has_sides_levels_and_motion_of_each_series(tables):
    anatomy = seen_points(tables).reset_index()
    places = anatomy.set_index(["study_id", "series_id", "level", "condition"])["X"].unstack()
    for base in (vocabulary.FORAMINAL, vocabulary.SUBARTICULAR):
        assert (places[f"left_{base}"] - places[f"right_{base}"]).dropna().gt(10).all()
    z = anatomy[anatomy["condition"] == vocabulary.SPINAL_CANAL].pivot(index=["series_id"], columns="level", values="Z")
    assert (np.diff(z.dropna()[list(LEVELS)], axis=1) < -15).all()
    of_type = {
        kind: rows.drop_duplicates(["study_id", "condition", "level"]) for kind, rows in anatomy.groupby("series_type")
    }
    both = of_type[T1].merge(of_type[T2], on=["study_id", "condition", "level"])
    moved = np.linalg.norm(both[["X_x", "Y_x", "Z_x"]].to_numpy() - both[["X_y", "Y_y", "Z_y"]].to_numpy(), axis=1)
    assert 0.8 < np.median(moved) < 4 and moved.max() < 15  # two motions of about 1.5 mm each
    assert anatomy.groupby("series_type").size().min() > 0.9 * 240 * len(COLUMNS)


def test_discs_lie_in_front_of_the_canal_at_its_height(tables):
    anatomy = seen_points(tables).xs(vocabulary.SPINAL_CANAL, level="condition")
    both = pd.read_csv(tables / "discs.csv").merge(
        anatomy.reset_index(), on=anatomy.index.names, suffixes=("", "_canal")
    )
    both = both[both["series_type"] == AXIAL]
    way = both[["X_canal", "Y_canal", "Z_canal"]].to_numpy() - both[list("XYZ")].to_numpy()
    normal = both[list(study.NORMAL)].to_numpy()
    assert len(both) > 240 * 4
    assert np.abs(np.linalg.norm(normal, axis=1) - 1).max() < 1e-5 and (normal[:, 2] > 0.5).all()
    assert np.abs((way * normal).sum(axis=1)).max() < 0.01  # the canal's point lies in the disc's plane
    assert ((way[:, 1] > 10) & (way[:, 1] < 35)).all()


def test_marks_lie_beyond_the_graded_levels_in_training_studies_alone(tables):
    marks, anatomy = pd.read_csv(tables / "train_marks.csv"), seen_points(tables).reset_index()
    assert set(marks["study_id"]) == set(pd.read_csv(tables / "train.csv")["study_id"])
    sagittal = marks[marks["series_type"] == T2].pivot(index="study_id", columns="mark", values="Z")
    canal = anatomy[(anatomy["condition"] == vocabulary.SPINAL_CANAL) & (anatomy["series_type"] == T2)]
    canal = canal.pivot(index="study_id", columns="level", values="Z").reindex(sagittal.index)
    columns = [sagittal["t11_t12"], sagittal["t12_l1"], *(canal[k] for k in LEVELS), sagittal["s1_s2"]]
    steps = -np.diff(np.stack([*columns, sagittal["sacrum"]]), axis=0)
    assert np.nanmin(steps) > 4 and np.nanmax(steps) < 60
    assert sagittal.drop(columns="transitional").notna().all(axis=None)  # whether the image shows them or not
    assert 0.05 < sagittal["transitional"].notna().mean() < 0.3


def test_spines_tell_who_is_not_ordinary(tables):
    spines = pd.read_csv(tables / "spines.csv")
    assert len(spines) == spines["study_id"].nunique() == 240
    assert (spines["ordinary"] == (~spines["transitional"] & (spines["slip_mm"] == 0))).all()
    assert (spines["slip_level"].notna() == (spines["slip_mm"] != 0)).all()
    assert 0.7 < spines["ordinary"].mean() < 0.9  # 12 % slips, 8 % transitional vertebrae
    assert 0.25 < spines["stir"].mean() < 0.55 and 0.1 < spines["tilted_blocks"].mean() < 0.4


def test_clicks_err_as_readers_do(tables):
    points = pd.read_csv(tables / "train_label_coordinates.csv")
    recess = points[points["condition"].str.contains("Subarticular")]
    pairs = recess.pivot_table(index=["study_id", "series_id", "level"], columns="condition", values="instance_number")
    pairs = pairs.dropna()
    differ = (pairs.iloc[:, 0] != pairs.iloc[:, 1]).mean()
    assert 0.36 < differ < 0.5  # 43 % in the real data
    left, right = (recess[recess["condition"].str.startswith(side)] for side in ("Left", "Right"))
    both = left.merge(right, on=["study_id", "series_id", "level"])
    assert (both["x_x"] > both["x_y"]).mean() > 0.98  # but for sides that changed places


def test_dirt_occurs_at_its_rate(tables):
    series = pd.read_csv(tables / "train_series_descriptions.csv")
    axial = series[series["series_description"] == AXIAL].groupby("study_id").size()
    assert 0.1 < (axial > 1).mean() < 0.26  # real: 335 of 1975
    train = pd.read_csv(tables / "train.csv")
    missing = train["left_subarticular_stenosis_l1_l2"].isna()
    assert 0.03 < missing.mean() < 0.15  # real: 164 of 1975
    assert train.loc[missing, "right_subarticular_stenosis_l1_l2"].isna().mean() > 0.9  # some are lost one by one
    assert train.filter(like="subarticular").isna().to_numpy()[:, [2, 3, 4]].mean() < 0.01


def test_dirt_can_be_switched_off_or_forced(tmp_path):
    clean = write_phantom(tmp_path / "clean", 12, 0, 4, images=False, **CLEAN)
    assert not pd.read_csv(clean / "train.csv").isna().any().any()
    points = pd.read_csv(clean / "train_label_coordinates.csv")
    assert len(points) == 12 * len(COLUMNS)
    assert list(pd.read_csv(clean / "train_series_descriptions.csv")["series_description"]) == [T1, T2, AXIAL] * 12
    foramen = points[points["condition"].str.contains("Foraminal")].copy()
    foramen["left"] = foramen["condition"].str.startswith("Left")
    number = foramen.groupby(["study_id", "left"])["instance_number"].mean().unstack()
    assert (number[True] > number[False]).all()  # not reversed: from right to left
    bad = write_phantom(
        tmp_path / "bad", 12, 0, 4, images=False, **CLEAN | {"series_missing": 1, "point_missing": 1, "far_numbers": 1}
    )
    assert (pd.read_csv(bad / "train_series_descriptions.csv").groupby("study_id").size() == 2).all()
    points = pd.read_csv(bad / "train_label_coordinates.csv")
    assert not points["condition"].str.startswith("Spinal").any()
    assert points["instance_number"].min() >= 100
    train = pd.read_csv(bad / "train.csv")
    assert train.filter(like="subarticular").notna().all().all()


def test_wrong_labels_are_planted_in_training_alone_and_told(tmp_path):
    right, wrong = (
        write_phantom(tmp_path / name, 60, 30, 4, images=False, **CLEAN | {"label_wrong": share})
        for name, share in (("right", 0.0), ("wrong", 0.1))
    )
    assert pd.read_csv(right / "wrong_labels.csv").empty
    told = pd.read_csv(wrong / "wrong_labels.csv").set_index("row_id")
    assert 0.08 < len(told) / (60 * len(COLUMNS)) < 0.12 and (told["severity"] != told["meant"]).all()
    words = {name: k for k, name in enumerate(vocabulary.SEVERITY_NAMES)}
    before, after = (
        pd.read_csv(root / "train.csv").set_index("study_id").stack().map(words) for root in (right, wrong)
    )
    before.index = after.index = [f"{study}_{column}" for study, column in after.index]
    changed = before != after
    assert set(before.index[changed]) == set(told.index)
    assert before[changed].equals(told["meant"].loc[before.index[changed]].rename(None))
    for name in ("train_label_coordinates.csv", "solution.csv", "oracle.csv", "latents.csv"):
        assert (right / name).read_bytes() == (wrong / name).read_bytes()


def test_missing_labels_do_not_depend_on_the_grade(tmp_path):
    root = write_phantom(tmp_path / "p", 250, 0, 11, workers=2, images=False, short_stack=0.5)
    latents = pd.read_csv(root / "latents.csv")
    narrowing = latents.loc[latents["row_id"].str.endswith("left_subarticular_stenosis_l1_l2"), "narrowing"].to_numpy()
    missing = pd.read_csv(root / "train.csv")["left_subarticular_stenosis_l1_l2"].isna().to_numpy()
    assert abs(spearmanr(narrowing, missing).statistic) < 0.19  # 3 standard errors


def test_points_lie_in_the_image_where_real_ones_do_and_more_widely():
    rng, places = np.random.default_rng(0), {}
    for _ in range(150):
        body = Body.draw(rng, np.full(len(COLUMNS), 0.2))
        acquisitions = {group: plan_series(rng, body, g.series_type) for group, g in vocabulary.GROUPS.items()}
        points = {group: acquisition.to_scanner(body.points()) for group, acquisition in acquisitions.items()}
        for column, (condition, level) in enumerate(study.COLUMN_KEYS):
            group = vocabulary.CONDITIONS[condition].group
            acquisition = acquisitions[group]
            x, y, away = geometry.to_pixels(acquisition.affines, points[group][column]).T
            k = np.argmin(np.abs(away))
            name = f"{vocabulary.CONDITIONS[condition].title}|{LEVEL_NAMES[LEVELS.index(level)]}"
            places.setdefault(name, []).append((x[k] / acquisition.cols, y[k] / acquisition.rows))
    facts = labels.real_facts()["label_point_position_mean_sd"]
    assert set(facts) == set(places)
    for name, real in facts.items():
        for axis, (mean, sd) in enumerate((real["x_over_width"], real["y_over_height"])):
            drawn = np.array(places[name])[:, axis]
            assert abs(drawn.mean() - mean) < 0.1, name
            assert 1 < drawn.std() / sd < 2.3, name


def study_features(folder: Path, study_id: int, series: pd.DataFrame) -> dict[str, float]:
    """What a study shows without its anatomy: counts, sizes, headers, file sizes and intensities of whole series."""
    out: dict[str, float] = {}
    for series_type, rows in series.groupby("series_description"):
        files = sorted((folder / "train_images" / str(study_id) / str(rows["series_id"].iloc[0])).glob("*.dcm"))
        heads = [pydicom.dcmread(file) for file in files[:: max(1, len(files) // 6)]]
        first, last = heads[0], heads[-1]
        pixels = np.concatenate([ds.pixel_array[::3, ::3].ravel() for ds in heads])
        numbers, sizes = [int(file.stem) for file in files], [file.stat().st_size for file in files]
        told = [len(rows), len(files), min(numbers), max(numbers), np.mean(sizes), np.std(sizes)]
        told += [first.Rows, first.Columns, *first.PixelSpacing, first.SliceThickness, first.SpacingBetweenSlices]
        told += [*first.ImagePositionPatient, *last.ImagePositionPatient, *first.ImageOrientationPatient]
        told += [first.WindowCenter, first.WindowWidth, pixels.mean(), pixels.std()]
        told += [*np.percentile(pixels, [1, 25, 50, 75, 99])]
        out |= {f"{series_type} {k}": float(value) for k, value in enumerate(told)}
    return out


def boosted(features: np.ndarray, truth: np.ndarray, folds: int = 5) -> np.ndarray:
    """Out-of-fold natural probabilities (n, 25, 3): boosting corrects the column's prior, told study and column."""
    n, m = truth.shape
    x = np.column_stack([np.repeat(features, m, axis=0), np.tile(np.arange(m), n)])
    y, study_of = truth.ravel(), np.repeat(np.arange(n), m)
    out = np.zeros((n * m, 3))
    for train, test in GroupKFold(folds).split(x, y, study_of):
        train = train[y[train] != MISSING]
        model = HistGradientBoostingClassifier(
            learning_rate=0.05,
            max_iter=60,
            max_leaf_nodes=6,
            min_samples_leaf=500,
            l2_regularization=100,
            max_features=0.3,
        )
        out[test] = model.fit(x[train], y[train]).predict_proba(x[test])
    return out.reshape(n, m, 3)


def gain_over_prior(features: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Bootstrap interval [low, high] of the total score won over the prior, both out of fold and paired by study."""
    n = len(truth)
    rows = pd.DataFrame({"row_id": [f"{i}_{c}" for i in range(n) for c in COLUMNS], "severity": truth.ravel()})
    solution = rows[rows["severity"] != MISSING]
    column_only = boosted(np.zeros((n, 1)), truth)
    losses = []
    for natural in (column_only, boosted(features, truth)):
        table = rows[["row_id"]].assign(**dict(zip(SEVERITIES, natural.reshape(-1, 3).T, strict=True)))
        losses.append(metric.study_losses(solution, metric.weight_table(table)))
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    won = losses[0].resampled(counts)[:, -1] - losses[1].resampled(counts)[:, -1]
    return np.nanquantile(won, [0.025, 0.975])


@pytest.mark.slow
def test_nothing_but_the_anatomy_betrays_a_label(tmp_path):
    root = write_phantom(tmp_path / "p", 240, 0, 21, workers=2)
    train = pd.read_csv(root / "train.csv").set_index("study_id")
    series = pd.read_csv(root / "train_series_descriptions.csv")
    table = pd.DataFrame(
        [study_features(root, study_id, series[series["study_id"] == study_id]) for study_id in train.index]
    )
    words = {name: k for k, name in enumerate(vocabulary.SEVERITY_NAMES)}
    truth = train[list(COLUMNS)].apply(lambda c: c.map(words)).fillna(MISSING).astype(int).to_numpy()
    low, high = gain_over_prior(table.to_numpy(), truth)
    print(f"headers and intensities win {low:.3f} to {high:.3f} over the prior")
    assert low < 0
    severe = (truth == 2).sum(axis=1)[:, None]  # a control: had something leaked, the test would see it
    leak = severe + np.random.default_rng(1).normal(0, 2, severe.shape)
    assert gain_over_prior(np.hstack([table.to_numpy(), leak]), truth)[0] > 0


@pytest.mark.slow
def test_tables_of_the_real_size_in_seconds(tmp_path):
    root = write_phantom(tmp_path / "p", 1975, 0, 1, workers=2, images=False)
    train = pd.read_csv(root / "train.csv")
    assert len(train) == 1975
    missing = train.isna().mean()[list(COLUMNS)].to_numpy()
    facts = labels.real_facts()
    real = np.array([facts["label_counts"][column][3] for column in COLUMNS]) / facts["studies"]
    assert np.abs(missing - real).max() < 0.03
    assert LEVELS[0] in train.columns[-5]
