"""A text in characters that patterns know.

    composed(text)      in Unicode's form NFC: a letter and its accent are one character, where there is such a one
    plain(text)         of equal length: every space, tab, digit and hyphen, and what is as wide as a Chinese character,
                        is the plain one; so what is found in it stands at the same place in the text
"""

import unicodedata

HYPHENS = "\u2010\u2011\u2012\u2013\u2212\ufe63"  # and the minus sign
WIDE = range(0xFF01, 0xFF5F)  # what ASCII prints, as wide as Chinese characters


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def plain(text: str) -> str:
    if text.isascii():
        return text.replace("\t", " ")
    return text.translate({ord(character): _plain(character) for character in set(text)})


def _plain(character: str) -> str:
    if character == "\t" or unicodedata.category(character) == "Zs":
        return " "
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    if character in HYPHENS:
        return "-"
    return chr(ord(character) - WIDE.start + ord("!")) if ord(character) in WIDE else character
