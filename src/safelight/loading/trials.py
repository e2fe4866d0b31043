"""Components of the libraries that are tried once, with the smallest of inputs, as soon as they are loaded.

What a tokenizer does is said in one of many files, and completed by its class; so it is looked at again where it is
whole. What a processor or a tokenizer cannot do at all is said when the model is loaded, and not by each request.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import nn

from safelight.errors import ModelIndexError
from safelight.loading.expressions import MAX_ADDITION, PARTS, check_part

TEXT = "A photo, 1 naïve 漢 <\U0001f642>\n"
"""Of letters, digits, spaces, signs and what takes several bytes."""
SIDE = 56
"""Of the picture."""


def try_out(component: Any, where: str) -> None:
    """Try a component that has no weights.

    Raises:
        ModelIndexError: if it would take more than its inputs are worth.
        Exception: whatever it raises.

    """
    import transformers

    if isinstance(component, transformers.PreTrainedTokenizerBase):
        check_steps(component, where)
        num_tokens = len(component(TEXT, verbose=False).input_ids)
        if num_tokens > len(TEXT.encode()) + MAX_ADDITION:
            raise ModelIndexError(f"{where}: it makes {num_tokens:,} tokens of {len(TEXT)} characters")
    elif isinstance(component, transformers.ImageProcessingMixin):
        component(images=Image.new("RGB", (SIDE, SIDE), (128, 96, 64)), return_tensors="pt")


def check_steps(component: Any, where: str) -> None:
    """Check the steps of a tokenizer, or a processor's, as they are in the end: from its files, and from its class.

    Raises:
        ModelIndexError: as `check_part`.

    """
    import transformers

    if isinstance(component, transformers.ProcessorMixin):
        component = vars(component).get("tokenizer")
    if not isinstance(component, transformers.PreTrainedTokenizerBase) or not component.is_fast:
        return
    backend = component.backend_tokenizer
    steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    for name, step in zip(PARTS, steps, strict=True):
        if step is not None:
            check_part(json.loads(step.__getstate__()), f"{where}: {name}")


def check_tokens_fit(components: Mapping[str, Any]) -> None:
    """Refuse a tokenizer with a token that its text encoder has no embedding of: a GPU does not outlive looking it up.

    Args:
        components: a model's, by name; those named `tokenizer...` and `text_encoder...` belong together.

    Raises:
        ModelIndexError: with the numbers.

    """
    import transformers

    for name, tokenizer in components.items():
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        is_pair = isinstance(tokenizer, transformers.PreTrainedTokenizerBase) and tokenizer.is_fast
        if not is_pair or not isinstance(encoder, transformers.PreTrainedModel):
            continue
        embedding, last = _embedding(encoder), max(tokenizer.get_vocab().values(), default=0)
        if isinstance(embedding, nn.Embedding) and last >= embedding.num_embeddings:
            there = f"its text encoder has {embedding.num_embeddings:,} embeddings"
            raise ModelIndexError(f"{name}: it has a token of number {last:,}; {there}")


def _embedding(encoder: Any) -> Any:
    """Return where an encoder looks its tokens up: itself, or the one inside that it wraps."""
    import transformers

    for part in encoder.modules():
        if isinstance(part, transformers.PreTrainedModel):
            with contextlib.suppress(NotImplementedError):  # of a class that does not say it
                return part.get_input_embeddings()
    return None
