"""Any timm network as a vision tower: `TimmTower` gives the last map, `TimmPyramid` a merged pyramid.

B images, C channels, (H, W) image size, (h, w) = (H, W) / stride. Weights are never downloaded.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medplib.errors import InputError, UnknownNameError
from medplib.vision.features import VisionFeatures

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]{0,40}")
_RESERVED = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        *("features_only", "feature_cls", "out_indices", "output_stride", "in_chans", "num_classes"),
        *("scriptable", "exportable", "no_jit", "model_name"),
    )
)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)  # bool is an int


def check_timm_name(model: str) -> str:
    """Return `model` if timm knows it, else raise UnknownNameError with close matches."""
    if not isinstance(model, str) or not re.fullmatch(r"[A-Za-z0-9_.\-]+", model) or not timm.is_model(model):
        close = difflib.get_close_matches(str(model), timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
        raise UnknownNameError(
            f"timm has no model named {model!r}.{hint} timm.list_models() lists all names."
        )
    return model


def check_model_args(model_args: Mapping[str, object] | None) -> dict[str, object]:
    """Return a copy of `model_args`, or raise InputError.

    Values may be numbers, bools, short plain words and lists of numbers, so that a configuration from
    elsewhere can neither name a file nor start a download.
    """
    checked: dict[str, object] = {}
    for key, value in (model_args or {}).items():
        if not isinstance(key, str) or key in _RESERVED:
            raise InputError(f"model_args may not set {key!r}; the tower sets it. Remove it.")
        if isinstance(value, list | tuple) and all(_is_number(item) for item in value):
            checked[key] = list(value)
        elif _is_number(value) or (isinstance(value, str) and _PLAIN.fullmatch(value)):
            checked[key] = value
        else:
            raise InputError(
                f"model_args[{key!r}] must be a number, a bool, a word of at most 40 letters, digits "
                f"and '_.-', or a list of numbers, got {value!r}."
            )
    return checked


def create_features(
    model: str,
    model_args: Mapping[str, object] | None,
    in_chans: int,
    out_indices: Sequence[int] | None = None,
) -> nn.Module:
    """A timm network with random weights that returns feature maps; UnknownNameError or InputError."""
    check_timm_name(model)
    arguments = check_model_args(model_args)
    if out_indices is not None:
        arguments["out_indices"] = tuple(out_indices)
    try:
        return timm.create_model(model, pretrained=False, features_only=True, in_chans=in_chans, **arguments)
    except Exception as error:  # whatever the constructor of that network raises
        raise InputError(
            f"timm cannot make features of {model!r} with model_args {dict(model_args or {})}: {error}"
        ) from error


def append_coordinates(image: Tensor) -> Tensor:
    """Append x and y, each from -1 (left, top) to 1 (right, bottom): (B, C, H, W) -> (B, C+2, H, W)."""
    height, width = image.shape[-2:]
    y = torch.linspace(-1, 1, height, device=image.device, dtype=image.dtype).view(1, 1, -1, 1)
    x = torch.linspace(-1, 1, width, device=image.device, dtype=image.dtype).view(1, 1, 1, -1)
    shape = (image.shape[0], 1, height, width)
    return torch.cat([image, x.expand(shape), y.expand(shape)], dim=1)  # (B, C+2, H, W)


def _run(network: nn.Module, images: Tensor, coordinates: bool) -> list[Tensor]:
    """images (B, 3, H, W) -> the network's maps, each (B, C, h, w), in the network's own precision."""
    if coordinates:
        images = append_coordinates(images)
    maps = network(images.to(next(network.parameters()).dtype))
    if getattr(network, "output_fmt", None) == "NHWC":  # hierarchical transformers such as Swin
        return [m.permute(0, 3, 1, 2) for m in maps]
    return list(maps)


class TimmTower(nn.Module):
    """The last feature map of a timm network, before a transformer's final norm; class tokens are left out.

        tower = TimmTower("vit_tiny_patch16_224", model_args={"img_size": 64})
        tower(torch.rand(1, 3, 64, 64)).grid   # (1, 192, 4, 4)

    `coordinates` appends x and y in [-1, 1] to the image as two more channels.
    """

    def __init__(
        self, model: str, *, model_args: Mapping[str, object] | None = None, coordinates: bool = False
    ) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.network = create_features(model, model_args, 5 if coordinates else 3, out_indices=(-1,))
        self.channels: int = self.network.feature_info.channels()[-1]
        self.stride: int = self.network.feature_info.reduction()[-1]
        self.skip_channels: tuple[int, ...] = ()

    def forward(self, images: Tensor) -> VisionFeatures:
        """images (B, 3, H, W), normalised -> grid (B, C, h, w)."""
        maps = _run(self.network, images, self.coordinates)
        return VisionFeatures(maps[-1])


def _normalization(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
        return nn.GroupNorm(groups, channels)
    raise InputError(f"norm must be 'group' or 'batch', got {norm!r}.")


class TopDownMerge(nn.Module):
    """Bring a coarser map to the size of a finer one and add them; then, with a `norm`, smooth by a 3x3 conv.

    (B, C_above, h, w) and (B, C_level, h', w') -> (B, out, h', w').
    """

    def __init__(self, above: int, level: int, out: int, norm: str | None) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(above, out, kernel_size=1) if above != out else nn.Identity()
        self.lateral = nn.Conv2d(level, out, kernel_size=1)
        self.smooth = nn.Identity() if norm is None else _smooth(out, norm)

    def forward(self, above: Tensor, level: Tensor) -> Tensor:
        above = F.interpolate(self.reduce(above), size=level.shape[-2:], mode="nearest")  # (B, out, h', w')
        return self.smooth(above + self.lateral(level))


def _smooth(channels: int, norm: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        _normalization(norm, channels),
        nn.GELU(),
    )


class TimmPyramid(nn.Module):
    """A timm network whose levels are merged from the deepest down, like a feature pyramid or a U-Net.

        tower = TimmPyramid("resnet10t", dim=128, model_args={"channels": [24, 48, 96, 160], "stem_width": 8})
        tower(torch.rand(1, 3, 256, 256))   # grid (1, 128, 16, 16); skips of stride 8, 4, 2

    The grid at `top_stride` has seen every deeper level of the network; each skip has seen the grid.
    `skip_strides` start at half of `top_stride` and halve; `skip_channels` are their widths. `norm` is
    'group' (independent of the batch) or 'batch'. `coordinates` appends x and y in [-1, 1] to the image.
    """

    def __init__(
        self,
        model: str,
        *,
        dim: int,
        model_args: Mapping[str, object] | None = None,
        coordinates: bool = False,
        top_stride: int = 16,
        skip_strides: Sequence[int] = (8, 4, 2),
        skip_channels: Sequence[int] = (64, 32, 16),
        norm: str = "group",
    ) -> None:
        super().__init__()
        skip_strides, skip_channels = tuple(skip_strides), tuple(skip_channels)[: len(skip_strides)]
        expected = tuple(top_stride >> i + 1 for i in range(len(skip_strides)))
        if skip_strides != expected or len(skip_channels) != len(skip_strides):
            raise InputError(
                f"skip_strides must halve from top_stride {top_stride}, here {expected}, with one "
                f"of skip_channels each; got {skip_strides} and {skip_channels}."
            )
        self.coordinates = coordinates
        self.network = create_features(model, model_args, 5 if coordinates else 3)
        info = self.network.feature_info
        channels = dict(zip(info.reduction(), info.channels(), strict=True))
        absent = [s for s in (top_stride, *skip_strides) if s not in channels]
        if absent:
            raise InputError(
                f"{model!r} has no features of stride {absent}; its strides are {sorted(channels)}."
            )

        self._strides = tuple(info.reduction())
        self.channels, self.skip_channels, self.stride = dim, skip_channels, top_stride
        deep = sorted((s for s in channels if s >= top_stride), reverse=True)  # e.g. 32, 16
        self.deepest = nn.Conv2d(channels[deep[0]], dim, kernel_size=1)
        self.deep_merges = nn.ModuleList(TopDownMerge(dim, channels[s], dim, norm=None) for s in deep[1:])
        self.smooth = _smooth(dim, norm)
        self.skip_merges = nn.ModuleList(
            TopDownMerge(above, channels[s], out, norm)
            for s, above, out in zip(skip_strides, (dim, *skip_channels), skip_channels, strict=False)
        )

    def forward(self, images: Tensor) -> VisionFeatures:
        """images (B, 3, H, W), normalised -> grid (B, dim, h, w), skips (B, C_i, h*2^(i+1), w*2^(i+1))."""
        maps = dict(zip(self._strides, _run(self.network, images, self.coordinates), strict=True))
        deep = sorted((s for s in maps if s >= self.stride), reverse=True)
        x = self.deepest(maps[deep[0]])  # (B, dim, H/deepest, W/deepest)
        for merge, stride in zip(self.deep_merges, deep[1:], strict=True):
            x = merge(x, maps[stride])
        grid = x = self.smooth(x)  # (B, dim, h, w)
        skips = []
        for i, merge in enumerate(self.skip_merges):
            x = merge(x, maps[self.stride >> i + 1])
            skips.append(x)
        return VisionFeatures(grid, tuple(skips))
