"""Where files come from: mirrors and their failures, the cache, folders, the environment."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.data import ENVIRONMENT, DataFileError, DataUnavailableError
from experiments.data.files import check, place, two_ways
from experiments.data.images import load_idx
from experiments.data.sources import mirrored
from tests.experiments.mirror import closed_address, files_below
from tests.experiments.small_sets import KINDS, idx_source, same

pytestmark = pytest.mark.usefixtures("bare")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
TWO_WAYS = ("--data-dir", "QUANTJAX_DATA", "with a network, to download")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def damaged(data: bytes) -> bytes:
    """The same number of bytes, one of them another."""
    return bytes([data[0] ^ 1]) + data[1:]


def assert_complete(message: str) -> None:
    """The four parts of an error, each on a line of its own."""
    parts = [line.strip().partition(":")[0] for line in message.splitlines()[1:]]
    assert parts == ["where", "why", "try"]


@EVERY_KIND
def test_a_mirror_and_a_folder_give_the_same(kind, mirror, cache, tmp_path):
    base = mirror.put("one", kind.served)
    downloaded = kind.load(kind.source(base), cache_dir=cache)
    assert mirror.requests == [f"one/{name}" for name in kind.served]
    from_folder = kind.load(kind.source(base), data_dir=kind.write(tmp_path / "data"))
    assert same(downloaded, from_folder)
    assert len(mirror.requests) == len(kind.served)


@EVERY_KIND
def test_a_second_load_asks_no_mirror(kind, mirror, cache):
    base = mirror.put("one", kind.served)
    first = kind.load(kind.source(base), cache_dir=cache)
    mirror.requests.clear()
    assert same(kind.load(kind.source(base), cache_dir=cache), first)
    assert mirror.requests == []
    assert files_below(cache) == kind.cached


@EVERY_KIND
def test_a_full_cache_works_offline(kind, mirror, cache):
    first = kind.load(kind.source(mirror.put("one", kind.served)), cache_dir=cache)
    offline = kind.source(closed_address())
    assert same(kind.load(offline, cache_dir=cache), first)


@EVERY_KIND
def test_offline_without_a_cache(kind, cache):
    addresses = closed_address(), closed_address()
    with pytest.raises(DataUnavailableError, match="no mirror served") as caught:
        kind.load(kind.source(*addresses), cache_dir=cache)
    message = str(caught.value)
    assert_complete(message)
    assert all(address in message for address in addresses)
    assert all(way in caught.value.fix for way in TWO_WAYS)
    assert all(path in caught.value.fix for path in kind.folder if not path.startswith("text/st"))
    assert files_below(cache) == []


@EVERY_KIND
@pytest.mark.parametrize("change", [damaged, lambda data: data[:-3], lambda _: b""])
def test_a_damaged_file_in_the_cache_is_fetched_anew(kind, change, mirror, cache):
    base = mirror.put("one", kind.served)
    first = kind.load(kind.source(base), cache_dir=cache)
    path = cache / kind.cached[0]
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    mirror.requests.clear()
    assert same(kind.load(kind.source(base), cache_dir=cache), first)
    assert mirror.requests == [f"one/{path.name}"]
    assert path.read_bytes() == whole


@EVERY_KIND
def test_a_damaged_cache_is_never_read_offline(kind, mirror, cache):
    kind.load(kind.source(mirror.put("one", kind.served)), cache_dir=cache)
    path = cache / kind.cached[0]
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(DataUnavailableError, match="no mirror served"):
        kind.load(kind.source(closed_address()), cache_dir=cache)


@EVERY_KIND
def test_the_second_mirror_serves_what_the_first_one_lacks(kind, mirror, cache):
    lacking, full = mirror.base("one"), mirror.put("two", kind.served)
    kind.load(kind.source(lacking, full), cache_dir=cache)
    assert mirror.requests == [f"{m}/{name}" for name in kind.served for m in ("one", "two")]


@EVERY_KIND
def test_the_second_mirror_serves_when_nothing_listens_at_the_first(kind, mirror, cache):
    full = mirror.put("two", kind.served)
    kind.load(kind.source(closed_address(), full), cache_dir=cache)
    assert files_below(cache) == kind.cached


@EVERY_KIND
def test_a_mirror_with_other_content_is_passed_over(kind, mirror, cache):
    wrong = mirror.put("one", {name: damaged(data) for name, data in kind.served.items()})
    full = mirror.put("two", kind.served)
    kind.load(kind.source(wrong, full), cache_dir=cache)
    assert mirror.requests == [f"{m}/{name}" for name in kind.served for m in ("one", "two")]


@EVERY_KIND
def test_only_other_content_leaves_nothing_behind(kind, mirror, cache):
    wrong = mirror.put("one", {name: damaged(data) for name, data in kind.served.items()})
    with pytest.raises(DataUnavailableError, match="no mirror served") as caught:
        kind.load(kind.source(wrong), cache_dir=cache)
    assert re.search(r"hash .* does not match", caught.value.why)
    assert files_below(cache) == []


@EVERY_KIND
def test_a_download_that_breaks_off_leaves_nothing_behind(kind, mirror, cache):
    base = mirror.put("one", kind.served)
    mirror.cut.update(mirror.files)
    with pytest.raises(DataUnavailableError, match="no mirror served") as caught:
        kind.load(kind.source(base), cache_dir=cache)
    assert_complete(str(caught.value))
    assert files_below(cache) == []
    mirror.cut.clear()
    kind.load(kind.source(base), cache_dir=cache)
    assert files_below(cache) == kind.cached


def test_what_came_before_a_failure_is_kept(mirror, cache):
    kind = KINDS["idx"]
    base = mirror.put("one", kind.served)
    last = mirror.files.pop("one/test-labels.gz")
    with pytest.raises(DataUnavailableError, match=r"no mirror served test-labels\.gz"):
        kind.load(kind.source(base), cache_dir=cache)
    assert files_below(cache) == [path for path in kind.cached if "test-labels" not in path]
    mirror.files["one/test-labels.gz"] = last
    mirror.requests.clear()
    kind.load(kind.source(base), cache_dir=cache)
    assert mirror.requests == ["one/test-labels.gz"]


def test_files_are_asked_for_as_they_are(mirror, cache):
    """A server that packs what it sends would be unpacked, and no checksum of a .gz would hold."""
    kind = KINDS["idx"]
    kind.load(kind.source(mirror.put("one", kind.served)), cache_dir=cache)
    assert set(mirror.encodings) == {"identity"}


def test_no_mirror_at_all(cache):
    with pytest.raises(DataUnavailableError, match="no mirror is known"):
        load_idx(idx_source(), cache_dir=cache)


def test_a_cache_that_cannot_be_written(mirror, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataUnavailableError, match="the cache cannot be written") as caught:
        load_idx(idx_source(mirror.base("one")), cache_dir=tmp_path / "file" / "cache")
    assert_complete(str(caught.value))
    assert mirror.requests == []


def test_the_cache_is_the_systems_own_unless_named(bare, mirror, tmp_path):
    kind = KINDS["text"]
    import pooch

    bare.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    kind.load(kind.source(mirror.put("one", kind.served)))
    assert files_below(tmp_path) == ["quantjax/data/text/small/input.txt"]


def test_without_pooch_folders_still_work(bare, mirror, cache, tmp_path):
    kind = KINDS["idx"]
    bare.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataUnavailableError, match="downloads need pooch") as caught:
        kind.load(kind.source(mirror.base("one")), cache_dir=cache)
    assert caught.value.fix == 'pip install "quantjax[experiments]"'
    kind.load(kind.source(), data_dir=kind.write(tmp_path / "data"))


@EVERY_KIND
def test_a_folder_that_lacks_a_file_is_not_completed_from_a_mirror(kind, mirror, cache, tmp_path):
    folder = kind.write(tmp_path / "data")
    (folder / next(iter(kind.folder))).unlink()
    base = mirror.put("one", kind.served)
    with pytest.raises(DataUnavailableError, match=r"is missing|there is no \.txt") as caught:
        kind.load(kind.source(base), data_dir=folder, cache_dir=cache)
    assert_complete(str(caught.value))
    assert str(folder) in str(caught.value)
    assert all(way in caught.value.fix for way in TWO_WAYS)
    assert mirror.requests == []


@pytest.mark.parametrize("name", ["idx", "text"])
@pytest.mark.parametrize("change", [damaged, lambda data: data[:-3]], ids=["damaged", "cut"])
def test_a_damaged_file_in_a_folder(name, change, tmp_path):
    kind = KINDS[name]
    path, data = next(iter(kind.folder.items()))
    folder = kind.write(tmp_path, **{Path(path).name.partition(".")[0]: change(data)})
    with pytest.raises(DataFileError, match="is damaged, or another file") as caught:
        kind.load(kind.source(), data_dir=folder)
    assert_complete(str(caught.value))
    assert str(folder / path) in str(caught.value)
    assert f"{len(change(data))} bytes" in caught.value.why
    assert (folder / path).read_bytes() == change(data)  # the user's own file stays


def test_checksums_of_any_algorithm(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    for checksum in (
        "md5:900150983cd24fb0d6963f7d28e17f72",
        "sha1:A9993E364706816ABA3E25717850C26C9CD0D89D",
        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    ):
        check(path, checksum)
        with pytest.raises(DataFileError, match="damaged"):
            check(path, checksum[:-1] + "0")


def test_the_environment_names_a_folder(bare, tmp_path):
    kind = KINDS["idx"]
    bare.setenv(ENVIRONMENT, str(kind.write(tmp_path)))
    assert ENVIRONMENT == "QUANTJAX_DATA"
    assert len(kind.load(kind.source()).train_labels) == 7


def test_the_argument_wins_over_the_environment(bare, tmp_path):
    kind, other = KINDS["text"], b"another text"
    first, second = tmp_path / "first", tmp_path / "second"
    kind.write(first)
    kind.write(second, input=other)
    bare.setenv(ENVIRONMENT, str(second))
    with pytest.raises(DataFileError, match="damaged"):
        kind.load(kind.source())
    assert kind.load(kind.source(), data_dir=first).text
    assert kind.load(kind.source(data=other)).text == "another text"


@pytest.mark.parametrize("argument", [None, ""])
def test_empty_text_is_no_folder(argument, bare, mirror, cache):
    kind = KINDS["text"]
    bare.setenv(ENVIRONMENT, "")
    kind.load(kind.source(mirror.put("one", kind.served)), data_dir=argument, cache_dir=str(cache))
    assert mirror.requests == ["one/input.txt"]


@pytest.mark.parametrize("argument", ["data_dir", "cache_dir"])
def test_the_home_of_nobody(argument, mirror):
    what = {"data_dir": "the data folder does not exist", "cache_dir": "cannot be written"}
    with pytest.raises(DataUnavailableError, match=what[argument]) as caught:
        load_idx(idx_source(mirror.base("one")), **{argument: "~nobody-of-that-name/data"})
    assert_complete(str(caught.value))
    assert mirror.requests == []


@pytest.mark.parametrize("by_argument", [True, False])
def test_a_folder_that_does_not_exist(by_argument, bare, tmp_path, mirror):
    missing = tmp_path / "nowhere"
    bare.setenv(ENVIRONMENT, str(tmp_path if by_argument else missing))
    argument = missing if by_argument else None
    with pytest.raises(DataUnavailableError, match="the data folder does not exist") as caught:
        load_idx(idx_source(mirror.base("one")), data_dir=argument)
    assert caught.value.where == str(missing)
    assert caught.value.why == f"named by {'data_dir' if by_argument else ENVIRONMENT}"
    assert all(way in caught.value.fix for way in TWO_WAYS)
    assert mirror.requests == []


def test_a_tilde_is_the_home_folder(bare, tmp_path):
    bare.setenv("HOME", str(tmp_path))
    bare.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "data").mkdir()
    at = place("set", ["a"], data_dir=Path("~/data"), cache_dir=None)
    assert at.folder == tmp_path / "data"


def test_the_two_ways_name_the_layout():
    advice = two_ways(["mnist/a.gz", "mnist/b.gz"])
    assert "mnist/a.gz, mnist/b.gz" in advice
    assert all(way in advice for way in TWO_WAYS)


def test_a_file_has_the_same_name_on_every_mirror():
    file = mirrored("a/b", "c.gz", "md5:0", ("https://one.example/", "https://two.example/x/"))
    assert file.path == "a/b/c.gz"
    assert file.urls == ("https://one.example/c.gz", "https://two.example/x/c.gz")


def test_loading_leaves_numpys_random_state_alone(tmp_path):
    kind = KINDS["idx"]
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    kind.load(kind.source(), data_dir=kind.write(tmp_path))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


REFUSED = {
    "is_dir": "the folder",
    "is_file": "missing file",
    "read_bytes": "content",
    "open": "checksum",
    "iterdir": "list",
}


@EVERY_KIND
@pytest.mark.parametrize("method", REFUSED)
def test_what_may_not_be_read_is_named(kind, method, mirror, tmp_path, monkeypatch):
    """A locked file or folder was a bare PermissionError, and a traceback on the command line."""
    folder = kind.write(tmp_path / "data")
    source = kind.source(mirror.put("one", kind.served))
    refused: list[Path] = []

    def refuse(path: Path, *arguments: object, **named: object) -> object:
        if folder in (path, *path.parents) and (method != "open" or arguments[:1] == ("rb",)):
            refused.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **named)

    plain = getattr(Path, method)
    monkeypatch.setattr(Path, method, refuse)
    try:
        kind.load(source, data_dir=folder)
    except DataUnavailableError as error:
        found = str(error)
    else:
        assert not refused  # this kind of set does not call it
        return
    assert "Permission denied" in found
    assert str(folder) in found
    assert_complete(found)
