"""Results on disk survive what happens to files."""

import pytest

from quantjax import errors
from quantjax.sweep import Cell, ResultStore, Row

ROWS = [
    Row("abc", "digits", seed, weight, 8, "min_max", weight / 10, weight, 10)
    for seed in (0, 1)
    for weight in (2, 4)
]


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "new" / "results.csv")


def test_nothing_yet(store):
    assert store.rows() == []
    assert store.known("abc", 0) == {}


def test_rows_come_back_as_they_were(store):
    store.add(ROWS[:1])
    store.add(ROWS[1:])
    assert store.rows() == ROWS
    assert store.path.read_text().count("fingerprint") == 1


def test_known_are_those_of_one_model(store):
    store.add([*ROWS, ROWS[0]._replace(fingerprint="other", correct=9)])
    assert store.known("abc", 1) == {Cell(2, 8, "min_max"): ROWS[2], Cell(4, 8, "min_max"): ROWS[3]}
    assert next(iter(store.known("other", 0).values())).correct == 9


def test_a_line_cut_short_is_left_out_and_then_replaced(store):
    store.add(ROWS[:2])
    store.path.write_text(store.path.read_text() + "abc,digits,1,2,8,min_m")
    assert store.rows() == ROWS[:2]
    store.add(ROWS[2:])
    assert store.rows() == ROWS
    assert "min_m\n" not in store.path.read_text()


def test_a_line_cut_within_a_letter_is_left_out(store):
    """The whole file was called no text, with the advice to move it away."""
    own = ROWS[2]._replace(study="größe", rule='a,"b"\nc')
    store.add([ROWS[0], own])
    store.path.write_bytes(store.path.read_bytes() + "abc,grö".encode()[:-1])
    assert store.rows() == [ROWS[0], own]
    store.add(ROWS[3:])
    assert store.rows() == [ROWS[0], own, ROWS[3]]


def test_empty_lines_and_the_mark_of_an_editor_are_no_rows(store):
    store.add(ROWS)
    store.path.write_text(store.path.read_text() + "\n\n", encoding="utf-8-sig")
    assert store.rows() == ROWS


def test_a_file_that_is_no_text_raises(store):
    store.path.parent.mkdir()
    store.path.write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(errors.SweepError, match="no text file"):
        store.rows()


def test_a_file_of_another_kind_raises(store):
    store.path.parent.mkdir()
    store.path.write_text("x,y\n1,2\n")
    with pytest.raises(errors.SweepError, match="not a result file"):
        store.rows()


@pytest.mark.parametrize("line", ["abc,digits,0,two,8,min_max,0.2,2,10", "abc,digits,0"])
def test_a_line_that_cannot_be_read_names_its_number(store, line):
    store.add(ROWS[:1])
    store.path.write_text(store.path.read_text() + line + "\n")
    with pytest.raises(errors.SweepError, match="line 3"):
        store.rows()


def test_rewrite_replaces_all(store):
    store.add(ROWS)
    store.rewrite(ROWS[:1])
    assert store.rows() == ROWS[:1]
    assert [path.name for path in store.path.parent.iterdir()] == ["results.csv"]


def test_accuracies_keep_every_digit(store):
    row = ROWS[0]._replace(accuracy=1 / 3)
    store.add([row])
    assert store.rows()[0].accuracy == 1 / 3
