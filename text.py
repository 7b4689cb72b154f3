"""Text that somebody else wrote (names, messages, file contents), made safe to show."""

import re

NAME_LENGTH = 80  # characters of a name that are shown

# Line breaks, terminal codes, broken UTF-8, and characters that XML forbids.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # marks that change the direction of text
PASSWORD = re.compile(r"(?<=://)[^/\s]*@")  # user:password@ of a URL


def plain(text: str) -> str:
    """Text on one line, in the order it was written, without terminal codes and the passwords of URLs."""
    return PASSWORD.sub("", UNPRINTABLE.sub(" ", DIRECTIONS.sub("", text)))


def shown(value, length: int = NAME_LENGTH) -> str:
    """A name as `plain` text, cut to at most `length` characters."""
    try:
        text = plain(str(value))
    except ValueError:  # Python refuses to print an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= length else text[: length - 1] + "…"


def distinct(names: list, length: int) -> list[str]:
    """Names as `shown`; where that makes two the same, their middles are left out instead of their ends."""
    cut = [shown(name, length) for name in names]
    half = length // 2
    whole = [shown(name, 10**6) for name in names]
    return [
        short if len(name) <= length or cut.count(short) == 1 else name[: length - half - 1] + "…" + name[-half:]
        for name, short in zip(whole, cut, strict=True)
    ]
