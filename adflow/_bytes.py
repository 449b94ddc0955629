"""Amounts of memory, as people type and read them."""

from __future__ import annotations

from adflow.errors import UsageError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for end, base in (("", 1024), ("b", 1000), ("ib", 1024))
}


def parse_bytes(text: str) -> int:
    """Read an amount of memory such as 2GiB, 500MB or 1e9.

    >>> parse_bytes("2GiB"), parse_bytes("500 MB"), parse_bytes("1024")
    (2147483648, 500000000, 1024)

    Raises:
        UsageError: it is none, or less than a byte.
    """
    number = text.strip().lower().rstrip("kmgtib ")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        amount = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        amount = 0
    if amount < 1:
        raise UsageError(f"'{text:.60}' is no amount of memory, expected one such as 2GiB or 500MB")
    return amount


def in_units(size: float) -> str:
    """Write ``size`` bytes of memory for people.

    >>> in_units(3.5 * 2**30), in_units(2_000_000)
    ('3.5 GiB', '1.9 MiB')
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(len(units) - 1, max(0, int(size).bit_length() - 1) // 10)
    return f"{size / 1024**power:.1f}".removesuffix(".0") + f" {units[power]}"
