"""What a run of the tests leaves out, and that each value of a product stays somewhere."""

import ast
import textwrap

import pytest

from scripts import long_tests
from scripts.long_tests import LIST as LONG

pytest_plugins = ["pytester"]

FILE = """
import pytest

@pytest.mark.thinned(3)
@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("column", "abcdefghij")
def test_product(row, column): ...

@pytest.mark.thinned(3)
@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("column", "abcdefghij")
def test_same_sets(row, column): ...

@pytest.mark.thinned(3)
@pytest.mark.parametrize("row", ["after", "others"])
@pytest.mark.parametrize("column", "a")
def test_few_sets(row, column): ...

@pytest.mark.parametrize("row", range(4))
def test_not_thinned(row): ...

def test_without_parameters(): ...
"""


@pytest.fixture
def names(pytester: pytest.Pytester, request: pytest.FixtureRequest):
    """The names of the tests that are run, with these options."""
    conftest = request.config.rootpath / "conftest.py"
    hooks = conftest.read_text().split("def pytest_addoption", 1)[1]
    header = "import collections\nimport functools\nfrom pathlib import Path\nimport pytest\n\n"
    header += "LONG = Path(__file__).with_name('long_tests.txt')\n\ndef pytest_addoption"
    pytester.makeconftest(header + hooks)
    pytester.makeini("[pytest]\nmarkers =\n    long: l\n    slow: s\n    thinned(n): t\n")
    pytester.makepyfile(test_some=textwrap.dedent(FILE), test_others="def test_other(): ...")
    names = "# names\ntest_some.py::test_not_thinned\ntest_others.py\n"
    (pytester.path / "long_tests.txt").write_text(names)

    def collected(*options: str, mark: str = "not slow") -> list[str]:
        result = pytester.runpytest("--collect-only", "-q", "-m", mark, *options)
        return [line.split("::")[1] for line in result.outlines if "::" in line]

    return collected


def of(names: list[str], test: str) -> list[str]:
    return [name.removeprefix(test) for name in names if name.split("[")[0] == test]


def test_a_third_stays_and_with_it_every_row_and_column(names):
    found = names()
    product = of(found, "test_product")
    assert len(product) == 17
    ids = [name.strip("[]").split("-") for name in product]
    assert {a for a, _ in ids} == set("abcdefghij")
    assert {b for _, b in ids} == set("01234")
    assert of(found, "test_same_sets") == product
    assert of(found, "test_few_sets") == ["[a-others]"]
    assert len(of(found, "test_not_thinned")) == 4
    assert len(of(found, "test_without_parameters")) == 1


def test_the_option_multiplies(names):
    found = names("--thin", "2")
    assert len(of(found, "test_product")) == 9
    assert len(of(found, "test_few_sets")) == 1  # a test of which nothing would stay keeps one
    assert len(of(found, "test_not_thinned")) == 2
    assert len(of(found, "test_without_parameters")) == 1


def test_what_is_named_as_long_is_left_out_where_it_is_asked_for(names):
    assert of(names(), "test_other") == [""]
    found = names(mark="not slow and not long")
    assert not of(found, "test_not_thinned")
    assert not of(found, "test_other")
    assert len(of(found, "test_product")) == 17
    assert len(of(names(mark="long"), "test_not_thinned")) == 4


def test_every_long_test_is_there():
    lines = LONG.read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if not line.startswith("#")]
    assert names == sorted(set(names))
    functions: dict[str, set[str]] = {}
    for name in names:
        file, _, test = name.partition("::")
        if file not in functions:
            tree = ast.parse((LONG.parents[1] / file).read_text(encoding="utf-8"))
            kinds = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
            functions[file] = {node.name for node in kinds}
        assert not test or test in functions[file], name


LOG = """
[gw0] [  1%] PASSED tests/a/test_x.py::test_one[3-4]
12.10s setup    tests/a/test_x.py::test_two
0.90s call     tests/a/test_x.py::test_one[3-4]
9.00s setup    tests/test_readme.py::test_kept
4.20s call     tests/b/test_y.py::test_many[a]
3.90s call     tests/b/test_y.py::test_many[b]
3.90s call     tests/b/test_y.py::test_short[b]
3.90s setup    tests/b/test_y.py::test_short[b]
9.90s teardown tests/b/test_y.py::test_short[b]
"""


def test_the_list_is_made_of_a_log(tmp_path, capsys):
    (tmp_path / "run.log").write_text(LOG)
    output = tmp_path / "long.txt"
    long_tests.main([str(tmp_path / "run.log"), "--output", str(output)])
    assert capsys.readouterr().out == "long.txt: 2 tests and files of 4 s and more\n"
    names = [line for line in output.read_text().splitlines() if not line.startswith("#")]
    assert names == ["tests/a/test_x.py", "tests/b/test_y.py::test_many"]
    assert long_tests.long_ones(LOG.splitlines(), seconds=13.0) == []
