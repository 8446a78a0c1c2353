"""An image file's bytes -> pixels, with the rules for which files are accepted.

A file's format is determined by its content, not its name. Rejected files raise an error that
names them: no file is decoded in part. docs/bad_inputs.md lists the treatment of some 170 odd
inputs.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import (
    BmpImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from padim_jax.config.settings import Range
from padim_jax.errors import UserError

_Result = TypeVar("_Result")
FEWEST_LEVELS = 32  # of grey; a file that had more and keeps fewer is reported
LEVELS = "grey levels kept"  # key in a decoded image's `info`, if they are too few

# Larger images are rejected by their header: they would take up to 3.0 GB to decode (17 bytes
# per pixel, see `input_pipeline.DECODING`). The largest industrial cameras have 151 million.
MAX_PIXELS = 178_956_970

# Upper bounds of a decoder's memory in bytes: for a file of unknown size, and per pixel (WebP
# has three copies of four bytes).
_ROOM, _ROOM_PIXEL = 2**28, 16

MAX_SIDE = 65_500  # of a JPEG, in libjpeg

# Pillow would warn from half as many on, amid other output. If an application has lifted the
# limit, it stays lifted.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)

# Only these: some of Pillow's formats start other programs (EPS: Ghostscript).
_FORMATS: tuple[tuple[bytes, Callable[[io.BytesIO], ImageFile.ImageFile]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (rb"\xff\xd8\xff", JpegImagePlugin.jpeg_factory),
    (rb"BM", BmpImagePlugin.BmpImageFile),
    (rb"II[*+]\0|MM\0[*+]", TiffImagePlugin.TiffImageFile),
    (rb"RIFF....WEBP", WebPImagePlugin.WebPImageFile),
)
# Pillow's modes of at most 8 bits per channel that are converted to RGB.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# Its modes of 16-bit files. For colours it keeps only the high bytes.
_DEEP_MODES = ("I;16", "I;16B", "LA", "RGB", "RGBA", "RGBX")
# Names of Pillow's modes in `describe`.
_CHANNELS = {"1": "grey", "L": "grey", "LA": "grey and alpha", "P": "palette", "I;16": "grey"}
_CHANNELS |= {"I;16B": "grey", "I": "grey", "F": "grey", "PA": "palette and alpha"}
_BITS = {"1": "1 bit", "I": "32 bit", "F": "floating point"}
_NUMBERS = {"I": "32-bit or signed integers", "F": "floating point numbers"}
_FEW_BITS = re.compile("'(?:L;)?([124])'")  # a grey level, in Pillow's name for it
_WHITE_IS_ZERO, _PHOTOMETRIC = 0, 262  # of TIFF
_AGAIN = "copy it again from where it comes, or leave it out"

# Follows a segment of a JPEG: its entropy-coded data, if any, then the next marker.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_END_OF_IMAGE = 0xD9


def open_rgb(data: bytes, name: str, counts: Range = "full") -> Image.Image:
    """Decode an image file to RGB with 8 bits per channel.

    Of 16 bits the high byte is taken (value // 256), as libpng and OpenCV do, unless
    `counts` says otherwise. Transparent pixels are put on white, as viewers show them; grey
    levels and palettes are expanded, CMYK is converted by Pillow's plain formula;
    colour profiles (ICC, gamma) are ignored. An EXIF orientation is not applied, as in the
    PyTorch projects, except in TIFF, where Pillow applies it. See `open_image` for the rest.

    Args:
      data: the file's bytes.
      name: name of the file in error messages.
      counts: the two values of the file that map to 0 and 255; values between are mapped
        linearly and rounded, values outside are clipped.

    Returns:
      The image. If fewer than `FEWEST_LEVELS` grey levels are left of a file that has more, its
      `info` has their number under `LEVELS`.

    Raises:
      UserError: see `open_image`; or 16 bits of which only the lowest 12 are used, only
        transparent pixels, or counts that do not suit such a file.
    """
    image, deep = _open(data, name)
    return _to_rgb(image, deep, name, counts)


def from_pillow(image: Image.Image, name: str, counts: Range = "full") -> Image.Image:
    """Convert an image opened by Pillow, as `open_rgb` does its file.

    Args:
      image: the image, of any mode.
      name: name of the image in error messages.
      counts: see `open_rgb`.

    Returns:
      RGB, see `open_rgb`.

    Raises:
      UserError: see `open_rgb`.
    """
    _require_size(*image.size, name)
    layout = str(getattr(image, "tile", ""))
    whites = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    image = _trying(name, image.copy)
    deep = _require_mode(image, layout, whites, name)
    return _to_rgb(image, deep, name, counts)


def from_array(pixels: np.ndarray, name: str, counts: Range = "full") -> Image.Image:
    """Convert an array, as `open_rgb` does a file of the same values.

    Args:
      pixels: uint8 or uint16, (h, w) or (h, w, 1) grey, (h, w, 3) RGB or (h, w, 4) RGBA.
      name: name of the array in error messages.
      counts: see `open_rgb`.

    Returns:
      RGB, see `open_rgb`.

    Raises:
      TypeError: the array has another type or number of axes.
      UserError: see `open_rgb`; or the array is empty.
    """
    deep = pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2
    channels = pixels.shape[2:]
    if not (deep or pixels.dtype == np.uint8) or channels not in ((), (1,), (3,), (4,)):
        raise TypeError(
            f"{name}: an array {pixels.shape} of {pixels.dtype}; expected uint8 (or uint16) "
            "grey (height, width), RGB (height, width, 3) or RGBA (height, width, 4). Of "
            "floating point values from 0 to 1 make it by (255 * x).round().astype(np.uint8)"
        )
    if pixels.ndim < 2:
        raise TypeError(f"{name}: an array {pixels.shape}; expected (height, width, 3)")
    _require_size(pixels.shape[1], pixels.shape[0], name)
    if channels == (1,):
        pixels = pixels[..., 0]
    if deep and pixels.ndim == 3:  # as Pillow decodes such files
        pixels = pixels >> 8
    grey16 = deep and pixels.ndim == 2
    image = Image.fromarray(pixels.astype(np.uint16 if grey16 else np.uint8))
    return _to_rgb(image, deep, name, counts)


def grey_counts(data: bytes, name: str) -> np.ndarray:
    """Count the values of an image file: 65536 counts for 16 bits, else 256.

    Args:
      data: the file's bytes.
      name: name of the file in error messages.

    Returns:
      (65536,) or (256,) integers.

    Raises:
      UserError: see `open_image`; or the file has 16-bit colours.
    """
    image, deep = _open(data, name)
    if not deep:
        rgb = image.convert("RGB")
        return np.sum(np.reshape(rgb.histogram(), (3, 256)), axis=0)
    if image.mode not in ("I;16", "I;16B"):
        raise _no_range(name)
    counts = np.zeros(65536, np.int64)
    for row in np.asarray(image):  # row by row: NumPy's indices take 8 bytes per pixel
        counts += np.bincount(row, minlength=65536)
    return counts


def _to_rgb(image: Image.Image, deep: bool, name: str, counts: Range) -> Image.Image:
    alpha = _alpha(image, deep, name)
    if deep and image.mode in ("I;16", "I;16B"):
        rgb, levels = _from_16_bits(np.asarray(image), name, counts)
    elif deep:
        if counts != "full":
            raise _no_range(name)
        rgb = image.convert("RGB")
        if np.asarray(rgb).max() < 16:
            raise _too_dark(name, "")
        levels = len(_values(rgb)), 65536  # the number in the file is lost
    else:
        rgb, levels = image if image.mode == "RGB" else image.convert("RGB"), (256, 256)
        if counts != "full":
            rgb, levels = _from_8_bits(rgb, name, counts)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    kept, there = levels
    if kept < min(FEWEST_LEVELS, there):
        rgb.info[LEVELS] = kept
    return rgb


def _alpha(image: Image.Image, deep: bool, name: str) -> Image.Image | None:
    """Pop transparency from `info` and return each pixel's opacity; None if all are opaque."""
    transparent = image.info.pop("transparency", None)
    if "A" in image.getbands():
        alpha = image.getchannel("A")
    elif transparent is None:
        return None
    elif image.mode == "P":
        image.info["transparency"] = transparent
        alpha = image.convert("RGBA").getchannel("A")
        del image.info["transparency"]
    elif deep and image.mode not in ("I;16", "I;16B"):
        raise UserError(
            f"{name}: 16 bits a channel with a transparent colour, of which only the high byte "
            "is known; save it without transparency"
        )
    else:
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
        opaque = pixels != np.asarray(transparent, pixels.dtype)
        if opaque.ndim == 3:
            opaque = opaque.any(axis=2)
        alpha = Image.fromarray(opaque.astype(np.uint8) * np.uint8(255))
    least, most = alpha.getextrema()
    if most == 0:
        raise UserError(
            f"{name}: all pixels are transparent: there is nothing to see; save it without "
            "transparency"
        )
    return None if least == 255 else alpha


def _from_16_bits(
    pixels: np.ndarray, name: str, counts: Range
) -> tuple[Image.Image, tuple[int, int]]:
    """Convert grey values to 8 bits; return also the numbers of levels kept and present."""
    table = _table(counts, 65536)
    there = np.zeros(65536, bool)
    values = np.empty(pixels.shape, np.uint8)
    for row, out in zip(pixels, values, strict=True):  # NumPy's indices take 8 bytes per pixel
        there[row] = True
        out[:] = table[row]
    if counts == "full" and values.max() < 16:
        raise _too_dark(name, ", or set config.image.range=train or (0, 4095)")
    levels = len(np.unique(table[there])), int(there.sum())
    return Image.fromarray(values).convert("RGB"), levels


def _from_8_bits(
    rgb: Image.Image, name: str, counts: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int]]:
    if counts[1] > 255:
        raise UserError(
            f"{name}: 8 bits a channel, and config.image.range={counts} is of images of 16; "
            "expected images of one depth, or a range up to 255"
        )
    there, table = _values(rgb), _table(counts, 256)
    return rgb.point(table.tolist() * 3), (len(np.unique(table[there])), len(there))


def _values(rgb: Image.Image) -> np.ndarray:
    """Return the distinct values of all three channels."""
    return np.flatnonzero(np.reshape(rgb.histogram(), (3, 256)).any(axis=0))


def _table(counts: Range, size: int) -> np.ndarray:
    """Return the 8-bit value of each value of the file."""
    values = np.arange(size)
    if counts == "full":
        return (values * 256 // size).astype(np.uint8)
    low, high = counts
    return np.clip(np.rint((values - low) * 255 / (high - low)), 0, 255).astype(np.uint8)


def _too_dark(name: str, setting: str) -> UserError:
    return UserError(
        f"{name}: 16 bits a channel, with no value above 4095: what is left of it in 8 bits "
        "would be black. Cameras of 10 or 12 bits store such files; multiply the values by 64 "
        f"or 16 first, or save 8 bits{setting}"
    )


def _no_range(name: str) -> UserError:
    return UserError(
        f"{name}: colours of 16 bits a channel, of which only the high byte is read; expected "
        "grey images, or 8 bits a channel, for config.image.range. Save it so, or set "
        "config.image.range=full"
    )


def open_image(data: bytes, name: str) -> Image.Image:
    """Decode an image file of at most 8 bits per channel, in its stored mode.

    PNG, JPEG, BMP, TIFF and WebP are accepted. Further images in a camera's JPEG (previews:
    MPO) are ignored.

    Args:
      data: the file's bytes.
      name: name of the file in error messages.

    Returns:
      The decoded image.

    Raises:
      UserError: the file is not an image of these formats, is damaged or incomplete, has more
        than `MAX_PIXELS` pixels or a side above `MAX_SIDE`, has several frames or pages, more
        than 8 bits per channel, or colours other than RGB, CMYK or YCbCr.
    """
    image, deep = _open(data, name)
    if deep:
        raise UserError(
            f"{name}: more than 8 bits a channel (Pillow mode {image.mode}); save it with 8"
        )
    # Pillow would warn that a palette's transparency is dropped.
    image.info.pop("transparency", None)
    return image


def describe(data: bytes) -> tuple[tuple[int, int], str] | None:
    """Return height, width and mode ("RGB 8 bit") from a file's header; decode no pixel.

    None for an unreadable header: decoding reports what is wrong with it.
    """
    for sign, open_ in _FORMATS:
        if re.match(sign, data, re.DOTALL):
            try:
                image = open_(io.BytesIO(data))
            except Exception:  # Pillow's plugins raise arbitrary exceptions
                return None
            deep = image.mode.startswith("I;16") or ";16" in str(image.tile)
            bits = "16 bit" if deep else _BITS.get(image.mode, "8 bit")
            channels = _CHANNELS.get(image.mode, image.mode)
            return (image.height, image.width), f"{channels} {bits}"
    return None


def pixel_count(data: bytes) -> int:
    """Return an image file's number of pixels from its header; 0 if it cannot be decoded."""
    try:
        width, height = _header(data, "").size
    except UserError:
        return 0
    return width * height


def _header(data: bytes, name: str) -> ImageFile.ImageFile:
    """Return an image that is not decoded yet, of an allowed size."""
    if not data:
        raise UserError(f"{name}: an empty file, not an image; {_AGAIN}")
    opened = (open_ for sign, open_ in _FORMATS if re.match(sign, data, re.DOTALL))
    if (format_ := next(opened, None)) is None:
        raise UserError(
            f"{name}: not an image (it begins with {data[:8]!r}); expected PNG, JPEG, BMP, "
            "TIFF or WebP. Convert it, or leave it out"
        )
    image = _trying(name, lambda: format_(io.BytesIO(data)))
    _require_size(*image.size, name)
    return image


def _require_size(width: int, height: int, name: str) -> None:
    if not width * height:
        raise UserError(f"{name}: {width}x{height} pixels; expected at least one")
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name}: {width}x{height} pixels by its header; expected at most {MAX_PIXELS} "
            "pixels, so that no file takes all memory. Make it smaller, or cut it into parts"
        )
    if max(width, height) > MAX_SIDE:
        raise UserError(
            f"{name}: {width}x{height} pixels; expected at most {MAX_SIDE} a side, since "
            "pictures of results are JPEG files. Cut it into parts"
        )


def _open(data: bytes, name: str) -> tuple[Image.Image, bool]:
    """Return a decoded image, and whether its file has 16 bits per channel."""
    image = _header(data, name)
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise UserError(
            f"{name}: several frames or pages ({image.format}), of which only the first would "
            "be looked at; save each as an image of its own"
        )
    layout = str(image.tile)  # names the file's own depth; gone after load()
    whites = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO

    def load() -> None:
        if image.format == "PNG":
            _require_intact_png(data)
        elif image.format in ("JPEG", "MPO"):
            _require_whole_jpeg(data)
        image.load()

    width, height = image.size
    _trying(name, load, _ROOM_PIXEL * width * height)
    return image, _require_mode(image, layout, whites, name)


def _require_mode(image: Image.Image, layout: str, whites: bool, name: str) -> bool:
    """Return whether an image has 16 bits per channel.

    Args:
      image: decoded image.
      layout: Pillow's description of how its pixels are stored.
      whites: whether 0 is white, if the file can say so.
      name: name of the file in error messages.

    Returns:
      True for 16 bits.

    Raises:
      UserError: its mode is not accepted.
    """
    deep = image.mode.startswith("I;16") or ";16" in layout
    if deep and (image.mode not in _DEEP_MODES or (whites and image.mode == "I;16")):
        kind = "0 for white" if whites else f"signed or other values (Pillow mode {image.mode})"
        raise UserError(
            f"{name}: 16 bits a channel, with {kind}; expected grey or RGB, with 0 for black"
        )
    if not deep and image.mode not in _MODES:
        kind = _NUMBERS.get(image.mode, f"{image.mode} colours")
        raise UserError(
            f"{name}: pixels of {kind}; expected 8 or 16 bits a channel, grey or RGB. Convert "
            "it first: which values are black and white is not known here"
        )
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and (bits := _FEW_BITS.search(layout)):
        # Pillow expands grey levels to 8 bits, but not this one.
        image.info["transparency"] = transparent * 255 // (2 ** int(bits[1]) - 1)
    return deep


def _trying(name: str, action: Callable[[], _Result], room: int = _ROOM) -> _Result:
    """Run a Pillow call, whose plugins raise arbitrary exceptions on damaged files.

    Args:
      name: name of the file.
      action: function that opens or decodes it.
      room: bytes that it may need. Decoders in C report a lack of memory as a broken file
        (WebP: "could not create decoder object"): without that much memory, nothing is known
        about the file.

    Returns:
      The result of `action`.

    Raises:
      MemoryError: there may be too little memory.
      UserError: the file is broken.
    """
    try:
        return action()
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:
        bytes(room)  # allocated but not written; MemoryError if there is no more
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: the image cannot be decoded: {reason}; {_AGAIN}") from error


def _require_intact_png(data: bytes) -> None:
    """Check a PNG's checksums; Pillow does not check those of pixels."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        kind = data[at + 4 : at + 8]
        if zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError(
                f"it is damaged (wrong checksum of its {kind.decode('latin-1')!r})"
            )
        if kind == b"IEND":
            return
        at = end + 4
    raise ValueError("it is cut off")


def _require_whole_jpeg(data: bytes) -> None:
    """Check a JPEG's end; zeros in its place, as after a power cut, would decode to grey."""
    at = 2
    while marker := _MARKER.search(data, at):
        at = marker.end()
        if marker[1][0] == _END_OF_IMAGE:
            return
        if at + 2 > len(data):
            break
        at += struct.unpack_from(">H", data, at)[0]
    raise ValueError("it is cut off (no end of image)")
