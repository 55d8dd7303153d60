"""Byte sizes as people write them."""

import re

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str) -> int:
    """The number of bytes in "8GiB", "512 MiB", "1.5GB" or "1048576".

    Raises ValueError for anything else and for sizes that are not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = (match.group(2) or "B").upper() if match else ""
    size = int(float(match.group(1)) * _UNITS[unit]) if match and unit in _UNITS else 0
    if size <= 0:
        raise ValueError(
            f"a size must be a positive number with an optional unit; received {text!r}; "
            "write it as 8GiB, 512MiB or a number of bytes"
        )
    return size
