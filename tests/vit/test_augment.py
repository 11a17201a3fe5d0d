"""Each kind of augmentation does what it says and no more, and what is off computes and draws nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from vit_inputs import SMALL, draw_inputs, draw_studies, train

from lsdc_utils.vit.augment import Augmentation, augment, check_margin, disturb, mixed
from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.inputs import cut_views
from lsdc_utils.vit.loss import row_losses, row_weights, target_grades, target_matrix
from lsdc_utils.vit.model import Vit3d
from lsdc_utils.vocabulary import AXIAL, COLUMNS, LEVELS, T1

STILL = Augmentation(jitter=((0, 0, 0),) * len(SLOTS), rotation=0, scale=0, intensity=0, drop_series=0, recombine=0)
STRONG = Augmentation(rotation=0.2094, scale=0.09, cut_off=2.5, warp=0.5, blur=1.0, noise=0.05, holes=0.3, mixup=0.4)
WIDE = replace(SMALL, size=16, margin=16, spacing=(1.0, 1.0, 1.0))
LOSS = "    return row_losses(log_natural.float(), weight).sum()"
PLAIN = """    label, known = torch.from_numpy(target).max(dim=-1)[::-1]
    losses = -(log_natural.float() + torch.tensor([1.0, 2.0, 4.0]).log()).log_softmax(dim=-1)
    return (losses.gather(-1, label[..., None])[..., 0] * weight.sum(dim=-1)).sum()"""


def pattern(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Grey values at places in pixels from the middle: smooth, and without any symmetry."""
    blob = 120 * np.exp(-((x - 3) ** 2 + (y + 2) ** 2) / 40) + 60 * np.exp(-((x + 5) ** 2 + (y - 4) ** 2) / 25)
    return 30 + blob + x + 0.5 * y


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of a square's pixels, from its middle."""
    rows, cols = np.indices((size, size)) - (size - 1) / 2
    return cols, rows


def patterned() -> np.ndarray:
    inputs = draw_inputs(1, np.random.default_rng(0), WIDE)
    inputs["images"][:] = np.rint(pattern(*grid(WIDE.size + 2 * WIDE.margin)))
    return inputs


@pytest.mark.parametrize(("degrees", "size"), [(30, 1.0), (-30, 1.25), (0, 0.8), (90, 1.0)])
def test_a_turned_and_resized_square_equals_the_turned_pattern(degrees, size):
    turns = np.broadcast_to((np.radians(degrees), size), (1, 5, len(SLOTS), 2))
    images, places = cut_views(patterned(), WIDE, np.zeros((1, 5, len(SLOTS), 3)), turns)
    (x, y), angle = grid(WIDE.size), np.radians(degrees)
    expected = pattern(size * (np.cos(angle) * x - np.sin(angle) * y), size * (np.sin(angle) * x + np.cos(angle) * y))
    np.testing.assert_allclose(
        images.numpy(), np.broadcast_to(expected, images.shape), atol=2
    )  # of bilinear interpolation
    np.testing.assert_array_equal(places.numpy(), patterned()["places"])


def test_a_warp_moves_points_as_its_grid_says():
    warps = np.zeros((1, 5, len(SLOTS), 2, 4, 4))
    warps[..., 0, :, :], warps[..., 1, :, :] = 1.5, -2.0  # the same everywhere: a shift
    warps[:, 0] *= np.linspace(0, 1, 4)  # at one level growing to the right
    images, _ = cut_views(patterned(), WIDE, np.zeros((1, 5, len(SLOTS), 3)), warps=warps)
    x, y = grid(WIDE.size)
    np.testing.assert_allclose(images[0, 1, 0].numpy(), pattern(x + 1.5, y - 2), atol=2)  # of bilinear interpolation
    share = (x - x.min()) / np.ptp(x)
    np.testing.assert_allclose(images[0, 0, 0].numpy(), pattern(x + 1.5 * share, y - 2 * share), atol=4)
    np.testing.assert_allclose(images[0, 0, 0][:, 0].numpy(), pattern(x, y)[:, 0], atol=2)  # of bilinear interpolation


def test_turns_that_reach_beyond_the_margin_are_an_error():
    strength = Augmentation(rotation=0.2094, scale=0.09, cut_off=2.5)
    config = replace(SMALL, size=128, margin=46)
    check_margin(config, strength)
    with pytest.raises(ValueError, match=r"margin is 45 pixels and turns of 30 degrees and sizes of 25% .* set 46"):
        check_margin(replace(config, margin=45), strength)
    with pytest.raises(ValueError, match="set 50"):
        check_margin(config, replace(strength, warp=1.5))
    check_margin(replace(config, margin=0), Augmentation())
    angles = strength.bounded(np.random.default_rng(0), strength.rotation, (2000,))
    assert np.degrees(np.abs(angles).max()) == pytest.approx(30, abs=0.01)


def squares(slices: int = 2, size: int = 16) -> torch.Tensor:
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.uniform(20, 200, (5, len(SLOTS) * slices, size, size))).float()


def test_a_hole_touches_its_rectangle_only_and_is_the_mean():
    before, after = squares(), squares()
    disturb(after, replace(STILL, holes=0.5), SMALL.slots, np.random.default_rng(0))
    painted = 0
    for level, slot in np.ndindex(5, len(SLOTS)):
        pair = slice(2 * slot, 2 * slot + 2)
        changed = (before[level, pair] != after[level, pair]).numpy()
        if not changed.any():
            continue
        painted += 1
        (rows,), (cols,) = np.nonzero(changed[0].any(axis=1)), np.nonzero(changed[0].any(axis=0))
        assert changed[:, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()  # the same one in all slices
        assert (
            changed[0].sum()
            == len(rows) * len(cols)
            == np.ptp([rows[0], rows[-1] + 1]) * np.ptp([cols[0], cols[-1] + 1])
        )
        assert 2 <= len(rows) <= 8 and 2 <= len(cols) <= 8
        mean = before[level, pair].mean(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(after[level, pair][changed], mean.expand(-1, 16, 16)[changed])
    assert 6 <= painted <= 19  # half of 25


@pytest.mark.parametrize("kind", [{"blur": 1.5}, {"noise": 0.1}])
def test_blur_and_noise_keep_the_mean(kind):
    before, after = squares(), squares()
    disturb(after, replace(STILL, **kind), SMALL.slots, np.random.default_rng(0))
    assert not torch.equal(before, after)
    assert after.mean() == pytest.approx(before.mean(), abs=0.5)
    spread = (
        (after - after.mean(dim=(2, 3), keepdim=True)).std(),
        (before - before.mean(dim=(2, 3), keepdim=True)).std(),
    )
    assert spread[0] < spread[1] if "blur" in kind else spread[1] < spread[0] < spread[1] + 26
    flat = torch.full((5, len(SLOTS) * 2, 16, 16), 77.0)
    disturb(flat, replace(STILL, blur=1.5), SMALL.slots, np.random.default_rng(0))
    torch.testing.assert_close(flat, torch.full_like(flat, 77.0), atol=1e-3, rtol=0)


def seen_and_targets(n: int = 3):
    inputs, labels = draw_studies(n, seed=3)
    labels[0, :6], labels[1, :6] = [0, 0, 1, 2, -1, -1], [1, 2, 1, 1, 2, -1]
    places = torch.from_numpy(inputs["places"].copy())
    places[0, 0, 0] = places[1, 0, 1] = torch.nan
    return (torch.from_numpy(inputs["images"]).float(), places), target_matrix(labels)


def test_a_row_is_not_taught_another_study_s_label_beside_its_own_t2():
    """The right half of a level is another study's; where its series is then left out, T2 would answer for it."""
    inputs, labels = draw_studies(6, seed=3)
    targets, rngs = target_matrix(np.where(labels < 0, 1, labels)), [np.random.default_rng(k) for k in range(6)]
    dropping = replace(STILL, recombine=0.5, drop_series=0.5)
    (_, places), taught = augment(inputs, targets, SMALL, dropping, rngs)
    exchanged = taught != targets
    for condition, kind in (("right_neural_foraminal_narrowing", T1), ("right_subarticular_stenosis", AXIAL)):
        columns = [COLUMNS.index(f"{condition}_{level}") for level in LEVELS]
        own = SMALL.slots == SLOTS.index((kind, "right"))
        gone = places[..., own].isnan().all(dim=-1).numpy()
        lost = taught[:, columns].sum(axis=-1) == 0
        assert lost.any() and not lost[~gone].any() and (gone & ~lost).any()  # those that were not exchanged stay
        np.testing.assert_array_equal(exchanged[:, columns].any(-1) & gone, lost)
    left = [k for k, column in enumerate(COLUMNS) if column.startswith("left")]
    np.testing.assert_array_equal(taught[:, left], targets[:, left])


def test_mixup_at_1_changes_nothing():
    seen, targets = seen_and_targets()
    after, same = mixed(seen, targets, np.ones(3), ordered=True)
    assert torch.equal(after[0], seen[0]) and torch.equal(after[1].nan_to_num(-99), seen[1].nan_to_num(-99))
    np.testing.assert_array_equal(same, targets)


def test_mixup_adds_the_losses_of_both_labels_each_with_its_own_weight():
    seen, targets = seen_and_targets()
    (images, places), both = mixed(seen, targets, np.array([0.75, 1.0, 1.0]), ordered=True)
    expected = [[0.75, 0.25, 0], [0, 0, 0], [0, 1, 0], [0, 0.25, 0.75], [0, 0, 0.25], [0, 0, 0]]  # 0 with 2: no label
    np.testing.assert_allclose(both[0, :6], expected)
    apart = mixed(seen, targets, np.array([0.75, 1.0, 1.0]), ordered=False)[1]
    np.testing.assert_allclose(apart[0, 1], [0.75, 0, 0.25])
    np.testing.assert_array_equal(both[1:], targets[1:])
    log_natural = torch.randn(3, 25, 3, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    parts = [
        row_losses(log_natural, torch.from_numpy(row_weights(t, targets))) for t in (targets, np.roll(targets, -1, 0))
    ]
    found = row_losses(log_natural, torch.from_numpy(row_weights(apart, targets)))
    torch.testing.assert_close(found[0], 0.75 * parts[0][0] + 0.25 * parts[1][0])
    torch.testing.assert_close(images[0, 1], 0.75 * seen[0][0, 1] + 0.25 * seen[0][1, 1])
    # A slice that one of both lacks stays as it is.
    assert places[0, 0, 0].isnan() and places[0, 0, 1] == seen[1][0, 0, 1]
    torch.testing.assert_close(images[0, 0, :2], seen[0][0, 0, :2])


def test_the_same_bytes_twice_and_what_is_off_is_not_drawn():
    inputs, labels = draw_studies(3, seed=0)
    config, targets = replace(SMALL, margin=6), target_matrix(labels)
    inputs = draw_inputs(3, np.random.default_rng(0), config)

    def drawn(strength):
        rngs = [np.random.default_rng(k) for k in range(3)]
        seen, aims = augment(inputs, targets, config, strength, rngs)
        return *seen, torch.from_numpy(aims), [rng.random() for rng in rngs]

    for one, other in zip(drawn(STRONG)[:3], drawn(STRONG)[:3], strict=True):
        assert torch.equal(one.nan_to_num(-99), other.nan_to_num(-99))
    plain, also = drawn(Augmentation()), drawn(replace(Augmentation(), holes=0.5))
    assert torch.equal(plain[1].nan_to_num(-99), also[1].nan_to_num(-99)) and torch.equal(plain[2], also[2])
    untouched = (plain[0] == also[0]).float().mean()
    assert 0.8 < untouched < 1  # holes apart, the images are the same
    rngs = [np.random.default_rng(k) for k in range(3)]
    for rng in rngs:  # gain, gamma and series; shifts; turns and sizes; exchanged halves
        sizes = [(2, 3), 3, (5, 1, 3), (5, 5, 3), (5, 5), (5, 5), 5]
        for size, kind in zip(sizes, ("normal", "random", *["normal"] * 4, "random"), strict=True):
            getattr(rng, kind)(size=size)
    assert plain[3] == [rng.random() for rng in rngs]


def test_each_kind_that_is_set_is_shown_alone():
    kinds = Augmentation(intensity=0.0, holes=0.1, cut_off=2.5).alone()
    assert list(kinds) == ["jitter", "rotation", "scale", "drop_series", "holes"]
    assert "jitter" not in Augmentation(jitter=[[0.0] * 3] * len(SLOTS)).alone()  # lists, as a parameter gives them
    assert kinds["holes"] == replace(STILL, holes=0.1, cut_off=2.5, jitter=((0.0,) * 3,) * len(SLOTS))


def test_with_labels_alone_the_loss_computes_the_same_bytes_as_the_plain_formula(tmp_path):
    studies = draw_studies(8, seed=1)
    studies[1][::3, 4:9] = -1
    models = [
        train(tmp_path / str(k), studies, change=(LOSS, text), vit_epochs=2)["model"]
        for k, text in enumerate((LOSS, PLAIN))
    ]
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_a_softened_target_has_the_natural_probabilities_as_its_optimum():
    natural = np.random.default_rng(0).dirichlet([2, 1, 1], (4, 25))
    labels = np.random.default_rng(1).choice([-1, 0, 1, 2], (4, 25))
    log_natural = torch.from_numpy(natural).log().requires_grad_()
    row_losses(log_natural, torch.from_numpy(row_weights(target_matrix(labels, natural, 1.0)))).sum().backward()
    assert log_natural.grad.abs().max() < 1e-6
    half = target_matrix(labels, natural, 0.5)
    np.testing.assert_allclose(half[labels >= 0].sum(axis=-1), 1, rtol=1e-6)
    assert not half[labels < 0].any() and (target_grades(half) == labels).all()
    gone = natural.copy()
    gone[0] = np.nan  # a study without an answer keeps its labels
    np.testing.assert_array_equal(target_matrix(labels, gone, 0.5)[0], target_matrix(labels)[0])
    np.testing.assert_allclose(half[labels == 2], 0.5 * np.eye(3)[2] + 0.5 * natural[labels == 2], rtol=1e-6)


def test_drop_path_leaves_out_blocks_in_training_alone():
    inputs = draw_inputs(6, np.random.default_rng(0))
    seen = cut_views(inputs, SMALL, np.zeros((6, 5, len(SLOTS), 3)))
    models = []
    for share in (0.0, 0.5):
        torch.manual_seed(0)
        models.append(Vit3d(replace(SMALL, dropout=0.0, drop_path=share)))
        torch.nn.init.ones_(models[-1].head.linear.weight)
    with torch.no_grad():
        whole, dropped = (model.eval()(*seen) for model in models)
        assert torch.equal(whole, dropped)
        models[1].slice_blocks.train()
        assert not torch.equal(models[1](*seen), models[1](*seen))
        models[0].slice_blocks.train()
        assert torch.equal(models[0](*seen), models[0](*seen))


def test_a_place_is_seen_on_one_slice_of_its_own_that_changes():
    inputs = draw_inputs(3, np.random.default_rng(0), SMALL)
    inputs["places"][0, 2] = np.nan  # a level that no slice shows
    chosen = set()
    for seed in range(8):
        rngs = [np.random.default_rng([seed, k]) for k in range(3)]
        images, places = augment(inputs, np.zeros((3, 25, 3)), SMALL, replace(STILL, single=True), rngs)[0]
        there = ~places.isnan().reshape(3, 5, len(SLOTS), SMALL.slices).numpy()
        known = ~np.isnan(inputs["places"]).reshape(there.shape)
        assert (there.sum(axis=-1) == known.any(axis=-1)).all() and not (there & ~known).any()
        np.testing.assert_array_equal(places[~places.isnan()], inputs["places"][~places.isnan().numpy()])
        assert images.any()
        chosen |= set(np.argwhere(there)[:, -1].tolist())
    assert chosen == set(range(SMALL.slices))
