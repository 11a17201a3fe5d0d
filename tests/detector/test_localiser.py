"""The localiser: coarse slices, what it learns from, detections in patient space, and its weights."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from spines import AXIAL_PLANE, SAGITTAL, make_affines, make_stack

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector import localiser
from lsdc_utils.detector.classes import DetectorError
from lsdc_utils.detector.localiser import MAPS, SPACING, STRIDE, Localiser, LocaliserConfig, Sample
from lsdc_utils.detector.spine import canal_points, find_discs
from lsdc_utils.vocabulary import AXIAL, LEVELS, T1, T2

CENTRE = np.array([4.0, 25.0, 0.0])  # mm, of the series
MARKS = {"t11_t12": 98.0, "t12_l1": 66.0, "s1_s2": -128.0, "sacrum": -152.0, "conus": 50.0}  # mm of height
MARKS["transitional"] = -96.0  # at L5/S1
POINTS = {level: np.array([4.0, 22.3 + 2 * k, 36.4 - 33.1 * k]) for k, level in enumerate(LEVELS)}


def canal(levels=LEVELS) -> pd.DataFrame:
    return pd.DataFrame([(level, *POINTS[level]) for level in levels], columns=["level", *"XYZ"])


def marks(*names: str) -> pd.DataFrame:
    return pd.DataFrame([(name, 4.0, 25.0, MARKS[name]) for name in names], columns=["mark", *"XYZ"])


def balls(points: np.ndarray) -> np.ndarray:
    """Grey of a bright bar through each disc along x, as a series of sagittal slices shows it."""
    return sum(250 * np.exp(-0.5 * ((points[..., 1:] - at[1:]) ** 2).sum(axis=-1) / 4.5**2) for at in POINTS.values())


def stack(size=(170, 130), pixel=(2.0, 2.0), slices=11, series_type=T2, plane=SAGITTAL) -> Stack:
    """A sagittal series; pixel: mm down and across."""
    affines = make_affines(slices, 1.0, 4.0, centre=(0, 0, 0), size=size, **plane)
    affines[:, :3, :2] *= pixel[::-1]
    middle = affines[:, :3, :2] @ (np.array(size[::-1]) - 1) / 2
    off = 4.0 * (np.arange(slices) - (slices - 1) / 2)
    affines[:, :3, 3] = CENTRE - [0, 0, 45] - middle - off[:, None] * affines[:, :3, 2]
    return make_stack(balls, affines, size, series_type)


def middle_of(image: np.ndarray, near: np.ndarray, reach: float) -> np.ndarray:
    """Column and row of what is bright within `reach` pixels of a place (column, row)."""
    row, column = np.indices(image.shape)
    weight = image * (np.hypot(column - near[0], row - near[1]) <= reach)
    return np.array([(weight * column).sum(), (weight * row).sum()]) / weight.sum()


@pytest.mark.parametrize(
    ("size", "pixel"),
    [((340, 260), (1.0, 1.0)), ((512, 400), (0.6, 0.9)), ((150, 130), (2.3, 2.0)), ((130, 70), (2.6, 3.4))],
    ids=["square", "not square", "almost", "enlarged"],
)
def test_a_coarse_slice_shows_each_place_where_its_affine_says(size, pixel):
    seen = stack(size, pixel, slices=3)
    images, affines = localiser.coarse(seen)
    assert images.dtype == np.uint8
    used = np.array(size) * pixel / SPACING
    assert np.abs(images.shape[1:] - used).max() <= 0.5
    np.testing.assert_allclose(geometry.spacing(affines), SPACING, rtol=0.01)
    for point in POINTS.values():
        at = geometry.to_pixels(affines[1], point)[:2]
        off = (middle_of(images[1], at, 7) - at) * SPACING
        assert np.abs(off).max() < 0.4, off
    corner = geometry.to_patient(affines[0], np.array([-0.5, -0.5]))
    np.testing.assert_allclose(corner, geometry.to_patient(seen.affines[0], np.array([-0.5, -0.5])))


def test_samples_are_the_slices_that_show_the_spine_with_points_in_their_pixels():
    seen = stack()  # slices from 20 mm to the right to 20 mm to the left of the canal
    wide = list(localiser.samples(stack(slices=19), canal(), marks()))
    assert len(wide) == 13  # up to 24 mm to either side
    images, affines = localiser.coarse(seen)
    every = list(localiser.samples(seen, canal(), marks("s1_s2", "sacrum", "t12_l1", "transitional", "conus")))
    assert len(every) == len(images)
    names = ["t12_l1", *POINTS, "s1_s2", "sacrum"]
    behind = np.array(
        [[4, 25, MARKS["t12_l1"]], *POINTS.values(), *([4, 25, MARKS[name]] for name in names[-2:])], float
    )
    within = localiser.disc_places(behind, names)
    truth = {"disc": within[:6], "l5_s1": within[5], "s1_s2": within[6], "sacrum": within[7]}
    truth["transitional"], tip = within[5], np.array([[4, 25, MARKS["conus"]]])
    for k, sample in enumerate(every):
        np.testing.assert_array_equal(sample.image, images[k])
        off = abs(affines[k, 0, 3] - 4)
        for number, name in enumerate(MAPS):
            in_canal = {"canal": behind[: 6 * (off < 5)], "conus": tip[: int(off < 5)]}
            expected = in_canal[name] if name in in_canal else truth[name].reshape(-1, 3)
            back = geometry.to_patient(affines[k], sample.points[sample.maps == number])
            np.testing.assert_allclose(back[:, 1:], expected[:, 1:], atol=1e-6)
        assert sample.known.tolist() == [True] * 5 + [not 5 < off < 9] * 2


def test_what_has_no_label_or_mark_is_not_known():
    known = {name: k for k, name in enumerate(MAPS)}
    for levels, names, missing in (
        (LEVELS, ("s1_s2", "sacrum", "conus"), set()),
        (LEVELS, (), {"s1_s2", "sacrum", "transitional", "conus"}),
        (LEVELS[:4], ("s1_s2",), {"l5_s1", "sacrum", "conus"}),
    ):
        sample = next(localiser.samples(stack(slices=1), canal(levels), marks(*names)))
        assert {name for name in MAPS if not sample.known[known[name]]} == missing


@pytest.mark.parametrize(
    ("levels", "names", "weights"),
    [  # heights, mm: rows that must and rows that must not count
        (LEVELS, (), {100: 0, 66: 0, 56: 0, 46: 1, 0: 1, -96: 1, -150: 1}),
        (LEVELS, ("t12_l1",), {110: 0, 98: 0, 66: 1, 0: 1, -150: 1}),
        (LEVELS, ("t12_l1", "t11_t12"), {108: 1, 66: 1, 0: 1, -150: 1}),
        (LEVELS[:4], (), {66: 0, 0: 1, -63: 1, -75: 1, -85: 0, -96: 0, -150: 0}),
        ([level for level in LEVELS if level != "l3_l4"], (), {3: 1, -20: 0, -30: 0, -40: 0, -63: 1, -150: 1}),
    ],
    ids=["above L1/L2", "above T12/L1", "with marks", "below L4/L5", "L3/L4"],
)
def test_rows_of_unknown_discs_carry_no_weight(levels, names, weights, monkeypatch):
    monkeypatch.setattr(localiser, "SIDE", 2 * localiser.SIDE)
    seen = stack()
    sample = next(localiser.samples(stack(slices=1), canal(levels), marks(*names)))
    _, affines = localiser.coarse(seen)
    for height, weight in weights.items():
        row = round(geometry.to_pixels(affines[0], np.array([4.0, 25.0, height]))[1])
        assert sample.rows[row] == weight, height
    _, _, drawn = localiser.augmented(sample, np.random.default_rng(0))
    discs, behind = drawn[MAPS.index("disc")], drawn[MAPS.index("canal")]
    assert discs.min() == 0 and discs.max() == 1 and np.array_equal(behind, discs)  # no point, no canal that is known
    assert not drawn[1 : MAPS.index("canal")].reshape(len(MAPS) - 2, -1).std(axis=1).any()  # whole maps or none


def test_maps_of_an_augmented_slice_lie_on_the_discs_that_it_shows(monkeypatch):
    """The canal is bright in this series: in any frame the image is bright where its map has a target, within 3 mm."""
    monkeypatch.setattr(localiser, "_recoloured", lambda image, rng: image)
    sample = next(localiser.samples(stack(size=(340, 260), pixel=(1.0, 1.0), slices=1), canal(), marks()))
    judged = 0
    for seed in range(20):
        image, target, weight = localiser.augmented(sample, np.random.default_rng(seed))
        assert image.shape == (localiser.SIDE, localiser.SIDE)
        assert target.shape == weight.shape == (len(MAPS), *(side // STRIDE for side in image.shape))
        canals = target[MAPS.index("canal")]
        for y, x in np.argwhere(canals > 0.8):
            at = middle_of(canals, (x, y), 2) * STRIDE + 0.5
            inside = (at > 8).all() and (at < localiser.SIDE - 9).all() and image[tuple(at.astype(int)[::-1])] > 0
            if inside and canals[y, x] == canals[y - 1 : y + 2, x - 1 : x + 2].max():
                assert np.abs(middle_of(image.astype(float), at, 5) - at).max() * SPACING < 3
                judged += 1
        assert (target[1] <= target[0] + 1e-6).all()  # L5/S1 is a disc
    assert judged > 60


def test_a_seed_gives_one_frame_and_greys_and_another_seed_others():
    sample = next(localiser.samples(stack(slices=1), canal(), marks()))
    first, again, other = (localiser.augmented(sample, np.random.default_rng(seed)) for seed in (3, 3, 4))
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
        assert one.dtype == np.float32
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])
    assert first[0].min() >= 0 and first[0].max() <= 1.5


def test_the_loss_counts_errors_only_where_something_is_known():
    target = torch.zeros(1, len(MAPS), 4, 4)
    target[0, 0, 1, 1] = 1
    good, weight = target * 16 - 8, torch.ones_like(target)
    bad = good.clone()
    bad[0, 0, 3, 3] = 8
    assert localiser.loss(good, target, weight) < 1e-3 < 1 < localiser.loss(bad, target, weight)
    weight[0, 0, 3, 3] = 0
    assert localiser.loss(bad, target, weight) < 1e-3


# ---- detections ------------------------------------------------------------------------------------------------------


class Known(torch.nn.Module):
    """A network whose maps are known: a spot at each place (map -> LPS points) in the slices of a series."""

    def __init__(self, seen: Stack, places: dict[str, list], height: float = 0.9) -> None:
        super().__init__()
        self.unused, self.trained = torch.nn.Parameter(torch.zeros(1)), (True,) * len(MAPS)
        images, affines = localiser.coarse(seen)
        rows, cols = (np.arange(side // STRIDE) * STRIDE + (STRIDE - 1) / 2 for side in images.shape[1:])
        maps = np.full((len(images), len(MAPS), len(rows), len(cols)), 1e-4)
        for name, points in places.items():
            for k, point in ((k, point) for k in range(len(images)) for point in points):
                x, y, _ = geometry.to_pixels(affines[k], np.asarray(point, float))
                apart = np.hypot(cols - x, rows[:, None] - y) / STRIDE
                own = height * np.exp(-0.5 * (apart / localiser.SPREAD) ** 2)
                maps[k, MAPS.index(name)] = np.maximum(maps[k, MAPS.index(name)], own)
        self.maps = torch.from_numpy(maps).logit()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1] == 1 and images.min() >= 0 and images.max() <= 1
        return self.maps


@pytest.mark.parametrize(
    ("size", "pixel"), [((170, 130), (2.0, 2.0)), ((400, 420), (0.85, 0.6))], ids=["square", "not square"]
)
@pytest.mark.parametrize("shift", [0.0, 0.9, 1.7, 2.6, 3.5])
def test_a_peak_of_a_map_is_a_detection_within_a_millimetre(size, pixel, shift):
    seen = stack(size, pixel, slices=5)
    discs = [point + np.array([0, shift, -0.7 * shift]) for point in POINTS.values()]
    s1_s2 = [[4, 25 + shift, -128]]
    points, scores = localiser.detect_discs(Known(seen, {"disc": discs, "l5_s1": discs[-1:], "s1_s2": s1_s2}), seen)
    assert points.shape[:2] == scores.shape[:2] and scores.shape[2] == len(MAPS)
    for k, affine in enumerate(seen.affines):
        strong = points[k][scores[k].max(axis=1) > 0.5]
        assert len(strong) == 6 and np.allclose(strong[:, 0], affine[0, 3])
        for name, truth in (("disc", discs), ("l5_s1", discs[-1:]), ("s1_s2", s1_s2)):
            found = points[k][scores[k, :, MAPS.index(name)] > 0.5]
            apart = np.linalg.norm(found[:, None, 1:] - np.array(truth)[:, 1:], axis=2)
            assert apart.shape == (len(truth), len(truth)) and apart.min(axis=0).max() < 1


def test_discs_of_a_study_come_from_its_sagittal_series_alone():
    first, axial = stack(slices=5), stack(slices=7, series_type=AXIAL, plane=AXIAL_PLANE)
    middles = localiser.disc_places(np.array(list(POINTS.values())), LEVELS)
    network = Known(first, {"disc": middles, "l5_s1": middles[4:], "canal": list(POINTS.values())})
    found = find_discs(network, [first, axial, replace(first, series_type=T1)])
    assert found.slices == 10 and len(found.points) == 2 * 5 * 10
    assert found.on_t2.tolist() == [True] * 50 + [False] * 50
    points = canal_points([found], 7)
    assert points["level"].tolist() == list(LEVELS)
    assert np.linalg.norm(points[[*"XYZ"]].to_numpy() - list(POINTS.values()), axis=1).max() < 1


def test_a_study_without_sagittal_series_and_a_blank_one_have_no_discs():
    axial, blank = stack(slices=7, series_type=AXIAL, plane=AXIAL_PLANE), stack(slices=2)
    for found in (find_discs(Known(blank, {}), some) for some in ([], [axial], [blank])):
        assert found.points.shape == (0, 3) and found.scores.shape == (0, len(MAPS)) and found.on_t2.shape == (0,)
        assert canal_points([found], 7).empty


def test_maps_are_half_as_large_as_images_of_any_shape():
    network = Localiser(LocaliserConfig((4, 4, 6, 8))).eval()
    for height, width in ((160, 160), (16, 48), (208, 96)):
        assert network(torch.zeros(2, 1, height, width)).shape == (2, len(MAPS), height // STRIDE, width // STRIDE)


def test_weights_come_back_as_they_were_saved_and_only_with_their_own_description(tmp_path):
    torch.manual_seed(0)
    network, path = Localiser(LocaliserConfig((4, 4, 6, 8))).eval(), tmp_path / "localiser_fold1.safetensors"
    network.calibration = (2.0, 0.95)
    localiser.save_localiser(network, path, 1, {"training": {"batches": 3}})
    loaded = localiser.load_localiser(path)
    assert loaded.config == network.config and loaded.calibration == (2.0, 0.95) and not loaded.training
    for name, value in network.state_dict().items():
        assert loaded.state_dict()[name].cpu().equal(value), name
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["fold"], about["training"]) == (1, {"batches": 3})
    path.with_suffix(".json").write_text(json.dumps(about | {"maps": ["disc"]}))
    with pytest.raises(DetectorError, match="finds other marks"):
        localiser.load_localiser(path)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="sha256 differs"):
        localiser.load_localiser(path)


def test_a_sample_beyond_the_frame_leaves_the_map_empty():
    """Discs that a shift puts outside the image have no target, and no error."""
    points = np.array([[80.0, 80.0], [80.0, 900.0]])
    sample = Sample(
        np.zeros((960, 160), np.uint8), points, np.array([0, 1]), np.full(len(MAPS), True), np.full(960, True)
    )
    _, target, weight = localiser.augmented(sample, np.random.default_rng(0))
    assert target[0].max() > 0.8 and target[1].max() == 0 and weight[1].min() == 1


@pytest.mark.parametrize("names", [LEVELS, ("t12_l1", *LEVELS, "s1_s2")])
def test_the_middle_of_a_disc_lies_in_front_of_its_canal_at_right_angles_and_the_way_back_is_the_same(names):
    bow = np.linspace(-0.4, 0.5, len(names))
    curve = np.column_stack([np.full(len(names), 3.0), 20 + 60 * bow**2, 80 - 34.0 * np.arange(len(names))])
    middles = localiser.disc_places(curve, names)
    way, along = middles - curve, np.gradient(curve, axis=0)
    depth = [localiser.DISC_DEPTH["s1_s2" if name == "s1_s2" else ""] for name in names]
    np.testing.assert_allclose(np.linalg.norm(way, axis=1), depth)
    np.testing.assert_allclose((way * along).sum(axis=1), 0, atol=1e-9)
    assert (way[:, 1] < 0).all() and (way[:, 0] == 0).all()
    assert np.linalg.norm(localiser.disc_places(middles, names, 1.0) - curve, axis=1).max() < 6
    assert localiser.disc_places(curve[:1], names[:1])[0] == pytest.approx(curve[0] - [0, depth[0], 0])


def test_what_a_frame_does_not_show_has_no_target(monkeypatch):
    monkeypatch.setattr(localiser, "_recoloured", lambda image, rng: image)
    sample = next(localiser.samples(stack(slices=1), canal(), marks("s1_s2", "sacrum")))
    sample = replace(sample, image=np.full_like(sample.image, 200))
    shown = 0
    for seed in range(30):
        image, target, _ = localiser.augmented(sample, np.random.default_rng(seed))
        for _, y, x in np.argwhere(target > 0.9):
            around = image[max(2 * y - 3, 0) : 2 * y + 5, max(2 * x - 3, 0) : 2 * x + 5]
            assert around.max() == 200, "a target lies where the frame shows nothing"
            shown += 1
    assert shown > 100
