"""What an image processor really does to an image, found by sending one through it: its values, and its size."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import TimmWrapperForImageClassification, TimmWrapperImageProcessor

from tscnc_hf.artifact.models.geometry import distance, measured
from tscnc_hf.method.adversarial.pixels import Geometry, Preprocessing, normalisation
from tscnc_hf.method.resizing import Resize
from tscnc_hf.method.wrappers import unwrapped


TOLERANCE = 1e-5  # of the largest value: both compute in float32
# steps of a transformers processor that act on values; any other "do_..." moves pixels
OF_VALUES = {
    "do_rescale", "do_normalize", "do_flip_channel_order", "do_convert_rgb", "do_grayscale", "do_map_pixels",
    "do_color_quantize",
}  # fmt: skip
RESIZE = "resize"  # in `config.tscnc`
SIDE = 32  # of the image that is sent: without the geometry any will do


def preprocessing(model: nn.Module, processing_class: object | None = None) -> Preprocessing:
    """
    How the model's inputs are made of pixels: what the image processor does to an image of any size, found by sending
    one through it. Without one, the config of a timm model in transformers' wrapper says all, as it does for stock
    transformers; other configs say how inputs are normalised (`normalisation`), and those of this library what was
    done to images of the size trained on. A plain module of timm takes images as they are.

    Its values: what `normalisation` finds, if an image that goes through without resize and crop comes out so. A
    processor that does more is reproduced where an input channel is a multiple of one channel of the image plus a
    constant: other factors and offsets, another order of channels, a mean that is subtracted from values of 0 to 255.

    Its geometry: a resize to some size (nearest, bilinear or bicubic; see `Resize` for how exactly) and a centre crop.
    It is looked at when the first image of a size comes; ValueError then where it is something else.

    Args:
        processing_class: the image processor; anything that is not called with images says how they are normalised,
            and a `Preprocessing` is what it says.

    Raises:
        ValueError: the processor does something else to values, such as making patches or mixing channels, or no image
            goes through it; nothing says how inputs are normalised; or it is the class of image processors, not one.
    """
    if isinstance(processing_class, Preprocessing):
        return processing_class
    processor = image_processor(processing_class)
    if isinstance(processor, type) and hasattr(processor, "from_pretrained"):
        raise ValueError(
            f"processing_class={processor.__name__} is a class, and says nothing of this model: give an image "
            f"processor, {processor.__name__}.from_pretrained(...) or {processor.__name__}(...) with its settings"
        )
    of_config = _of_config(model)
    if not acts(processor):
        said = normalisation(model, processing_class)
        if of_config is not None:
            own = preprocessing(model, of_config)
            return said._replace(geometry=own.geometry)
        return said._replace(geometry=_recorded(model))
    found = _values(model, processor)
    return found._replace(geometry=_geometry(processor, found, _channels(model, processor)))


def _of_config(model: nn.Module) -> TimmWrapperImageProcessor | None:
    """What stock transformers makes of the config of a timm model."""
    model = unwrapped(model)
    if isinstance(model, TimmWrapperForImageClassification) and model.config.pretrained_cfg:
        return TimmWrapperImageProcessor(model.config.pretrained_cfg, architecture=model.config.architecture)
    return None


def _recorded(model: nn.Module) -> Geometry | None:
    """Of a config that this library wrote: what was done to the images of one size."""
    kept = (getattr(getattr(unwrapped(model), "config", None), "tscnc", None) or {}).get(RESIZE)
    if kept is None:
        return None
    size, resize = tuple(kept["image_size"]), Resize.from_dict(kept["resize"])

    def geometry(height: int, width: int) -> Resize:
        if (height, width) != size:
            raise ValueError(
                f"the model's config says how images of {size[0]}x{size[1]} are resized, and these are "
                f"{height}x{width}: pass the image processor as processing_class"
            )
        return resize

    return geometry


def _geometry(processor: object, how: Preprocessing, channels: int) -> Geometry:
    found: dict[tuple[int, int], Resize | None] = {}

    def geometry(height: int, width: int) -> Resize | None:
        if (height, width) not in found:
            found[height, width] = _resize_of(processor, how, (height, width), channels)
        return found[height, width]

    return geometry


def _resize_of(processor: object, how: Preprocessing, size: tuple[int, int], channels: int) -> Resize | None:
    """
    Raises:
        ValueError: an image of this size does not go through, or is changed in another way than a `Resize` does.
    """
    name, (height, width) = type(processor).__name__, size
    image = _noise(height, width, channels)
    given = _stacked(image)
    try:
        made = _pixel_values(processor, image).double()
    except Exception as error:  # whatever a processor raises
        raise ValueError(
            f"the image processor {name} cannot process an image of {height}x{width} ({type(error).__name__}: {error})"
        ) from error
    if made.shape == given.shape and _agree(_apply(how, given), made):
        return None
    resize = measured(_settings(processor), how, given, made, TOLERANCE) if made.ndim == 3 else float("inf")
    if isinstance(resize, float):
        output = "x".join(map(str, made.shape[1:]))
        raise ValueError(
            f"the image processor {name} makes {output} of an image of {height}x{width}, and by no resize (nearest, "
            f"bilinear, bicubic) and centre crop that attacks could go through: the closest is {255 * resize:.1f}/255 "
            f"off. Bring the images to {output} first (image_size), or pass an image processor that only resizes, "
            "crops at the centre, rescales and normalises; nearest is the same in all libraries for whole multiples"
        )
    return resize


def _settings(processor: object) -> dict[str, object]:
    return dict(getattr(processor, "data_config", None) or processor.to_dict())


def _values(model: nn.Module, processor: object) -> Preprocessing:
    name, channels = type(processor).__name__, _channels(model, processor)
    image = _noise(SIDE, SIDE, channels)
    darker = image.point(lambda value: value // 3)  # which an offset of the image's own mean would give away
    given = torch.cat([_stacked(image), _stacked(darker)], dim=1)
    try:
        flat = _without_geometry(processor)
        made = torch.cat([_pixel_values(flat, one) for one in (image, darker)], dim=-2)
    except Exception as error:  # whatever a processor raises
        raise ValueError(
            f"the image processor {name} cannot process a {'grey' if channels == 1 else 'RGB'} image of "
            f"{image.width}x{image.height} ({type(error).__name__}: {error}): pass one of an image classifier"
        ) from error
    if made.shape != given.shape:
        raise ValueError(
            f"the image processor {name} makes values of shape {tuple(made.shape)} of images {tuple(given.shape)}: "
            "attacks need inputs (channels, height, width) that are its pixels, normalised. Pass an image processor "
            "that only resizes, crops, rescales and normalises"
        )
    try:
        said = normalisation(model, processor)
    except ValueError:
        said = None
    if said is not None and _agree(_apply(said, given), made):
        return said
    found = _measured(given, made)
    if found is None or not _agree(_apply(found, given), made):
        raise ValueError(
            f"the image processor {name} does more to an image than rescaling each channel (with resize and crop left "
            "out, what it makes is no multiple of the pixels plus a constant, channel by channel): attacks cannot "
            "reproduce it. Pass an image processor that only resizes, crops, rescales and normalises"
        )
    alike = len(set(found.mean)) == 1 and len(set(found.std)) == 1 and found.order is None
    return Preprocessing(found.mean[:1], found.std[:1]) if alike else found


def image_processor(processing_class: object | None) -> object | None:
    """The image processor itself, also of a processor for images and text."""
    return getattr(processing_class, "image_processor", processing_class)


def acts(processor: object) -> bool:
    """Whether it is called with images; anything else only says how they are normalised, as a model's config does."""
    return callable(processor) and not isinstance(processor, type)


def agrees(processor: object, how: Preprocessing, shape: tuple[int, int, int]) -> bool:
    """Whether images of `shape` (c, h, w) come out of an image processor as `how` says."""
    channels, *size = shape
    image, resize = _noise(*size, channels), how.resize(*size)
    made, given = _pixel_values(image_processor(processor), image).double(), _stacked(image)
    if resize is None:
        return made.shape == given.shape and _agree(_apply(how, given), made)
    off, allowed = distance(resize, how, given, made, TOLERANCE)
    return off <= allowed


class ModelGeometry:
    """
    An image as the model's own image processor resizes and crops it, as uint8 pixels: its output, the normalisation
    undone. A function from a PIL image to uint8 (c, h, w).

    Attributes:
        identity: what tells it from others, plain JSON types.

    Raises:
        ValueError: see `preprocessing`.
    """

    def __init__(self, model: nn.Module, processing_class: object):
        self.processor = image_processor(processing_class)
        mean, std, order, _ = preprocessing(model, processing_class)
        self._mean, self._std = (np.asarray(values, dtype=np.float64)[:, None, None] for values in (mean, std))
        self._order = None if order is None else np.argsort(order)
        says = _settings(self.processor)
        kept = ("size", "crop_size", "crop_pct", "crop_mode", "resample", "interpolation", "input_size", "do_resize")
        made = {name: says[name] for name in (*kept, "do_center_crop", "do_pad") if says.get(name) is not None}
        self.identity = {"image_processor": type(self.processor).__name__} | {k: _json(v) for k, v in made.items()}

    @property
    def text(self) -> str:
        """What it does, in words."""
        of = ", ".join(f"{name} {value}" for name, value in self.identity.items() if name != "image_processor")
        return f"resized and cropped as by the model's {self.identity['image_processor']} ({of})"

    def __call__(self, image: Image.Image) -> np.ndarray:
        values = _pixel_values(self.processor, image).numpy() * self._std + self._mean
        values = values if self._order is None else values[self._order]
        return np.round(values * 255).clip(0, 255).astype(np.uint8)


def _json(value):
    if isinstance(value, (str, bool, float, type(None))):
        return value
    if isinstance(value, int):  # an enumeration of PIL is one, too
        return int(value)
    if isinstance(value, (list, tuple)):
        return [_json(part) for part in value]
    return {str(key): _json(part) for key, part in dict(value).items()}


def _channels(model: nn.Module, processor: object) -> int:
    config = getattr(model, "config", None)
    for source in (getattr(config, "pretrained_cfg", None), getattr(processor, "data_config", None)):
        if source and "input_size" in source:
            return source["input_size"][0]
    mean = getattr(processor, "image_mean", None)
    return getattr(config, "num_channels", None) or (1 if isinstance(mean, Sequence) and len(mean) == 1 else 3)


def _without_geometry(processor: object) -> object:
    if data := getattr(processor, "data_config", None):  # timm's, which then leaves an image of this size alone
        size = [data["input_size"][0], SIDE, SIDE]
        return type(processor)(dict(data) | {"crop_pct": 1.0, "crop_mode": "center", "input_size": size})
    flat = copy.copy(processor)
    for name in dir(processor):
        if name.startswith("do_") and name not in OF_VALUES and getattr(processor, name) is True:
            setattr(flat, name, False)
    return flat


def _pixel_values(processor: object, image: Image.Image) -> torch.Tensor:
    """What the processor makes of one image, without the batch dimension."""
    return torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"][0])


def _noise(height: int, width: int, channels: int) -> Image.Image:
    """Noise, darkest and brightest values among it: of one channel grey, else RGB."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    noise[0, 0], noise[-1, -1] = 0, 255
    return Image.fromarray(noise[..., 0] if channels == 1 else noise)


def _stacked(image: Image.Image) -> torch.Tensor:
    """float64 (c, h, w) in [0, 1]."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _apply(how: Preprocessing, pixels: torch.Tensor) -> torch.Tensor | None:
    if not {len(how.mean), len(how.std)} <= {1, len(pixels)}:
        return None
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in how[:2])
    return ((pixels if how.order is None else pixels[list(how.order)]) - mean) / std


def _agree(ours: torch.Tensor | None, theirs: torch.Tensor) -> bool:
    return ours is not None and bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp(min=1.0))


def _measured(pixels: torch.Tensor, made: torch.Tensor) -> Preprocessing | None:
    """The multiple and the constant of each channel, by least squares; None where one depends on none or several."""
    columns = torch.cat([pixels.flatten(1), torch.ones(1, pixels[0].numel(), dtype=torch.float64)]).T
    solution = torch.linalg.lstsq(columns, made.double().flatten(1).T).solution  # (channels + 1, channels)
    factors, constants = solution[:-1].T, solution[-1]
    order = factors.abs().argmax(-1)
    chosen = factors.gather(-1, order[:, None]).squeeze(-1)
    if sorted(order.tolist()) != list(range(len(pixels))) or (chosen.abs() < TOLERANCE).any():
        return None
    mean = [round(value, 9) + 0.0 for value in (-constants / chosen).tolist()]
    std = [float(f"{value:.7g}") for value in (1 / chosen).tolist()]
    return Preprocessing(mean, std, None if order.tolist() == sorted(order.tolist()) else order.tolist())
