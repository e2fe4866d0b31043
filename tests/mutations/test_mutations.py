"""Each promise can be broken, and is not by accident: its change fits the source, and its test is there."""

from __future__ import annotations

import ast

import pytest

from tests.mutations.__main__ import broken, copied, failing
from tests.mutations.table import MUTATIONS, ROOT

IDS = [each.name for each in MUTATIONS]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=IDS)
def test_a_change_fits_the_source_and_its_test_is_there(mutation):
    text = (ROOT / "src" / "safelight" / mutation.path).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1 and mutation.old != mutation.new
    changed = ast.parse(text.replace(mutation.old, mutation.new))
    assert ast.dump(changed) != ast.dump(ast.parse(text))
    file, _, function = mutation.test.partition("::")
    names = [node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)]
    assert function in names if function else any(name.startswith("test_") for name in names)


def test_each_promise_has_a_name_of_its_own():
    assert len(set(IDS)) == len(IDS) == len({each.promise for each in MUTATIONS})


@pytest.fixture(scope="module")
def root():
    with copied() as root:
        yield root


@pytest.mark.slow
def test_their_tests_pass_on_what_is_not_broken(root):
    assert failing(root, MUTATIONS) is None


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=IDS)
def test_a_broken_promise_is_seen(mutation, root):
    assert broken(root, mutation) is None
