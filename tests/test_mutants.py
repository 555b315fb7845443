"""The table of mutants does not rot: what they change is there once, and so are their tests."""

import ast

import pytest
from support.building import REPOSITORY
from support.faults import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_made(mutant):
    text = (REPOSITORY / mutant.path).read_text()
    assert text.count(mutant.text) == 1
    assert mutant.replacement != mutant.text
    path, _, test = mutant.test.partition("::")
    names = [getattr(node, "name", "") for node in ast.parse((REPOSITORY / path).read_text()).body]
    assert test.partition("[")[0] in names


def test_mutants_have_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 24
