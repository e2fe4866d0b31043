"""Workers that compile in the background, and are killed in mid-denoise before and after the switch."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import pytest
from PIL import Image

from safelight import ServerArgs
from safelight.acceleration.compile import CACHE_VARIABLE
from safelight.core.executor import SyncExecutor
from safelight.core.form import Form, Mode
from safelight.core.request import Req
from safelight.loading.loader import load_pipeline
from safelight.preparation import prepare
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor.replicas import ReplicaSet
from safelight.runtime.worker.model_runner import PipelineRunner
from safelight.serving.admission import Admission
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.inputs import new_job
from safelight.serving.jobs.manager import JobManager
from safelight.serving.jobs.sqlite import SqliteJobStore
from tests.recipes import all_recipes

SECONDS = 400.0
FIELDS = {"prompt": "a photo of a cat", "seed": 5, "height": 48, "width": 80, "num_inference_steps": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a tiny model, and keep what is compiled beside it."""
    root = tmp_path_factory.mktemp("compiled")
    all_recipes()["FluxPipeline"].build(root / "model", "default")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(root / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield root / "model"


@pytest.fixture(scope="module")
def expected(folder):
    """Return the picture of each mode, made in this process."""
    pipeline = load_pipeline(ServerArgs(str(folder), device="cpu", compile="blocks"))
    runner = PipelineRunner(pipeline)
    runner.finish_compiling()
    made = {}
    modes: tuple[Mode, ...] = ("eager", "compiled")
    for mode in modes:
        req = Req("r", prepare(pipeline.schema, FIELDS)[0].split()[0])
        for _ in SyncExecutor(pipeline, runner, Form(mode)).execute(req):
            pass
        made[mode] = req.outputs[0].numpy()
    return made


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.02)


async def killed_once(manager, supervisor, in_mode):
    """Submit a job, kill the worker in the middle of its steps, and return the job at its end."""
    params, warnings = prepare(supervisor.schema, FIELDS)
    job = await manager.acceptance.submit(
        *new_job(params, supervisor.schema, {}, warnings=tuple(warnings)), Admission()
    )
    await until(lambda: (manager.events.progress(job.id).step or 0) > 20)
    assert (await manager.store.get(job.id)).form == Form(in_mode)
    assert manager.events.progress(job.id).step < 280
    os.kill(supervisor._worker.process.pid, signal.SIGKILL)
    async with asyncio.timeout(SECONDS):
        async for _ in manager.events.follow(job.id):
            pass
    return await manager.store.get(job.id)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_job_that_runs_again_has_its_mode_and_its_bytes(folder, expected, tmp_path, mode):
    async def test():
        args = ServerArgs(str(folder), device="cpu", compile="blocks")
        replicas = ReplicaSet(EngineSettings(server_args=args, warm_up=False), 1)
        (supervisor,) = replicas.replicas
        told: list[str] = []
        replicas.on_compiled = told.append
        await asyncio.wait_for(replicas.start(), SECONDS)
        manager = JobManager(SqliteJobStore(tmp_path), FolderFiles(tmp_path / "outputs"), replicas)
        await manager.start()
        try:
            if mode == "compiled":
                await until(lambda: supervisor.stats.compiled)
            job = await killed_once(manager, supervisor, mode)
            assert (job.state, job.form) == ("completed", Form(mode)), job.error
            assert job.attempts in (1, 2), "a death between two units is nobody's, and costs no attempt"
            with manager.outputs.open(job.outputs[0].name) as file, Image.open(file) as image:
                assert np.array_equal(np.asarray(image), expected[mode])
            await until(lambda: supervisor.stats.compiled)
            assert set(told) == {""} and supervisor.stats.num_restarts == 1
        finally:
            await manager.close(0.0)
            await replicas.close()

    asyncio.run(test())
