"""Findings of the chest. All wording was written for Polyclinic; not for clinical use."""

from moe.data.demonstration.reports.finding import DEGREES, SIZES, Finding

LUNG = {
    "right": ("right upper lobe", "right middle lobe", "right lower lobe"),
    "left": ("left upper lobe", "left lingula", "left lower lobe"),
}

# fmt: off
FINDINGS = (
    Finding(
        "pneumothorax", region="Pleura", exams="cxr ctchest", code="J93.9",
        sided=True, degrees=SIZES,
        phrase="{deg} {side} pneumothorax",
        observation=(
            "A visceral pleural line is visible at the {side} apex, in keeping with a {deg} pneumothorax."
        ),
        plain="air that has leaked around the {side} lung",
        advice="Clinical correlation and a short-interval repeat study are advised.",
    ),
    Finding(
        "pleural effusion", region="Pleura", exams="cxr ctchest", code="J90",
        sided=True, degrees=SIZES,
        phrase="{deg} {side} pleural effusion",
        observation=(
            "Blunting of the {side} costophrenic angle is consistent with a {deg} pleural effusion."
        ),
        plain="fluid around the {side} lung",
    ),
    Finding(
        "pleural thickening", region="Pleura", exams="cxr ctchest", code="J92.9",
        sided=True, noun="mass", degrees=DEGREES,
        phrase="{deg} {side} pleural thickening",
        observation="There is {deg} pleural thickening along the {side} lateral chest wall.",
        plain="a thicker lining around the {side} lung",
    ),
    Finding(
        "consolidation", region="Lungs", exams="cxr ctchest", code="R91.8",
        sided=True, noun="mass", locations=LUNG,
        phrase="consolidation in the {loc}",
        observation="Airspace consolidation with air bronchograms is present in the {loc}.",
        plain="an area of the {side} lung that is filled instead of airy",
        advice="Follow-up imaging in 6 to 8 weeks is suggested to document resolution.",
    ),
    Finding(
        "atelectasis", region="Lungs", exams="cxr ctchest", code="J98.11",
        sided=True, noun="mass", degrees=("mild", "subsegmental", "moderate"),
        phrase="{deg} atelectasis at the {side} lung base",
        observation="Linear opacities at the {side} lung base represent {deg} atelectasis.",
        plain="part of the {side} lung that is not fully open",
    ),
    Finding(
        "pulmonary edema", region="Lungs", exams="cxr ctchest", code="J81.0",
        noun="mass", degrees=DEGREES,
        phrase="{deg} pulmonary edema",
        observation="Vascular indistinctness and septal lines indicate {deg} pulmonary edema.",
        plain="extra fluid in the lungs",
    ),
    Finding(
        "pulmonary nodule", region="Lungs", exams="cxr ctchest", code="R91.1",
        sided=True, size_mm=(4, 28), locations=LUNG,
        phrase="{size} pulmonary nodule in the {loc}",
        observation="A {size} solid pulmonary nodule is identified in the {loc}.",
        plain="a small spot in the {side} lung",
        advice="Comparison with prior imaging or follow-up CT is recommended.",
    ),
    Finding(
        "ground-glass opacity", region="Lungs", exams="ctchest", code="R91.8",
        sided=True, noun="mass", locations=LUNG,
        phrase="ground-glass opacity in the {loc}",
        observation="Patchy ground-glass opacity is seen in the {loc}.",
        plain="a hazy area in the {side} lung",
        advice="Follow-up chest CT is recommended to confirm resolution.",
    ),
    Finding(
        "emphysema", region="Lungs", exams="cxr ctchest", code="J43.9",
        noun="mass", degrees=DEGREES,
        phrase="{deg} emphysema",
        observation="The lungs are hyperexpanded with {deg} upper-zone predominant emphysema.",
        plain="lung damage with enlarged air spaces",
    ),
    Finding(
        "bronchiectasis", region="Lungs", exams="ctchest", code="J47.9",
        sided=True, noun="mass", degrees=DEGREES, locations=LUNG,
        phrase="{deg} bronchiectasis in the {loc}",
        observation="The bronchi of the {loc} do not taper, consistent with {deg} bronchiectasis.",
        plain="widened airways in the {side} lung",
    ),
    Finding(
        "pulmonary embolism", region="Pulmonary arteries", exams="ctchest", code="I26.99",
        sided=True,
        phrase="filling defect in a {side} segmental pulmonary artery consistent with pulmonary embolism",
        observation=(
            "A {side} segmental pulmonary arterial filling defect is present, diagnostic of acute "
            "pulmonary embolism."
        ),
        plain="a blood clot in an artery of the {side} lung",
        advice="The result was marked as critical for immediate communication.",
    ),
    Finding(
        "cardiomegaly", region="Heart and mediastinum", exams="cxr ctchest", code="I51.7",
        noun="mass", degrees=DEGREES,
        phrase="{deg} cardiomegaly",
        observation="The cardiac silhouette is enlarged, {deg} in degree.",
        plain="a heart that looks larger than usual",
    ),
    Finding(
        "pericardial effusion", region="Heart and mediastinum", exams="ctchest", code="I31.39",
        degrees=SIZES,
        phrase="{deg} pericardial effusion",
        observation="Low-attenuation fluid surrounds the heart, representing a {deg} pericardial effusion.",
        plain="fluid in the sac around the heart",
        advice="Echocardiography may be considered.",
    ),
    Finding(
        "mediastinal lymphadenopathy", region="Heart and mediastinum", exams="ctchest", code="R59.0",
        noun="mass", size_mm=(11, 30),
        locations=("right paratracheal", "subcarinal", "aortopulmonary window"),
        phrase="mediastinal lymphadenopathy measuring up to {size} in short axis",
        observation="Enlarged {loc} lymph nodes measure up to {size} in short axis.",
        plain="enlarged lymph nodes in the middle of the chest",
        advice="Tissue sampling or PET may be considered.",
    ),
    Finding(
        "pneumomediastinum", region="Heart and mediastinum", exams="cxr ctchest", code="J98.2",
        noun="mass",
        phrase="pneumomediastinum",
        observation=(
            "Streaky lucency outlines the mediastinal structures, consistent with pneumomediastinum."
        ),
        plain="air in the middle of the chest outside the lungs",
    ),
    Finding(
        "thoracic aortic aneurysm", region="Heart and mediastinum", exams="ctchest", code="I71.20",
        size_mm=(45, 62),
        phrase="ascending thoracic aortic aneurysm measuring {size}",
        observation="The ascending aorta is aneurysmal, measuring {size}.",
        plain="a widened main artery in the chest",
        advice="Vascular referral is suggested.",
    ),
    Finding(
        "hiatal hernia", region="Heart and mediastinum", exams="cxr ctchest", code="K44.9",
        degrees=SIZES,
        phrase="{deg} hiatal hernia",
        observation="A retrocardiac air-fluid level is in keeping with a {deg} hiatal hernia.",
        plain="part of the stomach that has moved up into the chest",
    ),
    Finding(
        "rib fracture", region="Bones", exams="cxr ctchest", code="S22.31XA|S22.32XA",
        sided=True, locations=("fifth", "sixth", "seventh", "eighth"),
        phrase="{side} {loc} rib fracture",
        observation="There is a cortical break of the {side} {loc} rib laterally.",
        plain="a broken rib on the {side} side",
    ),
    Finding(
        "elevated hemidiaphragm", region="Pleura", exams="cxr", code="J98.6",
        sided=True,
        phrase="elevated {side} hemidiaphragm",
        observation="The {side} hemidiaphragm is elevated relative to the other side.",
        plain="a breathing muscle that sits higher on the {side}",
    ),
)
# fmt: on
