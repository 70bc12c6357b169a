"""Findings of the limbs and leg veins, the neck and the breast.

All wording was written for Polyclinic; not for clinical use.
"""

from moe.data.demonstration.reports.finding import DEGREES, SIZES, Finding

# fmt: off
FINDINGS = (
    Finding(
        "medial meniscal tear", region="Menisci", exams="mrknee", code="S83.241A|S83.242A",
        sided=True, locations=("posterior horn", "body", "anterior horn"),
        phrase="tear of the {loc} of the {side} medial meniscus",
        observation=(
            "Linear signal reaches the articular surface of the {loc} of the {side} medial meniscus."
        ),
        plain="a torn cushion on the inner side of the {side} knee",
        advice="Orthopedic follow-up is suggested.",
    ),
    Finding(
        "anterior cruciate ligament tear", region="Ligaments", exams="mrknee", code="S83.511A|S83.512A",
        sided=True,
        phrase="complete tear of the {side} anterior cruciate ligament",
        observation="The fibers of the {side} anterior cruciate ligament are discontinuous.",
        plain="a torn main stabilizing ligament in the {side} knee",
        advice="Orthopedic follow-up is suggested.",
    ),
    Finding(
        "knee joint effusion", region="Joint", exams="mrknee", code="M25.461|M25.462",
        sided=True, degrees=SIZES,
        phrase="{deg} {side} knee joint effusion",
        observation="A {deg} effusion distends the {side} suprapatellar recess.",
        plain="fluid in the {side} knee joint",
    ),
    Finding(
        "popliteal cyst", region="Joint", exams="mrknee", code="M71.21|M71.22",
        sided=True, size_mm=(14, 60),
        phrase="{size} {side} popliteal cyst",
        observation="A {size} popliteal cyst lies medially behind the {side} knee.",
        plain="a fluid pocket behind the {side} knee",
    ),
    Finding(
        "distal radius fracture", region="Bones", exams="xrwrist", code="S52.501A|S52.502A",
        sided=True, locations=("transverse", "comminuted", "displaced"),
        phrase="{loc} fracture of the {side} distal radius",
        observation="There is a {loc} fracture of the {side} distal radius.",
        plain="a broken {side} wrist",
        advice="Orthopedic follow-up is suggested.",
    ),
    Finding(
        "scaphoid fracture", region="Bones", exams="xrwrist", code="S62.001A|S62.002A",
        sided=True, locations=("waist", "proximal pole", "distal pole"),
        phrase="fracture of the {side} scaphoid {loc}",
        observation="A lucent line crosses the {loc} of the {side} scaphoid.",
        plain="a broken small bone at the thumb side of the {side} wrist",
        advice="Repeat radiographs in 10 to 14 days are suggested.",
    ),
    Finding(
        "lateral malleolus fracture", region="Bones", exams="xrankle", code="S82.61XA|S82.62XA",
        sided=True,
        phrase="displaced fracture of the {side} lateral malleolus",
        observation="An oblique displaced fracture of the {side} lateral malleolus is present.",
        plain="a broken outer ankle bone on the {side}",
        advice="Orthopedic follow-up is suggested.",
    ),
    Finding(
        "ankle soft tissue swelling", region="Soft tissues", exams="xrankle", code="M25.471|M25.472",
        sided=True, noun="mass", degrees=DEGREES,
        phrase="{deg} soft tissue swelling of the {side} ankle",
        observation="There is {deg} soft tissue swelling about the {side} ankle.",
        plain="swelling around the {side} ankle",
    ),
    Finding(
        "hip osteoarthritis", region="Joint", exams="xrhip", code="M16.11|M16.12",
        sided=True, noun="mass", degrees=DEGREES,
        phrase="{deg} osteoarthritis of the {side} hip",
        observation=(
            "Joint space narrowing and osteophytes indicate {deg} osteoarthritis of the {side} hip."
        ),
        plain="wear of the {side} hip joint",
    ),
    Finding(
        "femoral neck fracture", region="Bones", exams="xrhip", code="S72.001A|S72.002A",
        sided=True, locations=("subcapital", "transcervical", "basicervical"),
        phrase="fracture of the {side} femoral neck",
        observation="A {loc} fracture of the {side} femoral neck is present.",
        plain="a broken {side} hip",
        advice="Urgent orthopedic consultation is recommended.",
    ),
    Finding(
        "thyroid nodule", region="Thyroid", exams="usthyroid", code="E04.1",
        sided=True, size_mm=(6, 38), locations=("solid hypoechoic", "mixed cystic and solid", "spongiform"),
        phrase="{size} {loc} nodule in the {side} thyroid lobe",
        observation="A {size} {loc} nodule is present in the {side} lobe.",
        plain="a lump in the {side} side of the thyroid gland",
        advice="Management should follow the nodule's risk category.",
    ),
    Finding(
        "cervical lymphadenopathy", region="Neck nodes", exams="usthyroid", code="R59.0",
        sided=True, size_mm=(11, 29),
        phrase="{size} {side} cervical lymph node without a fatty hilum",
        observation="A {side} cervical lymph node measures {size} and lacks a fatty hilum.",
        plain="an enlarged lymph node on the {side} side of the neck",
    ),
    Finding(
        "deep vein thrombosis", region="Deep veins", exams="usvein", code="I82.401|I82.402",
        sided=True, noun="mass", locations=("common femoral", "femoral", "popliteal"),
        phrase="acute deep vein thrombosis of the {side} {loc} vein",
        observation="The {side} {loc} vein is noncompressible and contains echogenic thrombus.",
        plain="a blood clot in a deep vein of the {side} leg",
        advice="The result was marked as critical for immediate communication.",
    ),
    Finding(
        "superficial thrombophlebitis", region="Superficial veins", exams="usvein", code="I80.01|I80.02",
        sided=True, noun="mass",
        phrase="superficial thrombophlebitis of the {side} great saphenous vein",
        observation="The {side} great saphenous vein is thickened and noncompressible.",
        plain="a clot in a surface vein of the {side} leg",
    ),
    Finding(
        "breast mass", region="Masses", exams="mammo", code="N63.10|N63.20",
        sided=True, size_mm=(6, 34), locations=("irregular", "oval circumscribed", "lobulated"),
        phrase="{size} {loc} mass in the {side} breast",
        observation="A {size} {loc} mass is seen in the {side} breast.",
        plain="a lump in the {side} breast",
        advice="Targeted ultrasound is recommended.",
    ),
    Finding(
        "breast calcifications", region="Calcifications", exams="mammo", code="R92.1",
        sided=True, noun="plural", locations=("amorphous", "coarse heterogeneous", "fine pleomorphic"),
        phrase="{loc} calcifications in the {side} breast",
        observation="Grouped {loc} calcifications are seen in the {side} breast.",
        plain="tiny calcium spots in the {side} breast",
        advice="Magnification views are recommended.",
    ),
)
# fmt: on
