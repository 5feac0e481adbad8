"""Code, config and docs speak of the same checks, and what the page says of tests is true."""

from __future__ import annotations

import ast
import re

from conftest import ROOT
from sluice.checks import CHECKS
from sluice.configsafety import ChecksSection

PAGE = (ROOT / "docs/checks.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL))


def test_every_check_has_a_severity_and_a_section():
    assert list(SECTIONS) == list(ChecksSection().severities())
    assert set(SECTIONS) == set(CHECKS)


def test_the_page_tells_the_defaults():
    said = {name: re.findall(r"^Default: `(\w+)`\.", text) for name, text in SECTIONS.items()}
    assert said == {name: [severity] for name, severity in ChecksSection().severities().items()}
    assert f"`checks.max_error_share` ({ChecksSection().max_error_share})" in SECTIONS["outcome_budget"]


def bugs() -> dict[str, str]:
    """What catches each, as the table says it."""
    return dict(re.findall(r"^\| (Z\d+) \|.*\| ([^|]+) \|$", PAGE, re.MULTILINE))


def test_every_bug_of_the_zoo_is_caught_by_a_test_that_exists():
    assert list(bugs()) == [f"Z{n}" for n in range(1, 21)]
    for bug, caught in bugs().items():
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", caught)
        assert tests, bug
        for file, name in tests:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{bug}: {name}"


def test_the_checks_of_the_table_are_those_that_its_tests_see():
    """Each check that a row links is asked for by name in one of the row's tests in the zoo."""
    zoo = ast.parse((ROOT / "tests/checks/test_zoo.py").read_text())
    bodies = {node.name: ast.unparse(node) for node in zoo.body if isinstance(node, ast.FunctionDef)}
    for bug, caught in bugs().items():
        named = "".join(bodies.get(name, "") for name in re.findall(r"test_zoo\.py::(\w+)`", caught))
        for check in re.findall(r"\]\(#(\w+)\)", caught):
            assert f"'{check}'" in named, f"{bug}: {check}"
