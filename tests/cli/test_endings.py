"""How the command ends: what is missing, what the output cannot take, what stops it."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantjax import cli
from quantjax.cli import command, streams

ROOT = Path(__file__).resolve().parents[2]
SWEEP = ["sweep", "--study", "tests.sweep.tiny:tiny_study", "--rules", "min-max", "--seeds", "0"]
SWEEP += ["--weight-bits", "8", "--activation-bits", "8"]
CALIBRATE = ["calibrate", "tests.calibration.tiny:model", "tests.calibration.tiny:batches"]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder whose sweep has nothing left to compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("swept")
        arguments = [*SWEEP[:-5], "--seeds", "0", "1", *SWEEP[-4:], "--output", str(folder)]
        assert cli.main(arguments) == 0
    return arguments


def run(*arguments, stdout=subprocess.PIPE, **environment):
    """The command as a process of its own."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-m", "quantjax", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**inherited, **environment},
        cwd=ROOT,
    )


# What is missing


@pytest.mark.parametrize("arguments", [SWEEP, CALIBRATE], ids=["sweep", "calibrate"])
def test_missing_matplotlib_is_said_ahead_of_all_work(tmp_path, arguments):
    """It was an ImportError behind all the work, in place of the table."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no', name='matplotlib')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ended = run(*arguments, "--output", str(tmp_path / "out"), PYTHONPATH=path)
    assert ended.returncode == 1
    assert ended.stderr == b'matplotlib is missing: pip install "quantjax[experiments]"\n'
    assert ended.stdout == b""
    assert not (tmp_path / "out").exists()


def test_what_draws_nothing_needs_no_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert cli.main(["studies"]) == 0
    assert cli.main(SWEEP) == 1
    assert "is missing: pip install" in capsys.readouterr().err


# What the output cannot take


def test_a_stream_without_the_letters_has_others(swept):
    """UnicodeEncodeError, in place of the results."""
    ended = run(*swept, PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"mean +- standard deviation over seeds" in ended.stdout
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert b"mean +- standard deviation" in run(*swept, **c_locale).stdout


def test_help_is_written_in_any_encoding():
    ended = run("sweep", "--help", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"--memory-budget-mib" in ended.stdout


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("ascii", b"+- x ?"), ("latin-1", b"\xb1 \xd7 ?"), ("utf-8", "± × σ".encode())],
)
def test_letters_that_an_encoding_has_are_written_as_they_are(encoding, written):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    streams.write_what_fits(stream)
    stream.write("± × σ")
    stream.flush()
    assert raw.getvalue() == written


@pytest.mark.parametrize("errors", ["backslashreplace", "ignore"])
def test_a_stream_with_an_answer_of_its_own_keeps_it(errors):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    streams.write_what_fits(stream)
    assert stream.errors == errors
    for none in (None, io.StringIO()):
        streams.write_what_fits(none)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", [["studies"], ["--help"], None], ids=str)
def test_a_closed_pipe_ends_it_quietly(swept, arguments, unbuffered):
    """What ``| head -1`` does."""
    read, write = os.pipe()
    os.close(read)
    ended = run(*(arguments or swept), stdout=write, PYTHONUNBUFFERED=unbuffered)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="only Linux has a disk that is always full"
)
@pytest.mark.parametrize("arguments", [["studies"], None], ids=str)
def test_a_full_disk_is_one_line(swept, arguments):
    with open("/dev/full", "wb") as full:
        ended = run(*(arguments or swept), stdout=full)
    assert ended.returncode == 1
    assert ended.stderr.decode().splitlines() == [
        f"error: the output cannot be written: {os.strerror(errno.ENOSPC)}"
    ]


@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "of another"), OSError(errno.EIO, "of a disk")]
)
def test_other_errors_of_the_system_are_not_hidden(monkeypatch, error):
    """A pipe to a process of the user's, for instance."""
    monkeypatch.setattr(command, "is_closed", lambda stream: False)

    def fail(arguments):
        raise error

    monkeypatch.setattr(command, "_run", fail)
    with pytest.raises(type(error)) as caught:
        cli.main(["studies"])
    assert caught.value is error


def test_whether_anybody_reads():
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        assert not streams.is_closed(stream)
        os.close(read)
        assert streams.is_closed(stream)
        stream.write("lost")
        streams.let_go(stream)
        stream.write("lost too")
    assert not streams.is_closed(None)
    streams.let_go(None)


# What stops it


def test_an_interrupt_while_it_starts_is_quiet(monkeypatch, capsys):
    def stop(module):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_lacks", stop)
    assert cli.main(["studies"]) == 130
    assert capsys.readouterr().err == "stopped\n"
