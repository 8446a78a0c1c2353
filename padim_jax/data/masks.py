"""Ground-truth masks of all kinds -> defect pixels, by one rule.

Data sets store masks in many ways: 0 and 255 (MVTec AD, KolektorSDD2), 0 and 1 (ShanghaiTech
Campus), 1, 2, 3 ... for kinds of defects (VisA), 255, 254, 253 ... for the same (MVTec LOCO),
grey levels where someone resized a mask or saved it as JPEG. The rule:

- If the values other than 0 are all above 127, or all at most 127, all nonzero pixels are
  defect pixels. (More than 32 values that are all at most 127 are rejected.)
- If they lie on both sides, they are grey levels: soft edges, or JPEG's noise. Defect pixels
  are those above 127. But if the values up to 127 fill areas of their own, as regions
  numbered 60, 120, 180, 240 do, all nonzero pixels are defect pixels: if more than half of the
  pixels of 1 to 127 lie in 3x3 squares of one value, and there are at most 32
  values. In between (a tenth to a half, or more values) the mask is rejected.

The value of a colour is its brightest channel, so that black is normal. The rule is applied
to a mask as it is stored, before it is resized (with nearest). Masks in which 0 marks the
defect are inverted afterwards (`Inverted`).
"""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from PIL import Image, ImageChops

from padim_jax.data.decoding import open_image
from padim_jax.data.files import (
    image_files,
    is_image,
    read_file,
    require_file,
    shown,
    unreadable,
)
from padim_jax.data.records import Record, Source
from padim_jax.errors import UserError
from padim_jax.system.paths import Path

# Limits for the fraction of pixels of 1 to 127 in 3x3 squares of one value, in masks with
# brighter pixels as well. Measured on blobs and strokes: JPEG of quality 10 to 100 and resized
# or blurred (sigma up to 4) masks 0.00; numbered blobs 0.8 to 1.
_SOFT, _FLAT = 0.1, 0.5
_MOST_VALUES = 32  # of numbered regions


def read(record: Record) -> bytes | None:
    """Return the encoded mask of a record: an image that `decode` takes.

    Args:
      record: its mask may be an image file, a folder of such files, each marking a part of the
        defect, or with `mask_frame` an .npy file of masks (n, h, w), of which only that frame
        is read.

    Returns:
      An image file's own bytes; for the other forms a PNG with 255 for defect pixels and 0
      elsewhere; None without a mask.

    Raises:
      UserError: a file cannot be read, or is not a mask of the expected form.
    """
    if record.mask is None:
        return None
    if record.mask_frame is not None:
        return _encode(_frame(record.mask, record.mask_frame))
    if is_image(record.mask):
        return read_file(record.mask)
    return _encode(_union(record.mask))


def decode(data: bytes, name: str) -> Bool[np.ndarray, "h w"]:
    """Return the defect pixels of an encoded mask.

    Args:
      data: an image file's bytes.
      name: name of the file in error messages.

    Returns:
      (h, w), True for defect pixels.

    Raises:
      UserError: the file is not an image of 8 bits per channel, or see `defects`.
    """
    return defects(open_image(data, name), name)


def defects(mask: Image.Image, name: str) -> Bool[np.ndarray, "h w"]:
    """Return the defect pixels of a mask by the rule in the module's docstring.

    Args:
      mask: mask of any mode of at most 8 bits per channel.
      name: name of the file in error messages.

    Returns:
      (h, w), True for defect pixels.

    Raises:
      UserError: the values fit neither grey levels nor numbered regions, or some pixels are
        transparent.
    """
    levels = _levels(mask, name)
    counts = levels.histogram()
    low, high = sum(counts[1:128]), sum(counts[128:])
    pixels = np.asarray(levels)
    if not low:
        return pixels > 127
    values = [value for value, count in enumerate(counts) if value and count]
    few = len(values) <= _MOST_VALUES
    if not high:
        if few:
            return pixels > 0
        raise _unclear(name, values, "none above 127 and too many for numbered regions")
    share = np.count_nonzero(_in_squares(pixels) & (pixels > 0) & (pixels <= 127)) / low
    if share <= _SOFT:
        return pixels > 127
    if share > _FLAT and few:
        return pixels > 0
    raise _unclear(name, values, f"of those up to 127 {share:.0%} lie in areas of one value")


def label_regions(mask: Bool[np.ndarray, "h w"]) -> tuple[Int32[np.ndarray, "h w"], int]:
    """Return a mask's 8-connected regions, numbered from 1 (0 elsewhere), and their count."""
    from scipy import ndimage  # slow to import; only masks need it

    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3, 3), bool), labels)
    return labels, int(labels.max(initial=0))


@dataclasses.dataclass(frozen=True)
class Inverted:
    """Source whose stored masks mark the defect by 0.

    Attributes:
      source: images, and masks as stored.
    """

    source: Source

    @property
    def records(self) -> Sequence[Record]:
        """Return the records of the images."""
        return self.source.records

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        """Return the encoded image of `records[index]`, and its mask inverted.

        Raises:
          UserError: a file cannot be read, or see `decode`.
        """
        image, mask = self.source.read(index)
        if mask is None:
            return image, None
        return image, _encode(~decode(mask, shown(self.records[index].mask or "")))


class FullCheck:
    """Detector of masks that mark most of an image as a defect: possibly inverted ones."""

    def __init__(self, masks: int):
        """Start with the total number of masks."""
        self._masks = masks
        self._found: list[str] = []
        self._covered = 0

    def add(self, name: str, defect: int, pixels: int) -> None:
        """Check a mask.

        Args:
          name: name of the mask.
          defect: number of its defect pixels.
          pixels: number of all its pixels.

        Raises:
          UserError: more than a tenth of all masks are more than half defect.
        """
        if 2 * defect <= pixels:
            return
        self._found.append(name)
        self._covered += defect == pixels
        if len(self._found) * 10 <= self._masks:
            return
        background = ""
        if self._covered:
            background = f"; {self._covered} of them have no pixel of the value 0 at all"
        raise UserError(
            f"{name}: {defect / pixels:.0%} of this mask are not 0, and so a defect; that is "
            f"more than half of the image, as in {len(self._found)} of {self._masks} masks or "
            f"more{background}. If 0 marks the defect, set "
            "--config.dataset.inverted_masks=yes; if the background has another colour, save "
            "the masks with 0 for normal pixels; if the defects are that large, set "
            "--config.dataset.inverted_masks=no"
        )


def _levels(mask: Image.Image, name: str) -> Image.Image:
    """Return the mask as one channel of 8 bits."""
    if "A" in mask.getbands() and mask.getchannel("A").getextrema() != (255, 255):
        raise UserError(
            f"{name}: a mask with transparent pixels (Pillow mode {mask.mode}); expected black "
            "for normal pixels and another colour for a defect's, none of them transparent"
        )
    if mask.mode in ("1", "L"):
        return mask.convert("L")
    red, green, blue = mask.convert("RGB").split()
    return ImageChops.lighter(ImageChops.lighter(red, green), blue)


def _in_squares(pixels: UInt8[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Return the pixels in a 3x3 square of one value (any of the nine that contain them)."""
    height, width = pixels.shape
    middle = pixels[:, 1:-1]
    rows = (middle == pixels[:, :-2]) & (middle == pixels[:, 2:])
    columns = (middle[1:-1] == middle[:-2]) & (middle[1:-1] == middle[2:])
    centres = rows[:-2] & rows[1:-1] & rows[2:] & columns
    squares = np.zeros(pixels.shape, bool)
    for down in range(3):
        for right in range(3):
            squares[down : height - 2 + down, right : width - 2 + right] |= centres
    return squares


def _unclear(name: str, values: list[int], why: str) -> UserError:
    shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
    return UserError(
        f"{name}: a mask of the {len(values)} values {shown} (at most {values[-1]}) beside 0: "
        f"{why}, so they are neither clearly grey levels nor clearly numbered regions; save it "
        "with 0 for normal pixels and 255 for a defect's"
    )


def _union(folder: Path) -> Bool[np.ndarray, "h w"]:
    first, *others = image_files(folder)
    union = decode(read_file(first), shown(first)).copy()
    for path in others:
        mask = decode(read_file(path), shown(path))
        if mask.shape != union.shape:
            raise UserError(
                f"{path}: a mask of {_size(mask)} pixels beside {first.name} of {_size(union)} "
                "in the same folder; expected masks of one image, of equal sizes"
            )
        union |= mask
    return union


def _frame(path: Path, number: int) -> Bool[np.ndarray, "h w"]:
    """Return one mask of a video's.

    Read by hand, not memory-mapped, which object stores do not support.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if header is None:
                raise ValueError(f"version {version} of the format is for other arrays")
            try:
                shape, columns_first, dtype = header(file)
            # NumPy parses Python syntax there, which raises arbitrary exceptions.
            except Exception as error:
                raise ValueError(f"its header: {error}") from error
            _check(path, number, shape, dtype)
            _, height, width = shape
            start, size = file.tell(), height * width * dtype.itemsize
            needed = size * (shape[0] if columns_first else number + 1)
            if start + needed > file.seek(0, io.SEEK_END):
                raise ValueError("it is cut off")  # before memory is allocated for it
            if columns_first:  # a frame's pixels are spread over the file
                file.seek(0)
                frame = np.lib.format.read_array(file, allow_pickle=False)[number]
            else:
                file.seek(start + number * size)
                frame = np.frombuffer(file.read(size), dtype).reshape(height, width)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a whole .npy file of NumPy: {error}") from error
    values = _bytes(path, number, frame)
    return defects(Image.fromarray(values), f"{path}, frame {number}")


def _check(path: Path, number: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind not in "biuf":  # objects would be unpickled: run as code
        raise UserError(
            f"{path}: an array of {dtype}; expected numbers (frames, height, width)"
        )
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"{path}: an array of shape {shape}; expected (frames, height, width)")
    if not 0 <= number < shape[0]:
        raise UserError(
            f"{path}: no frame {number} in masks of {shape[0]} frames (shape {shape}), counted "
            "from 0; expected a mask for every frame of the video"
        )


def _bytes(path: Path, number: int, frame: np.ndarray) -> UInt8[np.ndarray, "h w"]:
    if frame.dtype.kind != "b":
        least, most = frame.min(), frame.max()
        if not (least >= 0 and most <= 255 and np.array_equal(frame, np.trunc(frame))):
            raise UserError(
                f"{path}, frame {number}: values of {least} to {most} ({frame.dtype}); "
                "expected whole numbers of 0 to 255"
            )
    return frame.astype(np.uint8)


def _encode(mask: Bool[np.ndarray, "h w"]) -> bytes:
    data = io.BytesIO()
    image = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    image.save(data, "PNG", compress_level=1)  # for speed; a few kilobytes anyway
    return data.getvalue()


def _size(mask: Bool[np.ndarray, "h w"]) -> str:
    height, width = mask.shape
    return f"{width}x{height}"
