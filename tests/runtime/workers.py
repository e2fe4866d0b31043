"""Real workers for tests: one is started, asked and waited for."""

from __future__ import annotations

import asyncio
import contextlib

from safelight.core.server_args import ServerArgs
from safelight.preparation import prepare
from safelight.runtime.client import GenerationRequest
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor.supervisor import Supervisor

ANSWER = 20.0
"""Seconds after which a test gives up waiting."""


@contextlib.asynccontextmanager
async def running(folder, **settings):
    settings = {"server_args": ServerArgs(str(folder), device="cpu"), "warm_up": False, **settings}
    supervisor = Supervisor(EngineSettings(**settings))
    await asyncio.wait_for(supervisor.start(), 60)
    try:
        yield supervisor
    finally:
        folder = supervisor._folder
        await supervisor.close()
        assert not folder.exists(), "no socket or file is left over"


def ask(supervisor, prompt="a cat", request_id="r0", **fields):
    params, _ = prepare(supervisor.schema, {"prompt": prompt, "seed": 0, **fields})
    return supervisor.submit(GenerationRequest(request_id, params))


async def answer(ticket):
    return await asyncio.wait_for(ticket.result(), ANSWER)


async def pid_of(supervisor):
    while supervisor.state != "ready":
        await asyncio.sleep(0.01)
    return supervisor._worker.process.pid


def drive(test):
    """Run a coroutine to its end."""
    asyncio.run(asyncio.wait_for(test, 120))
