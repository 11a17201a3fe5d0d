"""The second classifier: a factorised 3D vision transformer built from four parts, each replaceable.

Squares of slices -> encoder -> reader -> slice blocks -> head -> probabilities. The right side is mirrored onto the
left. A place is graded by the slices that show it; levels and conditions do not see each other. To try another part,
write its class into this file with the constructor and shapes of the one that it replaces, and name it in notebook 04;
`load_vit` finds the class by the name that `save_vit` wrote.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from lsdc_utils.checkpoint import described, save_weights
from lsdc_utils.vit.crops import LATERAL, SLOTS
from lsdc_utils.vocabulary import AXIAL, COLUMNS, CONDITIONS, LEVELS, SERIES_TYPES, SEVERITIES, SIDES, T1, T2

SHOWN_ON = {"scs": (T2, AXIAL), "nfn": (T1,), "ss": (AXIAL,)}  # what one half level is graded for, by which series
HALF_OUTPUTS = tuple(SHOWN_ON)
COLUMN_GROUP = tuple(CONDITIONS[c].group for c in CONDITIONS for _ in LEVELS)  # of each of the 25 columns
KINDS = [SERIES_TYPES.index(kind) for kind, _ in SLOTS]  # series of each slot
SLOTS_OF_SIDE = [[k for k, (_, slot_side) in enumerate(SLOTS) if slot_side in ("", side)] for side in SIDES]
NODE_STEP = 4.0  # mm between places, from -12 to 12, between which the reader's matrices are interpolated


@dataclass(frozen=True)
class VitConfig:
    """What the network sees and how large it is."""

    size: int = 32  # pixels a side of the square of a slice
    spacing: tuple[float, float, float] = (0.8, 1.0, 0.5)  # mm a pixel on each of SERIES_TYPES
    margin: int = 8  # pixels kept all round, to cut shifted and turned squares from
    slices: int = 3  # of a series, a level and a side
    wider: tuple[tuple[float, int], ...] = ()  # further squares about the same places: times as wide, slices
    encoder: str = "conv"  # of a slice: conv, a small one from scratch, or the name of a timm model
    channels: tuple[int, ...] = (24, 48, 96, 128)  # of its stages; all but the last halve the sides (conv)
    patch: int = 16  # a side, in voxels (published)
    width: int = 96  # of a token
    depth: int = 1  # blocks over the patches of a study (published)
    heads: int = 4
    readout: int = 8  # numbers that each place of a feature map hands to the reader, which keeps places apart
    dropout: float = 0.5  # share of an encoder's features left out in training
    drop_path: float = 0.0  # share of samples that skip a block in training; in a timm encoder it rises to this
    mix: int = 1  # blocks over the slices of a half level
    pooling: str = "attention"  # of the slices of a half level; or gru
    head: str = "ordinal"  # or softmax

    def __post_init__(self) -> None:
        for name, known in (("head", HEADS), ("pooling", POOLINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"vit_{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if len(self.spacing) != len(SERIES_TYPES) or min(self.spacing) <= 0:
            raise ValueError(f"vit_spacing is {list(self.spacing)}; give mm a pixel for {', '.join(SERIES_TYPES)}")
        if not all(len(scale) == 2 and min(scale) > 0 and int(scale[1]) == scale[1] for scale in self.wider):
            raise ValueError(f"vit_wider is {list(self.wider)}; give pairs: times as wide, slices")
        if self.encoder == "conv" and self.size % (step := 2 ** (len(self.channels) - 1)):
            raise ValueError(f"vit_size {self.size} is not a multiple of {step}, the pixels of a place")

    @property
    def scales(self) -> list[tuple[np.ndarray, int]]:
        """Of each square of a slice: mm a pixel on each of SERIES_TYPES (3,), and how many slices have it."""
        scales = ((1.0, self.slices), *self.wider)
        return [(np.multiply(times, self.spacing), int(slices)) for times, slices in scales]

    @property
    def slots(self) -> np.ndarray:
        """Which of `SLOTS` (n,) each image of a level belongs to: slot by slot of the first scale, then of the next."""
        return np.concatenate([np.arange(len(SLOTS)).repeat(slices) for _, slices in self.scales])

    def split(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Values (B, 5, n, ...) of a level's images as (B, 5, slots, slices, ...) for each scale."""
        parts = images.split([len(SLOTS) * slices for _, slices in self.scales], dim=2)
        return [part.unflatten(2, (len(SLOTS), -1)) for part in parts]


class SliceConv(nn.Module):
    """Encoder: slices (N, 1, h, w) from `normalise` -> features (N, num_features). Small convolutions from scratch."""

    def __init__(self, config: VitConfig):
        super().__init__()
        layers, last = [], len(config.channels) - 1
        for k, (before, after) in enumerate(pairwise((1, *config.channels))):
            layers += self.layer(before, after, 3 if k else 5, 2 if k < last else 1)
            layers += self.layer(after, after) if 0 < k < last else ()
        # A square is aligned to what it shows, so a place in it has a meaning, which averaging would lose.
        self.layers = nn.Sequential(*layers, nn.Conv2d(config.channels[-1], config.readout, 1), nn.Flatten(1))
        self.num_features = config.readout * (config.size // 2**last) ** 2

    @staticmethod
    def layer(before: int, after: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        """A convolution, its norm and the non-linearity behind it."""
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        return [conv, nn.BatchNorm2d(after), nn.GELU()]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class TimmEncoder(nn.Module):
    """Encoder: a timm model, which starts from the weights in a file if one is given."""

    def __init__(self, config: VitConfig, weights: str = ""):
        super().__init__()
        size = {"img_size": config.size} if timm.get_pretrained_cfg(config.encoder).fixed_input_size else {}
        size |= {"drop_path_rate": config.drop_path} if config.drop_path else {}  # which not every model takes
        file = {"file": weights, "custom_load": weights.endswith(".npz")} if weights else None
        self.model = timm.create_model(
            config.encoder, pretrained=bool(weights), pretrained_cfg_overlay=file, in_chans=1, num_classes=0, **size
        )
        with contextlib.suppress(AssertionError):  # not every model can
            # Computed again in the backward pass: 7 MB a slice of 128 pixels instead of 78 (convnext_small, 16 bits).
            self.model.set_grad_checkpointing()
        self.num_features = self.model.num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def slice_encoder(config: VitConfig, weights: str = "") -> nn.Module:
    """The encoder that a config names; weights: a file of pretrained weights for a timm model, or "" for random."""
    return SliceConv(config) if config.encoder == "conv" else TimmEncoder(config, weights)


class PlaceReader(nn.Module):
    """Features (B, 5, slots, n, features) and places (B, 5, slots, n) of a scale, NaN where there is no slice -> tokens
    (B, 5, 2, slices, width) of the half levels, and whether there is a slice (B, 5, 2, slices).

    What a slice shows depends on its place, so matrices are interpolated between nodes in mm: a resampling between
    slices, but of features. Attention does not learn it from few studies.
    """

    def __init__(self, config: VitConfig, features: int):
        super().__init__()
        self.register_buffer("nodes", torch.arange(-12, 13, NODE_STEP), persistent=False)
        series, nodes, width = len(SERIES_TYPES) * len(config.scales), len(self.nodes), config.width
        self.read = nn.Parameter(torch.randn(series, features, width) / math.sqrt(features))
        matrices = torch.randn(series, nodes, width, width) / math.sqrt(width) + 0.5 * torch.eye(width)
        self.place = nn.Parameter(matrices)
        self.place_bias = nn.Parameter(torch.zeros(series, nodes, width))

    def forward(self, features: torch.Tensor, places: torch.Tensor, scale: int = 0) -> tuple[torch.Tensor, ...]:
        present, places = ~places.isnan(), places.nan_to_num()
        tokens = []
        for slots, lateral in zip(SLOTS_OF_SIDE, LATERAL.tolist(), strict=True):
            for slot in slots:
                kind = KINDS[slot] + scale * len(SERIES_TYPES)
                outward = lateral if SLOTS[slot][0] == T2 else 1.0  # both sides share T2, whose places are to the left
                place = (places[:, :, slot] * outward).clamp(self.nodes[0], self.nodes[-1])
                share = (1 - (place[..., None] - self.nodes).abs() / NODE_STEP).clamp(min=0)  # (..., nodes), sums to 1
                read = features[:, :, slot] @ self.read[kind]
                read = torch.einsum("...f,ftw->...tw", read, self.place[kind].transpose(0, 1)) + self.place_bias[kind]
                tokens.append((read * share[..., None]).sum(dim=-2))
        tokens = torch.stack(tokens, dim=2).unflatten(2, (len(SIDES), -1)).flatten(3, 4)
        return tokens, torch.stack([present[:, :, slots].flatten(2) for slots in SLOTS_OF_SIDE], dim=2)


class SliceBlocks(nn.Module):
    """Tokens (N, slices, width) of half levels and whether they are there -> vectors (N, 3, width), one for each of
    `HALF_OUTPUTS`: the sum over the slices that show it, and what blocks add that attend over them.

    Company is no evidence: only where the series that show a condition are missing, the others count.
    """

    def __init__(self, config: VitConfig):
        super().__init__()
        self.count = sum(slices for _, slices in config.scales)
        of_slot = [SLOTS[slot][0] for slot in SLOTS_OF_SIDE[0]]
        kinds = np.concatenate([np.repeat(of_slot, slices) for _, slices in config.scales])
        own = torch.from_numpy(np.stack([np.isin(kinds, shown) for shown in SHOWN_ON.values()]))
        self.register_buffer("own", own, persistent=False)
        self.ask = nn.Parameter(torch.zeros(len(HALF_OUTPUTS), 1, config.width))
        self.blocks = attention_blocks(config, config.mix)

    def forward(self, tokens: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        own = present[:, None] & self.own
        present = torch.where(own.any(dim=-1, keepdim=True), own, present[:, None]).flatten(0, 1)
        tokens = (tokens[:, None] + self.ask).flatten(0, 1)
        pooled = (tokens * present[..., None]).sum(dim=1, keepdim=True) / math.sqrt(self.count)
        return self.attend(pooled, tokens, present).unflatten(0, (-1, len(HALF_OUTPUTS)))

    def attend(self, pooled: torch.Tensor, tokens: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Vectors (n, width) from the sum of tokens (n, 1, width), tokens (n, slices, width), and which are there."""
        tokens = torch.cat([pooled, tokens], dim=1)
        present = torch.cat([torch.ones_like(present[:, :1]), present], dim=1)
        mask = torch.zeros_like(present, dtype=tokens.dtype).masked_fill(~present, -1e4)[:, None, None]
        for block in self.blocks:
            tokens = block(tokens, attn_mask=mask)
        return tokens[:, 0]


class SliceGru(SliceBlocks):
    """As `SliceBlocks`; what a recurrent network adds that reads the slices of each slot from the farthest to the
    nearest, instead of blocks that attend over them. Slices that are not there leave its state as it is."""

    def __init__(self, config: VitConfig):
        super().__init__(replace(config, mix=0))
        self.cell = nn.GRUCell(config.width, config.width)

    def attend(self, pooled: torch.Tensor, tokens: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(tokens[:, 0])
        for token, there in zip(tokens.flip(1).unbind(1), present.flip(1).unbind(1), strict=True):
            state = torch.where(there[:, None], self.cell(token, state), state)
        return pooled[:, 0] + state


def attention_blocks(config: VitConfig, depth: int) -> nn.Sequential:
    """Transformer blocks of timm. Layer scale: a block begins as a small correction to what the head already sees."""
    options = {"mlp_ratio": 4, "qkv_bias": True, "init_values": 0.1, "drop_path": config.drop_path}
    return nn.Sequential(*(Block(config.width, config.heads, **options) for _ in range(depth)))


class OrdinalHead(nn.Module):
    """Vectors (B, 5, 2, 3, width) of half levels -> natural log-probabilities (B, 25, 3) in COLUMNS order.

    A cumulative link: P(severity > k) = sigmoid(latent - threshold k), thresholds learnt for each group and level
    (McCullagh 1980, Regression Models for Ordinal Data). The canal's latent is the mean of its two halves.
    """

    numbers, cuts = 1, 2  # of a latent; in a row of thresholds: the first, and the logarithm of the step to the second

    def __init__(self, config: VitConfig, outputs: int = len(HALF_OUTPUTS)):
        super().__init__()
        self.linear = nn.Linear(config.width, outputs * self.numbers)
        nn.init.zeros_(self.linear.weight)  # so that training begins at the prior
        nn.init.zeros_(self.linear.bias)
        self.rows = [HALF_OUTPUTS.index(group) * len(LEVELS) + k % len(LEVELS) for k, group in enumerate(COLUMN_GROUP)]
        self.thresholds = nn.Parameter(torch.zeros(len(HALF_OUTPUTS) * len(LEVELS), self.cuts))

    def forward(self, halves: torch.Tensor) -> torch.Tensor:
        return self.grade(self.latents(halves).float(), self.thresholds[self.rows])

    def latents(self, halves: torch.Tensor) -> torch.Tensor:
        """Latent severities (B, 25, numbers)."""
        weight, bias = (p.unflatten(0, (len(HALF_OUTPUTS), -1)) for p in (self.linear.weight, self.linear.bias))
        outputs = torch.einsum("...ow,onw->...on", halves, weight) + bias  # (B, levels, sides, outputs, numbers)
        of_side = {None: outputs.mean(2), SIDES[0]: outputs[:, :, 0], SIDES[1]: outputs[:, :, 1]}
        columns = [of_side[c.side][:, :, HALF_OUTPUTS.index(c.group)] for c in CONDITIONS.values()]
        return torch.cat(columns, dim=1)

    def grade(self, latents: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
        """Natural log-probabilities (B, 25, 3) of latents (B, 25, numbers) by thresholds (25, cuts)."""
        latents, (first, step) = latents.squeeze(-1), thresholds.unbind(-1)
        above = F.logsigmoid(latents - first), F.logsigmoid(latents - first - step.exp())
        below = F.logsigmoid(first - latents), F.logsigmoid(first + step.exp() - latents)
        # log P(moderate) = log(s(a) - s(b)) = log s(a) + log s(-b) + log(1 - exp(b - a)), for a > b
        middle = above[0] + below[1] + torch.log(-torch.expm1(-step.exp()))
        return torch.stack([below[0], middle, above[1]], dim=-1)

    @torch.no_grad()
    def start_at_prior(self, labels: np.ndarray) -> None:
        """Set the thresholds so that a latent of 0 gives the frequencies in `labels` (n, 25), plus half a count."""
        pooled = np.full((len(self.thresholds), len(SEVERITIES)), 0.5)
        np.add.at(pooled, self.rows, np.stack([(labels == k).sum(0) for k in range(len(SEVERITIES))], axis=1))
        self.thresholds.copy_(torch.from_numpy(self.thresholds_of(pooled / pooled.sum(1, keepdims=True))))

    def thresholds_of(self, share: np.ndarray) -> np.ndarray:
        """Thresholds (rows, cuts) by which a latent of 0 has probabilities (rows, 3)."""
        first = np.log(share[:, 0] / (1 - share[:, 0]))
        return np.stack([first, np.log(np.log((1 - share[:, 2]) / share[:, 2]) - first)], axis=1)

    @torch.no_grad()
    def cut_offs(self) -> np.ndarray:
        """For each column the log odds (25, 2) against `moderate` or worse, and against `severe`, at a latent of 0."""
        zero = self.thresholds.new_zeros(1, len(COLUMNS), self.numbers)
        share = self.grade(zero, self.thresholds[self.rows])[0].exp().double().cpu().numpy()
        return np.stack([np.log(share[:, 0] / share[:, 1:].sum(1)), np.log(share[:, :2].sum(1) / share[:, 2])], axis=1)


class SoftmaxHead(OrdinalHead):
    """A softmax that ignores the order of the severities, for comparison; thresholds hold the logits of the prior."""

    numbers = cuts = len(SEVERITIES)

    def grade(self, latents: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (..., 3) of latents and thresholds (..., 3)."""
        return F.log_softmax(latents + thresholds, dim=-1)

    def thresholds_of(self, share: np.ndarray) -> np.ndarray:
        """The logits (..., 3) at which the probabilities are `share` (..., 3)."""
        return np.log(share)


PARTS = ("encoder", "reader", "slice_blocks", "head")  # of a network, which a person may exchange
HEADS = {"ordinal": OrdinalHead, "softmax": SoftmaxHead}
POOLINGS = {"attention": SliceBlocks, "gru": SliceGru}


class Vit3d(nn.Module):
    """Images (B, 5, n, h, w), 0..255, at places (B, 5, n) in mm, NaN where there is no slice, n as the config's `slots`
    -> natural log-probabilities (B, 25, 3) in COLUMNS order. Parts not given are those that the config names."""

    def __init__(
        self, config: VitConfig, encoder: nn.Module | None = None, reader: nn.Module | None = None,
        slice_blocks: nn.Module | None = None, head: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config = config
        self.encoder = encoder or slice_encoder(config)
        self.reader = reader or PlaceReader(config, self.encoder.num_features)
        self.slice_blocks = slice_blocks or POOLINGS[config.pooling](config)
        self.dropout = nn.Dropout(config.dropout)
        self.head = head or HEADS[config.head](config)

    def forward(self, images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        split = self.config.split
        parts = [self.tokens(*part, scale) for scale, part in enumerate(zip(split(images), split(places), strict=True))]
        tokens, present = (torch.cat(values, dim=3).flatten(0, 2) for values in zip(*parts, strict=True))
        halves = self.slice_blocks(tokens, present)
        return self.head(halves.unflatten(0, (len(images), len(LEVELS), len(SIDES))))

    def tokens(self, images: torch.Tensor, places: torch.Tensor, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the reader makes of the images (B, 5, slots, n, h, w) of a scale."""
        there = ~places.isnan()  # the encoder, which may keep statistics, sees no missing slices
        seen = normalise(images, there)
        features = seen.new_zeros(*places.shape, self.encoder.num_features)
        if there.any():
            encoded = self.encoder(seen[there][:, None])
            features = features.to(encoded.dtype).masked_scatter(there[..., None], self.dropout(encoded))
        return self.reader(features, places, scale)


def normalise(images: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """Grey values 0..255 (..., n, h, w) with mean 0 and deviation about 1 over the last three axes, without slices that
    are not `present` (..., n). 8 grey levels keep a series that shows nothing from growing."""
    values, axes = images.float(), (-3, -2, -1)
    weight = torch.ones_like(values) if present is None else present[..., None, None].float().expand_as(values)
    total = weight.sum(dim=axes, keepdim=True).clamp(min=1)
    mean = (values * weight).sum(dim=axes, keepdim=True) / total
    variance = ((values - mean).square() * weight).sum(dim=axes, keepdim=True) / total
    return (values - mean) * weight / (variance.sqrt() + 8)


def save_vit(model: nn.Module, path: str | Path, fold: int, training: dict, studies: Sequence[int] = ()) -> None:
    """Write <path>.safetensors and beside it a .json that says what they are and how they came to be: the settings of
    the `training`, and the ids of its `studies`."""
    about = {
        "model": "vit3d",
        "network": type(model).__name__,
        "parts": {name: type(part).__name__ for name, part in model.named_children() if name in PARTS},
        "fold": fold,
        "config": asdict(model.config),
        "training": training,
        "studies": [int(study) for study in studies],
        "columns": list(COLUMNS),
        "severities": list(SEVERITIES),
    }
    save_weights(model, path, about, "timm")


def read_weights(path: str | Path, network: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The .json and the tensors of `save_vit`; ValueError if they do not belong together or hold another network."""
    about = described(Path(path))
    if about["columns"] != list(COLUMNS) or about["severities"] != list(SEVERITIES):
        raise ValueError(f"{path} grades other columns or severities than this version of lsdc_utils")
    if (name := about.get("network")) != network:
        raise ValueError(f"{path} holds a {name}, not a {network}: train again, or set published_method as in training")
    return about, load_file(path)


def load_vit(path: str | Path) -> Vit3d:
    """The network that `save_vit` wrote; ValueError as in `read_weights`, or where this module lacks a part's class."""
    about, tensors = read_weights(path, Vit3d.__name__)
    config, known = VitConfig(**about["config"]), globals()
    parts = {part: known.get(name) for part, name in about["parts"].items()}
    for part, kind in parts.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):  # a name in a file may call nothing else
            raise ValueError(f"{path}: add the class of its {part} {about['parts'][part]} to lsdc_utils/vit/model.py")
    encoder = parts.pop("encoder")(config)
    reader = parts.pop("reader")(config, encoder.num_features)
    model = Vit3d(config, encoder, reader, **{part: kind(config) for part, kind in parts.items()})
    model.load_state_dict(tensors)
    return model.eval()
