"""STC, the ShanghaiTech Campus dataset: thirteen scenes, each under a fixed camera.

    root/training/frames/01_001/{000,001,..}.jpg      unpacked from root/training/videos/*.avi
    root/testing/frames/01_0014/{000,001,..}.jpg
    root/testing/test_frame_mask/01_0014.npy          0 or 1 for each frame
    root/testing/test_pixel_mask/01_0014.npy          (frames, height, width)

A category is a scene, 01 to 13, the first part of its videos' names. Scene 13 has no test
videos. Training videos are published as .avi only: ffmpeg extracts their frames.

Liu et al., "Future Frame Prediction for Anomaly Detection - A New Baseline", CVPR 2018.
Licence: see docs/datasets.md.
"""

import io
import shlex

import numpy as np
from jaxtyping import Bool

from padim_jax.data.files import (
    file_names,
    image_files,
    quoted,
    read_file,
    require_file,
    subfolders,
    unreadable,
)
from padim_jax.data.layouts.layout import Layout, require_root, split_given
from padim_jax.data.records import GOOD, Record
from padim_jax.errors import UserError
from padim_jax.system.paths import Path, is_folder

NAME = "ShanghaiTech Campus"
URL = "https://svip-lab.github.io/dataset/campus_dataset.html"
ANOMALY = "anomaly"
_HEAD = 2**16  # bytes read of an .npy file, which begins with its header


def stc(root: Path, category: str) -> list[Record]:
    """List the frames of one scene: train, then test, by video and frame number.

    Args:
      root: folder that holds training and testing.
      category: a scene, such as "01".

    Returns:
      Records of the training frames, then of the test frames; for a scene without test videos
      (13) only the former. A test frame's label is test_frame_mask's; the mask of an anomalous
      one is its frame in test_pixel_mask, counted from 0. The defect type is "anomaly".

    Raises:
      UserError: the root or the scene is missing; training videos are not unpacked; a video's
        frames are not numbered consecutively, or their number differs from its masks'; or a
        mask is missing or of another form.
    """
    require_root(root, NAME, "training/frames and testing/frames", URL)
    videos = _training_videos(root, category)
    records = [
        _record(root, frame, None, None)
        for video in videos
        for frame in _frames(video).values()
    ]
    if not is_folder(root / "testing" / "frames"):
        return records
    for video in _of_scene(root / "testing" / "frames", category):
        records += _test_records(root, video)
    return records


def categories(root: Path) -> list[str]:
    """Return the scenes that have test frames, sorted; 13 is published without.

    Raises:
      UserError: the root is missing, or there is no scene.
    """
    require_root(root, NAME, "training/frames and testing/frames", URL)
    frames = root / "testing" / "frames"
    scenes = {_scene(folder) for folder in subfolders(frames)}
    if not scenes:
        raise UserError(
            f"{frames}: holds no folder; expected one for each video, as in 01_0014"
        )
    return sorted(scenes)


LAYOUT = Layout(split_given(stc), categories, lambda root, _: root / "training")


def _record(root: Path, frame: Path, mask: Path | None, number: int | None) -> Record:
    """Return the record of a training frame (no number) or a test frame (no mask if normal)."""
    return Record(
        split="train" if number is None else "test",
        image=frame,
        mask=mask,
        label=int(mask is not None),
        defect_type=GOOD if mask is None else ANOMALY,
        relative_path=frame.relative_to(root).as_posix(),
        mask_frame=None if mask is None else number,
    )


def _training_videos(root: Path, category: str) -> list[Path]:
    """Return the folders of a scene's unpacked training videos."""
    frames, packed = root / "training" / "frames", root / "training" / "videos"
    unpacked = subfolders(frames) if is_folder(frames) else []
    videos = [folder for folder in unpacked if _scene(folder) == category]
    names = [
        packed / name for name in sorted(file_names(packed)) if name.lower().endswith(".avi")
    ]
    there = {folder.name for folder in videos}
    todo = [path for path in names if _scene(path) == category and path.stem not in there]
    if todo:
        raise UserError(
            f"{packed}: {quoted(todo)} not unpacked into frames in {frames}. With ffmpeg "
            f"installed: {_unpacking(root, category)}"
        )
    if not videos:
        scenes = sorted({_scene(path) for path in [*unpacked, *names]})
        raise UserError(
            f"config.category={category!r}: no folder {frames / f'{category}_001'} nor others "
            + (
                f"of that scene; scenes found: {', '.join(scenes)}"
                if scenes
                else f"of any scene; expected the videos of {NAME} from {URL}, unpacked"
            )
        )
    return videos


def _unpacking(root: Path, category: str) -> str:
    # -r 1 on both sides extracts each frame once, whatever the video's rate; numbers start at 0
    # as in the published test frames.
    return (
        f"cd {shlex.quote(str(root / 'training'))} && for video in videos/{category}_*.avi; do "
        'name=$(basename "$video" .avi); mkdir -p "frames/$name"; ffmpeg -r 1 -i "$video" -r 1 '
        '-qscale:v 1 -qmin 1 -start_number 0 "frames/$name/%03d.jpg"; done'
    )


def _test_records(root: Path, video: Path) -> list[Record]:
    frames = _frames(video)
    first, last = min(frames), max(frames)
    if missing := [str(n) for n in range(first, last + 1) if n not in frames]:
        raise UserError(
            f"{video}: no frame {', '.join(missing[:5])} between {first} and {last}, so which "
            "mask is whose cannot be told; unpack the test frames again"
        )
    labels = _labels(root, video, len(frames))
    mask = root / "testing" / "test_pixel_mask" / f"{video.name}.npy"
    if labels.any():
        _require_masks(mask, video, len(frames))
    return [
        _record(root, frame, mask if label else None, number)
        for number, (frame, label) in enumerate(zip(frames.values(), labels, strict=True))
    ]


def _labels(root: Path, video: Path, count: int) -> Bool[np.ndarray, " frames"]:
    path = root / "testing" / "test_frame_mask" / f"{video.name}.npy"
    data = read_file(path)
    shape, dtype, start = _header(data, path)
    if shape != (count,):  # before memory is allocated for what the header claims
        raise UserError(
            f"{path}: labels of shape {shape} for the {count} frames in {video}; "
            "expected one for each. Unpack masks and test frames again"
        )
    size = len(data) - start
    if dtype.kind not in "biuf" or size != count * dtype.itemsize:
        raise UserError(f"{path}: not an .npy file of {count} numbers: {size} bytes of {dtype}")
    labels = np.frombuffer(data, dtype, offset=start)
    if not np.isin(labels, (0, 1)).all():
        raise UserError(
            f"{path}: holds {np.unique(labels)[:5]}; expected 0 or 1 for each frame"
        )
    return labels.astype(bool)


def _require_masks(path: Path, video: Path, count: int) -> None:
    """Raise UserError unless there is a mask for each frame; only the file's head is read."""
    require_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise unreadable(path, error) from error
    shape, *_ = _header(head, path)
    if len(shape) != 3 or shape[0] != count:
        raise UserError(
            f"{path}: masks of shape {shape} for the {count} frames in {video}; expected "
            f"({count}, height, width). Unpack masks and test frames again"
        )


def _header(data: bytes, path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return the shape and dtype that an .npy file claims, and the offset of its data."""
    file = io.BytesIO(data)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    # NumPy parses Python syntax there, which raises arbitrary exceptions.
    except Exception as error:
        raise UserError(f"{path}: not an .npy file of NumPy: {error}") from error
    return shape, dtype, file.tell()


def _frames(video: Path) -> dict[int, Path]:
    """Return the frames of a video by number, in that order: 1000.jpg comes after 999.jpg."""
    found: dict[int, Path] = {}
    for path in image_files(video):
        if not path.stem.isdecimal() or int(path.stem) in found:
            raise UserError(
                f"{path}: expected frames named by different numbers, as in 000.jpg"
            )
        found[int(path.stem)] = path
    return dict(sorted(found.items()))


def _of_scene(folder: Path, category: str) -> list[Path]:
    return [path for path in subfolders(folder) if _scene(path) == category]


def _scene(video: Path) -> str:
    return video.name.partition("_")[0]
