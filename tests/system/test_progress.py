"""Batches that devices divide, of one size for all of a fit, and a bar for one process."""

import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from padim_jax.config import defaults
from padim_jax.config.settings import validate
from padim_jax.data import passes
from padim_jax.data.input_pipeline import Batch, FolderSource
from padim_jax.data.records import Record
from padim_jax.devices.parallel import Devices


@pytest.fixture
def records(tmp_path: pathlib.Path) -> list[Record]:
    """Eleven images; image k is filled with k."""
    found = []
    for number in range(11):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(path)
        found.append(Record("train", path, None, 0, "good", path.name))
    return found


def batches(
    records: list[Record], batch_size: int, devices: Devices, start: int = 0
) -> list[Batch]:
    values: Any = defaults.get_config()
    values.image.resize, values.batch_size = (32, 32), batch_size
    source = FolderSource(records)
    return list(passes.batches(source, validate(values), "fit", None, devices, start))


@pytest.mark.parametrize("devices", [Devices(1), Devices(3), Devices(8)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_devices_divide_every_batch(batch_size: int, devices: Devices, records: list[Record]):
    found = batches(records, batch_size, devices)
    assert [record for batch in found for record in batch.records] == records
    (size,) = {len(batch.images) for batch in found}
    assert size % devices.total == 0
    assert size < batch_size + devices.total


def test_a_few_images_are_no_whole_batch(records: list[Record]):
    (batch,) = batches(records[:3], 32, Devices(2))
    assert len(batch.images) == 4


@pytest.mark.parametrize("devices", [Devices(2, 2, 0), Devices(2, 2, 1)], ids=str)
def test_a_process_has_its_part(devices: Devices, records: list[Record]):
    found = batches(records, 8, devices)
    assert [len(batch.images) for batch in found] == [4, 4]
    own = records[:4] + records[8:] if devices.process == 0 else records[4:8]
    assert [record for batch in found for record in batch.records] == own


@pytest.mark.parametrize("start", [1, 4, 8, 10])
@pytest.mark.parametrize("batch_size", [4, 32])
def test_size_does_not_depend_on_the_start(batch_size: int, start: int, records: list[Record]):
    """Convolutions of fewer images may round otherwise: a fit that goes on would differ."""
    (size,) = {len(batch.images) for batch in batches(records, batch_size, Devices(1))}
    found = batches(records, batch_size, Devices(1), start)
    assert {len(batch.images) for batch in found} == {size}
    assert [record for batch in found for record in batch.records] == records[start:]


def test_nothing_is_left(records: list[Record]):
    assert batches(records, 4, Devices(1), start=11) == []
    assert batches([], 4, Devices(1)) == []
