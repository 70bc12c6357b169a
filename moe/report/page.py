"""report.html: what a run has shown, on one page that needs nothing but itself.

It is written from what lies in the run's folder and from nothing else, so it can be written again at any time, also of
a run that has not finished, and the same files give the same bytes. The page loads nothing (its own content policy
forbids it) and runs no script. It has no text of documents, and of paths only their last part.
"""

from pathlib import Path
from typing import Any

import jinja2
import yaml

from moe.report import history, job_page, numerals, record, specialty_page
from moe.report.record import Record, Row
from moe.run_folder import RunFolder
from moe.whole import write_whole

SHORT = 12  # hex digits of a hash that a reader compares by eye


def write_page(run: RunFolder) -> Path:
    """Write report.html and return its path. Raises InputError where the folder is not a run's."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for form in (
        numerals.decimal,
        numerals.percent,
        numerals.count,
        numerals.duration,
        numerals.gibibytes,
    ):
        environment.filters[form.__name__] = form
    found = record.read(run)
    kind, content = ("job", job_page.content) if found.is_job else ("specialty", specialty_page.content)
    html = environment.get_template(f"{kind}.html").render(_common(found) | content(found))
    write_whole(run.report, html)
    return run.report


def _common(found: Record) -> dict[str, Any]:
    sections = found.data_sections
    return {
        "name": found.config["run"]["name"],
        "results": found.results,
        "stale": found.stale,
        "manifest": found.manifest,
        "config": yaml.safe_dump(found.config, sort_keys=False, allow_unicode=True),
        "progress": history.progress(found),
        "happened": history.summary(found),
        "when": history.begun_and_ended(found),
        "demonstration": [domain for domain, section in sections.items() if section.get("demonstration")],
        "data": [found.data(domain) for domain in sections],
        "stages": _stages(found),
        "pace": [
            {"stage": stage, **stretch}
            for stage in found.trainings
            for stretch in history.pace(found.metrics(stage))
        ],
        "short": SHORT,
    }


def _stages(found: Record) -> list[Row]:
    """Seconds of each finished stage, in the order of the graph."""
    domains = list(found.data_sections)
    order = [f"data-{domain}" for domain in domains] + list(found.trainings)
    order += [] if found.is_job else ["merge", *(f"measure-{domain}" for domain in domains)]
    return [{"name": stage, "seconds": done["seconds"]} for stage in order if (done := found.done(stage))]
