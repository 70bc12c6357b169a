"""What a run claims: each claim's bound, the figures it was measured by, and whether they meet it.

A claim holds when all of its figures meet the bound. A figure that is not a number meets none. How the figures were
measured is in moe.specialty.measure.
"""

import math
from dataclasses import dataclass
from typing import Any

from moe.config import MOST_SUBSETS
from moe.report.numerals import percent, percent_beside

MIN_GAIN = 0.10  # of a specialty's bits per byte, against the anchor
MAX_PUBLIC_LOSS = 0.01  # of public bits per byte, against the anchor
MIN_PURITY = 0.80  # of the tokens of a specialty's held-out text
WIN_RATE_MARGIN = 0.01  # around rho, of public tokens
MAX_REMOVAL_CHANGE = 0.005  # of bits per byte, either way
SLACK = 1e-9  # a figure that is its bound meets it, whatever the last bit of a quotient says


@dataclass(frozen=True)
class Figure:
    name: str  # what it is of: a text or an owner
    text: str
    holds: bool
    note: str = ""  # what a reader must know before believing it


@dataclass(frozen=True)
class Claim:
    name: str
    sentence: str
    bound: str
    figures: tuple[Figure, ...]

    @property
    def holds(self) -> bool:
        return all(figure.holds for figure in self.figures)


def claims(results: dict[str, Any], rho: float) -> list[Claim]:
    """`results` is what results.json holds; `rho` the share of public tokens the packs were calibrated to."""
    return [
        _gain(results),
        _public_kept(results),
        _optout(results),
        _plain_router(results),
        _purity(results),
        _win_rate(results, rho),
        _removed(results),
        _others_unchanged(results),
    ]


def gain(figures: dict[str, Any]) -> float:
    """Share of the anchor's bits per byte that the merged model saves."""
    return 1 - figures["merged_bpb"] / figures["anchor_bpb"]


def _gain(results: dict[str, Any]) -> Claim:
    return Claim(
        "Specialty gain",
        "On a specialty's held-out text the merged model saves this share of the anchor's bits per byte.",
        f"at least {percent(MIN_GAIN, 0)}",
        tuple(
            Figure(name, percent_beside(share, MIN_GAIN), share >= MIN_GAIN - SLACK)
            for name, share in ((name, gain(figures)) for name, figures in results["specialties"].items())
        ),
    )


def _public_kept(results: dict[str, Any]) -> Claim:
    change = -gain(results["public"])
    return Claim(
        "Public text kept",
        "Merging does not make the model worse on public text.",
        f"at most {percent(MAX_PUBLIC_LOSS, 0, signed=True)}",
        (
            Figure(
                "public",
                percent_beside(change, MAX_PUBLIC_LOSS, signed=True),
                change <= MAX_PUBLIC_LOSS + SLACK,
            ),
        ),
    )


def optout_is_exact(results: dict[str, Any]) -> bool:
    """Whether as many subsets of owners were compared as are wanted, and every bit was equal."""
    return bool(results["optout"]["bitwise_equal"]) and results["optout"]["subsets"] >= min(num_subsets(results),
                                                                                            MOST_SUBSETS)


def num_subsets(results: dict[str, Any]) -> int:
    """Of owners, of all that there are."""
    return 2 ** len(results["specialties"])


def _optout(results: dict[str, Any]) -> Claim:
    optout, every = results["optout"], num_subsets(results)
    wanted = min(every, MOST_SUBSETS)
    compared = f"{wanted:,}" if wanted == every else f"{wanted:,} of {every:,}"
    if optout["subsets"] < wanted:
        text = f"only {optout['subsets']:,} of {every:,} subsets compared"
    else:
        text = f"{compared} subsets: " + ("all bits equal" if optout["bitwise_equal"] else "bits differ")
    return Claim(
        "Opt-out is exact",
        "Without an owner the model is, bit for bit, the one in which that owner never was.",
        ("all subsets of owners" if wanted == every else f"{compared} subsets of owners, drawn") + ", all bits",
        (Figure("logits", text, optout_is_exact(results)),),
    )


def _plain_router(results: dict[str, Any]) -> Claim:
    differs = bool(results["optout"]["plain_router_differs"])
    return Claim(
        "Control of the opt-out check",
        "A plain router, without stable slots, is seen to differ: the comparison above can fail.",
        "at least one bit differs",
        (Figure("plain router", "differs" if differs else "does not differ", differs),),
    )


def _purity(results: dict[str, Any]) -> Claim:
    purity = results["routing"]["purity"]
    note = "100 % by construction: there is one owner" if len(purity) == 1 else ""
    return Claim(
        "Routing purity",
        "On text of a specialty, the router's best expert beside the anchor is that specialty's own.",
        f"at least {percent(MIN_PURITY, 0)} of tokens",
        tuple(
            Figure(name, percent_beside(share, MIN_PURITY), share >= MIN_PURITY - SLACK, note)
            for name, share in purity.items()
        ),
    )


def _win_rate(results: dict[str, Any], rho: float) -> Claim:
    low, high = rho - WIN_RATE_MARGIN, rho + WIN_RATE_MARGIN
    points = f"{WIN_RATE_MARGIN * 100:.0f}\u00a0point"
    return Claim(
        "Win rate on public text",
        "An expert outranks the anchor on as many public tokens as it was calibrated to (rho), no more and no fewer.",
        f"{percent(rho, 0 if math.isclose(100 * rho, round(100 * rho)) else 1)} of tokens, within {points}",
        tuple(
            Figure(name, percent_beside(rate, low, high), low - SLACK <= rate <= high + SLACK)
            for name, rate in results["public"]["win_rate"].items()
        ),
    )


def _removed(results: dict[str, Any]) -> Claim:
    figures = []
    for name, row in results["specialties"].items():
        change = row["without_owner_bpb"] / row["anchor_bpb"] - 1
        small = abs(gain(row)) <= MAX_REMOVAL_CHANGE
        figures.append(
            Figure(
                name,
                _change(change),
                abs(change) <= MAX_REMOVAL_CHANGE + SLACK,
                f"little to remove: with its owner {percent(-gain(row), 2, signed=True)}" if small else "",
            )
        )
    return Claim(
        "Removal removes",
        "Without its owner's pack, text of a specialty scores as it does under the anchor.",
        f"within {percent(MAX_REMOVAL_CHANGE, 1)} of the anchor",
        tuple(figures),
    )


def _others_unchanged(results: dict[str, Any]) -> Claim:
    texts = {"public": results["public"], **results["specialties"]}
    figures = []
    for owner in results["specialties"]:
        changes = {t: row["without_bpb"][owner] / row["merged_bpb"] - 1 for t, row in texts.items() if t != owner}
        worst = max(changes, key=lambda t: abs(changes[t]) if math.isfinite(changes[t]) else math.inf)
        figures.append(
            Figure(
                f"without {owner}",
                f"{_change(changes[worst])} ({worst})",
                all(abs(change) <= MAX_REMOVAL_CHANGE + SLACK for change in changes.values()),
            )
        )
    return Claim(
        "Removal spares the others",
        "Without one owner's pack, every other text scores as it did; the largest change is shown.",
        f"within {percent(MAX_REMOVAL_CHANGE, 1)} of before",
        tuple(figures),
    )


def _change(share: float) -> str:
    return percent_beside(share, MAX_REMOVAL_CHANGE, -MAX_REMOVAL_CHANGE, places=2, signed=True)
