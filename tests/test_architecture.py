"""The architecture holds: which room may import which, how long files are, what stays out of them.

The checks are functions from source text to a list of faults, so that they are tested on sources
that break them; the tests at the end apply them to the repository.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINE_LIMIT = 400
THIS = Path(__file__).relative_to(ROOT).as_posix()

# A room (module or folder directly below quantjax/) imports from its own layer and earlier ones.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "_compat", "printing", "lean", "arguments", "meshes", "symbolic"}),
    frozenset({"formats", "granularity", "rounding", "affine", "packing", "tangents"}),
    frozenset({"arithmetic", "qtensor", "fake_quant", "borders", "simulation", "estimators"}),
    frozenset({"statistics", "ranges", "contract"}),
    frozenset(
        {
            *("policy", "quantizer", "selectors", "presets", "data_free", "interpreter"),
            *("kernels", "distillation", "pruning", "biases", "relative_selectors"),
        }
    ),
    frozenset({"products", "layout"}),
    frozenset({"planning", "site_plan", "table", "integers"}),
    frozenset({"adapters", "storage", "transforms"}),
    frozenset({"sweep", "calibration", "folding", "training"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
# Rooms that may import less than their layer: the interpreter knows nothing of quantization.
ONLY: dict[str, frozenset[str]] = {
    "interpreter": frozenset({"errors", "_compat", "meshes", "interpreter"})
}
FACE = "__init__"  # quantjax/__init__.py: imports all, and nothing in the library imports it
NEVER = ("experiments", "tests")  # packages that the library does not import
PRIVATE = ("jax._src", "jax.interpreters")
VERSIONS = ("jax.__version__", "jax.__version_info__")
SUSPECT = re.compile(r"_src|interpreters|__version")  # without which there is nothing to parse

ADDRESS = re.compile(r"index[-_]url\s*[= ]\s*\S|find[-]links|https?://\S*/simple\b", re.IGNORECASE)
HOME_PATH = re.compile(r"(?<![.\w])/(?:[r]oot|[h]ome|[w]ork|[U]sers|[o]pt)/")


class Import(NamedTuple):
    """One imported dotted name, `from a import b` being `a.b`."""

    line: int
    name: str


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """All imports of a source: absolute and relative, in functions, and by importlib."""
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                base = parents[: len(parents) - level + 1] if level else []
                prefix = ".".join([*base, *([origin] if origin else [])])
                yield from (Import(node.lineno, f"{prefix}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Attribute(attr=call) | ast.Name(id=call),
                args=[ast.Constant(value=str(name)), *_],
            ) if call in ("import_module", "__import__"):
                yield Import(node.lineno, name)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain, empty for any other expression."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            prefix = dotted(value)
            return f"{prefix}.{attr}" if prefix else ""
    return ""


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer(room: str) -> int | None:
    return next((i for i, rooms in enumerate(LAYERS) if room in rooms), None)


def direction_faults(path: str, source: str) -> list[str]:
    """What a file of quantjax/ imports against the direction; `path` counts from the root."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    room = parts[1]
    module = ".".join(parts[:-1] if is_package else parts)
    if room != FACE and layer(room) is None:
        return [f"{path}: the room '{room}' is in no layer; place it in LAYERS of {THIS}"]
    faults = []
    for line, name in imports(source, module, is_package=is_package):
        where = f"{path}:{line}: imports {name}"
        if any(is_within(name, package) for package in NEVER):
            faults.append(f"{where}; the library never imports {name.split('.')[0]}")
        if not is_within(name, "quantjax") or room == FACE:
            continue
        target, depth = [*name.split("."), FACE][1], name.count(".")
        if layer(target) is None and depth > 1:
            continue  # a room in no layer, which has a fault of its own
        if layer(target) is None:
            faults.append(f"{where}; import the room that defines it, not the public face")
        elif room in ONLY and target not in ONLY[room]:
            faults.append(f"{where}; {room} imports only {', '.join(sorted(ONLY[room]))}")
        elif (layer(target) or 0) > (layer(room) or 0):
            faults.append(f"{where}; {target} is in a later layer than {room}")
    return faults


def private_faults(path: str, source: str) -> list[str]:
    """Private JAX and branches on its version, anywhere but in quantjax/_compat.py."""
    if path == "quantjax/_compat.py" or not SUSPECT.search(source):
        return []
    module = ".".join(Path(path).with_suffix("").parts)
    used = list(imports(source, module))
    used += [
        Import(node.lineno, dotted(node))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
    ]
    return [
        f"{path}:{line}: {name}; only quantjax/_compat.py may touch private JAX or its version"
        for line, name in sorted(set(used))
        if any(is_within(name, package) for package in PRIVATE) or name in VERSIONS
    ]


def length_faults(path: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{path}: {lines} lines, the limit is {LINE_LIMIT}"] if lines > LINE_LIMIT else []


def address_faults(path: str, text: str) -> list[str]:
    """Lines with a package index address or an absolute path of somebody's machine."""
    return [
        f"{path}:{number}: {match[0]!r} is an index address or a machine's path"
        for number, line in enumerate(text.splitlines(), 1)
        for match in [ADDRESS.search(line) or HOME_PATH.search(line)]
        if match
    ]


def project_files() -> list[Path]:
    """The files that git tracks or would add; without git, all outside hidden and build folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        found: Iterable[Path] = (ROOT / name for name in listed.stdout.split("\0") if name)
    else:
        hidden = re.compile(r"\..*|__pycache__|build|dist|.*\.egg-info")
        found = (
            path
            for path in ROOT.rglob("*")
            if not any(hidden.fullmatch(part) for part in path.relative_to(ROOT).parts)
        )
    return sorted(path for path in found if path.is_file())


def sources(*folders: str) -> dict[str, str]:
    """Path from the root to text, of the Python files in these folders."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in project_files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders
    }


def report(faults: Iterable[str]) -> None:
    """Fail with all faults in full, a line each."""
    text = "\n".join(faults)
    assert not text, text


def line_count(files: dict[str, str]) -> int:
    return sum(len(text.splitlines()) for text in files.values())


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quantjax/__init__.py", "from quantjax.sweep.runner import run\nfrom quantjax import cli"),
        ("quantjax/affine.py", "from quantjax.errors import FormatError\nimport quantjax.rounding"),
        ("quantjax/fake_quant.py", "from quantjax.estimators import ste"),
        ("quantjax/formats/__init__.py", "from .integer import Integer\nfrom .. import errors"),
        ("quantjax/transforms/observe.py", "from quantjax.interpreter.evaluate import evaluate"),
        ("quantjax/policy.py", "import jax, quantjaxed\nfrom quantjax.interpreter import sites"),
        ("quantjax/interpreter/trace.py", "from . import sites\nfrom quantjax._compat import core"),
    ],
)
def test_direction_lets_pass(path: str, source: str):
    assert direction_faults(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("quantjax/affine.py", "import quantjax.qtensor", "qtensor is in a later layer"),
        ("quantjax/affine.py", "from quantjax import qtensor", "qtensor is in a later layer"),
        ("quantjax/affine.py", "def f():\n    from quantjax.sweep import run", ":2: imports"),
        ("quantjax/affine.py", "from . import policy", "policy is in a later layer"),
        ("quantjax/formats/integer.py", "from ..ranges import minmax", "later layer than formats"),
        ("quantjax/formats/__init__.py", "from ..ranges import minmax", "later layer than formats"),
        ("quantjax/ranges/minmax.py", "from quantjax.interpreter import sites", "a later layer"),
        ("quantjax/interpreter/sites.py", "from ..affine import divide", "interpreter imports"),
        ("quantjax/interpreter/sites.py", "import quantjax.policy", "imports only _compat, errors"),
        ("quantjax/policy.py", "import quantjax as qj", "not the public face"),
        ("quantjax/policy.py", "from quantjax import uniform_policy", "not the public face"),
        ("quantjax/cli.py", "import experiments.digits", "never imports experiments"),
        ("quantjax/__init__.py", "from tests import helpers", "never imports tests"),
        ("quantjax/cli.py", "importlib.import_module('experiments.digits')", "never imports exp"),
        ("quantjax/utils.py", "", "the room 'utils' is in no layer; place it in LAYERS"),
        ("quantjax/new_room/thing.py", "", "the room 'new_room' is in no layer"),
    ],
)
def test_direction_finds(path: str, source: str, reason: str):
    (fault,) = direction_faults(path, source)
    assert fault.startswith(path)
    assert reason in fault


@pytest.mark.parametrize(
    "source",
    [
        "import jax._src.core",
        "from jax._src import core",
        "from jax import _src",
        "def f():\n    from jax.interpreters import ad",
        "from jax.interpreters.partial_eval import x",
        "import jax\njax.interpreters",
        "from jax import __version__",
        "import jax\nnew = jax.__version_info__ >= (0, 11)",
        "import jax\nprint(jax.__version__.split('.'))",
        "importlib.import_module('jax._src.core')",
    ],
)
def test_private_jax_is_found(source: str):
    assert len(private_faults("quantjax/transforms/tap.py", source)) == 1
    assert private_faults("quantjax/_compat.py", source) == []


def test_public_jax_is_no_fault():
    source = "import jax\nfrom jax.extend import core\njax.lax.add\nmy.jax_src\n'jax._src'"
    assert private_faults("quantjax/transforms/tap.py", source) == []


def test_length_at_and_over_the_limit():
    assert length_faults("a.py", "x = 1\n" * LINE_LIMIT) == []
    assert len(length_faults("a.py", "x = 1\n" * (LINE_LIMIT + 1))) == 1


# Split, so that this file itself stays clean.
@pytest.mark.parametrize(
    "text",
    [
        "pip install --index" + "-url=mirror x",
        "PIP_EXTRA_INDEX" + "_URL=mirror",
        "--find" + "-links wheels",
        "see https://example.org" + "/simple/",
        "data at /ho" + "me/someone/data",
        "'/r" + "oot/.cache'",
        "(/Us" + "ers/someone)",
        "file:///o" + "pt/wheels",
    ],
)
def test_address_is_found(text: str):
    assert address_faults("a.md", f"first\n{text}\n")[0].startswith("a.md:2:")


@pytest.mark.parametrize(
    "text",
    ["https://example.org/sample", "framework/x", "./home/x", "the index url", "/usr/bin/env"],
)
def test_no_address_no_fault(text: str):
    assert address_faults("a.md", text) == []


def test_files_are_short():
    files = sources("quantjax", "experiments", "tests", "scripts", "conftest.py")
    report(fault for item in files.items() for fault in length_faults(*item))


def test_imports_point_one_way():
    files = sources("quantjax")
    assert files
    report(fault for item in files.items() for fault in direction_faults(*item))


def test_private_jax_stays_in_one_file():
    files = sources("quantjax", "experiments", "tests", "scripts", "conftest.py")
    report(fault for item in files.items() for fault in private_faults(*item))


def test_no_addresses_and_no_machine_paths():
    faults = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture, an archive
            continue
        faults += address_faults(path.relative_to(ROOT).as_posix(), text)
    report(faults)


def test_tests_are_at_least_as_long_as_the_library():
    tests, library = line_count(sources("tests")), line_count(sources("quantjax"))
    assert tests >= library, f"tests/ has {tests} lines, quantjax/ {library}"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )


def test_importing_quantjax_starts_no_backend():
    # With a platform that does not exist, JAX raises as soon as something asks for a device.
    nowhere = {"JAX_PLATFORMS": "nowhere"}
    control = python("import jax; jax.devices()", **nowhere)
    assert control.returncode != 0
    assert "nowhere" in control.stderr
    result = python("import quantjax", **nowhere)
    assert result.returncode == 0, result.stderr


def test_importing_quantjax_imports_no_extra():
    code = "import quantjax, sys; print(*sys.modules)"
    result = python(code)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "quantjax" in loaded
    assert not loaded & {"matplotlib", "sklearn", "rich", "tyro", "experiments"}
