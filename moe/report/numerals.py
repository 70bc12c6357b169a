"""How the report writes numbers: signs, units, and no more digits than a reader can use."""

import math

NBSP, MINUS = "\u00a0", "\u2212"
NOT_FINITE = "not finite"


def decimal(value: float, places: int = 3, signed: bool = False) -> str:
    """3.235, and +0.004 or −0.004 where `signed`; what rounds to nothing has no sign."""
    if not math.isfinite(value):
        return NOT_FINITE
    value = round(value, places) + 0.0  # -0.0 + 0.0 is 0.0
    sign = MINUS if value < 0 else "+" if signed and value > 0 else ""
    return f"{sign}{abs(value):,.{places}f}"


def percent(share: float, places: int = 1, signed: bool = False) -> str:
    """0.123 is 12.3 %."""
    return f"{decimal(share * 100, places, signed)}{NBSP}%" if math.isfinite(share) else NOT_FINITE


def percent_beside(share: float, *bounds: float, places: int = 1, signed: bool = False) -> str:
    """A percentage with at least `places` decimals, and as many as it takes to see on which side of the bounds it
    lies: 9.97 %, not 10.0 %."""
    while places < 6 and any(
        round(share * 100, places) == round(bound * 100, places) and not math.isclose(share, bound, abs_tol=1e-9)
        for bound in bounds
    ):
        places += 1
    return percent(share, places, signed)


def count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else NOT_FINITE


def duration(seconds: float) -> str:
    """6.7 s, 1 min 06 s, 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest:02}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60:02}{NBSP}min"


def gibibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f}{NBSP}GiB"
