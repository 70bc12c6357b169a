"""Rows of results as a table in plain text."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

# Heading, key and format of the columns of a table; those that no row fills are left out.
COLUMNS = (("provider", "provider", "{}"), ("pass", "pass", "{}"), ("launch", "launch", "{}"), ("ms", "ms", "{:.3f}"),
           ("p20", "p20", "{:.3f}"), ("p80", "p80", "{:.3f}"), ("us", "us", "{:.1f}"),
           ("TFLOP/s", "tflop_per_s", "{:.4g}"), ("% of P", "percent_of_p", "{:.1f}"),
           ("% of own", "percent_of_own", "{:.1f}"),
           ("GB/s", "gb_per_s", "{:.4g}"), ("% of copy", "percent_of_copy", "{:.1f}"),
           ("peak MiB", "peak_mib", "{:.1f}"), ("held MiB", "held_mib", "{:.1f}"),
           ("resident MiB", "peak_resident_mib", "{:.1f}"), ("void", "void", "{}"))


def table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]] = COLUMNS) -> str:
    """Rows as plain text, words to the left and numbers to the right; below them those that give a reason instead."""
    measured = [row for row in rows if "reason" not in row]
    shown = [column for column in columns if any(row.get(column[1]) not in (None, "", False) for row in measured)]
    cells = [[heading for heading, *_ in shown]]
    cells += [["" if row.get(key) in (None, False) else form.format(row[key]) for _, key, form in shown]
              for row in measured]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    words = [any(isinstance(row.get(key), str) for row in measured) for _, key, _ in shown]
    lines = ["  ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word
                       in zip(line, widths, words, strict=True)).rstrip() for line in cells if measured]
    for row in rows:
        if "reason" in row:
            lines.append(" ".join(filter(None, (row["provider"], row.get("pass"), row.get("launch"))))
                         + f": {row['reason']}")
    return "\n".join(lines)
