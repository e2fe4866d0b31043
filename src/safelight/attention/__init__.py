"""Attention: the layer that models use, and the table of backends behind it."""

from safelight.attention.backends import BACKENDS, select_backend
from safelight.attention.layer import Attention, AttentionMetadata, set_attention_backend

__all__ = ["BACKENDS", "Attention", "AttentionMetadata", "select_backend", "set_attention_backend"]
