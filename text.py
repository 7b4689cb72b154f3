"""Text that somebody else wrote (names, messages, what a file holds), made fit to be shown."""

import re

NAME_LENGTH = 80  # characters of a name that are shown

# Line breaks, terminal codes, broken UTF-8, and what XML may not hold.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # marks that turn what follows around
PASSWORD = re.compile(r"(?<=://)[^/\s]*@")  # user:password@ of a URL


def plain(text: str) -> str:
    """Text on one line, in the order in which it is written, without what terminals obey and the passwords of URLs."""
    return PASSWORD.sub("", UNPRINTABLE.sub(" ", DIRECTIONS.sub("", text)))


def shown(value, length: int = NAME_LENGTH) -> str:
    """A name as `plain` text, cut where it is longer than `length` characters."""
    try:
        text = plain(str(value))
    except ValueError:  # Python does not write out a number of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= length else text[: length - 1] + "…"
