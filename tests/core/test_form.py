"""The form of a request: a small value that crosses sockets and stores as it is."""

from __future__ import annotations

import msgspec
import pytest

from safelight.core.form import EAGER, Form


@pytest.mark.parametrize("form", [EAGER, Form("compiled")])
def test_it_is_a_value_that_can_be_sent(form):
    sent = msgspec.msgpack.encode(form)
    assert msgspec.msgpack.decode(sent, type=Form) == form and {form: 1}[Form(form.mode)] == 1
    assert Form("compiled") != EAGER
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"mode": "fast"}), type=Form)
