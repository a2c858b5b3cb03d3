"""Sets of text: one text, or many stories."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from experiments.data.errors import DataFileError, DataUnavailableError
from experiments.data.files import Place, download, find, place, read, two_ways, unreadable
from experiments.data.sources import StoriesSource, TextSource


class Text(NamedTuple):
    """One text, with its line ends as they are in the file.

    Attributes:
      digest: of the text in UTF-8.
    """

    text: str
    digest: str


class Stories(NamedTuple):
    """Many texts, without white space at their ends and none of them empty.

    Attributes:
      digest: of all of them in UTF-8, each followed by a zero byte.
    """

    stories: list[str]
    digest: str


def load_text(
    source: TextSource, *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None
) -> Text:
    """A text; in a folder too it is checked against its checksum.

    Raises:
      DataUnavailableError: neither folder nor mirror has it.
      DataFileError: another checksum, or no UTF-8.
    """
    at = place(source.name, [source.file.path], data_dir=data_dir, cache_dir=cache_dir)
    text = read_text(find(source.file, at))
    return Text(text, hashlib.sha256(text.encode()).hexdigest()[:16])


def load_stories(
    source: StoriesSource,
    *,
    data_dir: Path | str | None = None,
    cache_dir: Path | str | None = None,
) -> Stories:
    """Stories: from mirrors the source's own file; in a folder every ``.txt`` file, by name.

    A folder may hold any part of the set, so its files are not checked against a checksum; the
    digest tells which stories there were. A file that is a cut-out begins or ends within a story.

    Raises:
      DataUnavailableError: the folder has no such file, or no mirror served the source's.
      DataFileError: another checksum of the download, no UTF-8, or no separator in a file.
    """
    parent = source.file.path.rpartition("/")[0]
    at = place(source.name, [f"{parent}/*.txt"], data_dir=data_dir, cache_dir=cache_dir)
    if at.folder is None:
        paths = [download(source.file, at)]
    else:
        paths = _text_files(at.folder / parent, at)
    stories: list[str] = []
    for path in paths:
        text = read_text(path)
        if source.separator not in text:
            raise DataFileError(
                f"{path.name} holds no stories",
                where=str(path),
                why=f"{source.separator} is nowhere in it",
                fix="delete it, or move it to another folder",
            )
        stories += split_stories(text, source.separator)
    digest = hashlib.sha256(b"".join(story.encode() + b"\0" for story in stories))
    return Stories(stories, digest.hexdigest()[:16])


def split_stories(text: str, separator: str) -> list[str]:
    """The stories between separators, stripped, without empty ones.

    >>> split_stories("One day.<end> <end>The\\nend.\\n<end>\\n", "<end>")
    ['One day.', 'The\\nend.']
    """
    return [story for part in text.split(separator) if (story := part.strip())]


def read_text(path: Path) -> str:
    """The content of a file in UTF-8; line ends stay as they are.

    Raises:
      DataFileError: the bytes are no UTF-8.
    """
    try:
        return read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataFileError(
            f"{path.name} is not text in UTF-8",
            where=str(path),
            why=f"{error.reason} at byte {error.start}",
            fix="fetch it again, or convert it to UTF-8",
        ) from error


def _text_files(folder: Path, at: Place) -> list[Path]:
    """The ``.txt`` files of a folder, sorted by name."""
    try:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        paths = [path for path in found if path.suffix == ".txt" and path.is_file()]
    except OSError as error:
        raise unreadable(folder, error) from error
    if not paths:
        raise DataUnavailableError(
            f"{at.name}: there is no .txt file",
            where=str(folder),
            why="nothing is downloaded where a folder is named",
            fix=two_ways(at.layout),
        )
    return paths
