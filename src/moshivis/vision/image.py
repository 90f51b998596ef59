"""From a stranger's picture to the pixels of an image encoder: safe decoding, resizing, normalising.

Sizes, resampling and normalisation follow the released preprocessing (reference facts, model.md section 6).
"""

from __future__ import annotations

import io
import math
import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor
from torch.nn import functional as F

from moshivis.config import VisionConfig
from moshivis.errors import InputError
from moshivis.files import read_limited

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 100_000_000

# Formats that Pillow decodes by itself and recognises by their first bytes. EPS is left out because it runs another
# program, ICO and ICNS because the size in their header is not that of the picture inside.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PIXTRAL_MEAN = (0.48145466, 0.4578275, 0.40821073)
_PIXTRAL_STD = (0.26862954, 0.26130258, 0.27577711)


def read_image(
    source: str | os.PathLike[str] | bytes | Image.Image,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode a picture from a file, its bytes or an opened Pillow image, as an upright RGB image.

    EXIF orientation is applied, transparency is flattened on white, of an animation the first frame is taken. Size
    limits are checked before any pixel is decoded.
    Raises InputError if there is no such file, if it is not a picture, damaged, or beyond the limits.
    """
    if isinstance(source, Image.Image):
        name, image = "this picture", source
    else:
        name = "this picture" if isinstance(source, bytes | bytearray | memoryview) else os.fspath(source)
        image = _open(read_limited(source, max_bytes=max_bytes, noun="picture"), name, max_pixels)
    _check_size(image, name, max_pixels)
    try:
        image.load()
        return _to_rgb(_apply_orientation(_scale_deep_tiff(image)))
    except Exception as error:  # damaged data makes decoders raise anything, not only OSError
        raise InputError(f"{name} is damaged or of a kind that cannot be decoded: {error}") from error


def _open(content: bytes, name: str, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a picture that can be decoded (PNG, JPEG, WebP, GIF, BMP, TIFF …)") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit; it does not tell the size.
        raise InputError(
            f"{name} has too many pixels, the limit is {max_pixels / 1e6:g} megapixels; make it smaller"
        ) from error
    except Exception as error:
        raise InputError(f"{name} is damaged: {error}") from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height == 0:
        raise InputError(f"{name} has no pixels: {width} x {height}")
    if width * height > max_pixels:
        megapixels = width * height / 1e6
        raise InputError(
            f"{name} has too many pixels: {width} x {height} = {megapixels:.1f} megapixels, the limit is "
            f"{max_pixels / 1e6:g}; make it smaller"
        )


def _scale_deep_tiff(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, black is 0: Pillow gives 12 bits as they are, and does not invert 16 where white is 0."""
    if not isinstance(image, TiffImageFile) or not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float32)
    white = 2.0 ** image.tag_v2[BITSPERSAMPLE][0] - 1
    values = values if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) else white - values
    return Image.fromarray(np.rint(values * (65535 / white)).astype(np.uint16))  # upright already, as TIFFs load


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a picture with damaged EXIF data is still a picture
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGB", layer.size, "white")
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey of more than 8 bits to uint8. `I` and `F` do not say their range: it follows from the largest value."""
    values = np.nan_to_num(values.astype(np.float32))
    if mode.startswith("I;16"):
        white = 65535.0
    else:
        largest = values.max()
        white = 1.0 if mode == "F" and largest <= 1 else 255.0 if largest <= 255 else 65535.0
    return np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)


def image_to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 [3, H, W], contiguous."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def resize_bicubic(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialias on uint8, [3, H, W] -> [3, height, width], the aspect ratio being what it becomes.

    In fixed point, rounded to 8 bits between the horizontal and the vertical pass: the pixels that the released model
    was trained with. Resizing in float would differ by up to 12 levels. Computed on the CPU.
    """
    _check_uint8(image)
    batch = image[None].cpu().contiguous()
    return F.interpolate(batch, size=(height, width), mode="bicubic", antialias=True, align_corners=False)[0]


def siglip_pixels(image: Tensor, size: int) -> Tensor:
    """uint8 [3, H, W] -> float32 [3, size, size] in -1..1. The picture is squashed to a square."""
    return (resize_bicubic(image, size, size).float() / 255 - 0.5) / 0.5


def pixtral_size(height: int, width: int, *, longest_edge: int, patch_size: int) -> tuple[int, int]:
    """Height and width that Pixtral's preprocessing gives a picture: within `longest_edge`, whole patches."""
    ratio = max(height, width) / longest_edge
    if ratio > 1:
        height, width = math.ceil(height / ratio), math.ceil(width / ratio)
    return math.ceil(height / patch_size) * patch_size, math.ceil(width / patch_size) * patch_size


def pixtral_pixels(image: Tensor, *, longest_edge: int, patch_size: int) -> Tensor:
    """uint8 [3, H, W] -> normalised float32 [3, h, w] with the sizes of `pixtral_size`; keeps the aspect ratio."""
    _check_uint8(image)
    height, width = pixtral_size(*image.shape[1:], longest_edge=longest_edge, patch_size=patch_size)
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    # Two calls fix the order of the passes, which differs between versions of Pillow.
    picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    mean = torch.tensor(_PIXTRAL_MEAN).view(3, 1, 1)
    std = torch.tensor(_PIXTRAL_STD).view(3, 1, 1)
    return (image_to_tensor(picture).float() / 255 - mean) / std


def to_pixels(image: Image.Image | Tensor, config: VisionConfig, size: int | None = None) -> Tensor:
    """RGB image or uint8 [3, H, W] -> the encoder's float32 input [3, h, w].

    `size` is the side of the square, in pixels, to which the picture is squashed first. None: SigLIP takes its native
    size, Pixtral keeps the picture's shape.
    """
    tensor = image_to_tensor(image) if isinstance(image, Image.Image) else image
    if config.encoder == "siglip":
        return siglip_pixels(tensor, size or config.image_size)
    if size is not None:
        tensor = resize_bicubic(tensor, size, size)
    return pixtral_pixels(tensor, longest_edge=config.longest_edge or config.image_size, patch_size=config.patch_size)


def _check_uint8(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image must be uint8 [3, H, W], not {image.dtype} {list(image.shape)}")
