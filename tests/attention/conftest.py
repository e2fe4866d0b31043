"""The table of backends, to be changed, and a stand-in for the Hub's kernels."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from safelight.attention import (
    BACKENDS,
    backends,
    select_backend,
)
from safelight.attention.layer import backend_for_masks
from tests.attention.formula import formula


class Hub:
    """Stands for the package `kernels`; its kernels have the signatures of those on the Hub."""

    def __init__(self):
        self.asked = []

    def get_kernel(self, repository, *, version):
        self.asked.append((repository, version))
        if repository.startswith("missing/"):
            raise FileNotFoundError("no build for this machine")
        return SimpleNamespace(flash_attn_func=self.flash_attn_func, sageattn=self.sageattn)

    @staticmethod
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        return formula(q, k, v, None, causal, softmax_scale).to(q.dtype)

    @staticmethod
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        assert tensor_layout == "NHD"
        return formula(q, k, v, None, is_causal, sm_scale).to(q.dtype)


@pytest.fixture
def table(monkeypatch):
    """The table of backends, to be changed; what was chosen before is forgotten, and again at the end."""
    changed = dict(BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", changed)
    select_backend.cache_clear()
    backend_for_masks.cache_clear()
    yield changed
    select_backend.cache_clear()
    backend_for_masks.cache_clear()


@pytest.fixture
def hub(monkeypatch):
    package = Hub()
    monkeypatch.setitem(sys.modules, "kernels", package)
    return package
