"""Findings of the abdomen and pelvis. All wording was written for Polyclinic; not for clinical use."""

from moe.data.demonstration.reports.finding import DEGREES, SIZES, Finding

# fmt: off
FINDINGS = (
    Finding(
        "acute appendicitis", region="Bowel", exams="ctabd", code="K35.80",
        noun="mass", size_mm=(8, 16),
        phrase="acute appendicitis with the appendix measuring {size}",
        observation=(
            "The appendix is dilated to {size} with wall enhancement and periappendiceal fat stranding."
        ),
        plain="an inflamed appendix",
        advice="Surgical consultation is recommended.",
    ),
    Finding(
        "diverticulitis", region="Bowel", exams="ctabd", code="K57.32",
        noun="mass", locations=("sigmoid colon", "descending colon"),
        phrase="uncomplicated diverticulitis of the {loc}",
        observation="There is wall thickening and pericolic stranding about a diverticulum of the {loc}.",
        plain="inflamed pouches in the wall of the bowel",
        advice="Colonoscopy after resolution may be considered.",
    ),
    Finding(
        "small bowel obstruction", region="Bowel", exams="ctabd", code="K56.609",
        size_mm=(31, 48), locations=("right lower quadrant", "left lower quadrant", "pelvis"),
        phrase="small bowel obstruction with loops up to {size}",
        observation=(
            "Fluid-filled small bowel loops are dilated up to {size} with a transition point in the "
            "{loc}."
        ),
        plain="a blockage of the small bowel",
        advice="Surgical consultation is recommended.",
    ),
    Finding(
        "inguinal hernia", region="Bowel", exams="ctabd", code="K40.90",
        sided=True,
        phrase="fat-containing {side} inguinal hernia",
        observation="A fat-containing inguinal hernia is present on the {side} without bowel involvement.",
        plain="tissue pushing through the {side} groin",
    ),
    Finding(
        "renal calculus", region="Kidneys", exams="ctabd usabd", code="N20.0",
        sided=True, size_mm=(3, 14), locations=("upper pole", "interpolar region", "lower pole"),
        phrase="{size} nonobstructing {side} renal calculus",
        observation="A {size} calculus lies in the {loc} of the {side} kidney.",
        plain="a stone in the {side} kidney",
    ),
    Finding(
        "ureteral calculus", region="Kidneys", exams="ctabd", code="N20.1",
        sided=True, size_mm=(3, 10), locations=("proximal", "mid", "distal"),
        phrase="{size} {side} ureteral calculus",
        observation="A {size} calculus is lodged in the {loc} {side} ureter.",
        plain="a stone in the tube below the {side} kidney",
        advice="Urology follow-up is suggested.",
    ),
    Finding(
        "hydronephrosis", region="Kidneys", exams="ctabd usabd", code="N13.30",
        sided=True, noun="mass", degrees=DEGREES,
        phrase="{deg} {side} hydronephrosis",
        observation="The {side} renal collecting system is dilated, {deg} in degree.",
        plain="swelling of the {side} kidney from backed-up urine",
    ),
    Finding(
        "renal cyst", region="Kidneys", exams="ctabd usabd", code="N28.1",
        sided=True, size_mm=(9, 60),
        phrase="{size} simple {side} renal cyst",
        observation="A simple cyst of the {side} kidney measures {size}.",
        plain="a fluid pocket in the {side} kidney",
    ),
    Finding(
        "gallstones", region="Gallbladder", exams="ctabd usabd", code="K80.20",
        noun="plural", size_mm=(4, 24),
        phrase="gallstones measuring up to {size}",
        observation="Dependent stones measuring up to {size} are seen in the gallbladder.",
        plain="stones in the gallbladder",
    ),
    Finding(
        "hepatic steatosis", region="Liver", exams="ctabd usabd", code="K76.0",
        noun="mass", degrees=DEGREES,
        phrase="{deg} hepatic steatosis",
        observation="The liver shows diffuse change in keeping with {deg} hepatic steatosis.",
        plain="extra fat in the liver",
    ),
    Finding(
        "hepatic cyst", region="Liver", exams="ctabd usabd", code="K76.89",
        size_mm=(7, 55), locations=("left lobe", "right lobe", "caudate lobe"),
        phrase="{size} hepatic cyst in the {loc}",
        observation="A well-defined {size} hepatic cyst is present in the {loc}.",
        plain="a fluid pocket in the liver",
    ),
    Finding(
        "splenomegaly", region="Spleen", exams="ctabd usabd", code="R16.1",
        noun="mass", size_mm=(133, 190),
        phrase="splenomegaly measuring {size}",
        observation="The spleen is enlarged with a craniocaudal length of {size}.",
        plain="an enlarged spleen",
    ),
    Finding(
        "ascites", region="Peritoneum", exams="ctabd usabd", code="R18.8",
        noun="mass", degrees=SIZES,
        phrase="{deg} volume ascites",
        observation="There is {deg} volume free fluid in the abdomen and pelvis.",
        plain="free fluid in the belly",
    ),
    Finding(
        "adrenal nodule", region="Adrenals", exams="ctabd", code="E27.8",
        sided=True, size_mm=(10, 38),
        phrase="{size} {side} adrenal nodule",
        observation="A {size} nodule arises from the {side} adrenal gland.",
        plain="a small lump on the gland above the {side} kidney",
        advice="Dedicated adrenal imaging may be considered.",
    ),
    Finding(
        "abdominal aortic aneurysm", region="Vessels", exams="ctabd usabd", code="I71.40",
        size_mm=(31, 58),
        phrase="infrarenal abdominal aortic aneurysm measuring {size}",
        observation="The infrarenal aorta is aneurysmal, with a maximal diameter of {size}.",
        plain="a widened main artery in the belly",
        advice="Vascular follow-up is suggested.",
    ),
    Finding(
        "ovarian cyst", region="Pelvis", exams="ctabd", code="N83.201|N83.202",
        sided=True, size_mm=(21, 70),
        phrase="{size} {side} ovarian cyst",
        observation="A {size} cyst is present in the {side} adnexa.",
        plain="a fluid pocket on the {side} ovary",
        advice="Pelvic ultrasound is suggested.",
    ),
)
# fmt: on
