"""Pictures of every kind that we promise to read, those that we refuse, and the pixels that encoders get."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moshivis.config import VisionConfig
from moshivis.errors import InputError
from moshivis.vision.image import image_to_tensor, pixtral_size, read_image, resize_bicubic, to_pixels

WIDTH, HEIGHT = 48, 32
CORNERS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]  # top left, top right, bottom left, bottom right


def corners() -> Image.Image:
    """Four quarters of different colours: shows any wrong turn or flip."""
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for colour, (x, y) in zip(CORNERS, [(0, 0), (24, 0), (0, 16), (24, 16)], strict=True):
        image.paste(colour, (x, y, x + 24, y + 16))
    return image


def encode(image: Image.Image, container: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, container, **options)
    return buffer.getvalue()


def level(image: Image.Image, place: tuple[int, int]) -> tuple[int, ...]:
    pixel = image.getpixel(place)
    assert isinstance(pixel, tuple)
    return tuple(int(value) for value in pixel)


def assert_corners(image: Image.Image, tolerance: int = 0) -> None:
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    for colour, place in zip(CORNERS, [(8, 8), (40, 8), (8, 24), (40, 24)], strict=True):
        assert np.abs(np.subtract(level(image, place), colour)).max() <= tolerance, (place, colour)


def png(width: int, height: int, *, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG made by hand, for kinds that Pillow cannot write. `rows` is the filtered, uncompressed data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("container", "tolerance"),
    [
        ("PNG", 0),
        ("JPEG", 12),
        ("WEBP", 24),
        ("GIF", 0),
        ("BMP", 0),
        ("TIFF", 0),
        ("PPM", 0),
        ("JPEG2000", 12),
        ("AVIF", 24),
        ("QOI", 0),
    ],
)
def test_common_formats(tmp_path: Path, container: str, tolerance: int) -> None:
    content = encode(corners(), container)
    assert_corners(read_image(content), tolerance)
    file = tmp_path / "picture.of.wrong.name.txt"
    file.write_bytes(content)
    assert_corners(read_image(file), tolerance)
    assert_corners(read_image(str(file)), tolerance)
    assert_corners(read_image(Image.open(file)), tolerance)


@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    ("orientation", "camera"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
        (9, None),
    ],
)
def test_exif_orientation_is_undone(container: str, orientation: int, camera: Image.Transpose | None) -> None:
    stored = corners() if camera is None else corners().transpose(camera)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_corners(read_image(encode(stored, container, exif=exif)), tolerance=24)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_do_not_spoil_a_picture() -> None:
    assert_corners(read_image(encode(corners(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffjunk")), tolerance=12)


def test_alpha_is_flattened_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((1, 1), (200, 0, 0, 255))
    image.putpixel((2, 2), (200, 0, 0, 128))
    flat = read_image(encode(image, "PNG"))
    assert level(flat, (0, 0)) == (255, 255, 255)
    assert level(flat, (1, 1)) == (200, 0, 0)
    assert np.abs(np.subtract(level(flat, (2, 2)), (227, 127, 127))).max() <= 1


def test_grey_with_alpha() -> None:
    image = Image.new("LA", (2, 1), (50, 0))
    image.putpixel((1, 0), (50, 255))
    flat = read_image(encode(image, "PNG"))
    assert [level(flat, (x, 0)) for x in (0, 1)] == [(255, 255, 255), (50, 50, 50)]


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    plain = read_image(encode(image, "PNG"))
    assert [level(plain, (x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 0)]
    transparent = read_image(encode(image, "PNG", transparency=0))
    assert [level(transparent, (x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 0)]
    half = read_image(encode(image, "PNG", transparency=bytes([128, 255])))
    assert np.abs(np.subtract(level(half, (0, 0)), (132, 137, 142))).max() <= 1


def test_a_transparent_colour_without_palette() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    flat = read_image(encode(image, "PNG", transparency=(1, 2, 3)))
    assert [level(flat, (x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_black_and_white(mode: str) -> None:
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), 255)
    assert [level(read_image(encode(image, "PNG")), (x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def test_16_bit_grey_keeps_its_shades() -> None:
    values = np.array([[0, 257 * 100, 65535, 300]], dtype=np.uint16)
    content = png(4, 1, bits=16, colour_type=0, rows=b"\0" + values.astype(">u2").tobytes())
    for source in (content, encode(Image.fromarray(values), "TIFF")):
        image = read_image(source)
        assert [level(image, (x, 0))[0] for x in range(4)] == [0, 100, 255, 1]


@pytest.mark.parametrize("bits, white_is", [(12, 1), (16, 0), (16, 1)])
def test_grey_tiffs_of_scanners(bits: int, white_is: int) -> None:
    """12 bits a pixel, packed; or white where the number is 0."""
    top = 2**bits - 1
    values = [0, top, round(top * 0.4), top]
    data = struct.pack("<4H", *values)
    if bits == 12:
        data = b"".join(
            ((first << 12) + second).to_bytes(3, "big") for first, second in zip(values[::2], values[1::2], strict=True)
        )
    strip, orientation = 8 + 2 + 10 * 12 + 4, 3
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: white_is, 273: strip, 274: orientation, 277: 1, 278: 1}
    tags[279] = len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    image = read_image(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data)
    shades = [level(image, (x, 0))[0] for x in (3, 2, 1, 0)]  # orientation 3 is upside down
    assert shades == ([0, 255, 102, 255] if white_is else [255, 0, 153, 0])


def test_16_bit_colour() -> None:
    values = np.array([[[0, 65535, 257 * 77]]], dtype=np.uint16)
    image = read_image(png(1, 1, bits=16, colour_type=2, rows=b"\0" + values.astype(">u2").tobytes()))
    assert level(image, (0, 0)) == (0, 255, 77)


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_grey(top: float) -> None:
    values = np.array([[0.0, 0.4 * top, top, np.nan]], dtype=np.float32)
    image = read_image(encode(Image.fromarray(values), "TIFF"))
    assert [level(image, (x, 0))[0] for x in range(4)] == [0, 102, 255, 0]


def test_cmyk_jpeg() -> None:
    image = read_image(encode(corners().convert("CMYK"), "JPEG", quality=100))
    assert_corners(image, tolerance=12)


@pytest.mark.parametrize("container", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(container: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("blue", "white")]
    content = encode(corners(), container, save_all=True, append_images=frames, duration=80)
    assert_corners(read_image(content), tolerance=24)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a system that does not tell")
def test_a_300_megapixel_picture_is_refused_in_little_memory() -> None:
    width, height = 20_000, 15_000
    content = png(width, height, bits=1, colour_type=0, rows=(b"\0" + bytes(width // 8)) * height)
    assert len(content) < 1_000_000
    reading = subprocess.run([sys.executable, "-c", READING], input=content, capture_output=True, check=True)
    refused, more = json.loads(reading.stdout)
    assert "too many pixels, the limit is 100 megapixels" in refused and more < 30_000


# In a process of its own: the most memory that one ever took does not fall again.
READING = """
import json, re, sys
from pathlib import Path
from moshivis.errors import InputError
from moshivis.vision.image import read_image

def most():  # KiB
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def refused(content):
    try:
        read_image(content)
    except InputError as error:
        return str(error)

content = sys.stdin.buffer.read()
refused(bytes(10))  # what reading takes at all
before = most()
print(json.dumps([refused(content), most() - before]))
"""


def test_the_pixel_limit_is_ours_also_below_pillows() -> None:
    content = encode(Image.new("1", (1000, 1001)), "PNG")
    assert read_image(content).size == (1000, 1001)
    for source in (content, Image.open(io.BytesIO(content)), Image.new("L", (1000, 1001))):
        with pytest.raises(InputError, match=r"1000 x 1001 = 1\.0 megapixels, the limit is 1;"):
            read_image(source, max_pixels=1_000_000)


def test_warnings_turned_into_errors_are_still_an_input_error() -> None:
    width, height = 12_000, 10_000  # where Pillow only warns
    content = png(width, height, bits=1, colour_type=0, rows=(b"\0" + bytes(width // 8)) * height)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="too many pixels"):
            read_image(content)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[Path | bytes, str]] = [
        (tmp_path / "missing.png", "missing.png: no such file"),
        (tmp_path, "is a folder"),
        (b"", "is empty"),
        (b"a sentence", "is not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage", "is not a picture"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "is not a picture"),
        (png(0, 5, bits=8, colour_type=0, rows=b""), "picture"),
        (encode(corners(), "PNG") + bytes(2000), "limit for a picture"),
    ]
    for source, message in cases:
        with pytest.raises(InputError, match=message):
            read_image(source, max_bytes=2000)
    with pytest.raises(InputError, match="has no pixels: 0 x 5"):
        read_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("container", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_truncated_picture_is_refused(container: str) -> None:
    rng = np.random.default_rng(0)
    content = encode(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), container)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(InputError):
            read_image(content[: int(len(content) * share)])


@settings(max_examples=200, deadline=None)
@given(
    container=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "QOI", "AVIF"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_an_input_error(container: str, changes: list[tuple[float, int]]) -> None:
    content = bytearray(encode(corners(), container))
    for place, value in changes:
        content[int(place * len(content))] = value
    try:
        image = read_image(bytes(content), max_pixels=1_000_000)
    except InputError:
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= 1_000_000


def test_the_callers_image_is_left_alone() -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    read_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (200, 0, 0, 0)


def test_resize_to_the_same_size_changes_nothing() -> None:
    image = torch.randint(0, 256, (3, 30, 21), dtype=torch.uint8)
    assert torch.equal(resize_bicubic(image, 30, 21), image)


def test_resize_antialiases() -> None:
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = resize_bicubic(stripes, 8, 8).int()
    assert ((small - 127).abs() <= 8).all()


def test_resize_does_not_depend_on_the_memory_layout() -> None:
    image = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8)
    interleaved = image.permute(2, 0, 1)
    assert torch.equal(resize_bicubic(interleaved, 28, 42), resize_bicubic(interleaved.contiguous(), 28, 42))


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8)])
def test_resize_takes_only_bytes_in_planes(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        resize_bicubic(image, 4, 4)


def test_siglip_pixels_cover_minus_one_to_one() -> None:
    config = VisionConfig(image_size=56)
    pixels = to_pixels(corners(), config)
    assert pixels.shape == (3, 56, 56)
    assert pixels.dtype == torch.float32
    assert (pixels.min().item(), pixels.max().item()) == (-1.0, 1.0)
    assert to_pixels(image_to_tensor(corners()), config, 70).shape == (3, 70, 70)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 80), (64, 80)),
        ((40, 70), (48, 80)),
        ((130, 200), (64, 96)),
        ((96, 97), (96, 96)),
        ((1, 5000), (16, 96)),
        ((5000, 1), (96, 16)),
    ],
)
def test_pixtral_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert pixtral_size(*size, longest_edge=96, patch_size=16) == expected
    config = VisionConfig(encoder="pixtral", patch_size=16, image_size=96)
    image = torch.full((3, *size), 255, dtype=torch.uint8)
    pixels = to_pixels(image, config)
    assert pixels.shape == (3, *expected)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.93033625, 2.07488384, 2.14588670]))
    assert to_pixels(image, config, 64).shape == (3, 64, 64)
