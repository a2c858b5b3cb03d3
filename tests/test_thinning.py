"""``thinned(n)`` and ``--thin N``: what stays, and that each value of a product stays somewhere."""

import textwrap

import pytest

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
    header = "import collections\nimport pytest\n\ndef pytest_addoption"
    pytester.makeconftest(header + hooks)
    pytester.makeini("[pytest]\nmarkers =\n    slow: s\n    thinned(n): t\n")
    pytester.makepyfile(textwrap.dedent(FILE))

    def collected(*options: str) -> list[str]:
        result = pytester.runpytest("--collect-only", "-q", "-m", "not slow", *options)
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
