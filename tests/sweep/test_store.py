"""Results on disk survive what happens to files."""

import csv
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from quantjax import errors
from quantjax.sweep import Cell, ResultStore, Row
from quantjax.sweep import store as module

ROOT = Path(__file__).resolve().parents[2]

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


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00\n", b"a" * 200_000 + b"\n"], ids=["bytes", "field"]
)
def test_a_file_that_is_no_text_or_has_endless_fields_raises(store, content):
    store.path.parent.mkdir()
    store.path.write_bytes(content)
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


def test_accuracies_keep_every_digit(store):
    row = ROWS[0]._replace(accuracy=1 / 3)
    store.add([row])
    assert store.rows()[0].accuracy == 1 / 3


# Several sweeps at once

ADDING = """
import sys, time
from pathlib import Path
from quantjax.sweep import ResultStore, Row

folder, who = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for i in range(60):
    (folder / f"{i}.{who}").touch()
    while not (folder / f"{i}.{1 - who}").exists():
        time.sleep(0)
    store = ResultStore(folder / str(i) / "results.csv")
    for j in range(3):
        store.add([Row("f", "s", who, j, k, "min_max", 0.5, 1, 2) for k in range(3)])
"""


def test_two_processes_lose_no_row_and_write_one_header(tmp_path):
    """Each wrote a header where both saw a new file, which no later sweep could read."""
    adding = [
        subprocess.Popen(
            [sys.executable, "-c", ADDING, str(tmp_path), str(who)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who in (0, 1)
    ]
    for process in adding:
        assert process.stdout.readline() == "ready\n"
    for process in adding:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in adding:
        process.communicate(timeout=60)
        assert process.returncode == 0
    for i in range(60):
        store = ResultStore(tmp_path / str(i) / "results.csv")
        assert len(set(store.rows())) == len(store.rows()) == 18
        assert store.path.read_text().count("fingerprint") == 1


def test_threads_that_add_and_read_see_whole_rows(store):
    store.add(ROWS)
    failed = []

    def work(who):
        try:
            for i in range(30):
                store.add([ROWS[0]._replace(seed=10 + who, weight_bits=i)])
                assert set(ROWS) <= set(store.rows())
        except Exception as error:  # noqa: BLE001  threads keep theirs to themselves
            failed.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(set(store.rows())) == len(ROWS) + 4 * 30


def test_a_file_of_empty_lines_gets_a_header(store):
    store.path.parent.mkdir()
    store.path.write_text("\n")
    store.add(ROWS)
    assert store.rows() == ROWS


def test_a_header_in_the_middle_is_no_row(store):
    """What two sweeps of an older version, or on a disk without locks, have left."""
    store.add(ROWS[:2])
    head = store.path.read_text().splitlines()[0]
    store.path.write_text(store.path.read_text() + head + "\n")
    store.add(ROWS[2:])
    assert store.rows() == ROWS


def test_rows_added_while_the_file_is_replaced_are_in_the_new_one(store, monkeypatch):
    """The lock that was waited for is that of a file which has no name any more."""
    store.add(ROWS[:1])
    real, other = module._lock, ResultStore(store.path.with_name("other.csv"))

    def replaced_meanwhile(file, *, shared):
        monkeypatch.setattr(module, "_lock", real)
        other.add(ROWS[:2])
        os.replace(other.path, store.path)
        real(file, shared=shared)

    monkeypatch.setattr(module, "_lock", replaced_meanwhile)
    store.add(ROWS[2:])
    assert store.rows() == ROWS


def test_a_cut_line_is_taken_out_of_the_file_itself(store):
    """Another sweep may hold it open: what that adds to a file without a name is lost."""
    store.add(ROWS[:2])
    with store.path.open("a", newline="") as held:
        held.write("abc,digits,1")
        held.flush()
        store.add(ROWS[2:3])
        csv.writer(held, lineterminator="\n").writerow(ROWS[3])
    assert store.rows() == ROWS


@pytest.mark.parametrize("mode", [0o644, 0o664, 0o600])
def test_permissions_stay(store, mode):
    """0644 became 0600."""
    store.add(ROWS[:1])
    os.chmod(store.path, mode)
    store.path.write_text(store.path.read_text() + "abc")
    store.add(ROWS)
    assert stat.S_IMODE(store.path.stat().st_mode) == mode


def test_one_line_of_another_file_is_not_taken_out(store):
    store.path.parent.mkdir()
    store.path.write_text("a note")
    for call in (store.rows, lambda: store.add(ROWS)):
        with pytest.raises(errors.SweepError, match="not a result file"):
            call()
    assert store.path.read_text() == "a note"
    store.path.write_text("fingerprint,stu")
    store.add(ROWS)
    assert store.rows() == ROWS


def test_a_disk_without_locks_is_written_all_the_same(store, monkeypatch):
    import fcntl

    def refuse(file, kind):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    store.add(ROWS)
    assert store.rows() == ROWS
    monkeypatch.setitem(sys.modules, "fcntl", None)
    more = [row._replace(seed=row.seed + 2) for row in ROWS]
    store.add(more)
    assert store.rows() == [*ROWS, *more]
