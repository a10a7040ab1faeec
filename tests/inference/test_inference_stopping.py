import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_lm.errors import UserError
from tiny_lm.inference.stopping import StopStrings


def pushed(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    stopping = StopStrings(stops)
    text = "".join([stopping.feed(piece) for piece in pieces])
    return text + stopping.flush(), stopping.found


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_the_text_ends_before_the_first_stop_however_it_is_cut(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    # The stop that is complete first wins, and the earliest of those that are complete with the same piece.
    text, found = pushed(tuple(stops), list(whole))
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    assert found == bool(ends)
    if found:
        starts = [min(ends) - len(stop) for stop in stops if whole[: min(ends)].endswith(stop)]
        assert text == whole[: min(starts)]
    else:
        assert text == whole
    in_pieces, found_in_pieces = pushed(tuple(stops), pieces)
    assert found_in_pieces == found
    assert whole.startswith(in_pieces) and not any(stop in in_pieces for stop in stops)


def test_only_what_may_be_a_stop_is_held_back() -> None:
    stopping = StopStrings(("<end>",))
    assert stopping.feed("a fox <") == "a fox "
    assert stopping.feed("e") == ""
    assert stopping.feed("gg> <en") == "<egg> "
    assert stopping.feed("d> and more") == "" and stopping.found
    assert stopping.feed("still more") == "" and stopping.flush() == ""


def test_too_much_is_refused() -> None:
    for stops, message in [(("",), "1 to 256 characters"), (("x" * 257,), "1 to 256"), (("x",) * 17, "at most 16")]:
        with pytest.raises(UserError, match=message):
            StopStrings(stops)
