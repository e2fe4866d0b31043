"""Where images stand among the tokens of a text encoder: what the package's pipelines leave out when they call it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def tell_where_images_are(pipe: Any) -> None:
    """Let every text encoder of a pipeline that takes images know which of its tokens are theirs.

    Encoders of transformers 5 count an image's tokens by row and column only if they are told; several pipelines, made
    for earlier versions, do not tell. Their authors' pictures come from positions of rows and columns.
    """
    for component in pipe.components.values():
        if isinstance(component, nn.Module) and "mm_token_type_ids" in inspect.signature(component.forward).parameters:
            component.register_forward_pre_hook(_add_token_types, with_kwargs=True)


def _add_token_types(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Add a 1 for each token of an image, where pixels are given and neither that nor positions are."""
    told = kwargs.get("mm_token_type_ids") is not None or kwargs.get("position_ids") is not None
    if told or kwargs.get("pixel_values") is None or kwargs.get("input_ids") is None:
        return None
    is_image = kwargs["input_ids"] == encoder.config.image_token_id
    return args, {**kwargs, "mm_token_type_ids": is_image.int()}
