"""Grey levels of a series: images of one scale, flattened by the series' own wide blur, then windowed to 8 bit.

A surface coil shows tissue darker with depth: with a fall-off of 40 mm, 12 times over 100 mm. The field is estimated as
the blurred logarithm of the tissue's signal, so that a smooth factor of the signal is a factor of the field as well.
"""

import cv2
import numpy as np

from lsdc_utils import geometry

WINDOW = (0.5, 99.5)  # percentiles of a series between which its scale is taken
SPARSE = 5  # every 5th pixel each way is used for them; odd, so that a mirrored image uses the same
STANDS_OUT = 16  # times as many pixels as of the next values; real saturated tissue is below
EMPTY, FEW_VALUES = 0.02, 8  # least share of signal in an image, and number of different values in a series
ODD, NOISE = 1.75, 0.2  # deviation against the usual (ordinary: 1.4 at most); correlation of pixels `SPARSE` apart
GRID, BLUR = 5.0, 30.0  # mm of a pixel of the field, and of the blur's standard deviation: about a vertebra's height
AIR, DARK = 2.5, 0.3  # not tissue: below so many times the darkest twentieth, or this share of what lies around it
LEAST = 1e-3  # of the window: no tissue is darker, where padding was 0
STRIP = 50.0  # mm to either side of the middle: holds the spine, or half of it where it lies 40 mm off
BRIGHTEST, MARGIN = 99.5, 1.3  # percentile of the strip's tissue on the grid, CSF or fat; the window's end against it


def to_grey(images: list[np.ndarray], affines: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Write images, each (rows, cols), to the upper left of target (n, rows, cols) uint8; affines (n, 4, 4) as Stack's.
    Returns each image's scale against its neighbours' (n,); 0 if it is blank, and its target is not written."""
    signal = _signal(images)
    windows, scales = _windows(images, signal)
    kept = np.flatnonzero(scales)
    some = [images[i] for i in kept]
    gains = _gains(some, [signal[i] for i in kept], windows[kept], affines[kept]) if len(kept) else []
    for i, gain in zip(kept, gains, strict=True):
        window_image(images[i], windows[i], gain, target[i])
    return scales


def _signal(images: list[np.ndarray]) -> list[np.ndarray | None]:
    """Where an image shows signal, (rows, cols) uint8; None: everywhere. Not signal: padding (-inf), values that stand
    out of the histogram (borders, text), and two pixels around them."""
    values, counts = np.unique(np.concatenate([_sample(image).ravel() for image in images]), return_counts=True)
    near = np.pad(counts, 2)
    near = np.max([near[:-4], near[1:-3], near[3:-1], near[4:]], axis=0)  # of the two next values each way
    fills = values[~np.isfinite(values) | (counts > np.maximum(STANDS_OUT * near, 9))]
    if values.dtype.kind == "f":
        fills = np.union1d(fills, -np.inf)
    kernel = np.ones((5, 5), np.uint8)
    return [cv2.erode((~np.isin(image, fills)).astype(np.uint8), kernel) if len(fills) else None for image in images]


def _windows(images: list[np.ndarray], signal: list[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """Values of each image that are 0 and 1 on the series' scale (n, 2), and its scale against its neighbours' (n,).

    The values are the percentiles `WINDOW` of the signal in all images. An image of another scale or offset counts,
    and is shown, as if it had those of its neighbours, unless it is noise. A blank image has scale 0.
    """
    seen = [_sample(image).ravel() for image in images]
    for i, mask in enumerate(signal):
        if mask is not None:
            inside = seen[i][_sample(mask).ravel() > 0]
            seen[i] = inside if inside.size > EMPTY * seen[i].size else np.zeros(1)
    middle, spread = np.array([(part.mean(), np.abs(part - part.mean()).mean()) for part in seen]).T
    windows, scales, full = np.zeros((len(images), 2)), np.zeros(len(images)), spread > 0
    usual, centre = (np.median(of[full]) if full.any() else 0 for of in (spread, middle))
    alike = full & (spread <= ODD * usual) & (usual <= ODD * spread) & (np.abs(middle - centre) <= ODD * usual)
    alike = alike if alike.any() else full  # of two images none is usual
    if len(np.unique(seen[np.argmax(alike)])) < FEW_VALUES:
        return windows, scales
    odd = [i for i in np.flatnonzero(full & ~alike) if np.corrcoef(seen[i][1:], seen[i][:-1])[0, 1] > NOISE]
    near = {i: [np.interp(i, np.flatnonzero(alike), of[alike]) for of in (middle, spread)] for i in odd}
    pool = [(seen[i] - middle[i]) * (wide / spread[i]) + place for i, (place, wide) in near.items()]
    pool += [seen[i] for i in np.flatnonzero(alike)]
    low, high, *most = np.percentile(np.concatenate(pool), (*WINDOW, 5, 95))
    if np.ptp(most) > (high - low) / 255:  # else nearly all have one grey level
        windows[full], scales[full] = (low, high), 1
        for i, (place, wide) in near.items():
            scales[i] = spread[i] / wide
            windows[i] = middle[i] + (np.array([low, high]) - place) * scales[i]
    return windows, scales


def _sample(image: np.ndarray) -> np.ndarray:
    """Every `SPARSE`-th pixel each way, as many before the first as behind the last: a mirrored image has the same."""
    every = []
    for count in image.shape:
        rest = (count - 1) % SPARSE
        first = rest // 2 if rest % 2 == 0 else (rest + SPARSE) // 2
        every.append(slice(first, count - first, SPARSE) if 2 * first < count else slice(None))
    return image[tuple(every)]


def _gains(
    images: list[np.ndarray], signal: list[np.ndarray | None], windows: np.ndarray, affines: np.ndarray
) -> list[np.ndarray]:
    """Grey levels per unit of each image's window, on a grid of `GRID` mm: 255 at the upper end of the flat series."""
    fields, strip = [np.empty(0)] * len(images), []
    shapes = [image.shape for image in images]
    for shape in sorted(set(shapes)):
        group = [i for i in range(len(images)) if shapes[i] == shape]
        spacing = np.median(geometry.spacing(affines[group]), axis=0)
        size = np.maximum(np.rint(np.multiply(shape[::-1], spacing) / GRID), 1).astype(int)
        parts = [_coarse(images[i], signal[i], windows[i], size) for i in group]
        coarse, weights = (np.stack(of) for of in zip(*parts, strict=True))
        centres = geometry.to_patient(affines[group], (np.array(shape[::-1]) - 1) / 2)
        field, inside = _field(coarse, weights, centres)
        far = [np.abs(np.arange(n) - (n - 1) / 2) * GRID > STRIP for n in coarse.shape[1:]]
        inside[:, :, far[1]] = False
        if geometry.plane_of(affines[group[0], :3, 2]) == "axial":  # a sagittal image shows it from top to bottom
            inside[:, far[0]] = False
        strip.append((field[inside], coarse[inside]))
        for i, of_image in zip(group, field, strict=True):
            fields[i] = of_image
    field, values = (np.concatenate(of) for of in zip(*strip, strict=True))
    if not field.size:
        field = values = np.ones(1)
    high = max(MARGIN * np.percentile(values / field, BRIGHTEST), LEAST)
    least = field.min()  # beyond the strip a larger gain would show noise alone
    return [(255 / high / np.maximum(field, least)).astype(np.float32) for field in fields]


def _coarse(image: np.ndarray, signal: np.ndarray | None, window: np.ndarray, size: np.ndarray) -> tuple:
    """Means of an image's signal on its window's scale, and the share of signal, on a grid of size (cols, rows)."""
    kept = np.subtract(image, window[0], dtype=np.result_type(image, np.float32)).astype(np.float32, copy=False)
    share = np.ones(size[::-1], np.float32)
    if signal is not None:
        kept = np.where(signal, kept, np.float32(0))
        share = cv2.resize(signal.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    means = cv2.resize(kept, size, interpolation=cv2.INTER_AREA) / np.maximum(share, 1e-3)
    return np.maximum(means, 0) / np.float32(max(np.ptp(window), 1e-6)), share


def _field(coarse: np.ndarray, weights: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coil's field, as the geometric mean of the tissue around each pixel, and where tissue is (n, rows, cols).

    Slices share what lies near by their centres (n, 3) in mm. A plane through the logarithms is taken out before the
    blur, as it would bend where the tissue ends.
    """
    rows, cols = (np.arange(n) - (n - 1) / 2 for n in coarse.shape[1:])
    near = [_near(places) for places in (centres, GRID * rows[:, None], GRID * cols[:, None])]
    seen = weights > 0 if (weights > 0).any() else weights >= 0
    floor = max(AIR * float(np.percentile(coarse[seen], 5)), LEAST)
    log = np.log(np.maximum(coarse, floor))
    tissue = seen & (coarse > floor) & (log > _blur(log, seen, near) + np.log(DARK))
    tissue = tissue if tissue.any() else seen
    terms = np.stack(np.broadcast_arrays(1.0, rows[:, None], cols), axis=-1).reshape(-1, 3)
    count, total = (part.sum(axis=0).ravel() for part in (tissue, np.where(tissue, log, 0)))
    fit = np.linalg.lstsq(terms.T @ (terms * count[:, None]), terms.T @ total, rcond=1e-6)[0]
    plane = (terms @ fit).reshape(log.shape[1:]).astype(np.float32)
    return np.exp(plane + _blur(log - plane, tissue, near)), tissue


def _near(places: np.ndarray) -> np.ndarray:
    """Gaussian weights (n, n) of places (n, d) in mm for each other."""
    squares = ((places[:, None] - places[None]) ** 2).sum(axis=-1)
    return np.exp(-squares / (2 * BLUR**2)).astype(np.float32)


def _blur(values: np.ndarray, weights: np.ndarray, near: list[np.ndarray]) -> np.ndarray:
    """Means of values around each pixel, (n, rows, cols), by weights and by what is near each way; 0 far from all."""
    slices, rows, cols = near
    both = np.stack([np.where(weights, values, 0), weights]).astype(np.float32)
    total, weight = rows @ np.tensordot(slices, both, (1, 1)).transpose(1, 0, 2, 3) @ cols
    return total / (weight + 1e-3)


def window_image(image: np.ndarray, window: np.ndarray, gain: np.ndarray, target: np.ndarray) -> None:
    """Write an image (rows, cols) to the upper left of a target, uint8; gain: grey levels per unit of the window."""
    values = np.subtract(image, window[0], dtype=np.result_type(image, np.float32))  # float64 for 32-bit integers
    gain = cv2.resize(gain / np.float32(max(np.ptp(window), 1e-6)), image.shape[::-1])
    values *= gain
    place = target[: image.shape[0], : image.shape[1]]
    place[:] = np.rint(np.clip(values, 0, 255, out=values), out=values)
