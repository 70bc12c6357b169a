"""De-identification: an identifier goes however its characters are spelled and wherever a piece of a long text ends;
and a text that cannot be searched whole is not let through."""

import unicodedata

import pytest

from moe.data.curation import pieces
from moe.data.curation.characters import plain
from moe.data.curation.settings import Deidentify
from moe.errors import InputError

pytest.importorskip("presidio_analyzer", reason="wants the extra curate: pip install -e '.[curate]'")

from moe.data.curation.deidentify import Deidentifier, TooHard  # noqa: E402

# With spaces in the value, or between it and its label; type, what stands around the value, the value.
SPACED = [
    ("NAME", "Seen by Dr. {} today.", "Olga Haddad"), ("NAME", "Patient: {}; stable.", "Olga Haddad"),
    ("DATE", "Seen on {}.", "March 14, 2021"), ("ADDRESS", "Lives at {} alone.", "1204 Maple Hill Avenue"),
    ("ZIP", "Illinois {}.", "61602"), ("AGE", "{} year old woman", "93"), ("MRN", "MRN: {}.", "00482913"),
    ("PHONE", "Call {} now.", "(312) 555-0142"),
]  # fmt: skip
SPACES = {"no-break": "\u00a0", "narrow-no-break": "\u202f", "em": "\u2003", "ideographic": "\u3000", "tab": "\t"}


@pytest.fixture(scope="module")
def deidentify():
    return Deidentifier(Deidentify())


@pytest.mark.parametrize("space", [pytest.param(space, id=name) for name, space in SPACES.items()])
def test_every_space_is_one(deidentify, space):
    for kind, around, value in SPACED:
        text = around.format(value).replace(" ", space)
        assert deidentify(text)[0] == around.replace(" ", space).format(f"[{kind}]"), (kind, around)


def test_a_letter_may_be_apart_from_its_accent(deidentify):
    # The last one's letters have no accents in Unicode that they could be one with.
    for name in ("José Núñez", "Łukasz Żółć", "ÉLODIE DUPRÉ", "\u1ecc\u0301lá \u1eccl\u0301a"):
        text = unicodedata.normalize("NFD", f"Naïve. Patient: {name}; café.")
        assert deidentify(text)[0] == "Naïve. Patient: [NAME]; café."


@pytest.mark.parametrize("text, want", [
    pytest.param("MRN: ００４８２９１３.", "MRN: [MRN].", id="wide-digits"),
    pytest.param("MRN：00482913.", "MRN：[MRN].", id="wide-colon"),
    pytest.param("Seen ０３／１４／２０２１.", "Seen [DATE].", id="wide-slash"),
    pytest.param("ＭＲＮ: 00482913.", "ＭＲＮ: [MRN].", id="wide-letters"),
    pytest.param("Seen ٠٣/١٤/٢٠٢١.", "Seen [DATE].", id="arabic-digits"),
    pytest.param("Seen 03\u201114\u20112021.", "Seen [DATE].", id="no-break-hyphen"),
    pytest.param("SSN 219\u201009\u20109999.", "SSN [SSN].", id="hyphen"),
    pytest.param("ZIP 61602\u20130142.", "ZIP [ZIP].", id="en-dash"),
])
def test_a_digit_a_colon_and_a_hyphen_may_be_of_another_kind(deidentify, text, want):
    assert deidentify(text)[0] == want


def test_what_stays_keeps_its_characters(deidentify):
    text = "Le\u00a0nodule mesure 12\u202f×\u202f5 mm\t(1–2 ２)．　Fin"
    assert deidentify(text) == (text, {}) and len(plain(text)) == len(text) and plain(text).count("\t") == 0


def test_a_site_s_own_pattern_may_know_a_tab_or_a_wide_digit():
    deidentify = Deidentifier(Deidentify(patterns={"MRN": r"H\t\d{3}|№[０-９]{3}"}))
    assert deidentify("H\t123, №１２３, Patient:\tOlga.")[0] == "[MRN], [MRN], Patient:\t[NAME]."


def test_spelling_does_not_matter_to_a_pseudonym(tmp_path):
    (tmp_path / "key").write_bytes(b"k" * 16)
    deidentify = Deidentifier(Deidentify(key=tmp_path / "key"))
    one, other = (deidentify(text)[0] for text in ("MRN: 00482913", "MRN: ００４８２９１３"))
    assert one == other and one.startswith("MRN: [MRN ")


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 300)
    monkeypatch.setattr(pieces, "REACH", 120)


SENTENCE = ("Patient: Olga Haddad, MRN: 00482913, seen on March 14, 2021 by Dr. O'Brien, lives at 1204 Maple Hill "
            "Avenue, in Peoria, IL 61602; see https://portal.example.org/view?id=88213 there; ")  # fmt: skip
GONE = ("Patient: [NAME], MRN: [MRN], seen on [DATE] by Dr. [NAME], lives at [ADDRESS], "
        "in [ADDRESS], IL [ZIP]; see [URL] there; ")  # fmt: skip


def test_a_piece_may_end_anywhere(deidentify, short_pieces):
    """Between a label and its value, within a value, behind it: as if the text were searched whole."""
    for before in range(pieces.PIECE - len(SENTENCE) - 2, pieces.PIECE + 3):
        start = ("word " * 60)[-before:]
        assert deidentify(start + SENTENCE + "word " * 20)[0] == start + GONE + "word " * 20, before


def test_a_piece_of_the_real_size_may_end_anywhere(deidentify):
    for before in range(pieces.PIECE - 15, pieces.PIECE + 3):
        start = ("word " * 4_000)[-before:]
        assert deidentify(f"{start}MRN: 00482913. {start}")[0] == f"{start}MRN: [MRN]. {start}"


def test_what_goes_on_beyond_a_piece_goes_whole(deidentify, short_pieces, monkeypatch):
    text = "word " * 50 + "see https://portal.example.org/" + "a1" * 1_000 + " there"
    assert deidentify(text)[0] == "word " * 50 + "see [URL] there"
    monkeypatch.setattr(pieces, "LONGEST", 500)
    with pytest.raises(TooHard):
        deidentify(text)


def test_a_text_that_a_pattern_gives_up_is_not_let_through(monkeypatch):
    monkeypatch.setattr("presidio_analyzer.pattern_recognizer.REGEX_TIMEOUT_SECONDS", 1)
    deidentify = Deidentifier(Deidentify(patterns={"MRN": "(?:a|a|aa)+b"}))
    assert deidentify("MRN: 00482913")[0] == "MRN: [MRN]"
    with pytest.raises(TooHard):
        deidentify("a" * 60 + " MRN: 00482913")
    assert deidentify("MRN: 00482913")[0] == "MRN: [MRN]"  # the next text may be searched


@pytest.fixture
def names(tmp_path):
    """The folder of a spaCy model that knows one person."""
    model = pytest.importorskip("spacy").blank("en")
    model.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Olga Haddad"}])
    model.to_disk(tmp_path / "model")
    return tmp_path / "model"


def test_a_name_in_running_text_goes_wherever_a_piece_ends(names, short_pieces):
    deidentify = Deidentifier(Deidentify(names=str(names)))
    for before in range(pieces.PIECE - 13, pieces.PIECE + 2):
        start = ("word " * 62)[-before:]
        assert deidentify(f"{start}Olga Haddad coughs")[0] == f"{start}[NAME] coughs", before


def test_a_model_that_cannot_be_loaded_is_named(names):
    (names / "config.cfg").unlink()
    with pytest.raises(InputError, match=r"deidentify.names=.*model: spaCy cannot load it: "):
        Deidentifier(Deidentify(names=str(names)))
