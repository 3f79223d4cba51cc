"""Encoded bytes of one image in, upright uint8 RGB out.

JPEG is decoded by libjpeg-turbo (`simplejpeg`), at half scale or less where the image is much larger than the canvas;
every other format, and a JPEG that libjpeg-turbo finds fault with, by Pillow. Whatever cannot be decoded is a
`DecodeError` with a reason, never a crash, and no image is allocated before its header passed the pixel limit.

Decisions, where several are usual:

- Transparency (alpha channel, palette or colour key) is laid over white.
- 16-bit samples are scaled by 255 / 65535. Float pixels are taken as [0, 1]; other ranges are refused, not guessed.
- CMYK is converted without its colour profile; Adobe's inverted CMYK comes out right.
- Of an animation, or a file of several pages, the first frame is used.

The resizer was chosen by measurement (photographs of 500x375 to 256, images/s on one core, decoding not included):
torch's uint8 antialiased bilinear 3740, Pillow bilinear 950, with `reducing_gap` 1000, Pillow box 1400; on 4000x3000
torch 250, Pillow 18. Torch differs from Pillow bilinear by 0.03 grey levels on average, box by 3.8.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from PIL import Image

if TYPE_CHECKING:
    from PIL import ImageFile

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
"""Pillow formats that are opened, raster formats only: Pillow hands EPS, for one, to an external program."""

REDUCED_AT_LEAST = 1.5
"""A JPEG decoded at reduced scale keeps at least so many times the canvas in both directions.

Measured on photographs, mean absolute difference from the full decode after the resize, in grey levels: 2.6 for 1,
1.3 for 1.5, 0.7 for 2. On 4000x3000 to 256 all three decode 70 to 80 images/s, the full decode 39. Scales between 1/2
and 1 are not used: they take longer than they save.
"""

_JPEG, _APP1 = b"\xff\xd8\xff", b"\xff\xe1"
_INKS = ("CMYK", "YCCK")
_EXIF_ORIENTATION = 0x0112
_WHITE = (255, 255, 255, 255)


class Scratch:
    """Memory for one decoded image after the other.

    An image of more than 128 kB would get fresh memory each time, and the page faults of it cost more than half of what
    decoding does (photographs of 500x375, one core: 585 images/s, 935 into memory that is used again).
    """

    LIMIT = 64 * 2**20
    """Larger images get memory of their own, which is given back."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def image(self, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3), C-contiguous, with anything in it; valid until the next call."""
        needed = height * width * 3
        if needed > self.LIMIT:
            return np.empty((height, width, 3), np.uint8)
        if needed > len(self._bytes):
            self._bytes = np.empty(needed, np.uint8)
        return self._bytes[:needed].reshape(height, width, 3)


class DecodeError(ValueError):
    """These bytes are not an image that can be used; the message is `KIND: DETAIL`, without the image's name."""


def decode(data: bytes, pixel_limit: int) -> np.ndarray:
    """Decode one image at its full size.

    Args:
        data: The encoded image.
        pixel_limit: Refuse images of more pixels, by their header, before anything is decoded.

    Returns:
        uint8 (height, width, 3), RGB, upright, contiguous.

    Raises:
        DecodeError: These bytes are not an image that can be used.
    """
    pixels, orientation, _ = _pixels(data, None, pixel_limit)
    return np.ascontiguousarray(_upright(pixels, orientation))


def decode_canvas(
    data: bytes | memoryview,
    canvas: int,
    pixel_limit: int,
    out: np.ndarray | None = None,
    scratch: Scratch | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode one image and squash all of it to a square, antialiased (bilinear).

    Args:
        data: The encoded image.
        canvas: Side S of the square in pixels.
        pixel_limit: Refuse images of more pixels, by their header, before anything is decoded.
        out: uint8 (S, S, 3), C-contiguous; written and returned if given.
        scratch: Where the image is decoded before it is squashed; give the same one for image after image.

    Returns:
        uint8 (S, S, 3), RGB, upright; and the upright height and width that the image had.

    Raises:
        DecodeError: These bytes are not an image that can be used. `out` may have been written in part.
    """
    if out is None:
        out = np.empty((canvas, canvas, 3), np.uint8)
    if isinstance(data, bytes) and _as_it_is(data, canvas, pixel_limit, out):
        return out, (canvas, canvas)
    pixels, orientation, size = _pixels(data, canvas, pixel_limit, out, scratch)
    if orientation != 1:
        out[...] = _upright(_resized(pixels, (canvas, canvas)), orientation)
    elif pixels is not out:
        _resize(pixels, out)
    return out, size


def _as_it_is(data: bytes, canvas: int, pixel_limit: int, out: np.ndarray) -> bool:
    """Decode an upright JPEG of the canvas's own size into `out`; False if these bytes are anything else.

    In a set of small images each is one, and Python would take as long for it as libjpeg-turbo: so this does no more
    than it must.
    """
    if not data.startswith(_JPEG):
        return False
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height != canvas or width != canvas or canvas * canvas > pixel_limit or colours in _INKS or _APP1 in data:
            return False
        simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    except ValueError:
        return False
    return True


def check(data: bytes, pixel_limit: int) -> tuple[int, int]:
    """Find out whether an image can be decoded, by decoding all of it at the smallest scale.

    Returns:
        The upright height and width.

    Raises:
        DecodeError: These bytes are not an image that can be used.
    """
    return _pixels(data, 1, pixel_limit)[2]


def shrink(data: bytes, short_side: int, pixel_limit: int) -> tuple[bytes, tuple[int, int]]:
    """Re-encode an image whose short side is longer than `short_side` pixels; another one is returned as it is.

    The aspect ratio is kept to the nearest pixel. The new encoding is JPEG of quality 95 with full colour resolution.

    Returns:
        The encoded image, and its upright height and width.

    Raises:
        DecodeError: These bytes are not an image that can be used.
    """
    pixels, orientation, (height, width) = _pixels(data, short_side, pixel_limit)
    short = min(height, width)
    if short <= short_side:
        return data, (height, width)
    height, width = (max(1, round(side * short_side / short)) for side in (height, width))
    stored = (width, height) if orientation >= 5 else (height, width)
    upright = np.ascontiguousarray(_upright(_resized(pixels, stored), orientation))
    return simplejpeg.encode_jpeg(upright, quality=95, colorspace="RGB", colorsubsampling="444"), (height, width)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if pixels.shape[:2] == size:
        return pixels
    resized = np.empty((*size, 3), np.uint8)
    _resize(pixels, resized)
    return resized


def _resize(pixels: np.ndarray, out: np.ndarray) -> None:
    """Squash (h, w, 3) into `out`, (H, W, 3); straight into it, which takes half the time of a result to be copied."""
    if pixels.shape == out.shape:
        out[...] = pixels
        return
    import torch  # a second or two that tasks which never resize do not pay

    image, resized = (torch.from_numpy(each).permute(2, 0, 1)[None] for each in (pixels, out))
    # what `interpolate` calls, which has no `out`; the name is the same since torch 1.11
    torch.ops.aten._upsample_bilinear2d_aa.out(image, resized.shape[2:], False, None, None, out=resized)  # noqa: SLF001


def _pixels(
    data: bytes | memoryview,
    canvas: int | None,
    pixel_limit: int,
    out: np.ndarray | None = None,
    scratch: Scratch | None = None,
) -> tuple[np.ndarray, int, tuple[int, int]]:
    """Decode to (h, w, 3), not yet upright, at a reduced scale where the canvas allows.

    Returns the pixels, the EXIF orientation still to be applied, and the upright full height and width.
    """
    if len(data) == 0:
        raise DecodeError("empty file")
    if data[:3] == _JPEG:
        found = _turbo(data, canvas, pixel_limit, out, scratch)
        if found is not None:
            return found
    try:
        return _pillow(data, canvas, pixel_limit)
    except DecodeError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's readers raise whatever the bytes led them to: OSError, SyntaxError, struct.error, KeyError, ...
        raise DecodeError(_reason(error)) from error


def _turbo(
    data: bytes | memoryview, canvas: int | None, pixel_limit: int, out: np.ndarray | None, scratch: Scratch | None
) -> tuple[np.ndarray, int, tuple[int, int]] | None:
    """Decode a JPEG with libjpeg-turbo; None if that is Pillow's to do (CMYK) or to judge (irregular or broken)."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours in _INKS:
        return None
    _check_pixels(height, width, pixel_limit)
    orientation = _jpeg_orientation(data)
    full = (width, height) if orientation >= 5 else (height, width)
    # The last pixel at a reduced scale covers padding too, which shows where there are few pixels.
    least = max(64, int(REDUCED_AT_LEAST * (canvas or 0)))
    target: np.ndarray | None = None
    options: dict[str, Any] = {}
    if canvas is not None and min(height, width) >= 2 * least:
        options = {"min_height": least, "min_width": least, "min_factor": 2}
    elif out is not None and orientation == 1 and height == width == canvas:
        target = out
    elif scratch is not None:
        target = scratch.image(height, width)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=target, **options)
    except ValueError:  # what is odd but whole (bytes between segments) Pillow reads; what is truncated it refuses
        return None
    return (pixels if target is None else target), orientation, full


def _jpeg_orientation(data: bytes | memoryview) -> int:
    """Return the EXIF (or XMP) orientation of a JPEG, 1 to 8; parsed by Pillow only where there may be any."""
    if not _has_app1(data):
        return 1
    try:
        image = _open(data)
    except Exception:  # noqa: BLE001 - Pillow's view of the header does not matter here: libjpeg-turbo could read its header, so it is an image
        return 1
    return _orientation(image)


def _has_app1(data: bytes | memoryview) -> bool:
    """Whether a JPEG has an APP1 segment before its image, as EXIF and XMP are; also if its segments are irregular.

    Looking for their words in all of the data would take a twentieth of the time of decoding.
    """
    at = 2
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1 : at + 2]
        if marker == b"\xda":  # start of scan
            return False
        if marker == b"\xe1":
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _pillow(data: bytes | memoryview, canvas: int | None, pixel_limit: int) -> tuple[np.ndarray, int, tuple[int, int]]:
    """Decode anything that Pillow can, as `_pixels` does."""
    image = _open(data)
    width, height = image.size
    _check_pixels(height, width, pixel_limit)
    if canvas is not None and image.format in ("JPEG", "MPO"):
        image.draft(None, (canvas, canvas))
    image.load()
    if image.format == "TIFF":  # load() has turned it already, and dropped the tag
        width, height = image.size
    orientation = _orientation(image)
    full = (width, height) if orientation >= 5 else (height, width)
    return _rgb(image), orientation, full


def _open(data: bytes | memoryview) -> ImageFile.ImageFile:
    """Read the header, as `Image.open` does but for its limit of pixels, which is global and not ours."""
    prefix = bytes(data[:16])
    reasons = []
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept(prefix) if accept is not None else True
        if isinstance(accepted, str):
            reasons.append(accepted)
        elif accepted:
            image = factory(io.BytesIO(data), "")
            assert image is not None
            return image
    if reasons:
        raise DecodeError(f"unsupported: {reasons[0]}")
    raise DecodeError(f"not an image: it starts with {prefix!r}, which no known format does")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - metadata that cannot be read must not cost the image
        return 1
    return value if value in range(1, 9) else 1


def _rgb(image: Image.Image) -> np.ndarray:
    """Convert any Pillow image to uint8 (h, w, 3)."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise DecodeError("unsupported: integer pixels beyond 0...65535; convert it to 8 or 16 bits")
        grey = ((deep.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        real = np.asarray(image)
        if not (np.isfinite(real).all() and real.min() >= 0 and real.max() <= 1):
            raise DecodeError("unsupported: float pixels outside [0, 1]; convert it to 8 or 16 bits")
        return np.repeat(np.rint(real * 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return np.array(image.convert("RGB"))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to (h, w, 3); a view, not a copy."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _check_pixels(height: int, width: int, limit: int) -> None:
    if height * width == 0:
        raise DecodeError(f"no pixels: {width}x{height}")
    if height * width > limit:
        raise DecodeError(f"too many pixels: {width}x{height}, more than the limit of {limit}")


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"truncated or corrupt: {words[:200] if words else type(error).__name__}"
