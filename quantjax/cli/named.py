"""What names on the command line stand for: ``module:object``, a file, or what is registered."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantjax import errors
from quantjax.calibration.collect import Model, is_array
from quantjax.ranges import FitRule, RangeRule
from quantjax.sweep.study import Study

# What NumPy raises for damaged files: an array's header is parsed as Python's text, and an archive
# may say that it is encrypted, or larger than all memory.
_UNREADABLE = (
    EOFError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class Group(NamedTuple):
    """A group of entry points: its name in ``pyproject.toml``, and what one of them is called."""

    name: str
    kind: str


STUDIES = Group("quantjax.studies", "study")
MODELS = Group("quantjax.models", "model")
DATA = Group("quantjax.data", "data")
ARRAYS = (".npy", ".npz")
_FILES = (".csv", ".tsv", ".json", ".txt", ".pt", ".pkl", ".h5", ".safetensors", ".parquet", ".png")
"""Ends of names that mean a file, of which none is read."""
_IMPORTABLE = "module:object, with the module importable from the current folder"


def find_study(name: str) -> Study:
    """A ``Study``, or a function of no arguments that returns one.

    Raises:
      UnknownNameError: no such study, or something else than a study.
    """
    found = _called(find(name, STUDIES), name)
    if isinstance(found, Study):
        return found
    raise errors.UnknownNameError(
        f"{name} is {type(found).__name__}, not a quantjax.sweep.Study",
        fix="name a Study, or a function of no arguments that returns one",
    )


def find_model(name: str) -> Model:
    """A ``Model``, a tuple ``(apply, params)``, or a function of no arguments that returns one.

    Raises:
      UnknownNameError: no such model, or something else than a model.
    """
    found = _called(find(name, MODELS), name)
    if isinstance(found, Model):
        return found
    if isinstance(found, tuple) and len(found) == 2 and callable(found[0]):
        return Model(*found)
    raise errors.UnknownNameError(
        f"{name} is {type(found).__name__}, not a quantjax.calibration.Model",
        fix="name a Model, a tuple (apply, params), or a function of no arguments that returns one",
    )


def find_rule(name: str) -> RangeRule | FitRule:
    """A rule, or a function of no arguments that returns one.

    Raises:
      UnknownNameError: no such rule, or something else than a rule.
    """
    found = _called(_imported(name), name)
    if isinstance(found, RangeRule | FitRule):
        return found
    raise errors.UnknownNameError(
        f"{name} is {type(found).__name__}, not a quantjax.RangeRule",
        fix="name a RangeRule or FitRule, or a function of no arguments that returns one",
    )


def find_data(name: str, data_dir: Path | None = None) -> Any:
    """Batches: an iterable of them, one array, a function that returns either, or a file.

    Args:
      name: ``module:object``, a registered name, or the path of a ``.npy`` or ``.npz`` file. Of
        several arrays in a file, each is an argument of the model, in the file's order.
      data_dir: passed on to functions that have an argument of that name.

    Raises:
      UnknownNameError: no such data, or something that is no data.
      DataError: a file that holds no arrays.
    """
    if Path(name).suffix.lower() in ARRAYS:
        return _read(Path(name))
    found = find(name, DATA)
    takes = callable(found) and not is_array(found) and not isinstance(found, Iterable)
    options: dict[str, Any] = {}
    if data_dir is not None:
        if takes and "data_dir" in inspect.signature(found).parameters:
            options["data_dir"] = data_dir
        else:
            print(f"note: {name} takes no data_dir", file=sys.stderr)
    elif takes and _needs(found, "data_dir"):
        raise errors.UnknownNameError(
            f"{name} needs a folder", why="it has an argument data_dir", fix="--data-dir PATH"
        )
    found = _called(found, name, **options) if takes else found
    if is_array(found) or (isinstance(found, Iterable) and not isinstance(found, str | bytes)):
        return found
    raise errors.UnknownNameError(
        f"{name} is {type(found).__name__}, not an iterable of batches",
        fix="name a list or generator of batches, an array, or a function that returns one",
    )


def _needs(function: Callable[..., Any], argument: str) -> bool:
    """Whether it cannot be called without that argument."""
    try:
        found = inspect.signature(function).parameters.get(argument)
    except ValueError:  # a builtin function, which has no signature
        return False
    return found is not None and found.default is inspect.Parameter.empty


def find(name: str, group: Group) -> Any:
    """The object that ``module:object`` names, or the registered one.

    Raises:
      UnknownNameError: it is not there, or cannot be imported.
    """
    points = {point.name: point for point in entry_points(group=group.name)}
    if ":" in name:
        return _imported(name)
    if name not in points:
        raise errors.UnknownNameError(
            f"no {group.kind} is called {name}",
            where=f"registered: {', '.join(sorted(points)) or 'none'}",
            fix=_meant(name, points)
            + "one of these, or module:object for one of your own"
            + (", or a .npy or .npz file" if group is DATA else ""),
        )
    try:
        return points[name].load()
    except ImportError as error:
        raise errors.UnknownNameError(
            f"the {group.kind} {name} cannot be loaded",
            why=str(error),
            fix='pip install "quantjax[experiments]"',
        ) from error
    except SyntaxError as error:
        raise _no_python(name, error) from error


def _meant(name: str, points: Iterable[str]) -> str:
    """The registered name next to it, or its last dot as a colon; and ``or``."""
    close = difflib.get_close_matches(name, list(points), n=1)
    module, dot, attribute = name.rpartition(".")
    if close:
        return f"{close[0]}, or "
    is_file = Path(name).suffix in _FILES or Path(name).is_file()
    return f"{module}:{attribute}, or " if dot and module and attribute and not is_file else ""


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if module.startswith(".") or "/" in module or module.endswith(".py"):
        raise errors.UnknownNameError(
            f"{name} cannot be imported",
            why="what stands ahead of the colon is a path, no module",
            fix=_as_module(Path(module), attribute) or _IMPORTABLE,
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        close = difflib.get_close_matches(attribute, dir(sys.modules.get(module)), n=1)
        raise errors.UnknownNameError(
            f"{name} cannot be imported",
            why=str(error),
            fix=f"{module}:{close[0]}" if close else _IMPORTABLE,
        ) from error
    except (ImportError, ValueError) as error:
        raise errors.UnknownNameError(
            f"{name} cannot be imported", why=str(error), fix=_IMPORTABLE
        ) from error
    except SyntaxError as error:
        raise _no_python(name, error) from error
    finally:
        sys.path.remove(here)
    return found


def _no_python(name: str, error: SyntaxError) -> errors.UnknownNameError:
    return errors.UnknownNameError(
        f"{name} cannot be imported",
        where=f"{error.filename}, line {error.lineno}",
        why=error.msg,
        fix="correct that line",
    )


def _as_module(path: Path, attribute: str) -> str:
    """``folder.file:attribute`` for ``./folder/file`` below the current folder, if it is there."""
    named = path.with_suffix("") if path.suffix == ".py" else path
    is_there = Path(f"{named}.py").is_file() or named.is_dir()
    parts = named.parts  # none of the current folder itself
    if is_there and parts and not path.is_absolute() and all(map(str.isidentifier, parts)):
        return f"{'.'.join(parts)}:{attribute}"
    return ""


def _called(found: Any, name: str, **options: Any) -> Any:
    """What a function returns; anything else as it is."""
    if not callable(found):
        return found
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        raise errors.UnknownNameError(
            f"{name} cannot be called without arguments",
            why=str(error),
            fix="a function of no arguments, or the object itself",
        ) from error
    try:
        return found(**options)
    except ModuleNotFoundError as error:
        is_ours = ":" not in name
        raise errors.MissingPackageError(
            f"{name} needs {error.name}, which is not installed",
            where=name,
            fix='pip install "quantjax[experiments]"' if is_ours else f"install {error.name}",
        ) from error


def _read(path: Path) -> Any:
    """The array of a file, or a list with the one batch that its arrays make up."""
    try:
        with path.open("rb") as file:
            held = np.load(file, allow_pickle=False)
            if isinstance(held, np.ndarray):
                return held
            return [tuple(held[name] for name in held.files)]
    except FileNotFoundError as error:
        raise errors.UnknownNameError(
            f"there is no file {path}",
            fix="the path of a .npy or .npz file, from the current folder",
        ) from error
    except _UNREADABLE as error:
        raise errors.DataError(
            f"{path} cannot be read as arrays",
            why=str(error).partition("\n")[0] or type(error).__name__,
            fix="a file that np.save or np.savez wrote, of numbers",
        ) from error
