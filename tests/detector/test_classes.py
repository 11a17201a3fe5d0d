"""Detectors: what they are shown, and what their classes mean."""

import pytest
from toy_spine import config

from lsdc_utils.detector.classes import DetectorConfig, DetectorError, class_numbers, class_table, config_from
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, LEVELS


def test_numbers_of_classes():
    assert {key: len(class_table(config(key))) for key in GROUPS} == {"nfn": 15, "scs": 15, "ss": 3}


@pytest.mark.parametrize("condition", GROUPS)
def test_every_label_has_the_class_of_its_level_and_severity(condition):
    table, numbers = class_table(config(condition)), class_numbers(config(condition))
    names = [c.name for c in CONDITIONS.values() if c.group == condition]
    assert set(numbers) == {(name, level, severity) for name in names for level in LEVELS for severity in range(3)}
    for (_, level, severity), number in numbers.items():
        assert table["severity"][number] == severity and table["level"][number] in (None, level)


def test_settings_that_cannot_work_are_refused():
    for wrong in ({"size": (60, 32)}, {"strip": (0.5, 0.2, 0.0, 1.0)}, {"condition": "spine"}):
        with pytest.raises(DetectorError):
            DetectorConfig(
                **{"condition": "scs", "strip": (0, 1, 0, 1), "size": (32, 32), **wrong}, neighbours=True, box_mm=14.0
            )


def test_a_config_comes_back_from_lists():
    values = {"condition": "ss", "strip": [0.3, 0.7, 0.3, 0.7], "size": [96, 96], "neighbours": True, "box_mm": 10.0}
    assert config_from(values).views == ((1.0, False),)
    assert config_from(values | {"views": [[1.0, 0], [0.5, 1]]}).views == ((1.0, False), (0.5, True))
