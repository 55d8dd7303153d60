"""MemoryRecord's invariants and its JSON."""

import json
from collections.abc import Callable

import pytest

from dpmem_profiling import CATEGORIES, MemoryRecord, format_bytes

Make = Callable[..., MemoryRecord]


def test_json_and_back(make_record: Make) -> None:
    record = make_record(notes=("a note",), limit_bytes=2**30)
    assert MemoryRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_other_versions_are_refused(make_record: Make) -> None:
    data = make_record().to_json()
    with pytest.raises(ValueError, match="schema_version must be 1; got 2"):
        MemoryRecord.from_json({**data, "schema_version": 2})
    del data["schema_version"]
    with pytest.raises(ValueError, match="schema_version must be 1; got None"):
        MemoryRecord.from_json(data)


def test_missing_and_surplus_fields_are_named(make_record: Make) -> None:
    data = {**make_record().to_json(), "surprise": 1}
    del data["device"]
    with pytest.raises(ValueError, match="missing or surplus: device, surprise"):
        MemoryRecord.from_json(data)


def test_the_peak_must_add_up(make_record: Make) -> None:
    with pytest.raises(ValueError, match="peak_allocated_bytes=104857600; got 7"):
        make_record(at_peak={"parameter": 7})


def test_categories_and_source_must_be_known(make_record: Make) -> None:
    with pytest.raises(ValueError, match=r"persistent_bytes must use the categories .*got weights"):
        make_record(persistent_bytes={"weights": 3})
    with pytest.raises(ValueError, match="measured, predicted; got 'guessed'"):
        make_record(source="guessed")


def test_eleven_categories() -> None:
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 11


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 2**20, "10.0 MiB"),
        (150 * 2**20, "150 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (80 * 2**30, "80.0 GiB"),
        (5000 * 2**40, "5000 TiB"),
        (-(2**20), "-1.00 MiB"),
    ],
)
def test_format_bytes(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text
