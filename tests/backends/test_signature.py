"""Parameters of a pipeline of the package, as its call has them: what is invented, and what is ours."""

from __future__ import annotations

import diffusers
import pytest

from safelight.backends.signature import params_from_signature, sorted_arguments


@pytest.mark.parametrize(
    ("name", "fps", "passed"),
    [("WanPipeline", 24, False), ("StableVideoDiffusionPipeline", 7, True), ("LTXPipeline", None, False)],
)
def test_frames_a_second_are_invented_only_where_the_call_has_none(name, fps, passed):
    call = getattr(diffusers, name).__call__
    assert params_from_signature(call, name).defaults.get("fps") == fps
    assert ("fps" in sorted_arguments(call)[0]) is passed


def test_the_form_of_the_output_is_ours():
    for name in ("AudioLDM2Pipeline", "LongCatAudioDiTPipeline", "SanaPipeline"):
        assert params_from_signature(getattr(diffusers, name).__call__, name).defaults["output_type"] == "pil"
