"""The rule by which the rehearsal extrapolates to the size of the real data set."""

from __future__ import annotations

import pandas as pd
import pytest
from proofs import rehearsal

from lsdc_utils.pipeline import graph
from lsdc_utils.pipeline.parameters import load_parameters
from lsdc_utils.vit.augment import Augmentation, check_margin
from lsdc_utils.vit.model import Vit3d, VitConfig

MEASURED = pd.DataFrame(
    {
        25: [2000, 30.0, 900.0, 1.0, 0.5, 8.0],
        50: [4000, 40.0, 950.0, 2.0, 1.0, 9.0],
        100: [8000, 60.0, 940.0, 4.0, 2.0, 9.0],
    },
    index=["slices", "02 processor, s", "02 memory, MiB", "8-bit slices, GB", "crops, GB", "images an epoch, nfn"],
)


def test_costs_go_along_the_line_through_the_two_largest_counts() -> None:
    full = rehearsal.extrapolated(MEASURED, 1975, 160_000, 3)
    assert full["02 processor, s"] == pytest.approx(60 + 20 / 4000 * 152_000)
    assert full["02 memory, MiB"] == 940  # which did not grow
    assert full["8-bit slices, GB"] == pytest.approx(80)
    assert full["crops, GB"] == pytest.approx(2 / 100 * 1975)
    assert (full["slices"], full["images an epoch, nfn"]) == (160_000, 9)


def test_what_smaller_counts_expect_can_be_compared_with_what_was_measured() -> None:
    one, two = (rehearsal.extrapolated(MEASURED, 100, 8000, upto) for upto in (1, 2))
    assert one["02 processor, s"] == pytest.approx(120) and one["02 memory, MiB"] == 900
    assert two["02 processor, s"] == pytest.approx(60) and two["02 memory, MiB"] == pytest.approx(1050)
    assert one["crops, GB"] == two["crops, GB"] == pytest.approx(2)


def test_the_smallest_sizes_are_parameters_and_make_a_network_that_can_be_trained() -> None:
    parameters = load_parameters("kaggle", ["folds=0", *rehearsal.EPOCHS, *rehearsal.SMALLEST])
    families = {member["name"] for member in load_parameters("kaggle")["vit_members"]}
    assert {member["name"] for member in parameters["vit_members"]} == families
    for member in parameters["vit_members"]:
        own = parameters | graph.member_parameters(member, parameters)
        config = VitConfig(**{name: own[f"vit_{name}"] for name in VitConfig.__dataclass_fields__})
        check_margin(config, Augmentation(**own["vit_augment"]))  # ValueError where it is too small
        assert config.size == 64 and own["vit_encoder_weights"] == ""
        assert sum(weight.numel() for weight in Vit3d(config).parameters()) < 12e6
    assert (parameters["vit_epochs"], parameters["yolo_epochs"]["ss"]) == (2, 2)
