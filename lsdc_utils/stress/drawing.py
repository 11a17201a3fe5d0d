"""Phantom studies as stacks, of bodies that have much in common: what is the same in two of them is drawn once."""

import pickle
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lsdc_utils.data.stacks import Stack, read_stack
from lsdc_utils.data.windows import to_grey
from lsdc_utils.phantom.body import Body
from lsdc_utils.phantom.scanner import USUAL, Acquisition, expose, expose_again
from lsdc_utils.phantom.study import Series, StudyPlan, image_study, write_series
from lsdc_utils.vocabulary import SERIES_TYPES


@dataclass(frozen=True)
class Drawing:
    """Draws studies as they would be read from files. A study whose acquisitions are those of the first is drawn only
    where its body differs. The first series of a geometry goes through DICOM files; later ones bring other pixels."""

    folder: Path  # for the files of a series, until they are read
    exposed: dict[bytes, tuple] = field(default_factory=dict)  # of the first study: images, kept, tables
    read: dict[bytes, Stack] = field(default_factory=dict)  # by geometry

    def stacks(self, plan: StudyPlan) -> list[Stack]:
        """The stacks of a study, by series id."""
        stacks = [self._stack(plan.study_id, *drawn) for drawn in image_study(plan, self._expose)]
        return sorted(stacks, key=lambda stack: stack.series_id)

    def _expose(self, body: Body, acquisition: Acquisition) -> np.ndarray:
        """As `expose`, before coil and protocol matter."""
        key = pickle.dumps((replace(acquisition, protocol=USUAL, coil=0.0), body.discs, body.waves, body.traits))
        if key not in self.exposed and len(self.exposed) == len(SERIES_TYPES):
            return expose(body, acquisition)
        if key not in self.exposed:
            self.exposed[key] = expose(body, acquisition, kept := []), kept, body.tables
        return expose_again(body, acquisition, *self.exposed[key])

    def _stack(self, study_id: int, series: Series, pixels: np.ndarray) -> Stack:
        """The stack of a series with these pixels (n, rows, cols)."""
        key = pickle.dumps((series.acquisition.affines, pixels.shape, series.numbers))
        like = self.read.get(key)
        if like and len(like.pixels) == len(pixels):
            order, grey = [series.numbers.tolist().index(n) for n in like.instance_numbers], np.empty_like(like.pixels)
            if (to_grey([*pixels[order]], like.affines, grey) == 1).all():  # else an image is odd or blank
                return replace(like, pixels=grey)
        write_series(self.folder, study_id, series, (1, 1), pixels)
        self.read[key], _ = read_stack(self.folder, study_id, series.series_id, series.acquisition.series_type)
        shutil.rmtree(self.folder)
        return self.read[key]
