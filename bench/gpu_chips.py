"""What a GPU can do at best, as its maker states it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chip:
    """Bytes/s of its memory, dense half-precision FLOP/s."""

    bandwidth: float
    flops: float


# By a part of the device's name; the first one that fits counts.
CHIPS = {
    "H200": Chip(4.8e12, 989e12),
    "H100 PCIe": Chip(2.0e12, 756e12),
    "H100": Chip(3.35e12, 989e12),
    "A100": Chip(2.039e12, 312e12),
}
UNKNOWN = CHIPS["H100"]


def chip_of(name: str) -> Chip:
    """Of a device of that name; one that is not in the table counts as an H100."""
    return next((chip for part, chip in CHIPS.items() if part in name), UNKNOWN)
