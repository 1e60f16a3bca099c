"""Text comes out piece by piece as it would at once, wherever it is cut."""

from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.serve.text import TextStream

TEXTS = st.text(st.sampled_from("ab𝄞"), max_size=12)  # few letters, so that stops are found, in part or whole
STOPS = st.lists(st.text(st.sampled_from("ab𝄞"), min_size=1, max_size=4), max_size=3)


@st.composite
def cut_bytes(draw, content):
    """Pieces that together are `content`, cut also inside letters."""
    data = draw(content)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def at_once(text, stops):
    """(what is shown, the stop): letter by letter, until the text ends with a stop; the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300)
@given(cut_bytes(TEXTS.map(str.encode)), STOPS)
def test_wherever_it_is_cut(pieces, stops):
    stream = TextStream(stops)
    shown = [stream.push(piece) for piece in pieces]
    whole, stop = at_once(b"".join(pieces).decode(), stops)
    assert ("".join([*shown, stream.finish()]), stream.stopped) == (whole, stop)


@settings(max_examples=300)
@given(cut_bytes(TEXTS.map(str.encode)), STOPS)
def test_as_much_as_is_certain_is_shown_and_no_more(pieces, stops):
    """After each piece: all but the longest end that a stop may begin with."""
    stream, shown, seen = TextStream(stops), "", b""
    for piece in pieces:
        shown, seen = shown + stream.push(piece), seen + piece
        text, stop = at_once(seen.decode(errors="ignore"), stops)  # a letter that is not whole is not shown
        if stop is None:
            held = [n for each in stops for n in range(1, len(each)) if text.endswith(each[:n])]
            text = text[: len(text) - max(held, default=0)]
        assert shown == text


@given(cut_bytes(st.binary(max_size=12)))
def test_bytes_that_are_no_text(pieces):
    stream = TextStream()
    shown = "".join(stream.push(piece) for piece in pieces)
    assert shown + stream.finish() == b"".join(pieces).decode(errors="replace")


def test_after_the_end_there_is_nothing():
    stream = TextStream(["."])
    assert stream.push(b"a.b") == "a"
    assert (stream.push(b"c"), stream.finish(), stream.stopped) == ("", "", ".")


def test_a_half_letter_at_the_end_is_shown_as_such():
    stream = TextStream()
    assert stream.push("é".encode()[:1]) == ""
    assert stream.finish() == "\ufffd"
