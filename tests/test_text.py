import pytest

from text import NAME_LENGTH, plain, shown


def test_names_fit_where_they_are_shown():
    assert shown("cat") == "cat"
    assert shown("x" * 200, 40) == "x" * 39 + "…"
    assert len(shown("x" * 200)) == NAME_LENGTH
    assert shown(10**5000) == "a number of thousands of digits"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\u202ecat\x1b[31m", "cat [31m"),
        ("two\nlines\u2028or three", "two lines or three"),
        ("https://me:secret@hub.example/x", "https://hub.example/x"),
        ("broken \udcff", "broken  "),
    ],
)
def test_text_of_others_moves_nothing_and_tells_no_secret(text, said):
    assert plain(text) == said
