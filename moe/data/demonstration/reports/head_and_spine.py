"""Findings of the head and the lumbar spine. All wording was written for Polyclinic; not for clinical use."""

from moe.data.demonstration.reports.finding import DEGREES, Finding

LOBES = {
    "right": ("right frontal lobe", "right parietal lobe", "right temporal lobe", "right basal ganglia"),
    "left": ("left frontal lobe", "left parietal lobe", "left temporal lobe", "left basal ganglia"),
}
DISCS = ("L2-L3", "L3-L4", "L4-L5", "L5-S1")
VERTEBRAE = ("T12", "L1", "L2", "L3", "L4")

# fmt: off
FINDINGS = (
    Finding(
        "intraparenchymal hemorrhage", region="Brain", exams="cthead", code="I61.9",
        sided=True, size_mm=(9, 48), locations=LOBES,
        phrase="{size} intraparenchymal hemorrhage in the {loc}",
        observation="A {size} hyperdense focus of acute hemorrhage is centered in the {loc}.",
        plain="bleeding inside the {side} side of the brain",
        advice="Neurosurgical consultation is recommended.",
    ),
    Finding(
        "acute infarct", region="Brain", exams="cthead mrbrain", code="I63.9",
        sided=True, locations=LOBES,
        phrase="acute infarct in the {loc}",
        observation=(
            "There is loss of gray-white differentiation in the {loc}, consistent with an acute infarct."
        ),
        plain="a stroke affecting the {side} side of the brain",
        advice="Urgent stroke team review is recommended.",
    ),
    Finding(
        "midline shift", region="Brain", exams="cthead mrbrain", code="G93.5",
        sided=True, noun="mass", size_mm=(3, 12),
        phrase="{size} of midline shift to the {side}",
        observation="The septum pellucidum is displaced {size} to the {side}.",
        plain="brain structures pushed toward the {side}",
    ),
    Finding(
        "subdural hematoma", region="Extra-axial spaces", exams="cthead", code="I62.00",
        sided=True, size_mm=(4, 19),
        phrase="{side} subdural hematoma measuring {size} in thickness",
        observation=(
            "A crescentic extra-axial collection along the {side} convexity measures {size} in thickness."
        ),
        plain="bleeding between the skull and the brain on the {side}",
        advice="Neurosurgical consultation is recommended.",
    ),
    Finding(
        "hydrocephalus", region="Ventricles", exams="cthead mrbrain", code="G91.9",
        noun="mass", degrees=DEGREES,
        phrase="{deg} hydrocephalus",
        observation=(
            "The lateral and third ventricles are enlarged out of proportion to the sulci, {deg} in "
            "degree."
        ),
        plain="too much fluid in the spaces inside the brain",
    ),
    Finding(
        "skull fracture", region="Calvarium", exams="cthead", code="S02.0XXA",
        sided=True, locations=("frontal", "parietal"),
        phrase="nondisplaced {side} {loc} skull fracture",
        observation=(
            "A linear lucency through the {side} {loc} bone is consistent with a nondisplaced fracture."
        ),
        plain="a crack in the skull on the {side}",
    ),
    Finding(
        "maxillary sinus disease", region="Sinuses", exams="cthead mrbrain", code="J32.0",
        sided=True, noun="mass", degrees=DEGREES,
        phrase="{deg} {side} maxillary sinus mucosal thickening",
        observation="There is {deg} mucosal thickening of the {side} maxillary sinus.",
        plain="swelling in the {side} cheek sinus",
    ),
    Finding(
        "meningioma", region="Extra-axial spaces", exams="mrbrain", code="D32.0",
        sided=True, size_mm=(8, 44),
        phrase="{size} {side} convexity meningioma",
        observation=(
            "A {size} dural-based enhancing mass along the {side} convexity is most in keeping with a "
            "meningioma."
        ),
        plain="a usually slow-growing lump in the lining of the brain on the {side}",
        advice="Follow-up MRI is suggested.",
    ),
    Finding(
        "disc herniation", region="Discs", exams="mrspine", code="M51.26",
        sided=True, locations=DISCS,
        phrase="{loc} disc extrusion contacting the traversing {side} nerve root",
        observation="At {loc}, a disc extrusion contacts the traversing {side} nerve root.",
        plain="a slipped disc in the lower back touching a nerve on the {side}",
    ),
    Finding(
        "spinal canal stenosis", region="Canal", exams="mrspine", code="M48.061",
        noun="mass", degrees=DEGREES, locations=DISCS,
        phrase="{deg} spinal canal stenosis at {loc}",
        observation="Facet and ligamentous hypertrophy produce {deg} canal stenosis at {loc}.",
        plain="narrowing of the canal around the nerves of the lower back",
    ),
    Finding(
        "vertebral compression fracture", region="Vertebrae", exams="mrspine", code="M48.56XA",
        degrees=DEGREES, locations=VERTEBRAE,
        phrase="{deg} compression fracture of {loc}",
        observation="There is {deg} loss of height of the {loc} vertebral body with marrow edema.",
        plain="a collapsed bone in the spine",
        advice="Bone density assessment may be considered.",
    ),
    Finding(
        "spondylolisthesis", region="Alignment", exams="mrspine", code="M43.16",
        noun="mass", locations=DISCS,
        phrase="grade 1 anterolisthesis at {loc}",
        observation="There is grade 1 anterolisthesis at {loc}.",
        plain="one spine bone that has slipped forward on the next",
    ),
)
# fmt: on
