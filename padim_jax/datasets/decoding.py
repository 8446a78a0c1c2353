"""An image file's bytes -> pixels: what is taken for an image, and what is refused.

A file is known by its content, whatever its name says. What is refused has an error that names
it: no file is decoded in part. docs/bad_inputs.md lists what becomes of some 170 odd inputs.
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

from padim_jax.errors import UserError

_Result = TypeVar("_Result")

# Larger images are refused for what their header says: 0.7 GB when decoded. The largest
# industrial cameras have 151 million.
MAX_PIXELS = 178_956_970

# That a decoder may want, at most: bytes, for a file whose size is not known yet, and for a
# pixel (WebP has three copies of four bytes).
_ROOM, _ROOM_PIXEL = 2**28, 16

MAX_SIDE = 65_500  # of a JPEG, in libjpeg

# Pillow would warn of half as many, in the midst of other output. An application that has
# lifted the limit keeps it so.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)

# By these alone: of all that Pillow reads some start other programs (EPS: Ghostscript).
_FORMATS: tuple[tuple[bytes, Callable[[io.BytesIO], ImageFile.ImageFile]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (rb"\xff\xd8\xff", JpegImagePlugin.jpeg_factory),
    (rb"BM", BmpImagePlugin.BmpImageFile),
    (rb"II[*+]\0|MM\0[*+]", TiffImagePlugin.TiffImageFile),
    (rb"RIFF....WEBP", WebPImagePlugin.WebPImageFile),
)
# Pillow's modes of 8 bits a channel or less that it makes RGB of.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# Its modes of files of 16 bits. Of colours it has kept the high bytes alone.
_DEEP_MODES = ("I;16", "I;16B", "LA", "RGB", "RGBA", "RGBX")
_NUMBERS = {"I": "32-bit or signed integers", "F": "floating point numbers"}
_WHITE_IS_ZERO, _PHOTOMETRIC = 0, 262  # of TIFF
_AGAIN = "copy it again from where it comes, or leave it out"

# What follows a segment of a JPEG: its entropy-coded data, if any, then the next marker.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_END_OF_IMAGE = 0xD9


def open_rgb(data: bytes, name: str) -> Image.Image:
    """Decodes an image file to RGB of 8 bits a channel.

    Of 16 bits the high byte is taken (value // 256), as libpng and OpenCV do. Alpha is
    dropped, grey levels and palettes are expanded, CMYK is converted by Pillow's plain formula;
    colour profiles (ICC, gamma) are ignored. An EXIF orientation is not applied, as in the
    PyTorch projects, but in TIFF, where Pillow does. See `open_image` for the rest.

    Args:
      data: the file's bytes.
      name: how to call it in an error.

    Raises:
      UserError: see `open_image`; or 16 bits of which only the lowest 12 are used.
    """
    image, deep = _open(data, name)
    if deep:
        if image.mode in ("I;16", "I;16B"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        colours = image.convert("RGB")
        if np.asarray(colours).max() < 16:
            raise UserError(
                f"{name}: 16 bits a channel, with no value above 4095: what is left of it in 8 "
                "bits would be black. Cameras of 10 or 12 bits store such files; multiply the "
                "values by 64 or 16 first, or save 8 bits"
            )
        return colours
    return image.convert("RGB")


def open_image(data: bytes, name: str) -> Image.Image:
    """Decodes an image file of 8 bits a channel or less, in the mode that it is stored in.

    Taken are PNG, JPEG, BMP, TIFF and WebP. Of what a camera's JPEG holds beside its image
    (previews: MPO) nothing is looked at.

    Args:
      data: the file's bytes.
      name: how to call it in an error.

    Raises:
      UserError: not an image of these formats, a damaged or incomplete one, one of more than
        `MAX_PIXELS` or with a side of more than `MAX_SIDE`, of several frames or pages, of
        more than 8 bits a channel, or of colours that are not RGB, CMYK or YCbCr.
    """
    image, deep = _open(data, name)
    if deep:
        raise UserError(
            f"{name}: more than 8 bits a channel (Pillow mode {image.mode}); save it with 8"
        )
    return image


def _open(data: bytes, name: str) -> tuple[Image.Image, bool]:
    """A decoded image, and whether its file has 16 bits a channel."""
    if not data:
        raise UserError(f"{name}: an empty file, not an image; {_AGAIN}")
    opened = (open_ for sign, open_ in _FORMATS if re.match(sign, data, re.DOTALL))
    if (format_ := next(opened, None)) is None:
        raise UserError(
            f"{name}: not an image (it begins with {data[:8]!r}); expected PNG, JPEG, BMP, "
            "TIFF or WebP. Convert it, or leave it out"
        )
    image = _trying(name, lambda: format_(io.BytesIO(data)))
    width, height = image.size
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

    _trying(name, load, _ROOM_PIXEL * width * height)
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
    # Transparency is dropped; Pillow would warn that a palette's is.
    image.info.pop("transparency", None)
    return image, deep


def _trying(name: str, action: Callable[[], _Result], room: int = _ROOM) -> _Result:
    """Pillow's plugins raise whatever comes of the bytes that they find.

    Args:
      name: of the file.
      action: opens or decodes it.
      room: bytes that it may want. Decoders in C say of a want of memory that the file is
        broken (WebP: "could not create decoder object"): where there is no such room, nothing
        is known of the file.

    Raises:
      MemoryError: there may be too little memory.
      UserError: the file is broken.
    """
    try:
        return action()
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:
        bytes(room)  # asked for, not written to; a MemoryError if there is no more
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: the image cannot be decoded: {reason}; {_AGAIN}") from error


def _require_intact_png(data: bytes) -> None:
    """Pillow does not look at the checksums of pixels."""
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
    """Zeros in the place of a JPEG's end, as a power cut leaves them, decode to grey."""
    at = 2
    while marker := _MARKER.search(data, at):
        at = marker.end()
        if marker[1][0] == _END_OF_IMAGE:
            return
        if at + 2 > len(data):
            break
        at += struct.unpack_from(">H", data, at)[0]
    raise ValueError("it is cut off (no end of image)")
