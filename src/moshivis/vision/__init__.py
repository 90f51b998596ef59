"""Pictures: safe reading, image encoders, and the projection to the tokens that the adapters read."""

from moshivis.vision.encoders import VisionEncoder
from moshivis.vision.image import image_to_tensor, read_image, resize_bicubic, to_pixels
from moshivis.vision.projection import ImageProjection, Vision

__all__ = [
    "ImageProjection",
    "Vision",
    "VisionEncoder",
    "image_to_tensor",
    "read_image",
    "resize_bicubic",
    "to_pixels",
]
