"""Pixels in [0, 1] on one side, logits on the other: preprocessing belongs to the model's side of every attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tscnc_hf.method.resizing import Resize
from tscnc_hf.method.wrappers import unwrapped


LogitsFn = Callable[[Tensor], Tensor]
Geometry = Callable[[int, int], Resize | None]


def pixel_quantity(name: str, value: float | str, norm: str = "linf") -> float:
    """
    A number in pixel units, given as a float or as a fraction such as "8/255".

    Args:
        name (`str`): the option's name, for the error message.
        value (`float` or `str`): in [0, 1]; any length for `norm="l2"`, where an image may move by more than 1.

    Raises:
        ValueError: not a number, or outside [0, 1] (usually a value in 0-255 units).
    """
    try:
        if isinstance(value, str) and "/" in value:
            numerator, denominator = value.split("/")
            number = float(numerator) / float(denominator)
        elif isinstance(value, bool):
            raise TypeError("a truth value")
        else:
            number = float(value)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f'{name}={value!r} is not a number; give a fraction such as "8/255" or a float') from error
    if norm == "l2" and 0.0 <= number < float("inf"):
        return number
    if not 0.0 <= number <= 1.0:
        hint = f'; for 0-255 units write {name}="{value}/255"' if 1.0 < number <= 255.0 else ""
        raise ValueError(f"{name}={value} is outside [0, 1]: pixels are in [0, 1]{hint}")
    return number


class Preprocessing(NamedTuple):
    """
    What a model's inputs are of an image in [0, 1]: it is resized and cropped, then input channel c is
    (pixels[order[c]] - mean[c]) / std[c].

    Attributes:
        mean, std: one value a channel, or one for all, in pixel units.
        order: the image's channel behind each input channel; None where they are as in the image (RGB).
        geometry: from the (height, width) of an image to its `Resize`, or None where it goes in as it is. None where
            every image does.
    """

    mean: list[float]
    std: list[float]
    order: list[int] | None = None
    geometry: Geometry | None = None

    def resize(self, height: int, width: int) -> Resize | None:
        """What is done to the size of such an image; None where nothing is."""
        return None if self.geometry is None else self.geometry(height, width)


def normalisation(model: nn.Module, processing_class: object | None = None) -> Preprocessing:
    """
    How the model's inputs are said to be normalised, no word of their size. An image processor may do otherwise: see
    `tscnc_hf.artifact.models.preprocessing`.

    Looked up in this order: the image processor (`image_mean`, `image_std`, or timm's `data_config`),
    `model.config.pretrained_cfg` (timm), `model.config.tscnc` (written by this library), `model.pretrained_cfg` (of a
    model of timm itself).

    Raises:
        ValueError: none of them says.
    """
    model = unwrapped(model)
    if getattr(processing_class, "do_normalize", None) is False:
        return Preprocessing([0.0], [1.0])
    config, own = getattr(model, "config", None), ("image_mean", "image_std")
    sources = [{name: getattr(processing_class, name, None) for name in own}]
    sources += [getattr(processing_class, "data_config", None)]
    sources += [getattr(config, name, None) for name in ("pretrained_cfg", "tscnc")]
    sources += [getattr(model, "pretrained_cfg", None)]
    for source in filter(None, sources):
        mean, std = (source.get(name, source.get(f"image_{name}")) for name in ("mean", "std"))
        if mean is not None and std is not None:
            return Preprocessing(_listed(mean), _listed(std), source.get("channel_order"))
    raise ValueError(
        f"cannot tell how {type(model).__name__} normalises its input: pass processing_class= an image processor with "
        "image_mean and image_std (mean 0, std 1 if the model takes pixels in [0, 1] as they are)"
    )


def _listed(values: float | Sequence[float]) -> list[float]:
    return [float(values)] if isinstance(values, (int, float)) else list(values)


def pixel_inputs(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], order: Sequence[int] | None = None,
    geometry: Geometry | None = None,
) -> Tensor:  # fmt: skip
    """
    The inputs (b, c, H, W) that a model gets of images in [0, 1], float (b, c, h, w), differentiable in the pixels.
    Arguments: those of `Preprocessing`.
    """
    resize = None if geometry is None else geometry(*pixels.shape[-2:])
    late = resize is not None and resize.only_picks  # then the smaller image is normalised, with the same values
    pixels = pixels if resize is None or late else resize(pixels)
    if order is not None:
        pixels = torch.stack([pixels[:, channel] for channel in order], dim=1)
    inputs = (pixels - _per_channel(tuple(mean), pixels.device)) / _per_channel(tuple(std), pixels.device)
    return resize(inputs) if late else inputs


def pixel_logits(
    model: Callable, mean: Sequence[float], std: Sequence[float], order: Sequence[int] | None = None,
    geometry: Geometry | None = None,
) -> LogitsFn:  # fmt: skip
    """
    Wrap a classifier as a function of pixels.

    Args:
        model (`nn.Module`, or a function like one): takes what `pixel_inputs` makes of images, which a module gets in
            the dtype of its parameters; returns logits (b, k) or an output with `.logits`.
        mean, std, order, geometry: how inputs are made of pixels, as in `Preprocessing`.

    Returns:
        A function from pixels in [0, 1], float (b, c, h, w), to float32 logits (b, k), differentiable in the pixels.
    """
    how = (tuple(mean), tuple(std), None if order is None else list(order), geometry)

    def forward(pixels: Tensor) -> Tensor:
        inputs = pixel_inputs(pixels, *how)
        if isinstance(model, nn.Module) and (dtype := parameter_dtype(model)) is not None:
            inputs = inputs.to(dtype)
        # fp32 at least: the sign of a half-precision loss gradient can underflow to zero
        return logits_of(model(inputs)).float()

    return forward


def parameter_dtype(model: nn.Module) -> torch.dtype | None:
    """The floating dtype of the model's first parameter that has one."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)


def logits_of(output: object) -> Tensor:
    """
    The logits (b, k) that a model has returned: a tensor, `.logits`, the entry "logits" of a dict, or the one tensor
    of two dimensions in a tuple, which may hold features beside.

    Raises:
        ValueError: none or several.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, (tuple, list)):
        matrices = [part for part in found if isinstance(part, Tensor) and part.ndim == 2]
        found = matrices[0] if len(matrices) == 1 else None
    if isinstance(found, Tensor):
        return found
    shown = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        shown += f" with {', '.join(map(str, output)) or 'nothing'}"
    elif isinstance(output, (tuple, list)):
        shown += f" of {', '.join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in output)}"
    raise ValueError(
        f"the model returns {shown}: logits (batch, classes) are needed, as a tensor, as .logits, or as the one "
        "matrix of a tuple. Wrap the model so that it returns them"
    )


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, c, 1, 1), copied to a device once: a copy from the host in every step would stall it."""
    with torch.inference_mode(False):  # else a first use inside inference mode could never be differentiated later
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside (no batch-norm update, no dropout); every module's own mode is back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
