"""Schemas of models of a known architecture, and parameters that they resolve."""

from __future__ import annotations

import dataclasses

from safelight.core.architecture import Architecture
from safelight.preparation import prepare

FLUX = {"num_attention_heads": 24, "attention_head_dim": 128}


def with_architecture(schema, config, **more):
    return dataclasses.replace(schema, architecture=Architecture.of({"transformer": config}), **more)


def params(schema, **fields):
    return prepare(schema, {"prompt": "x", "num_inference_steps": 1, **fields})[0]
