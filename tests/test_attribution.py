"""A library's warning about its own future fails a test where it names what we call, and nowhere else."""

from __future__ import annotations

import builtins
import functools
import subprocess
import sys
import types

import pytest
import torch

from tests.attribution import STRICT

LIBRARY = """
import functools, warnings, contextlib
import torch

class UserFuture(UserWarning):
    pass

def old(category=FutureWarning):
    warnings.warn("old is deprecated", category, stacklevel=2)

def bluntly_old(category=FutureWarning):
    warnings.warn("bluntly_old is deprecated; call new", category)

def deprecate(name, category):
    warnings.warn(f"{name} is deprecated", category, stacklevel=2)

def takes(thing=None, category=FutureWarning):
    if thing is not None:
        deprecate("thing", category)

def takes_any(category=FutureWarning, **options):
    for name in options:
        deprecate(name, category)

class Old:
    def __init__(self, category=FutureWarning):
        deprecate("Old", category)

@torch.no_grad()
def decorated(category=FutureWarning):
    warnings.warn("`past` of decorated is deprecated", category, stacklevel=2)

@contextlib.contextmanager
def managed(category=FutureWarning):
    warnings.warn("managed is deprecated", category, stacklevel=3)
    yield

def within(category=FutureWarning):
    old(category)

def within_bluntly(category=FutureWarning):
    bluntly_old(category)

def within_takes(category=FutureWarning):
    takes(1, category)

def serious():
    warnings.warn("weights are not initialised", UserWarning, stacklevel=1)
"""


@pytest.fixture
def library(monkeypatch):
    module = types.ModuleType("some_library.parts")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(LIBRARY, "some_library/parts.py", "exec"), module.__dict__)  # a library that is nowhere installed
    return module


CATEGORIES = ["DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", "UserFuture"]


def category_of(library, name):
    return library.UserFuture if name == "UserFuture" else getattr(builtins, name)


def used(managed):
    with managed:
        pass


CALLED = {
    "a function": lambda library, category: library.old(category),
    "one that counts no frames": lambda library, category: library.bluntly_old(category),
    "an argument": lambda library, category: library.takes(thing=1, category=category),
    "an argument among others": lambda library, category: library.takes_any(category, strange=1),
    "a class": lambda library, category: library.Old(category),
    "a decorated function": lambda library, category: library.decorated(category),
    "a manager": lambda library, category: used(library.managed(category)),
    "by a partial": lambda library, category: functools.partial(library.old, category)(),
}
NOT_CALLED = {
    "a function within": lambda library, category: library.within(category),
    "one that counts no frames, within": lambda library, category: library.within_bluntly(category),
    "an argument that is given within": lambda library, category: library.within_takes(category),
    "what is not used": lambda library, category: library.takes(category=category),
}


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("name", CALLED)
def test_what_we_call_fails(library, name, category):
    with pytest.raises(Warning, match="is deprecated"):
        CALLED[name](library, category_of(library, category))


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("name", NOT_CALLED)
def test_what_a_library_calls_does_not(library, name, category):
    NOT_CALLED[name](library, category_of(library, category))


def test_every_other_warning_fails_wherever_it_comes_from(library):
    with pytest.raises(UserWarning, match="not initialised"):
        library.serious()


def test_torchs_own_deprecations_are_told_apart():
    """By a real one, of a decorator that torch has."""
    from typing_extensions import deprecated

    @deprecated("`grown` is deprecated", category=FutureWarning)
    @torch.no_grad()
    def grown():
        pass

    with pytest.raises(FutureWarning, match="grown"):
        grown()


@pytest.mark.parametrize(
    ("code", "fails"),
    [
        ("import warnings; warnings.warn('old', FutureWarning)", True),
        ("import library; library.old()", True),
        ("import library; library.within()", False),
        ("import library; library.serious()", True),
        ("import library", False),
    ],
)
def test_a_users_own_code_is_held_to_the_same(tmp_path, code, fails):
    (tmp_path / "library.py").write_text(LIBRARY)
    ran = subprocess.run([sys.executable, *STRICT, "-c", code], cwd=tmp_path, capture_output=True, timeout=120)
    assert (ran.returncode != 0) == fails, ran.stderr
