"""Ours against the best peer: the fastest one that is not ours, at each point and pass of one run."""

from collections.abc import Sequence

from benchmarks import harness
from benchmarks.harness import Point, Settings
from benchmarks.tables import Row, table

OURS = "kernels"  # how the names of our providers begin
COLUMNS = (("point", "point", "{}"), ("pass", "pass", "{}"), ("launch", "launch", "{}"), ("provider", "provider", "{}"),
           ("against", "against", "{}"), ("times as fast", "speedup", "{:.2f}"),
           ("of its memory", "memory_ratio", "{:.2f}"), ("of its resident", "resident_ratio", "{:.2f}"),
           ("% of P", "percent_of_p", "{:.1f}"),
           ("% of copy", "percent_of_copy", "{:.1f}"), ("void", "void", "{}"))
KEPT = ("op", "shape", "dtype", "load", "pass", "launch", "provider", "percent_of_p", "percent_of_copy", "void")


def against(rows: Sequence[Row], points: Sequence[Point], settings: Settings, peers: str) -> list[Row]:
    """Print the table; its rows are also lines of settings.out, those that have "against"."""
    found = []
    for point in points:
        of_point = [row for row in rows if (row["shape"], row["dtype"], row["load"], row["op"])
                    == (point.shape, harness.name_of(point.dtype), point.load, point.op)]
        for row in ratios(of_point):
            found.append(harness.emit(settings, point, row) | {"point": harness.title(point)})
    print(f"\nagainst the best of {peers}\n{table(found, COLUMNS)}", flush=True)
    return found


def ratios(rows: Sequence[Row]) -> list[Row]:
    """Ours over the best peer for each pass of one point's rows, launched alike."""
    found = []
    for which in dict.fromkeys((row["pass"], row.get("launch")) for row in rows if "pass" in row):
        measured = [row for row in rows if (row.get("pass"), row.get("launch")) == which and "ms" in row]
        own = [row for row in measured if row["provider"].startswith(OURS)]
        peers = [row for row in measured if row not in own]
        best = min(peers, key=lambda row: row["ms"], default=None)
        for row in own if best else ():
            line = {name: row[name] for name in KEPT if name in row}
            line |= {"against": best["provider"], "speedup": best["ms"] / row["ms"]}
            for ratio, of in (("memory_ratio", "peak_mib"), ("resident_ratio", "peak_resident_mib")):
                if best.get(of):
                    line[ratio] = row[of] / best[of]
            found.append(line)
    return found
