"""Numbers as a person reads them."""


def duration(seconds: float) -> str:
    """4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def size(count: float) -> str:
    """512 B, 1.4 MB, 2.0 GB; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def rate(bytes_per_s: float) -> str:
    """93.4 Mbit/s."""
    return f"{bytes_per_s * 8e-6:.1f} Mbit/s"


def money(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 1 else f"${usd:.5f}"


def count(number: float) -> str:
    return f"{number:,.0f}"
