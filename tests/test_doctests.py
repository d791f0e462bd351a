"""The examples in the docstrings run as they stand."""

import doctest
import importlib
import pkgutil

import pytest

import interp_vlm

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(interp_vlm.__path__, "interp_vlm.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert failed == 0


def test_the_front_door_has_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(found.examples) for module in modules for found in finder.find(module)) > 50
