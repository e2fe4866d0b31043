"""What a request costs, known before it runs: attention counts with its square, and input images count."""

from __future__ import annotations

import pytest
from PIL import Image

from safelight.runtime.cost import step_cost
from safelight.runtime.messages import schema_from_wire, schema_to_wire
from tests.serving.schemas import FLUX, params, with_architecture
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_SCHEMA, VIDEO_SCHEMA


@pytest.mark.parametrize("schema", [IMAGE_SCHEMA, EDIT_SCHEMA, VIDEO_SCHEMA], ids=lambda schema: schema.pipeline_name)
def test_attention_counts_with_its_square(schema):
    """At the balance attention costs as much as all else; what the schema says of it crosses the socket."""
    schema = with_architecture(schema, FLUX, token_bytes=7, device_bytes=9)
    assert schema_from_wire(schema_to_wire(schema)) == schema
    side = 2048
    more = {"max_area": side * side} if "max_area" in schema.defaults else {}
    asked = params(schema, height=side, width=side, **more)
    tokens = asked.num_sequence_tokens(schema)
    expected = tokens * (1 + tokens / (6 * 3072)) * asked.num_branches()
    assert step_cost(asked, schema) == pytest.approx(expected, rel=1e-4)


def test_input_images_are_tokens_too():
    schema = with_architecture(EDIT_SCHEMA, FLUX)
    alone = params(schema)
    edited = params(schema, image=Image.new("RGB", (1024, 1024)))
    assert edited.num_sequence_tokens(schema) == alone.num_sequence_tokens(schema) + 4096
    assert edited.num_latent_tokens(schema) == alone.num_latent_tokens(schema)
