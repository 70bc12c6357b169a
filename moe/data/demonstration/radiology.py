"""The imaging group: made-up reports and questions about them, DICOM, and FHIR's imaging resources.

Not for clinical use.
"""

from random import Random

from moe.data.demonstration import dicom, fhir, icd, packages, stakeholders
from moe.data.demonstration.chance import Chance
from moe.data.demonstration.corpus import Corpus, Document, Subject, Topic
from moe.data.demonstration.reports import (
    FINDINGS,
    MODALITIES,
    Finding,
    Label,
    Report,
    flip_side,
    make_report,
)

STATUSES = ("present", "absent", "uncertain")
OTHER_SIDE = {"right": "left", "left": "right"}
MEASURING_ERRORS = (-9, -5, 6, 11)  # millimeters


def topics(chance: Chance, num_reports: int) -> list[Topic]:
    return [
        *(_report_topic(number, chance) for number in range(num_reports)),
        *dicom.topics(chance),
        *fhir.topics("radiology", chance),
    ]


def _report_topic(number: int, chance: Chance) -> Topic:
    concept = f"report:{number:06d}"
    subject = Subject(packages.GRAMMAR, concept, chance.side(concept))

    def documents() -> list[Document]:
        return [Document(subject, make_report(chance.rng("report", number)).text)]

    def tasks(corpus: Corpus) -> None:
        report = make_report(chance.rng("report", number))
        rng = chance.rng("report-tasks", number)
        _impression(corpus, subject, report, rng)
        _ask_findings(corpus, subject, report, rng)
        _ask_list(corpus, subject, report, rng)
        for name, label in report.labels.items():
            if label.status != "absent" and rng.random() < 0.5:
                prompt = f"{report.text}\nWhat does this report say about {name}?"
                stakeholders.judge(corpus, chance, subject, prompt, _answers(report, name, label))

    return Topic(concept, documents, tasks)


def _impression(corpus: Corpus, subject: Subject, report: Report, rng: Random) -> None:
    """Findings to impression. The rejected one has a known fault: side, omission or invention."""
    positive = [label for label in report.labels.values() if label.status != "absent"]
    if any(label.side for label in positive) and not (report.exam.one_sided and rng.random() < 0.5):
        fault, wrong = "laterality", flip_side(report.impression)
    elif positive:
        fault, wrong = "omission", "No acute abnormality."
    else:
        invented = rng.choice(_findings_of(report)).name
        fault, wrong = "invention", f"{invented[:1].upper()}{invented[1:]}."
    prompt = report.head + "\nWrite the impression."
    corpus.question(subject, prompt, report.impression, "findings->impression")
    corpus.preference(subject, prompt, report.impression, wrong, f"impression:{fault}")


def _ask_findings(corpus: Corpus, subject: Subject, report: Report, rng: Random) -> None:
    """Status, side and size of each finding that is stated; half of the absent ones are passed over."""
    for name, label in report.labels.items():
        if label.status == "absent" and rng.random() < 0.5:
            continue
        wrong = rng.choice([status for status in STATUSES if status != label.status])
        question = f"{report.text}\nIs {name} present, absent or uncertain?"
        corpus.question(subject, question, label.status, "report+finding->status", wrong)
        if label.side:
            question = f"{report.text}\nOn which side is the {name}?"
            wrong = OTHER_SIDE[label.side]
            corpus.question(subject, question, label.side, "report+finding->side", wrong)
        if label.size_mm is not None and rng.random() < 0.6:
            question = f"{report.text}\nWhat is the size of the {name}, in millimeters?"
            wrong = f"{max(1, label.size_mm + rng.choice(MEASURING_ERRORS))} mm"
            corpus.question(subject, question, f"{label.size_mm} mm", "report+finding->size", wrong)


def _ask_list(corpus: Corpus, subject: Subject, report: Report, rng: Random) -> None:
    """All findings that are present; the wrong list swaps one for another that this exam may show."""
    names = [name for name, label in report.labels.items() if label.status == "present"]
    others = [f.name for f in _findings_of(report) if f.name not in names]
    wrong = ", ".join([rng.choice(others), *names[1:]]) if others else "none"
    question = report.text + "\nList the findings that are present."
    corpus.question(subject, question, ", ".join(names) or "none", "report->findings", wrong)


def _findings_of(report: Report) -> list[Finding]:
    return [finding for finding in FINDINGS if report.exam.key in finding.exams.split()]


def _answers(report: Report, name: str, label: Label) -> dict[str, str]:
    """What the report says about one finding, for four readers. None contradicts the label.

    A finding called possible is not coded as confirmed on an outpatient claim.
    """
    where = ", ".join(x for x in (label.side, label.location, label.size) if x) or "site as described"
    code, region = f"{label.code} ({icd.tabular().describe(label.code)})", label.region.lower()
    modality = MODALITIES[report.exam.modality]
    if label.status == "present":
        return {
            "precise": f"{label.phrase[:1].upper()}{label.phrase[1:]} ({where}), stated as definite.",
            "plain": f"Your scan shows {label.plain}. Your care team can tell you what it means for you and "
            "what comes next.",
            "coded": f"{code}. Documentation: {modality} report, {region} section, impression line supports "
            "the code.",
            "reasoned": f"The {region} section describes {name} directly and the impression repeats it "
            "without a hedge, therefore it counts as present.",
        }
    return {
        "precise": f"Possible {label.phrase} ({where}); equivocal on this study and cannot be confirmed.",
        "plain": f"Your scan may show {label.plain}, but it is not clear. You may need one more test, and "
        "your care team can explain it to you.",
        "coded": f"Not reported as {code} on an outpatient claim: documentation says possible. Code the sign "
        "or symptom in the indication.",
        "reasoned": f"The wording is hedged in the {region} section and again in the impression, therefore "
        f"{name} is uncertain rather than present, because neither sentence commits to it.",
    }
