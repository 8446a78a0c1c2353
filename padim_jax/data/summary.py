"""Summary of the images read: their numbers, sizes and copies, and losses in masks.

Pure: files' facts in, a summary out, as lines of text, as JSON and as warnings. `survey` reads
the files.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from padim_jax.data.decoding import FEWEST_LEVELS
from padim_jax.data.files import shown

_SHOWN = 3  # names, or formats, written out


class File(NamedTuple):
    """Facts about an image that need no decoding.

    Attributes:
      name: its `relative_path`.
      defect_type: see `Record`.
      digest: SHA-256 of its bytes.
      size: height and width from its header; None if unreadable.
      mode: channels and bits ("RGB 8 bit"); None if unreadable.
      levels: number of grey levels kept, if decoding keeps too few; see `decoding.open_rgb`.
    """

    name: str
    defect_type: str
    digest: bytes
    size: tuple[int, int] | None
    mode: str | None
    levels: int | None = None


class Mask(NamedTuple):
    """Facts about a decoded mask; see `image_cache.MaskFacts`.

    Attributes:
      name: its image's `relative_path`.
      pixels: number of pixels of the stored mask.
      defect: number of its defect pixels.
      pixels_left: number of pixels of the mask at the model's size.
      defect_left: number of its defect pixels.
      regions: number of 8-connected regions of the stored mask.
      resized_away, cropped_away: numbers of regions without a pixel at the model's size, by
        cause.
    """

    name: str
    pixels: int
    defect: int
    pixels_left: int
    defect_left: int
    regions: int
    resized_away: int
    cropped_away: int

    @property
    def is_nearly_full(self) -> bool:
        """Return whether more than half of it is a defect: possibly an inverted mask."""
        return 2 * self.defect > self.pixels


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one split, or of one input.

    Attributes:
      images: number of images.
      types: number of images of each defect type.
      sizes: number of images of each size and mode ("900x900, RGB 8 bit"); most frequent first.
      modes: modes present.
      copies: names of images that have the bytes of an earlier one.
      few_levels: number of grey levels kept, by name, of the images that keep fewer than
        `decoding.FEWEST_LEVELS` although their files have more.
    """

    images: int
    types: dict[str, int]
    sizes: dict[str, int]
    modes: tuple[str, ...]
    copies: list[str]
    few_levels: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Masks:
    """Masks of a test set.

    Attributes:
      masks: number of masks.
      regions, resized_away, cropped_away: sums; see `Mask`.
      area, area_left: fractions of defect pixels, as stored and at the model's size.
      empty: names of images whose mask has no defect pixel.
      nearly_full: names of images whose mask is more than half defect.
      losing: names of images that lose a region.
    """

    masks: int
    regions: int
    resized_away: int
    cropped_away: int
    area: float
    area_left: float
    empty: list[str]
    nearly_full: list[str]
    losing: list[str]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Summary of what a run has read.

    Attributes:
      splits: splits by name.
      shared: by two names of splits ("train, test"), images of the second that are also in the
        first.
      masks: masks of the test images, once they are decoded.
    """

    splits: dict[str, Split]
    shared: dict[str, list[str]]
    masks: Masks | None = None


def summarize(
    splits: Mapping[str, Sequence[File]], fitted: Collection[bytes] | None = None
) -> Summary:
    """Summarize files.

    Args:
      splits: images, by the name of their split.
      fitted: digests of the images a model was fitted to, if these are not a split.

    Returns:
      The summary, without masks.
    """
    digests = {name: {file.digest for file in files} for name, files in splits.items()}
    if fitted:
        digests = {"fitted": set(fitted), **digests}
    names = list(digests)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    shared = {
        f"{a}, {b}": [file.name for file in splits[b] if file.digest in digests[a]]
        for a, b in pairs
    }
    return Summary(
        {name: _split(files) for name, files in splits.items() if files},
        {pair: found for pair, found in shared.items() if found},
    )


def _split(files: Sequence[File]) -> Split:
    seen: set[bytes] = set()
    copies = []
    for file in files:
        if file.digest in seen:
            copies.append(file.name)
        seen.add(file.digest)
    sizes = collections.Counter(
        f"{file.size[1]}x{file.size[0]}, {file.mode}" for file in files if file.size
    )
    return Split(
        len(files),
        dict(collections.Counter(file.defect_type for file in files)),
        dict(sizes.most_common()),
        tuple(sorted({file.mode for file in files if file.mode})),
        copies,
        {file.name: file.levels for file in files if file.levels is not None},
    )


def summarize_masks(masks: Sequence[Mask]) -> Masks | None:
    """Summarize masks; None without any."""
    if not masks:
        return None
    return Masks(
        masks=len(masks),
        regions=sum(mask.regions for mask in masks),
        resized_away=sum(mask.resized_away for mask in masks),
        cropped_away=sum(mask.cropped_away for mask in masks),
        area=sum(mask.defect for mask in masks) / sum(mask.pixels for mask in masks),
        area_left=sum(m.defect_left for m in masks) / sum(m.pixels_left for m in masks),
        empty=[mask.name for mask in masks if not mask.defect],
        nearly_full=[mask.name for mask in masks if mask.is_nearly_full],
        losing=[m.name for m in masks if m.resized_away or m.cropped_away],
    )


def lines(summary: Summary) -> list[str]:
    """Return the summary for a person, one line per split."""
    return [_line(name, split) for name, split in summary.splits.items()]


def _line(name: str, split: Split) -> str:
    types = ", ".join(f"{shown(kind)} {count}" for kind, count in split.types.items())
    types = f" ({types})" if len(split.types) > 1 else ""
    sizes = list(split.sizes.items())
    if len(sizes) == 1:
        found = f" of {sizes[0][0]}"
    else:
        found = "".join(f"; {count} of {size}" for size, count in sizes[:_SHOWN])
        if len(sizes) > _SHOWN:
            found += f"; {sum(n for _, n in sizes[_SHOWN:])} of {len(sizes) - _SHOWN} others"
    copies = f"; {len(split.copies)} copies of others" if split.copies else ""
    levels = ""
    if few := split.few_levels:
        named = ", ".join(f"{shown(x)} {few[x]}" for x in list(few)[:_SHOWN])
        more = ", ..." * (len(few) > _SHOWN)
        levels = f"; {len(few)} keep fewer than {FEWEST_LEVELS} grey levels ({named}{more})"
    return f"{name}: {split.images} images{types}{found}{copies}{levels}"


def mask_line(masks: Masks, size: tuple[int, int]) -> str:
    """Return the summary of masks for a person.

    Args:
      masks: masks of the test images.
      size: the model's height and width in pixels.

    Returns:
      One line.
    """
    left = masks.regions - masks.resized_away - masks.cropped_away
    return (
        f"masks: {masks.masks} with {masks.regions} regions of defects, "
        f"{100 * masks.area:.2g} % of their pixels; at the model's {size[1]}x{size[0]} {left} "
        f"of these regions, {100 * masks.area_left:.2g} %"
    )


def warnings(summary: Summary) -> list[str]:
    """Return a line with advice for each implausible fact about files.

    Copies among training and validation images are excluded: `copies` and the calibration warn
    of them, also before the fit.
    """
    found = []
    for pair, names in summary.shared.items():
        first, second = pair.split(", ")
        if second != "test":
            continue
        known = {"fitted": "images that the model was fitted to", "train": "training images"}
        found.append(
            f"{len(names)} of {summary.splits[second].images} {second} images are "
            f"{known.get(first, f'{first} images')} as well (the same bytes): {_some(names)}. "
            "What is measured on images that a model has seen is too good; take them out of "
            "one of the two"
        )
    test, train = summary.splits.get("test"), summary.splits.get("train")
    if test and test.copies:
        found.append(
            f"{len(test.copies)} of {test.images} test images are copies of others (the same "
            f"bytes), and count as often as they are there: {_some(test.copies)}. Take them out"
        )
    if test and train and (others := sorted(set(test.modes) - set(train.modes))):
        found.append(
            f"test images of {', '.join(others)}, where all training images are of "
            f"{', '.join(train.modes)}: images that are stored otherwise may score otherwise. "
            "Take both from the same camera and program"
        )
    return found


def mask_warnings(masks: Masks, size: tuple[int, int], resolution: str) -> list[str]:
    """Return a line with advice for each implausible fact about masks.

    Args:
      masks: masks of the test images.
      size: the model's height and width in pixels.
      resolution: `config.metrics.resolution`.

    Returns:
      The lines; empty if all is plausible.
    """
    found = []
    resized = masks.resized_away if resolution == "model" else 0
    if lost := resized + masks.cropped_away:
        reasons = []
        if resized:
            reasons.append(f"{resized} smaller than a pixel there")
        if masks.cropped_away:
            reasons.append(f"{masks.cropped_away} outside of the crop")
        advice = "they do not count"
        if resolution == "model":
            advice = (
                "pixel metrics leave them out, and take the places of those that are too small "
                "for normal. Evaluate with --config.metrics.resolution=full, or raise "
                "config.image.resize"
            )
        if masks.cropped_away:
            advice += "; a larger config.image.crop, or none, sees more"
        found.append(
            f"{lost} of {masks.regions} regions of defects have no pixel at the model's "
            f"{size[1]}x{size[0]} ({', '.join(reasons)}), as in {_some(masks.losing)}: {advice}"
        )
    if masks.empty:
        found.append(
            f"{len(masks.empty)} of {masks.masks} masks of anomalous images have no defect "
            f"pixel: {_some(masks.empty)}. All their pixels count as normal; mend the masks, "
            "or move the images to the good ones"
        )
    if masks.nearly_full:
        found.append(
            f"{len(masks.nearly_full)} of {masks.masks} masks call more than half of the image "
            f"a defect: {_some(masks.nearly_full)}. If that is wrong, save them with 0 for "
            "normal pixels"
        )
    return found


def to_dict(summary: Summary) -> dict[str, Any]:
    """Return the summary as JSON."""
    splits = {name: dataclasses.asdict(split) for name, split in summary.splits.items()}
    for split in splits.values():
        del split["modes"]  # implied by the sizes
    masks = summary.masks and dataclasses.asdict(summary.masks)
    return {"splits": splits, "shared": summary.shared, "masks": masks}


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:_SHOWN])) + ", ..." * (len(names) > _SHOWN)
