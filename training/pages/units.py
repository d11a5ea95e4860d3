"""Quantities and durations as reports and the console print them."""

_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def quantity(value: float | None, unit: str = "") -> str:
    """1234567 as '1.23 M', with the unit after the prefix."""
    if value is None:
        return "–"
    prefix, size = next(((prefix, size) for prefix, size in _PREFIXES if value >= size), ("", 1))
    number = value / size
    decimals = 0 if size == 1 or number >= 100 else 1 if number >= 10 else 2
    return f"{number:.{decimals}f} {prefix}{unit}".strip()


def duration(seconds: float) -> str:
    """0.34 as '0.34 s', 61 as '1 min 1 s', 3661 as '1 h 1 min'."""
    if 0 < seconds < 9.5:
        return f"{seconds:.2g} s" if seconds >= 0.01 else "below 0.01 s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
