"""What identifies a person in text: the types of HIPAA's Safe Harbor, 45 CFR 164.514(b)(2)(i)(A) to (R), and patterns.

A pattern finds a value by its form (an e-mail address) or by the label before it (MRN: 00123456). `\\K` begins the
value: what stands before it is wanted but stays. Capital letters matter unless a part says (?i:...), because names,
states and months are told from words by them. (P) fingerprints and (Q) photographs are not text.

Names and places in running text need a model of the language. Without one only those are found that a title, a label
or the form of an address announces.
"""

from typing import NamedTuple

TYPES = {  # and the letter of the rule
    "NAME": "A",
    "ADDRESS": "B",
    "ZIP": "B",
    "DATE": "C",
    "AGE": "C",
    "PHONE": "D",
    "FAX": "E",
    "EMAIL": "F",
    "SSN": "G",
    "MRN": "H",
    "PLAN_ID": "I",
    "ACCOUNT": "J",
    "LICENCE": "K",
    "VEHICLE": "L",
    "DEVICE": "M",
    "URL": "N",
    "IP": "O",
    "ID": "R",
}
TELLING, LABELLED, FORM, WEAK = 0.95, 0.9, 0.7, 0.5  # how sure: where two overlap, the surer one names the type


class Pattern(NamedTuple):
    kind: str
    name: str
    score: float
    regex: str


def _patterns(kind: str, *patterns: tuple[str, float, str]) -> list[Pattern]:
    return [Pattern(kind, *pattern) for pattern in patterns]


# Between a label and its value: words that make it the label of a number, and what joins the two.
_NUMBER = r"(?i:numbers?|num\b|no\b\.?|nr\b\.?|id\b|identifier|code|\#)"
_IS = r"\s{0,3}(?:[:#=\-]|(?i:is\b|was\b))?\s{0,3}"
_MORE = rf"(?:\s{{0,3}}{_NUMBER}){{0,20}}{_IS}"
_MARK = rf"(?:\s{{0,3}}{_NUMBER}{_MORE}|\s{{0,3}}[:#=]\s{{0,3}})"
# a digit is near its beginning
_VALUE = (r"(?=[A-Za-z\-./]{0,8}\d)[A-Za-z\d](?:[A-Za-z\d]"
          r"|[\-./](?=[A-Za-z\d])){3,24}\b")


def _behind(labels: str, value: str = _VALUE) -> str:
    """A value behind a label that means nothing else: MRN 123456."""
    return rf"\b(?i:{labels})(?![A-Za-z]){_MORE}\K{value}"


def _behind_word(words: str, value: str = _VALUE) -> str:
    """A value behind a common word, which a number, # or : must make a label: account no. 123456."""
    return rf"\b(?i:{words})(?![A-Za-z]){_MARK}\K{value}"


# (A) A person is up to four capitalised words and initials, or LAST, FIRST.
_PREFIX = r"(?:Mc|Mac|O['’]|D['’]|De|Di|La|Le|Van)?"
# With accents that are no part of their letter (M): Unicode has no Ọ with an accent on it.
_WORD = (rf"(?:{_PREFIX}\p{{Lu}}[\p{{Ll}}\p{{M}}]+(?:[\-'’]\p{{Lu}}[\p{{Ll}}\p{{M}}]+)*"
         rf"|{_PREFIX}\p{{Lu}}[\p{{Lu}}\p{{M}}]{{1,20}}(?:[\-'’]\p{{Lu}}[\p{{Lu}}\p{{M}}]{{1,20}})?)")
_INITIAL = r"\p{Lu}\."
_PARTICLES = r"(?:(?:de|del|der|den|di|la|le|van|von|bin|al|el) ){0,2}"
_PERSON = (rf"(?:{_WORD}, {_WORD}(?: (?:{_INITIAL}|\p{{Lu}}\b))?"
           rf"|(?:{_INITIAL} ?){{0,2}}{_PARTICLES}{_WORD}(?: (?:{_INITIAL}|{_PARTICLES}{_WORD})){{0,3}})")
# MR, MS: not people
_TITLE = (r"(?:(?:Dr|Mr|Mrs|Ms|Miss|Mx|Prof|Professor|Doctor|Sr|Fr|Rev|MRS)\b\.?|(?:DR|MR|MS"
          r"|PROF)\.)")
_DEGREE = (r"(?:,? (?:M\.?D|Pharm\.?D|Ph\.?D|R\.N|D\.O|N\.P|P\.A|PA-C|DDS|DMD|DPM|APRN|CRNA|LPN"
           r"|MBBS)\b|, (?:RN|DO|NP)\b)")
_NAMED = (r"(?:patient|pt|member|subscriber|guarantor|insured|provider|physician|surgeon|mother|father|spouse|"
          r"emergency contact|next of kin|contact|employer)(?:'s)?(?: (?:full |last |first )?name)?|"
          r"(?:full |last |first |maiden )?name|PCP|radiologist|pharmacist|nurse|resident|attending|"
          r"(?:referring|attending|ordering|primary care|reading|interpreting|consulting|rendering|requesting) "
          r"(?:physician|provider|doctor|radiologist|md)|"
          r"(?:electronically |e-?)?(?:signed|dictated|transcribed|verified|reviewed|read|reported) by")
_NAMES = _patterns(
    "NAME",
    ("behind a title", LABELLED, rf"\b{_TITLE} {{1,2}}\K{_PERSON}"),
    ("behind a label", LABELLED, rf"\b(?i:{_NAMED})[ \t]{{0,3}}[:=][ \t]{{0,4}}\K(?!{_TITLE} ){_PERSON}"),
    ("before a degree", FORM, rf"\b{_WORD}(?: (?:{_INITIAL}|{_WORD})){{1,3}}(?={_DEGREE})"),
)

# (B) Less than a state.
_STATE = (r"(?:(?:AL|AK|AZ|AR|CA|CO|CT|DC|DE|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM"
          r"|NY|NC|"
          r"ND|OH|OK|OR|PA|PR|RI|SC|SD|TN|TX|UT|VT|VA|VI|WA|WV|WI|WY)\b\.?|Alabama|Alaska|Arizona|Arkansas|California|"
          r"Colorado|Connecticut|Delaware|Florida|Georgia|Hawaii|Idaho|Illinois|Indiana|Iowa|Kansas|Kentucky|Louisiana|"
          r"Maine|Maryland|Massachusetts|Michigan|Minnesota|Mississippi|Missouri|Montana|Nebraska|Nevada|"
          r"New (?:Hampshire|Jersey|Mexico|York)|Ohio|Oklahoma|Oregon|Pennsylvania|Rhode Island|"
          r"(?:North|South) (?:Carolina|Dakota)|Tennessee|Texas|Utah|Vermont|Virginia|Washington|West Virginia"
          r"|Wisconsin|"
          r"Wyoming)")
_CAPITAL = r"\p{Lu}[\p{L}\p{M}.'’\-]{1,24}"
_CITY = rf"{_CAPITAL}(?: {_CAPITAL}){{0,2}}"
_STREET = (r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Pl|Terrace|Ter|Circle|"
           r"Cir|Highway|Hwy|Parkway|Pkwy|Square|Sq|Trail|Trl|Loop|STREET|ST|AVENUE|AVE|ROAD|RD|BLVD|LANE|LN|DRIVE|DR|"
           r"COURT|CT|WAY|PLACE|PL|CIRCLE|CIR)\b\.?")
_COMPASS = r"(?:(?:N|S|E|W|NE|NW|SE|SW|North|South|East|West)\b\.? )?"
_ROOM = r"(?:,? (?:(?i:apt|apartment|suite|ste|unit|floor|fl|room|rm)\b\.? ?|\#) ?[\w\-]{1,6})?"
_LIVES = r"city|town|county|hometown|residence|lives in|resident of|resides in|born in"
_PLACES = [
    *_patterns(
        "ADDRESS",
        ("street", FORM, rf"(?<![\d.])\b\d{{1,6}}[A-Z]? {_COMPASS}(?:(?:{_CAPITAL}|\d{{1,3}}(?:st|nd|rd|th)) ){{1,4}}"
                         rf"{_STREET}{_ROOM}"),
        ("post box", FORM, r"\bP\.? ?O\.? ?(?i:box) ?\d{1,7}\b"),
        ("city before a state and ZIP code", FORM, rf"\b{_CITY}(?=,? {{1,2}}{_STATE} {{1,2}}\d{{5}}\b)"),
        ("city behind a label", FORM, rf"\b(?i:{_LIVES})(?: of)?[ \t]{{0,400}}:?[ \t]{{0,400}}\K{_CITY}"),
        ("county", WEAK, rf"\b{_CAPITAL} (?:County|Parish)\b"),
    ),
    *_patterns(
        "ZIP",
        ("behind a state", FORM, rf"\b{_STATE} {{1,2}}\K\d{{5}}(?:-\d{{4}})?\b"),
        ("behind a label", LABELLED, r"\b(?i:zip|post(?:al)?)(?: ?code)?\s{0,2}:?\s{0,2}\K\d{5}(?:-\d{4})?\b"),
        ("of nine digits", WEAK, r"(?<![\d\-])\d{5}-\d{4}(?![\d\-])"),
    ),
]  # fmt: skip

# (C) Days and months, with or without a year; a year alone may stay. Ages over 89.
_MONTH = (r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sep(?:t(?:ember)?)?|"
          r"Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?|JAN(?:UARY)?|FEB(?:RUARY)?|MAR(?:CH)?|APR(?:IL)?|MAY|JUNE?|JULY?|"
          r"AUG(?:UST)?|SEP(?:T(?:EMBER)?)?|OCT(?:OBER)?|NOV(?:EMBER)?|DEC(?:EMBER)?)")
_D, _M, _Y = r"(?:3[01]|[12]\d|0?[1-9])", r"(?:1[0-2]|0?[1-9])", r"(?:19|20)\d\d"
_DD, _MM = r"(?:3[01]|[12]\d|0[1-9])", r"(?:1[0-2]|0[1-9])"
_TIME = r"(?:[T ,]{1,2}\d{1,2}:\d\d(?::\d\d(?:\.\d{1,6})?)?(?:\s?[AaPp]\.?[Mm]\b\.?)?(?:Z|[+\-]\d\d:?\d\d)?)?"
_ALONE, _END = r"(?<![\d./\-])", r"(?!\d|[./\-]\d)"  # not a piece of a longer number
_WEEKDAY = r"(?:(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?,? )?"
_DATED = (r"DOB|D\.O\.B\.|birth ?date|date of (?:birth|service|death|admission|discharge|visit|surgery|injury)|DOS"
          r"|DOA|DOD|"
          r"dated?|admitted|discharged|seen|on|since|until|born|expires?|exam date|study date")
_HOLIDAY = (r"(?:Christmas(?: Eve| Day)?|Thanksgiving(?: Day)?|New Year's (?:Eve|Day)|Easter(?: Sunday| Monday)?"
            r"|Labor Day|"
            r"Memorial Day|Halloween|Independence Day)")
_OLD = r"(?:9\d|1[0-2]\d)"
_YEARS = (r"[ \-]{0,2}(?i:(?:years?|yrs?)(?:[ \-]old|[ \-]of[ \-]age|[ \-](?:fe)?male)|y/?\.?o\b|yo[mf]?\b"
          r"|years? young|"
          r"y\.o\.)")
_TIMES = [
    *_patterns(
        "DATE",
        ("year first", FORM, rf"{_ALONE}{_Y}([\-/.]){_M}\1{_D}{_TIME}{_END}"),
        ("month first", FORM, rf"{_ALONE}{_M}([/\-.]){_D}\1{_Y}{_TIME}{_END}"),
        ("day first", FORM, rf"{_ALONE}{_D}([/\-.]){_M}\1{_Y}{_TIME}{_END}"),
        ("two digits of the year", FORM, rf"{_ALONE}(?:{_M}/{_D}|{_D}/{_M})/\d\d{_TIME}{_END}"),
        ("month in words, then day", FORM,
         rf"\b{_WEEKDAY}{_MONTH}\b\.? {{0,2}}{_D}(?:st|nd|rd|th)?\b(?!\s?(?:mg|mcg|ml|mL|g|%))"
         rf"(?:,? {{0,2}}{_Y}|,? '\d\d)?{_TIME}(?!\d)"),
        ("day, then month in words", FORM,
         rf"(?<![\d.,]){_WEEKDAY}{_D}(?:st|nd|rd|th)?(?: of)?[ \-]?{_MONTH}(?![A-Za-z])\.?(?:[ ,\-]{{0,2}}(?:{_Y}"
         rf"|\d\d))?"
         rf"{_TIME}(?!\d)"),
        ("month and year", FORM, rf"\b{_MONTH}\b\.?(?:,? (?:of )?|\-){_Y}\b"),
        ("month and year in digits", FORM, rf"{_ALONE}{_M}/{_Y}{_END}"),
        ("holiday", FORM, rf"\b{_HOLIDAY}(?: of|,)? {_Y}\b"),
        ("behind a label", FORM, rf"\b(?i:{_DATED})\s{{0,2}}:?\s{{0,2}}\K(?:{_M}/{_D}|\d{{8}})\b(?![/.\-]?\d)"
                                 r"(?! ?(?:%|mg|mm|cm))"),
        ("of eight digits", WEAK, rf"(?<![\w./\-]){_Y}{_MM}{_DD}(?![\w]|[./\-]\d)"),
        ("of eight digits, with a time", FORM, rf"{_ALONE}{_Y}{_MM}{_DD}(?:[01]\d|2[0-3])[0-5]\d(?:[0-5]\d)?\b"),
    ),
    *_patterns(
        "AGE",
        ("over 89", FORM, rf"(?<![\d.,/\-]){_OLD}(?={_YEARS})"),
        ("behind a label", FORM, r"\b(?i:aged?|age at (?:diagnosis|death|visit|exam))\s{0,2}(?::|(?i:is|of"
                                 r"|was)\b)?\s{0,2}\K"
                                 rf"{_OLD}\b(?![.,/\-]?\d)(?! ?(?i:%|mm|cm|days?|weeks?|months?|mg))"),
        ("in words", FORM, r"\b(?i:nonagenarian|centenarian|supercentenarian)s?\b"),
    ),
]  # fmt: skip

# (D) to (R)
_CALL = r"\+?\(?\d[\d ().\-]{5,18}\d\b(?:,? ?(?i:x|ext\.?|extension) ?\d{1,6})?"
_SSN = r"(?:\d{3}-?\d{2}-?\d{4}|[X*]{3}-?[X*]{2}-?\d{4})\b"
_PATH = r"[^\s<>\"'\])}]*[^\s<>\"'\])}.,;:!?]"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_RECORD = (r"MRN|M\.R\.N\.|MR(?=\s?\#|\s?no)|med(?:ical)? rec(?:ord)?|patient id|pt id|unit record|PID|EMPI|"
           r"hospital (?=number|no|id)|chart (?=number|no|id|\#)")
_PLAN = (r"(?:member|subscriber|beneficiary|insurance|health plan|policy|group|medicare|medicaid"
         r"|insured|payer|plan)(?:'s)?")
_ACCOUNT = (r"account|acct|a/c|bank account|billing account|HAR|guarantor account|invoice|check|routing|card|FIN|CSN|"
            r"encounter|visit")
_LICENCE = (r"(?:medical |state |nursing |pharmacy |driver'?s? |driving )?licen[cs]e|lic\.?|certificate|certification|"
            r"passport|registration|DL")
_PLATE = r"(?=[A-Z \-]{0,8}\d)[A-Z\d]{1,4}(?:[ \-]?[A-Z\d]{1,5}){1,2}\b"
_DEVICE = r"(?:device |pacemaker |implant |generator |lead |pump |scanner )?serial|device(?= id)|IMEI|UDI"
_OTHER = (r"accession|acc|order|requisition|specimen|case|claim|prescription|rx|reference|ref|study|subject"
          r"|authorization|"
          r"auth|referral|confirmation|employee|badge|record|transaction|ticket")
_NUMBERS = [
    *_patterns(
        "PHONE",
        ("North American", FORM, r"(?<![\w.\-+/])(?:\+?1[ .\-]?)?(?:\(\d{3}\) ?|\d{3}[.\- ])\d{3}[.\- ]\d{4}"
                                 r"(?:,? ?(?i:x|ext\.?|extension) ?\d{1,6})?(?![\d\-])"),
        ("behind a label", LABELLED, r"\b(?i:phone|telephone|tel|cell|mobile|pager|beeper|call(?: back)?"
                                     r"|contact)(?![a-z])"
                                     rf"{_MORE}(?i:at )?\K{_CALL}"),
    ),
    *_patterns("FAX", ("behind a label", TELLING, rf"\b(?i:fax|facsimile)(?![a-z]){_MORE}(?i:(?:to|at) )?\K{_CALL}")),
    *_patterns("EMAIL", ("address", LABELLED, r"(?<![\w.+\-])[\w.+\-%']{1,64}@(?:[\w\-]{1,63}\.)+[A-Za-z]{2,24}\b")),
    *_patterns(
        "SSN",
        ("behind a label", LABELLED, _behind("SSN|SS|social security", _SSN)),
        ("the last four", LABELLED, r"\b(?i:last (?:4|four)(?: digits)?(?: of)?(?: (?:ssn|social(?: security)?))?)"
                                    rf"{_MORE}\K\d{{4}}\b"),
    ),
    *_patterns("MRN", ("behind a label", LABELLED, _behind(_RECORD))),
    *_patterns("PLAN_ID", ("behind a word", LABELLED, _behind_word(_PLAN)),
               ("behind a label", LABELLED, _behind("MBI|HICN?|medicare id|medicaid id|policy number"))),
    *_patterns("ACCOUNT", ("behind a word", LABELLED, _behind_word(_ACCOUNT))),
    *_patterns("LICENCE", ("behind a word", LABELLED, _behind_word(_LICENCE)),
               ("of a prescriber", LABELLED, _behind("DEA|NPI|UPIN"))),
    *_patterns("VEHICLE", ("plate", TELLING, _behind(r"(?:licen[cs]e |number )?plates?|vehicle (?:registration"
                                                     r"|tag)", _PLATE)),
               ("identification number", LABELLED, _behind(r"VIN|vehicle identification", r"[A-HJ-NPR-Z\d]{11,17}\b"))),
    *_patterns("DEVICE", ("behind a word", LABELLED, _behind_word(_DEVICE)),
               ("behind a label", LABELLED, _behind("S/N|SN")),
               ("GS1 identifier", TELLING, r"\(01\)\d{14}(?:\((?:10|11|17|21|240)\)[A-Za-z\d\-]{1,20})*")),
    *_patterns(
        "URL",
        ("with a scheme", LABELLED, rf"\b(?i:https?|ftp|sftp|s3|file)://[^\s<>\"'\])}}]{{2}}{_PATH}"),
        ("www", FORM, rf"(?<![\w@.])(?i:www)\.[\w\-]+(?:\.[\w\-]+)+(?:/{_PATH})?"),
        ("bare", FORM, rf"(?<![\w@.\-/])(?:[\w\-]+\.)+(?:com|org|net|edu|gov|mil|health|io)\b(?:/{_PATH})?(?![\w@])"),
    ),
    *_patterns("IP", ("version 4", FORM, rf"(?<![\w.])(?:{_BYTE}\.){{3}}{_BYTE}(?::\d{{2,5}}|/\d\d?)?(?!\w|\.\d)")),
    *_patterns("ID", ("behind a word", WEAK + 0.1, _behind_word(_OTHER))),
]  # fmt: skip

PATTERNS = (*_NAMES, *_PLACES, *_TIMES, *_NUMBERS)
