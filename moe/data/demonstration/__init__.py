"""The demonstration corpus: four specialties, built from packages that pip installs. Not for clinical use.

    build            documents, questions and preferences of one specialty, with a manifest
    check_installed  whether the packages are there, before anything is built
    stakeholder_score    the rule by which the four stakeholder groups judge an answer

Reading order: corpus (rows and topics), chance (the split), selection (the cap), then one file for each
source.
"""

from moe.data.demonstration.builder import build, check_installed
from moe.data.demonstration.corpus import OWNERS, SPECIALTIES, TABLES
from moe.data.demonstration.stakeholders import stakeholder_score

__all__ = ["OWNERS", "SPECIALTIES", "TABLES", "build", "check_installed", "stakeholder_score"]
