"""What an engine is told once reaches its workers whole, and is checked there as where it was said."""

from __future__ import annotations

import msgspec
import pytest

from safelight import ServerArgs
from safelight.errors import InvalidParameterError
from safelight.runtime.messages import Start
from safelight.runtime.settings import EngineSettings
from safelight.runtime.unit_board import UnitLimits


def crossed(start):
    return msgspec.msgpack.decode(msgspec.msgpack.encode(start), type=Start)


def test_settings_cross_the_socket_whole():
    args = ServerArgs("m", device="cpu", component_dtypes={"vae": "float32"}, cfg_parallel_size=2, memory_limit="1GiB")
    settings = EngineSettings(args, max_running=2, batching="throughput", unit_limits=UnitLimits(1.0, 2.0, 3.0))
    start = Start(settings, 1, 1, "0.store")
    assert crossed(start) == start and settings.num_ranks == 2


def test_what_cannot_be_is_refused_on_the_other_side_too():
    wrong = msgspec.to_builtins(Start(EngineSettings(ServerArgs("m"))))
    wrong["settings"]["server_args"]["kernels"] = "fastest"
    with pytest.raises(InvalidParameterError, match="kernels"):
        msgspec.convert(wrong, Start)
