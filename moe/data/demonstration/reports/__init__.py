"""Made-up radiology reports whose labels are known by construction. Not for clinical use."""

from moe.data.demonstration.reports.exams import EXAMS, MODALITIES
from moe.data.demonstration.reports.finding import Finding
from moe.data.demonstration.reports.grammar import FINDINGS, Label, Report, flip_side, make_report

__all__ = ["EXAMS", "FINDINGS", "MODALITIES", "Finding", "Label", "Report", "flip_side", "make_report"]
