"""One TensorFlow Datasets builder for all layouts: the records' files, packed.

The original bytes of images and masks go into array_record files, for sharing and
for cloud storage; TensorFlow is needed neither to write nor to read them. A packed
set stores a fingerprint of the files it was made from.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from padim_jax.data import masks
from padim_jax.data.files import is_image, read_file
from padim_jax.data.records import Record
from padim_jax.errors import UserError
from padim_jax.system import library_logs, locks, paths

_DEFAULT_DIR = pathlib.Path.home() / "tensorflow_datasets"


class PadimDataset(tfds.core.GeneratorBasedBuilder):
    """Builder that packs the records of one category, or reads a packed set."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, data_dir: paths.Path, records: Sequence[Record] = ()):
        self._records = records
        super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Normal images to fit, normal and anomalous ones to test.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, None)),
                    # Bytes and not an Image: empty without a mask. A mask of several files, or
                    # of a video's frame, is packed as one image (see `masks.read`).
                    "mask": tfds.features.Text(),
                    "label": tfds.features.Scalar(np.int64),
                    "defect_type": tfds.features.Text(),
                    "relative_path": tfds.features.Text(),
                }
            ),
            # Records are read in the layout's order.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager
        splits: dict[str, list[Record]] = {}
        for record in self._records:
            splits.setdefault(record.split, []).append(record)
        assert isinstance(self.info.metadata, dict)
        self.info.metadata["fingerprint"] = fingerprint(self._records)
        self.info.metadata["records"] = [
            {
                **dataclasses.asdict(record),
                "image": str(record.image),
                "mask": record.mask and str(record.mask),
            }
            for records in splits.values()
            for record in records
        ]
        return {split: self._generate_examples(records) for split, records in splits.items()}

    def _generate_examples(self, records: Sequence[Record]) -> Iterator[tuple[int, dict]]:
        for number, record in enumerate(records):
            yield (
                number,
                {
                    "image": io.BytesIO(read_file(record.image)),
                    "mask": masks.read(record) or b"",
                    "label": record.label,
                    "defect_type": record.defect_type,
                    "relative_path": record.relative_path,
                },
            )


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Source that reads a packed split; see `records.Source`."""

    records: Sequence[Record]
    examples: Sequence[Any]

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        """Return the encoded image of `records[index]` and its mask's, if it has one."""
        example = self.examples[index]
        return example["image"], example["mask"] if self.records[index].mask else None


def packed_dir(tfds_dir: paths.Path | None, title: str) -> paths.Path:
    """Return the folder in which a set is packed.

    Args:
      tfds_dir: folder of packed sets; None for TFDS's default.
      title: name of the set.

    Returns:
      The folder.

    Raises:
      UserError: array_record files cannot be read there.
    """
    name = "config.dataset.tfds_dir"
    if tfds_dir is None:
        name = "TFDS_DATA_DIR (config.dataset.tfds_dir=None)"
        tfds_dir = paths.parse(os.environ.get("TFDS_DATA_DIR", str(_DEFAULT_DIR)))
    if str(tfds_dir).startswith("s3://"):
        raise UserError(
            f"{name}={tfds_dir}: array_record files are read on this machine and from gs:// "
            "only. Copy the packed set to a folder here, or read the images where they are: "
            "--config.dataset.source=folder"
        )
    return tfds_dir.expanduser() / title


def prepare(data_dir: paths.Path, records: Sequence[Record] | None) -> PadimDataset:
    """Pack records unless they are already packed.

    Args:
      data_dir: folder from `packed_dir`.
      records: current records of the source folder, or None without a source folder: a set
        packed elsewhere is then used as it is.

    Returns:
      The builder of the packed set.

    Raises:
      UserError: the packed set is incomplete or was made from other files than the source
        folder holds now, or there is neither, or a file cannot be read, or the set would be
        packed to an object store.
    """
    # TFDS warns whenever there is nothing yet, as before each packing.
    with library_logs.without("has no dataset_info.json"):
        return _prepare(data_dir, records)


def _prepare(data_dir: paths.Path, records: Sequence[Record] | None) -> PadimDataset:
    builder = PadimDataset(data_dir=data_dir, records=records or ())
    if builder.is_prepared():
        _require_same(builder, data_dir, records)
        return builder
    # Waits for a process that packs the same. Reading alone takes no lock.
    packing = records is not None and isinstance(data_dir, pathlib.Path)
    with locks.attempt(data_dir, wait=True) if packing else contextlib.nullcontext():
        builder = PadimDataset(data_dir=data_dir, records=records or ())
        if not builder.is_prepared():
            _pack(builder, data_dir, records)
            return builder
    _require_same(builder, data_dir, records)
    return builder


def _pack(
    builder: PadimDataset, data_dir: paths.Path, records: Sequence[Record] | None
) -> None:
    if builder.data_path.exists():
        # As after an interrupted copy; preparing itself writes all or nothing.
        raise UserError(
            f"{builder.data_path}: an incomplete packed set, its description is missing. "
            f"Copy it again, or move {data_dir} away to pack again"
        )
    if records is None:
        raise UserError(
            f"config.dataset.source=tfds: no packed set in {data_dir} and no source folder "
            "to make one from; check config.dataset.root and config.dataset.tfds_dir"
        )
    if not isinstance(data_dir, pathlib.Path):
        raise UserError(
            f"config.dataset.source=tfds: no packed set in {data_dir}, and array_record "
            "files are written on this machine's disks only. Pack to a folder here "
            f"(--config.dataset.tfds_dir) and copy its {data_dir.name} there"
        )
    place = pathlib.Path(builder.data_path)
    _remove_unfinished(place)  # of a killed process
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder.download_and_prepare()
    except UserError:
        raise
    except Exception as error:  # array_record's errors quote the system's
        if (reason := paths.explanation(error, data_dir)) is None:
            raise
        with contextlib.suppress(OSError):
            _remove_unfinished(place)
        raise UserError(f"{reason}. Nothing is packed yet") from error


def _remove_unfinished(place: pathlib.Path) -> None:
    for left in place.parent.glob(f"incomplete.*_{place.name}"):
        shutil.rmtree(left)


def _require_same(
    builder: PadimDataset, data_dir: paths.Path, records: Sequence[Record] | None
) -> None:
    if records is not None and _metadata(builder).get("fingerprint") != fingerprint(records):
        raise UserError(
            f"{data_dir}: packed from {len(_metadata(builder)['records'])} images that differ "
            f"from the {len(records)} in the source folder now. Move {data_dir} away to "
            "pack again, name another --config.dataset.tfds_dir, or use "
            "--config.dataset.source=folder"
        )


def open_split(builder: PadimDataset, split: str) -> TfdsSource:
    """Return the packed images of one split, in the layout's order; possibly none.

    Args:
      builder: builder from `prepare`.
      split: "train", "validation" or "test".

    Returns:
      The source.

    Raises:
      UserError: the set's descriptions of its images are damaged or unsafe.
    """
    place = builder.data_path
    every = [_record(fields, place) for fields in _metadata(builder)["records"]]
    records = [record for record in every if record.split == split]
    if not records:
        return TfdsSource((), ())
    decoders = {"image": tfds.decode.SkipDecoding()}
    # TFDS's decorator hides the signature from the type checker.
    examples = builder.as_data_source(split, decoders=decoders)  # pyright: ignore[reportCallIssue]
    return TfdsSource(records, examples)


def _record(fields: Any, place: paths.Path) -> Record:
    """Return one image's record from a packed set's description, which is untrusted."""
    try:
        found = Record(
            **{
                **fields,
                "image": paths.parse(fields["image"], needed=False),
                "mask": fields["mask"] and paths.parse(fields["mask"], needed=False),
            }
        )
        if found.label not in (0, 1):
            raise TypeError("expected a label of 0 or 1")
        return found
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{place}: a damaged packed set: {fields!r} is no image's description; copy it "
            "again, or move it away to pack again"
        ) from error


def fingerprint(records: Sequence[Record]) -> str:
    """Return the SHA-256 of the records and of the contents of all their files."""
    digest = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for record, contents in zip(records, threads.map(_contents, records), strict=True):
            fields = (record.split, record.label, record.defect_type, record.relative_path)
            digest.update(repr((*fields, contents)).encode())
    return digest.hexdigest()


def _contents(record: Record) -> list[str]:
    contents = [read_file(record.image)]
    if record.mask is not None:
        mask = masks.read(record)
        assert mask is not None
        if not is_image(record.mask):
            # Converted here: the pixels count, not their encoding.
            pixels = masks.decode(mask, str(record.mask))
            mask = repr(pixels.shape).encode() + pixels.tobytes()
        contents.append(mask)
    return [hashlib.sha256(content).hexdigest() for content in contents]


def _metadata(builder: PadimDataset) -> dict[str, Any]:
    metadata = builder.info.metadata
    if not (isinstance(metadata, dict) and isinstance(metadata.get("records"), list)):
        raise UserError(
            f"{builder.data_path}: a damaged packed set: its metadata list no images; copy it "
            "again, or move it away to pack again"
        )
    return metadata
