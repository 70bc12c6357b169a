"""The exam types: what was done, why, and the sentence for each region where nothing is found.

All wording was written for Polyclinic; not for clinical use.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Exam:
    key: str
    modality: str  # DICOM modality
    weight: int  # how often it is drawn
    title: str  # slots {view} and {SIDE}
    techniques: tuple[str, ...]
    indications: tuple[str, ...]
    normal: Mapping[str, str]  # region, in the order of the report, to its normal sentence
    ages: tuple[int, int] = (18, 92)
    normals_deny: bool = False  # the normal sentences are denials already; say no more beside one

    @property
    def one_sided(self) -> bool:
        return "{SIDE}" in self.title


MODALITIES = {
    "DX": "digital radiography",
    "CT": "computed tomography",
    "MR": "magnetic resonance",
    "US": "ultrasound",
    "MG": "mammography",
}

# fmt: off
EXAMS = (
    Exam(
        "cxr", modality="DX", weight=5,
        title="RADIOGRAPH OF THE CHEST, {view}",
        techniques=("{view} views of the chest were obtained.", "{view} chest radiography was performed."),
        indications=(
            "cough and fever",
            "shortness of breath",
            "chest pain",
            "fall with chest wall tenderness",
            "preoperative evaluation",
        ),
        normal={
            "Lungs": "The lungs are clear and normally expanded.",
            "Pleura": "The pleural spaces are clear and the costophrenic angles are sharp.",
            "Heart and mediastinum": "Heart size and mediastinal contours are normal.",
            "Bones": "The visualized osseous structures are intact.",
        },
    ),
    Exam(
        "ctchest", modality="CT", weight=5,
        title="CT OF THE CHEST WITH CONTRAST",
        techniques=(
            "Helical images were acquired through the chest after intravenous iodinated contrast.",
            "Axial images of the chest with multiplanar reformats were obtained after intravenous "
            "contrast.",
        ),
        indications=(
            "sudden shortness of breath",
            "hemoptysis",
            "abnormal chest radiograph",
            "weight loss and smoking history",
            "blunt chest trauma",
        ),
        normal={
            "Pulmonary arteries": "The pulmonary arteries opacify well to the segmental level.",
            "Lungs": "The lungs are clear; the central airways are patent.",
            "Pleura": "The pleural surfaces are unremarkable.",
            "Heart and mediastinum": "The heart, great vessels and mediastinum are normal in appearance.",
            "Bones": "No aggressive osseous lesion is seen.",
        },
    ),
    Exam(
        "ctabd", modality="CT", weight=5,
        title="CT OF THE ABDOMEN AND PELVIS",
        techniques=(
            "Axial images were obtained from the diaphragm to the symphysis with intravenous contrast.",
            "Portal venous phase images of the abdomen and pelvis were acquired.",
        ),
        indications=(
            "right lower quadrant pain",
            "left flank pain",
            "abdominal distension and vomiting",
            "fever and left lower quadrant pain",
            "abnormal liver tests",
        ),
        normal={
            "Liver": "The liver is normal in size and attenuation.",
            "Gallbladder": "The gallbladder is unremarkable.",
            "Spleen": "The spleen is normal in size.",
            "Adrenals": "The adrenal glands are normal.",
            "Kidneys": "The kidneys enhance symmetrically.",
            "Bowel": "The bowel is normal in caliber.",
            "Vessels": "The abdominal aorta is normal in caliber.",
            "Peritoneum": "The peritoneal cavity is clear.",
            "Pelvis": "The pelvic organs are unremarkable.",
        },
    ),
    Exam(
        "usabd", modality="US", weight=3,
        title="ULTRASOUND OF THE ABDOMEN",
        techniques=(
            "Real-time gray-scale and color Doppler imaging of the abdomen was performed.",
            "Targeted sonography of the upper abdomen and kidneys was performed.",
        ),
        indications=(
            "right upper quadrant pain",
            "elevated liver enzymes",
            "flank pain",
            "acute kidney injury",
            "screening for aneurysm",
        ),
        normal={
            "Liver": "The liver is normal in echotexture and contour.",
            "Gallbladder": "The gallbladder wall is thin and the lumen is anechoic.",
            "Spleen": "The spleen is normal in length.",
            "Kidneys": "Both kidneys are normal in length and cortical thickness.",
            "Vessels": "The visualized aorta is normal in caliber.",
            "Peritoneum": "The visualized peritoneal spaces are clear.",
        },
    ),
    Exam(
        "cthead", modality="CT", weight=4, ages=(19, 94),
        title="CT OF THE HEAD WITHOUT CONTRAST",
        techniques=(
            "Axial images of the head were obtained without intravenous contrast.",
            "Noncontrast helical CT of the head was performed with bone and soft tissue reformats.",
        ),
        indications=(
            "sudden weakness and slurred speech",
            "fall with head strike",
            "worst headache of life",
            "confusion",
            "new seizure",
        ),
        normal={
            "Brain": "The brain parenchyma is normal in attenuation.",
            "Ventricles": "The ventricles and sulci are normal for age.",
            "Extra-axial spaces": "The extra-axial spaces are clear.",
            "Calvarium": "The calvarium is intact.",
            "Sinuses": "The paranasal sinuses are clear.",
        },
    ),
    Exam(
        "mrbrain", modality="MR", weight=3,
        title="MRI OF THE BRAIN WITH AND WITHOUT CONTRAST",
        techniques=(
            "Multiplanar T1, T2, FLAIR, diffusion and post-gadolinium sequences of the brain were "
            "acquired.",
            "MRI of the brain was performed on a 3 T scanner before and after gadolinium.",
        ),
        indications=(
            "persistent headache",
            "transient visual loss",
            "gait disturbance",
            "follow-up of a known lesion",
            "new focal deficit",
        ),
        normal={
            "Brain": "No restricted diffusion or abnormal parenchymal signal is seen.",
            "Ventricles": "The ventricular system is normal in size.",
            "Extra-axial spaces": "The meninges and extra-axial spaces are unremarkable.",
            "Sinuses": "The paranasal sinuses are clear.",
        },
    ),
    Exam(
        "mrspine", modality="MR", weight=3,
        title="MRI OF THE LUMBAR SPINE",
        techniques=(
            "Sagittal T1, T2 and STIR and axial T2 images of the lumbar spine were acquired.",
            "Noncontrast MRI of the lumbar spine was performed.",
        ),
        indications=(
            "low back pain with leg radiation",
            "neurogenic claudication",
            "back pain after a fall",
            "foot weakness",
            "chronic low back pain",
        ),
        normal={
            "Alignment": "Alignment is normal.",
            "Vertebrae": "Vertebral body heights and marrow signal are preserved.",
            "Discs": "Disc heights and signal are preserved.",
            "Canal": "The canal and foramina are patent at all levels.",
        },
    ),
    Exam(
        "mrknee", modality="MR", weight=2,
        title="MRI OF THE {SIDE} KNEE",
        techniques=(
            "Multiplanar proton density and T2 fat-suppressed images of the {side} knee were obtained.",
            "Noncontrast MRI of the {side} knee was performed.",
        ),
        indications=(
            "twisting injury",
            "locking and medial pain",
            "instability after a sports injury",
            "swelling of the knee",
        ),
        normal={
            "Menisci": "The menisci are intact.",
            "Ligaments": "The cruciate and collateral ligaments are intact.",
            "Joint": "The joint fluid volume is physiologic.",
            "Cartilage": "The articular cartilage is preserved.",
        },
    ),
    Exam(
        "xrwrist", modality="DX", weight=1,
        title="RADIOGRAPHS OF THE {SIDE} WRIST",
        techniques=("Frontal, oblique and lateral views of the {side} wrist were obtained.",),
        indications=("fall on outstretched hand", "wrist pain and swelling", "snuffbox tenderness"),
        normal={
            "Bones": "Bone alignment and mineralization are normal.",
            "Soft tissues": "The soft tissues are unremarkable.",
        },
    ),
    Exam(
        "xrankle", modality="DX", weight=1,
        title="RADIOGRAPHS OF THE {SIDE} ANKLE",
        techniques=("Frontal, mortise and lateral views of the {side} ankle were obtained.",),
        indications=("inversion injury", "ankle pain after a fall", "unable to bear weight"),
        normal={
            "Bones": "The ankle mortise is congruent.",
            "Soft tissues": "The soft tissues are unremarkable.",
        },
    ),
    Exam(
        "xrhip", modality="DX", weight=1, ages=(50, 95),
        title="RADIOGRAPHS OF THE {SIDE} HIP",
        techniques=("Frontal pelvis and cross-table lateral views of the {side} hip were obtained.",),
        indications=("groin pain", "fall with hip pain", "stiffness of the hip"),
        normal={
            "Bones": "Bone mineralization is normal for age.",
            "Joint": "The joint space is preserved.",
        },
    ),
    Exam(
        "usthyroid", modality="US", weight=2,
        title="ULTRASOUND OF THE THYROID",
        techniques=("Gray-scale and color Doppler sonography of the thyroid and neck was performed.",),
        indications=("palpable neck lump", "abnormal thyroid function tests", "incidental nodule on CT"),
        normal={
            "Thyroid": "The thyroid is normal in size and echotexture.",
            "Neck nodes": "The cervical nodes have a normal appearance.",
        },
    ),
    Exam(
        "usvein", modality="US", weight=2,
        title="VENOUS DUPLEX ULTRASOUND OF THE {SIDE} LOWER EXTREMITY",
        techniques=(
            "Gray-scale imaging with compression and spectral Doppler of the {side} lower extremity veins"
            " was performed.",
        ),
        indications=("leg swelling", "calf pain after surgery", "recent long flight and leg pain"),
        normal={
            "Deep veins": "The deep veins are compressible with normal phasic flow.",
            "Superficial veins": "The superficial veins are compressible.",
        },
    ),
    Exam(
        "mammo", modality="MG", weight=2, ages=(40, 84), normals_deny=True,
        title="DIAGNOSTIC MAMMOGRAM, BILATERAL",
        techniques=("Craniocaudal and mediolateral oblique views with tomosynthesis were obtained.",),
        indications=("palpable lump", "recall from screening", "focal breast pain"),
        normal={
            "Masses": "No dominant mass is identified.",
            "Calcifications": "No suspicious calcifications are identified.",
            "Skin": "The skin and nipples are normal.",
        },
    ),
)
# fmt: on
