from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from jem.data.decode import DecodeError, check, decode, decode_canvas, shrink

LIMIT = 1_000_000
EXIF_ORIENTATION = 0x0112


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A picture without noise, so that lossy formats and other resizers stay close; different in every corner."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [x, y, (x + y) / 2, 1 - x]
    return np.round(np.stack(planes[:channels], -1) * 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


RGB = Image.fromarray(smooth(24, 40))
GREY = Image.fromarray(smooth(24, 40, 1)[..., 0])


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("PPM", {}, 0),
        ("JPEG2000", {}, 0),
        ("JPEG", {"quality": 95}, 12),
        ("JPEG", {"quality": 95, "progressive": True}, 12),
        ("JPEG", {"quality": 95, "subsampling": 2}, 12),
    ],
)
def test_colour_images_of_each_format_come_out_as_they_went_in(kind, options, tolerance):
    pixels = decode(encoded(RGB, kind, **options), LIMIT)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert difference(pixels, np.asarray(RGB)) <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF"])
def test_grey_images_come_out_with_three_equal_channels(kind):
    pixels = decode(encoded(GREY, kind), LIMIT)
    assert difference(pixels, np.asarray(GREY)[..., None].repeat(3, 2)) <= (4 if kind in ("JPEG", "WEBP") else 0)


def test_palette_images_come_out_in_their_colours():
    palette = RGB.quantize(16)
    assert len(np.unique(np.asarray(palette))) > 4
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert difference(decode(encoded(palette, kind), LIMIT), np.asarray(palette.convert("RGB"))) == 0


def test_one_bit_images_come_out_black_and_white():
    bits = Image.fromarray(np.indices((16, 24)).sum(0) % 3 == 0)
    for kind in ("PNG", "TIFF", "BMP"):
        expected = np.where(np.asarray(bits), 255, 0).astype(np.uint8)[..., None].repeat(3, 2)
        assert difference(decode(encoded(bits, kind), LIMIT), expected) == 0


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = np.linspace(0, 65535, 24 * 40).astype(np.uint16).reshape(24, 40)
    expected = np.round(deep / 257)[..., None].repeat(3, 2).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        assert difference(decode(encoded(Image.fromarray(deep), kind), LIMIT), expected) == 0


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, for kinds that Pillow does not write."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    chunks = [(name, body) for name, body in [*parts, (b"IEND", b"")]]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def test_sixteen_bit_colour_is_scaled():
    deep = (smooth(8, 12).astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    assert difference(decode(png(12, 8, 16, 2, rows), LIMIT), smooth(8, 12)) <= 1


def test_transparency_is_laid_over_white():
    clear = np.dstack([smooth(16, 16), np.full((16, 16), 128, np.uint8)])
    clear[:8, :, 3] = 0
    expected = clear[..., :3] * (clear[..., 3:] / 255) + 255 * (1 - clear[..., 3:] / 255)
    image = Image.fromarray(clear)
    for data in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True, exact=True), encoded(image, "TIFF")):
        assert difference(decode(data, LIMIT), np.round(expected).astype(np.uint8)) <= 1


def test_a_transparent_palette_colour_becomes_white():
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(1, (0, 0, 4, 8))
    for kind in ("PNG", "GIF"):
        pixels = decode(encoded(palette, kind, transparency=0), LIMIT)
        assert (pixels[:, :4] == [200, 100, 50]).all()
        assert (pixels[:, 4:] == 255).all()


def test_grey_with_alpha_and_colour_keys_are_laid_over_white():
    grey = Image.merge("LA", (Image.new("L", (6, 6), 40), Image.new("L", (6, 6), 0)))
    assert (decode(encoded(grey, "PNG"), LIMIT) == 255).all()
    keyed = encoded(Image.new("RGB", (6, 6), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (decode(keyed, LIMIT) == 255).all()


def test_cmyk_comes_out_in_its_colours_whether_inverted_or_not():
    # Ink on white paper: no ink is white, full cyan has no red, full black is black.
    inks = np.zeros((8, 32, 4), np.uint8)
    inks[:, 8:16, 0] = inks[:, 16:24, 1] = inks[:, 24:, 3] = 255
    expected = np.array([[255, 255, 255], [0, 255, 255], [255, 0, 255], [0, 0, 0]], np.uint8).repeat(8, 0)
    image = Image.fromarray(inks, "CMYK")
    inverted = encoded(image, "JPEG", quality=100)  # Pillow writes what Photoshop does: inverted, with Adobe's marker
    assert b"Adobe" in inverted
    assert difference(decode(inverted, LIMIT)[4], expected) <= 8
    assert difference(decode(encoded(image, "TIFF"), LIMIT)[4], expected) == 0
    square, size = decode_canvas(inverted, 8, LIMIT)
    assert square.shape == (8, 8, 3)
    assert size == (8, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(RGB, kind, exif=exif, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert upright.shape[:2] == ((40, 24) if orientation >= 5 else (24, 40))
    assert difference(decode(data, LIMIT), upright) <= 2
    square, size = decode_canvas(data, 20, LIMIT)
    assert size == upright.shape[:2]
    resized = Image.fromarray(upright).resize((20, 20), Image.Resampling.BILINEAR)
    assert difference(square, np.asarray(resized)) <= 3
    assert check(data, LIMIT) == size


def test_broken_metadata_does_not_cost_the_image():
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data, LIMIT).shape == (24, 40, 3)


def test_animations_and_pages_give_the_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert difference(decode(data, LIMIT), np.asarray(frames[0])) == 0


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    canvas=st.integers(8, 40),
    kind=st.sampled_from(["PNG", "JPEG"]),
)
@settings(max_examples=60)
def test_any_size_is_squashed_to_the_canvas_and_keeps_its_geometry_in_size(height, width, canvas, kind):
    image = Image.fromarray(smooth(height, width))
    data = encoded(image, kind, **({"quality": 98, "subsampling": 0} if kind == "JPEG" else {}))
    out = np.zeros((canvas, canvas, 3), np.uint8)
    square, size = decode_canvas(data, canvas, LIMIT, out=out)
    assert square is out
    assert size == (height, width)
    assert check(data, LIMIT) == (height, width)
    plain, _ = decode_canvas(data, canvas, LIMIT)
    assert (plain == out).all()
    expected = Image.fromarray(decode(data, LIMIT)).resize((canvas, canvas), Image.Resampling.BILINEAR)
    assert np.abs(out.astype(int) - np.asarray(expected)).mean() <= (1 if kind == "PNG" else 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_of_the_canvas_size_is_not_resampled(kind):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    square, size = decode_canvas(data, 32, LIMIT, out=np.empty((32, 32, 3), np.uint8))
    assert size == (32, 32)
    assert (square == decode(data, LIMIT)).all()


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_of_the_canvas_size_is_turned_and_converted_whatever_holds_its_bytes(mode, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    image = Image.fromarray(smooth(40, 40)).convert(mode)
    data = encoded(image, "JPEG", quality=95, **({"exif": exif} if orientation > 1 else {}))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    for held in (data, memoryview(data)):
        square, size = decode_canvas(held, 40, LIMIT)
        assert size == (40, 40)
        assert difference(square, upright) <= 2
        with pytest.raises(DecodeError, match="too many pixels"):
            decode_canvas(held, 40, 40 * 40 - 1)


def test_a_large_photograph_is_close_to_its_full_decode():
    data = encoded(Image.fromarray(smooth(900, 1200)), "JPEG", quality=95)
    square, size = decode_canvas(data, 128, 2_000_000)
    assert size == (900, 1200)
    expected = Image.fromarray(decode(data, 2_000_000)).resize((128, 128), Image.Resampling.BILINEAR)
    assert difference(square, np.asarray(expected)) <= 4


def test_a_photograph_equals_what_pillow_makes_of_it(shared_data):
    for file in sorted((shared_data / "photos").iterdir())[::40]:
        data = file.read_bytes()
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        assert difference(decode(data, LIMIT * 20), np.asarray(image)) <= 8  # another libjpeg's upsampling
        square, size = decode_canvas(data, 256, LIMIT * 20)
        assert size == (image.height, image.width)
        expected = np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(square - expected).mean() < 2.5


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is text, not an image", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # Pillow would run Ghostscript
        (b"\xff\xd8\xff", "truncated or corrupt"),
        (b"\xff\xd8\xff" + bytes(100), "truncated or corrupt"),
        (b"\x89PNG\r\n\x1a\n", "truncated or corrupt"),
        (encoded(RGB, "PNG")[:-30], "truncated or corrupt"),
        (encoded(RGB, "JPEG")[:-60], "truncated or corrupt"),
        (encoded(RGB, "JPEG", progressive=True)[:-60], "truncated or corrupt"),
        (encoded(RGB, "GIF")[:60], "truncated or corrupt"),
        (encoded(RGB, "WEBP")[:60], "truncated or corrupt"),
        (encoded(RGB, "TIFF")[:200], "truncated or corrupt"),
        (encoded(RGB, "BMP")[:200], "truncated or corrupt"),
        (encoded(Image.fromarray(np.full((4, 4), 7.5, np.float32)), "TIFF"), "unsupported"),
    ],
)
def test_what_is_no_whole_image_is_refused_with_a_reason(data, reason):
    for attempt in (
        lambda: decode(data, LIMIT),
        lambda: decode_canvas(data, 16, LIMIT),
        lambda: check(data, LIMIT),
        lambda: shrink(data, 8, LIMIT),
    ):
        with pytest.raises(DecodeError, match=reason):
            attempt()


def test_decompression_bombs_are_refused_by_their_header():
    huge = png(60_000, 60_000, 8, 2, b"")
    jpeg = bytearray(encoded(RGB, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    for data in (huge, bytes(jpeg)):
        with pytest.raises(DecodeError, match="too many pixels: 60000x60000"):
            decode_canvas(data, 32, LIMIT)


def test_the_pixel_limit_is_exact_and_may_exceed_pillows():
    data = encoded(RGB, "PNG")
    assert check(data, 24 * 40) == (24, 40)
    with pytest.raises(DecodeError, match="too many pixels"):
        check(data, 24 * 40 - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert check(data, LIMIT) == (24, 40)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on what it finds odd but can read
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
@settings(max_examples=150)
def test_damaged_bytes_give_an_image_or_a_decode_error_and_nothing_else(data, kind):
    whole = bytearray(encoded(RGB, kind))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    reason = None
    try:
        square, _ = decode_canvas(cut, 16, LIMIT)
    except DecodeError as error:
        reason = str(error)
    if reason is None:
        assert square.shape == (16, 16, 3)
    else:
        assert reason
        assert "\n" not in reason


def test_shrinking_keeps_the_aspect_and_small_images_as_they_are():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    large = encoded(Image.fromarray(smooth(120, 301)), "JPEG", quality=95, exif=exif)
    data, size = shrink(large, 60, LIMIT)
    assert size == (150, 60)
    pixels = decode(data, LIMIT)
    assert pixels.shape == (150, 60, 3)
    upright = Image.fromarray(decode(large, LIMIT)).resize((60, 150), Image.Resampling.BILINEAR)
    assert difference(pixels, np.asarray(upright)) <= 8
    small = encoded(RGB, "PNG")
    assert shrink(small, 24, LIMIT) == (small, (24, 40))
