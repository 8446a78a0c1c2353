"""Odd and broken image files, made on the spot: what a folder may hold in a factory.

Each kind has a function that writes a file and returns the RGB pixels that it stands for, or
None where it is refused.
"""

import dataclasses
import io
import os
import pathlib
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 24, 36


@dataclasses.dataclass(frozen=True)
class Input:
    """One file.

    Attributes:
      what: for the table.
      make: writes it; its pixels, or None.
      how: what is done where it is taken.
      name: of the file; None is a number.
    """

    what: str
    make: Callable[[pathlib.Path], np.ndarray | None]
    how: str = ""
    name: str | None = None


def noise(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


RGB = noise()
GREY = RGB[..., 0]
ALPHA = noise(seed=1)[..., 0]
THRICE = np.repeat(GREY[..., None], 3, axis=2)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(data, kind, **options)
    return data.getvalue()


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None] / 255
    return np.floor(pixels * opacity + 255 * (1 - opacity) + 0.5).astype(np.uint8)


def as_pillow(data: bytes) -> np.ndarray:
    """Where a format loses something, its plain decoding is what is expected."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png(
    lines: list[bytes],
    width: int,
    height: int,
    depth: int,
    colour: int,
    before: bytes = b"",
    interlace: int = 0,
) -> bytes:
    """A PNG of lines of samples, with chunks in front of them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    pixels = zlib.compress(b"".join(b"\0" + line for line in lines))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def png_of(pixels: np.ndarray, colour: int, before: bytes = b"") -> bytes:
    """A PNG of 8 or 16 bits a sample."""
    height, width = pixels.shape[:2]
    order = pixels.astype(pixels.dtype.newbyteorder(">"))
    lines = [line.tobytes() for line in order]
    return png(lines, width, height, 8 * pixels.dtype.itemsize, colour, before)


def tiff(
    pixels: np.ndarray,
    photometric: int,
    sample_format: int = 1,
    order: str = "<",
    planar: bool = False,
    claims: tuple[int, int] | None = None,
    follows_itself: bool = False,
) -> bytes:
    """An uncompressed TIFF of samples (h, w) or (h, w, c)."""
    samples = 1 if pixels.ndim == 2 else pixels.shape[2]
    height, width = claims or pixels.shape[:2]
    values = pixels.astype(pixels.dtype.newbyteorder(">" if order == ">" else "<"))
    parts = [np.moveaxis(values, 2, 0)[i] for i in range(samples)] if planar else [values]
    data = b"".join(part.tobytes() for part in parts)
    offsets = [8 + i * len(data) // len(parts) for i in range(len(parts))]
    tail = 8 + len(data)

    arrays = b""

    def entry(tag: int, kind: int, values: list[int]) -> bytes:
        nonlocal arrays
        letter = "H" if kind == 3 else "I"
        packed = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(packed) <= 4:
            packed = packed.ljust(4, b"\0")
        else:
            place, arrays = tail + len(arrays), arrays + packed
            packed = struct.pack(order + "I", place)
        return struct.pack(order + "HHI", tag, kind, len(values)) + packed

    entries = [
        entry(256, 4, [width]),
        entry(257, 4, [height]),
        entry(258, 3, [8 * pixels.dtype.itemsize] * samples),
        entry(259, 3, [1]),
        entry(262, 3, [photometric]),
        entry(273, 4, offsets),
        entry(277, 3, [samples]),
        entry(278, 4, [height]),
        entry(279, 4, [len(data) // len(parts)] * len(parts)),
        entry(284, 3, [2 if planar else 1]),
        entry(339, 3, [sample_format] * samples),
    ]
    place = tail + len(arrays)
    sign = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries)
    following = struct.pack(order + "I", place if follows_itself else 0)
    return sign + struct.pack(order + "I", place) + data + arrays + directory + following


def bmp(pixels: np.ndarray, bits: int, from_top: bool = False) -> bytes:
    """A BMP of 24 or 32 bits."""
    rows, width, _ = pixels.shape
    height = -rows if from_top else rows
    order = pixels[..., ::-1] if from_top else pixels[::-1, :, ::-1]
    if bits == 32:
        order = np.dstack([order, np.zeros(order.shape[:2], np.uint8)])
    lines = [line.tobytes() for line in order]
    data = b"".join(line.ljust(-(-len(line) // 4) * 4, b"\0") for line in lines)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + header + data


def interlaced() -> bytes:
    """Adam7, which Pillow reads but cannot write."""
    steps = [
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4),
        (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
    ]  # fmt: skip
    lines = [
        line.tobytes()
        for x, y, right, down in steps
        for line in RGB[y::down, x::right]
        if len(line)
    ]
    return png(lines, WIDTH, HEIGHT, 8, 2, interlace=1)


def bomb(name: bytes) -> bytes:
    """A chunk of 64 MB in some 64 kB."""
    packed = zlib.compress(bytes(1 << 26), 9)
    if name == b"iTXt":
        return chunk(name, b"Comment\0\x01\0\0\0" + packed)
    return chunk(name, b"Comment\0\0" + packed)


def frames(kind: str, **options: object) -> bytes:
    images = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    return encoded(images[0], kind, save_all=True, append_images=images[1:], **options)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def palette(pixels: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    image = Image.fromarray(pixels)
    image.putpalette([part for v in range(256) for part in (255 - v, v, 7)])
    return image, np.stack([255 - pixels, pixels, np.full_like(pixels, 7)], axis=2)


def writes(
    data: bytes, expected: np.ndarray | None
) -> Callable[[pathlib.Path], np.ndarray | None]:
    def make(path: pathlib.Path) -> np.ndarray | None:
        path.write_bytes(data)
        return expected

    return make


def taken(what: str, data: bytes, expected: np.ndarray, how: str = "as it is", **kw) -> Input:
    return Input(what, writes(data, expected), how, **kw)


def lossy(what: str, data: bytes, how: str = "as it is", **kw) -> Input:
    return taken(what, data, as_pillow(data), how, **kw)


def refused(what: str, data: bytes, **kw) -> Input:
    return Input(what, writes(data, None), **kw)


def deep() -> list[Input]:
    grey = np.random.default_rng(2).integers(0, 65536, (HEIGHT, WIDTH), np.uint16)
    rgb = np.random.default_rng(3).integers(0, 65536, (HEIGHT, WIDTH, 3), np.uint16)
    alpha = grey[::-1]
    high, thrice = (rgb >> 8).astype(np.uint8), np.dstack([(grey >> 8).astype(np.uint8)] * 3)
    how = "its high byte: value // 256"
    dark, signed = grey >> 4, grey.astype(np.int16)
    cmyk = np.dstack([rgb, grey])
    nan = np.full((HEIGHT, WIDTH), np.nan, np.float32)
    return [
        taken("PNG, grey of 16 bits", png_of(grey, 0), thrice, how),
        taken("PNG, RGB of 16 bits", png_of(rgb, 2), high, how),
        taken(
            "PNG, grey of 16 bits and alpha",
            png_of(np.dstack([grey, alpha]), 4),
            on_white(thrice, alpha >> 8),
            f"{how}; what is transparent on white",
        ),
        taken(
            "PNG, RGBA of 16 bits",
            png_of(np.dstack([rgb, alpha]), 6),
            on_white(high, alpha >> 8),
            f"{how}; what is transparent on white",
        ),
        taken("TIFF, grey of 16 bits, Intel's order", tiff(grey, 1), thrice, how),
        taken("TIFF, grey of 16 bits, Motorola's order", tiff(grey, 1, order=">"), thrice, how),
        taken(
            "TIFF, grey of 16 bits, LZW",
            encoded(Image.fromarray(grey), "TIFF", compression="tiff_lzw"),
            thrice,
            how,
        ),
        taken("TIFF, RGB of 16 bits, Intel's order", tiff(rgb, 2), high, how),
        taken("TIFF, RGB of 16 bits, Motorola's order", tiff(rgb, 2, order=">"), high, how),
        refused("PNG, grey of 12 bits stored in 16", png_of(dark, 0)),
        refused("PNG, RGB of 12 bits stored in 16", png_of(rgb >> 4, 2)),
        refused("TIFF, grey of 12 bits stored in 16", tiff(dark, 1)),
        refused("TIFF, grey of 16 bits, 0 for white", tiff(grey, 0)),
        refused("TIFF, grey of 16 signed bits", tiff(signed, 1, sample_format=2)),
        refused("TIFF, CMYK of 16 bits", tiff(cmyk, 5)),
        refused("TIFF, grey of 32 bits", tiff(grey.astype(np.int32) * 7, 1, sample_format=2)),
        refused("TIFF, 32-bit floating point", tiff(grey / np.float32(65535), 1, 3)),
        refused("TIFF, 32-bit floating point, all NaN", tiff(nan, 1, 3)),
        refused("TIFF, 64-bit floating point", tiff(grey / 65535.0, 1, 3)),
    ]


def colours() -> list[Input]:
    indexed, indexed_rgb = palette(GREY)
    few, few_rgb = palette(GREY % 16)
    black = np.zeros_like(GREY)
    cmyk = Image.frombytes("CMYK", (WIDTH, HEIGHT), np.dstack([255 - RGB, black]).tobytes())
    clear = np.dstack([RGB, np.zeros_like(GREY)])
    opaque = np.dstack([RGB, np.full_like(GREY, 255)])
    two = np.where(THRICE > 127, 255, 0).astype(np.uint8)
    white = "what is transparent on white"
    level, colour = THRICE.copy(), RGB.copy()
    level[GREY == 3] = 255
    colour[0, :3] = 1, 2, 3
    seen = np.where(np.all(colour == (1, 2, 3), axis=2, keepdims=True), 255, colour)
    four = np.dstack([GREY // 16 * 17] * 3)
    four[GREY // 16 == 3] = 255
    ignored = "as it is; the profile is ignored"
    g4 = {"compression": "group4"}
    gama = png_of(RGB, 2, chunk(b"gAMA", struct.pack(">I", 22000)))
    return [
        taken("PNG, grey", encoded(GREY, "PNG"), THRICE),
        taken("PNG, RGB", encoded(RGB, "PNG"), RGB),
        taken("PNG, interlaced", interlaced(), RGB),
        taken("PNG, 1 bit", encoded(GREY > 127, "PNG"), two),
        taken("PNG, palette", encoded(indexed, "PNG"), indexed_rgb, "its colours"),
        taken("PNG, palette of 4 bits", encoded(few, "PNG", bits=4), few_rgb, "its colours"),
        taken(
            "PNG, palette with transparent entries (tRNS)",
            encoded(indexed, "PNG", transparency=bytes(range(256))),
            on_white(indexed_rgb, GREY),
            white,
        ),
        taken(
            "PNG, grey with a transparent level (tRNS)",
            encoded(GREY, "PNG", transparency=3),
            level,
            white,
        ),
        taken(
            "PNG, grey of 4 bits with a transparent level (tRNS)",
            png(
                [bytes(row[::2] // 16 * 16 + row[1::2] // 16) for row in GREY],
                *(WIDTH, HEIGHT, 4, 0, chunk(b"tRNS", struct.pack(">H", 3))),
            ),
            four,
            white,
        ),
        taken(
            "PNG, RGB with a transparent colour (tRNS)",
            encoded(colour, "PNG", transparency=(1, 2, 3)),
            seen.astype(np.uint8),
            white,
        ),
        taken(
            "PNG, grey and alpha",
            encoded(np.dstack([GREY, ALPHA]), "PNG"),
            on_white(THRICE, ALPHA),
            white,
        ),
        taken(
            "PNG, RGBA", encoded(np.dstack([RGB, ALPHA]), "PNG"), on_white(RGB, ALPHA), white
        ),
        taken("PNG, RGBA, wholly opaque", encoded(opaque, "PNG"), RGB),
        refused("PNG, RGBA, wholly transparent", encoded(clear, "PNG")),
        taken("PNG with a gamma of 0.22", gama, RGB, "as it is; gamma is ignored"),
        taken(
            "PNG with an ICC profile", encoded(RGB, "PNG", icc_profile=profile()), RGB, ignored
        ),
        lossy("JPEG with an ICC profile", encoded(RGB, "JPEG", icc_profile=profile()), ignored),
        lossy("JPEG, grey", encoded(GREY, "JPEG")),
        lossy("JPEG, RGB", encoded(RGB, "JPEG")),
        lossy("JPEG, RGB without subsampling", encoded(RGB, "JPEG", subsampling=0)),
        lossy("JPEG, progressive", encoded(RGB, "JPEG", progressive=True)),
        lossy("JPEG with restart markers", encoded(RGB, "JPEG", restart_marker_blocks=1)),
        lossy("JPEG, CMYK (Adobe's, inverted)", encoded(cmyk, "JPEG"), "by Pillow's formula"),
        taken("BMP, 24 bits", bmp(RGB, 24), RGB),
        taken("BMP, 32 bits", bmp(RGB, 32), RGB),
        taken("BMP, rows from the top", bmp(RGB, 24, from_top=True), RGB),
        taken("BMP, palette", encoded(indexed, "BMP"), indexed_rgb, "its colours"),
        taken("BMP, 1 bit", encoded(GREY > 127, "BMP"), two),
        taken("TIFF, RGB, Motorola's order", tiff(RGB, 2, order=">"), RGB),
        taken("TIFF, RGB in planes", tiff(RGB, 2, planar=True), RGB),
        taken(
            "TIFF, grey, 0 for white", tiff(255 - GREY, 0), THRICE, "inverted: as it is meant"
        ),
        taken("TIFF, LZW", encoded(RGB, "TIFF", compression="tiff_lzw"), RGB),
        taken("TIFF, PackBits", encoded(RGB, "TIFF", compression="packbits"), RGB),
        taken("TIFF, Deflate", encoded(RGB, "TIFF", compression="tiff_adobe_deflate"), RGB),
        lossy("TIFF, JPEG inside", encoded(RGB, "TIFF", compression="jpeg")),
        taken("TIFF, fax (group 4)", encoded(GREY > 127, "TIFF", **g4), two),
        taken("TIFF, palette", encoded(indexed, "TIFF"), indexed_rgb, "its colours"),
        taken(
            "TIFF, RGBA", encoded(np.dstack([RGB, ALPHA]), "TIFF"), on_white(RGB, ALPHA), white
        ),
        taken("TIFF, CMYK", encoded(cmyk, "TIFF"), RGB, "by Pillow's formula"),
        taken("BigTIFF", encoded(RGB, "TIFF", big_tiff=True), RGB),
        lossy("WebP", encoded(RGB, "WEBP")),
        taken("WebP, lossless", encoded(RGB, "WEBP", lossless=True), RGB),
        taken(
            "WebP with alpha",
            encoded(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True),
            on_white(RGB, ALPHA),
            white,
        ),
        refused("TIFF, CIELAB colours", tiff(RGB, 8)),
    ]


def metadata() -> list[Input]:
    kept = "as it is stored; not turned"
    found = [
        lossy(f"JPEG with the EXIF orientation {n}", encoded(RGB, "JPEG", exif=exif(n)), kept)
        for n in range(2, 9)
    ]
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    jpeg = encoded(RGB, "JPEG")
    turned = encoded(RGB, "TIFF", tiffinfo={0x0112: 6})
    two = encoded(RGB, "MPO", save_all=True, append_images=[Image.fromarray(noise(seed=4))])
    thumbnail = b"Exif\0\0MM\0*\0\0\0\x08" + bytes(6) + encoded(RGB[:8, :8], "JPEG")
    return [
        *found,
        taken("PNG with the EXIF orientation 6", encoded(RGB, "PNG", exif=exif(6)), RGB, kept),
        lossy("WebP with the EXIF orientation 6", encoded(RGB, "WEBP", exif=exif(6)), kept),
        taken("TIFF with the orientation 6", turned, np.rot90(RGB, -1), "turned, by Pillow"),
        lossy("JPEG with XMP", encoded(RGB, "JPEG", xmp=xmp)),
        lossy("JPEG with a comment of 60 kB", encoded(RGB, "JPEG", comment=b"x" * 60_000)),
        lossy("JPEG with a thumbnail inside", encoded(RGB, "JPEG", exif=thumbnail)),
        taken("JPEG with a second image (MPO)", two, as_pillow(two), "its first: the picture"),
        lossy("JPEG with other bytes behind its end", jpeg + b"\0garbage\xff\xd8" * 50),
        taken("PNG with other bytes behind its end", encoded(RGB, "PNG") + bytes(999), RGB),
        refused("PNG with 64 MB of text in 64 kB (zTXt)", png_of(RGB, 2, bomb(b"zTXt"))),
        refused("PNG with 64 MB of text in 64 kB (iTXt)", png_of(RGB, 2, bomb(b"iTXt"))),
        refused("PNG with 64 MB of ICC profile in 64 kB", png_of(RGB, 2, bomb(b"iCCP"))),
    ]


def frames_and_pages() -> list[Input]:
    tiffs = frames("TIFF")
    return [
        refused("GIF", encoded(RGB, "GIF")),
        refused("GIF, animated", frames("GIF")),
        refused("WebP, animated", frames("WEBP")),
        refused("PNG, animated (APNG)", frames("PNG")),
        refused("TIFF of three pages", tiffs),
        refused("TIFF of three pages, cut off", tiffs[:-200]),
        taken("TIFF whose page is followed by itself", tiff(RGB, 2, follows_itself=True), RGB),
    ]


def sizes() -> list[Input]:
    def claim(data: bytes, at: int, form: str, *values: int) -> bytes:
        return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]

    found = []
    for height, width in ((1, 1), (5000, 1), (1, 5000), (1, 65500), (2, 3)):
        pixels = noise(height, width)
        how = "resized, whatever its aspect"
        found.append(taken(f"PNG of {width}x{height}", encoded(pixels, "PNG"), pixels, how))
    jpeg = encoded(RGB, "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    webp = encoded(np.dstack([RGB, ALPHA]), "WEBP")  # VP8X: 24 bits a side, less 1
    canvas = (16382).to_bytes(3, "little") * 2
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + encoded(RGB, "PNG")[33:]
    nothing = png([], 0, 0, 8, 2)
    return [
        *found,
        refused("PNG that claims 20000x20000", huge),
        refused("JPEG that claims 65500x65500", claim(jpeg, frame, ">HH", 65500, 65500)),
        refused("BMP that claims 20000x20000", claim(bmp(RGB, 24), 18, "<ii", 20000, 20000)),
        refused("TIFF that claims 20000x20000", tiff(RGB, 2, claims=(20000, 20000))),
        refused("WebP that claims 16383x16383", webp[:24] + canvas + webp[30:]),
        refused("PNG of 65501x1", encoded(noise(1, 65501), "PNG")),
        refused("PNG of 0x0", nothing),
        refused("TIFF of 0x0", tiff(RGB, 2, claims=(0, 0))),
    ]


def damage() -> list[Input]:
    files = {
        "PNG": encoded(RGB, "PNG"),
        "JPEG": encoded(RGB, "JPEG"),
        "progressive JPEG": encoded(RGB, "JPEG", progressive=True),
        "BMP": bmp(RGB, 24),
        "TIFF": tiff(RGB, 2),
        "LZW TIFF": encoded(RGB, "TIFF", compression="tiff_lzw"),
        "WebP": encoded(RGB, "WEBP"),
    }
    found = [
        refused(f"{kind}, cut off after {percent} %", data[: len(data) * percent // 100])
        for kind, data in files.items()
        for percent in (5, 50, 95)
    ]
    whole, jpeg = files["PNG"], files["JPEG"]
    data = whole.index(b"IDAT") + 50

    def zeros(data: bytes) -> bytes:
        return data[: len(data) * 3 // 4] + bytes(len(data) - len(data) * 3 // 4)

    return [
        refused("empty file", b""),
        refused("one byte", b"\x89"),
        *found,
        refused("JPEG whose last quarter is zeros (power cut)", zeros(jpeg)),
        refused("PNG whose last quarter is zeros (power cut)", zeros(whole)),
        refused("JPEG without a picture", b"\xff\xd8\xff\xe0\0\x04ab\xff\xd9"),
        refused("PNG without its end (IEND)", whole[:-12]),
        refused("PNG, wrong checksum of its header", whole[:29] + b"\0\0\0\0" + whole[33:]),
        refused(
            "PNG, one bit of its pixels flipped",
            whole[:data] + bytes([whole[data] ^ 8]) + whole[data + 1 :],
        ),
        refused("PNG without pixels", whole[:33] + whole[-12:]),
    ]


def other_kinds() -> list[Input]:
    arrays = io.BytesIO()
    np.savez(arrays, RGB)
    jpeg = encoded(RGB, "JPEG")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    return [
        lossy("JPEG called .png", jpeg, "as what it is", name="jpeg.png"),
        taken("PNG called .jpg", encoded(RGB, "PNG"), RGB, "as what it is", name="png.jpg"),
        taken("PNG called .PNG", encoded(RGB, "PNG"), RGB, name="capitals.PNG"),
        refused("text called .png", b"this is no image\n", name="text.png"),
        refused("HTML called .png", b"<!DOCTYPE html><script>alert(1)</script>"),
        refused("SVG called .png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        refused("EPS called .png (Pillow would start Ghostscript)", script),
        refused("PDF called .png", b"%PDF-1.7\n"),
        refused("PPM called .png", encoded(RGB, "PPM")),
        refused("ICO called .png", encoded(RGB, "ICO")),
        refused("NumPy's .npz called .png", arrays.getvalue()[:99]),
        refused("zeros", bytes(4096)),
    ]


def no_files() -> list[Input]:
    def folder(path: pathlib.Path) -> None:
        path.mkdir()

    def link(target: str) -> Callable[[pathlib.Path], None]:
        return lambda path: path.symlink_to(target)

    def linked(path: pathlib.Path) -> np.ndarray:
        target = path.parent.parent / "target.png"
        target.write_bytes(encoded(RGB, "PNG"))
        path.symlink_to(target)
        return RGB

    def linked_folder(path: pathlib.Path) -> None:
        (path.parent.parent / "folder").mkdir()
        path.symlink_to(path.parent.parent / "folder")

    def pipe(path: pathlib.Path) -> None:
        os.mkfifo(path)

    def listening(path: pathlib.Path) -> None:
        # Elsewhere first: a socket's path has at most 107 bytes.
        with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as one:
            one.bind(f"{short}/s")
            pathlib.Path(short, "s").rename(path)

    def unreadable(path: pathlib.Path) -> None:
        path.write_bytes(encoded(RGB, "PNG"))
        path.chmod(0)

    def large(path: pathlib.Path) -> None:
        path.write_bytes(encoded(RGB, "PNG"))
        os.truncate(path, 2**30 + 1)  # of zeros, which take no room

    return [
        Input("folder called .png", folder),
        Input("link to an image", linked, "as it is"),
        Input("link to a folder", linked_folder),
        Input("link to nothing", link("nowhere.png")),
        Input("link to itself", link("loop.png"), name="loop.png"),
        Input("file that may not be read", unreadable, name="unreadable.png"),
        Input("named pipe", pipe),
        Input("socket", listening),
        Input("device (a link to /dev/zero)", link("/dev/zero")),
        Input("file of more than 1 GiB", large),
    ]


def names() -> list[Input]:
    data = encoded(RGB, "PNG")
    odd = {
        "spaces": " a  b .png",
        "a newline": "line\nbreak.png",
        "200 characters": "n" * 196 + ".png",
        "240 bytes": "あ" * 78 + "bb.png",
        "a leading dash": "-rf.png",
        "composed letters (é is one)": "caf\u00e9.png",
        "decomposed letters (é is two)": "cafe\u0301.png",
        "HTML": "<img src=x onerror=alert(1)>.png",
        "quotes and a shell's characters": "'\"$(touch x);`.png",
        "a spreadsheet's formula": "=1+1,2.png",
        "a format's characters": "%s{0}\\n.png",
        "control characters": "\x1b[31m\x07.png",
        "text from right to left": "\u202egnp.png",
        "two suffixes": "a.tar.png",
    }
    found = [taken(f"name: {what}", data, RGB, name=name) for what, name in odd.items()]
    return [
        *found,
        refused("name: not UTF-8", data, name=os.fsdecode(b"caf\xe9.png")),
        refused("name: 250 bytes", data, name="m" * 246 + ".png"),
        taken("the same image again", data, RGB, "as it is: it counts once in a fit"),
    ]


def images() -> dict[str, list[Input]]:
    """All, by chapters of the table."""
    return {
        "Colours": colours(),
        "More than 8 bits": deep(),
        "Metadata": metadata(),
        "Frames and pages": frames_and_pages(),
        "Sizes": sizes(),
        "Damage": damage(),
        "Other kinds of content": other_kinds(),
        "No ordinary files": no_files(),
        "Names": names(),
    }


def masks() -> list[Input]:
    """Of one and the same image; the pixels are those of the defect, None where refused."""
    defect = np.zeros((HEIGHT, WIDTH), bool)
    defect[5:12, 8:30] = True
    byte = defect.astype(np.uint8)
    ramp = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 100

    def mask(what: str, pixels: np.ndarray, how: str) -> Input:
        return taken(what, encoded(pixels, "PNG"), defect, how)

    def folder(path: pathlib.Path) -> None:
        path.mkdir()

    clear = np.dstack([255 * byte, 255 * (1 - byte)])
    return [
        mask("mask of 0 and 255", 255 * byte, "the defect is where it is not 0"),
        mask("mask of 0 and 1", byte, "the defect is where it is not 0"),
        mask("mask of 1 bit", defect, "the defect is where it is not 0"),
        mask("mask in colour", np.dstack([byte * 200, byte, byte]), "its brightest channel"),
        taken(
            "mask without a defect pixel",
            encoded(0 * byte, "PNG"),
            0 * defect,
            "the image is anomalous, none of its pixels is; with a warning",
        ),
        refused("mask of another size", encoded(255 * byte[1:], "PNG")),
        refused("mask of 16 bits", png_of(byte.astype(np.uint16) * 65535, 0)),
        refused("mask with transparent pixels", encoded(clear, "PNG")),
        refused("mask of 99 levels of grey", encoded(ramp, "PNG")),
        refused("mask that is cut off", encoded(255 * byte, "PNG")[:60]),
        refused("mask that is text", b"defect at 5, 8\n"),
        Input("mask that is a folder", folder),
    ]
