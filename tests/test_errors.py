"""Every error: its base, its message, its docstring, and that the library does raise it."""

import ast
import builtins
import copy
import inspect
import multiprocessing
import pickle
import re
from pathlib import Path

import pytest

import quantjax
from quantjax import errors
from quantjax.errors import QuantjaxError

ROOT = Path(quantjax.__file__).parent
CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and value is not QuantjaxError and issubclass(value, Exception)
]
ALL = pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)


def raised(path: Path) -> list[tuple[str, ast.Call]]:
    """Calls of an error of ours after a ``raise``, by class name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).removeprefix("errors.")
            if hasattr(errors, name):
                found.append((name, node.exc))
    return found


RAISED = [
    (path.relative_to(ROOT).as_posix(), name, call)
    for path in sorted(ROOT.rglob("*.py"))
    for name, call in raised(path)
]


def test_there_are_errors_and_places_that_raise_them():
    assert len(CLASSES) >= 10
    assert len(RAISED) >= len(CLASSES)


@ALL
def test_one_base_and_the_builtin_that_fits(error):
    assert issubclass(error, QuantjaxError)
    assert issubclass(error, ValueError | TypeError | KeyError | ImportError | RuntimeError)
    assert error.__name__.endswith("Error")
    assert not hasattr(builtins, error.__name__)


@ALL
def test_a_docstring_with_a_failing_example_and_its_fix(error):
    doc = inspect.getdoc(error)
    first, _, rest = doc.partition("\n\n")
    assert first.endswith(".")
    assert "\n" not in first
    assert re.search(r"\bfails?\b", rest), "no failing example"
    sentences = [s for s in re.split(r"(?<=[.:])\s+", rest.replace("\n", " ")) if s]
    assert len(sentences) >= 2, "no fix after the example"


@ALL
def test_the_library_raises_it(error):
    assert any(name == error.__name__ for _, name, _ in RAISED), f"{error.__name__} is never raised"


@pytest.mark.parametrize(
    ("path", "name", "call"), RAISED, ids=[f"{p}:{c.lineno}" for p, _, c in RAISED]
)
def test_every_place_names_the_failure_and_one_edit(path, name, call):
    keywords = {keyword.arg for keyword in call.keywords}
    assert len(call.args) == 1, "what: one positional argument"
    assert "fix" in keywords
    assert keywords <= {"where", "why", "fix"}


@ALL
def test_the_message_has_four_parts_on_lines_of_their_own(error):
    caught = error("it broke", where="site a/b", why="it was old", fix="a new one")
    assert str(caught).splitlines() == [
        "it broke",
        "  where: site a/b",
        "  why:   it was old",
        "  try:   a new one",
    ]
    assert (caught.what, caught.where, caught.why, caught.fix) == (
        "it broke",
        "site a/b",
        "it was old",
        "a new one",
    )


def test_parts_that_have_nothing_to_say_are_left_out():
    assert str(QuantjaxError("it broke", fix="a new one")) == "it broke\n  try:   a new one"
    with pytest.raises(TypeError):
        QuantjaxError("it broke")
    with pytest.raises(TypeError):
        QuantjaxError("it broke", "a new one")


def test_one_clause_catches_all_of_them_and_nothing_else():
    for call in (lambda: quantjax.integer(max_bits=99), lambda: quantjax.fake_quant(1.0, 0.0)):
        with pytest.raises(QuantjaxError) as caught:
            call()
        lines = str(caught.value).splitlines()
        assert lines[-1].startswith("  try:   ")
    with pytest.raises(TypeError) as caught_type:
        quantjax.integer(8)
    assert not isinstance(caught_type.value, QuantjaxError)


def test_an_opaque_site_is_a_fault_of_the_policy():
    assert issubclass(errors.OpaqueSiteError, errors.PolicyError)


@ALL
def test_it_is_pickled_and_copied_with_its_parts(error):
    made = error("what", where="site w", why="because", fix="bits=8")
    made.add_note("in cell 3")
    for again in (pickle.loads(pickle.dumps(made)), copy.copy(made), copy.deepcopy(made)):
        assert type(again) is error
        assert str(again) == str(made)
        assert (again.what, again.where, again.why, again.fix) == (
            *("what", "site w", "because", "bits=8"),
        )
        assert again.__notes__ == ["in cell 3"]


def test_a_pool_of_processes_gets_it():
    """It hung: an exception is made again of its text, and these have more than that."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map_async(quantjax.integer, [17])
        with pytest.raises(TypeError, match="positional"):  # no error of ours, for comparison
            found.get(timeout=120)
        found = pool.apply_async(quantjax.integer, kwds={"max_bits": 17})
        with pytest.raises(errors.FormatError, match="try: "):
            found.get(timeout=120)
