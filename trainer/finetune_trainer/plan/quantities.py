"""Parse Kubernetes quantities (`64Gi`, `500m`, `1.5G`), and format numbers for people."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

_FORM = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_SCALES: dict[str | None, Decimal] = {
    None: Decimal(1),
    "m": Decimal("0.001"),
    "k": Decimal(10**3),
    **{letter: Decimal(1000**power) for power, letter in enumerate("MGTP", start=2)},
    **{f"{letter}i": Decimal(1024**power) for power, letter in enumerate("KMGTP", start=1)},
}


def parse_quantity(text: str) -> int:
    """Return the value of a quantity, rounded up as by Kubernetes' `Quantity.Value()` (`500m` is 1).

    Raises:
        ValueError: the text is not a quantity.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"got {text!r}, expected a quantity such as 64Gi, 1.5G or 8")
    number, suffix = match.groups()
    return int((Decimal(number) * _SCALES[suffix]).to_integral_value(ROUND_CEILING))


def human_bytes(count: float) -> str:
    """Format bytes in binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{_short(count)} {unit}"
        count /= 1024
    return f"{_short(count)} TiB"


def human_count(count: float) -> str:
    """Format a number in thousands (k), millions (M), billions (B) or trillions (T): `8.03 B`."""
    for unit in ("", " k", " M", " B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{_short(count)}{unit}"
        count /= 1000
    return f"{_short(count)} T"


def _short(count: float) -> str:
    """Format a number with three significant digits, never in scientific notation."""
    return f"{count:.0f}" if abs(count) >= 100 else f"{count:.3g}"
