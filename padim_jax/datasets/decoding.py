"""An image file's bytes -> pixels: what is taken for an image, and what is refused."""

import io

from PIL import Image, UnidentifiedImageError

from padim_jax.errors import UserError

# Pillow's modes of 8 bits a channel or less. Deeper ones would be clipped (grey: I;16,
# I, F) or lose their low bytes (colour, which it calls RGB all the same), and no one
# would notice.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def open_image(data: bytes, name: str) -> Image.Image:
    """Decodes an image file, in the mode that it is stored in.

    Of an animation the first frame is taken; an EXIF orientation is not applied, as in the
    PyTorch projects.

    Args:
      data: the file's bytes.
      name: how to call it in an error.

    Raises:
      UserError: not an image, a broken one, or one deeper than 8 bits a channel.
    """
    try:
        image = Image.open(io.BytesIO(data))
        encoding = str(image.tile)  # names the file's own depth; gone after load()
        image.load()
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError and ValueError for some broken files.
        raise UserError(f"{name}: the image cannot be decoded: {error}") from error
    if image.mode not in _MODES or ";16" in encoding:
        raise UserError(
            f"{name}: more than 8 bits a channel (Pillow mode {image.mode}); convert it to "
            "8-bit grey or RGB first"
        )
    # Transparency is dropped; Pillow would warn that a palette's is.
    image.info.pop("transparency", None)
    return image
