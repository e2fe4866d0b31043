"""What is set once reaches the parts of a whole server."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from types import SimpleNamespace

import httpx
import pytest
from openai import OpenAI

from safelight.client import RemoteEngine
from safelight.core.server_args import ServerArgs
from safelight.errors import SafelightError
from safelight.serving import server
from safelight.serving.addresses import KEY_NAME
from safelight.serving.http.listening import bound
from safelight.serving.http_args import HTTPArgs
from safelight.serving.limits import Limits
from safelight.serving.server import Server
from tests.live_server import fault_model, free_port, serving
from tests.serving.http_server import assert_error
from tests.serving.wire import (
    GENERATIONS,
    KEY,
    PAGE,
    picture_of,
)


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Return what makes a server of settings, up to where it would serve, and returns its parts."""

    def of(**settings):
        found = SimpleNamespace()

        def stop(engine, jobs, settings):
            found.engine, found.jobs, found.settings = engine, jobs, settings
            raise SafelightError("this is enough")

        @contextlib.contextmanager
        def listening(host, port):
            with listen(host, port) as found.listener:
                yield found.listener

        listen = server.listen
        with monkeypatch.context() as patch:
            patch.setattr(server, "create_app", stop)
            patch.setattr(server, "listen", listening)
            patch.setattr(server, "raise_limit", lambda: 1000)
            args = HTTPArgs(port=free_port(), state_dir=str(tmp_path / "state"), **settings)
            with pytest.raises(SafelightError, match="this is enough"):
                asyncio.run(Server(ServerArgs(), args, lambda line: None).run())
        for part in (found.jobs.outputs, found.jobs.store):  # what was made in the server's loop ended with that
            asyncio.run(part.close())
        return found

    return of


def test_every_bound_that_is_set_is_a_bound_of_the_server(parts):
    made = parts(max_waiting=7, max_cost=8.0, max_tokens=9, first_unit_limit=10.0, keep_hours=1.0, max_storage=11)
    assert made.settings.limits == Limits(waiting=7, max_cost=8.0, max_tokens=9, unit_seconds=10.0)
    assert made.jobs.runner.limits.keep_seconds == 3600.0 and made.jobs.runner.limits.max_bytes == 11
    assert made.listener.bound == bound(1000)
    assert parts().settings.limits == Limits()


def test_every_door_that_is_set_is_a_door_of_the_server(parts, tmp_path):
    (tmp_path / "key").write_text("k" * 32)
    made = parts(allowed_hosts="a.example", allowed_origins="https://b.example", public_url="https://c.example")
    assert not made.settings.keys and set(made.settings.allowed_hosts) == {"a.example", "c.example"}
    assert made.settings.allowed_origins == ("https://b.example",)
    assert parts(api_key_file=str(tmp_path / "key")).settings.keys.principal("k" * 32) is not None


def test_ids_addresses_and_origins_of_a_whole_server(tmp_path):
    """The worker's log has the id beside the traceback; addresses open in the server's next life."""
    model = fault_model(tmp_path / "model")
    options = ["--allowed-origins", PAGE, "--response-format", "url", "--no-warm-up"]
    with serving(tmp_path, model, *options, key=KEY) as server, server.http() as http:
        told = {}
        for form in ("b64_json", "url"):
            body = {"prompt": "[raise@denoising:1] a cat", "response_format": form}
            answer = http.post(GENERATIONS, json=body)
            assert_error(answer, 500)
            told[form] = answer.headers["x-request-id"]
        log = server.log.read_text()
        for request_id in told.values():
            assert re.search(rf"worker ERROR [^\n]*{request_id}[^\n]*failed\nTraceback", log), log
        lost = http.post(GENERATIONS, json={"prompt": "[exit@denoising:1] a cat", "response_format": "b64_json"})
        assert assert_error(lost, 503)["code"] == "worker_lost"
        with OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            url = picture_of(client.images.generate(prompt="a cat")).url
        assert KEY not in url and httpx.get(url).status_code == 200
        assert httpx.get(url, headers={"origin": PAGE}).headers["access-control-allow-origin"] == PAGE
        assert re.search(rf"worker died [^\n]*{lost.headers['x-request-id']}", server.log.read_text())
        secret = tmp_path / "state" / KEY_NAME
        assert secret.stat().st_mode & 0o777 == 0o600
    with serving(tmp_path, model, "--no-warm-up", key=KEY) as server:
        address = url.partition("/v1/")[2]
        assert httpx.get(f"{server.url}/v1/{address}").status_code == 200
        assert_error(httpx.get(f"{server.url}/v1/{address}0"), 403)


def has_ipv6():
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:
            return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
@pytest.mark.slow
def test_a_server_on_ipv6(tmp_path):
    prompt = "a large red circle at the left on a white background"
    with serving(tmp_path, None, "--no-warm-up", host="::1") as server:
        assert f"http://[::1]:{server.port}\n" in server.log.read_text()
        with RemoteEngine(server.url) as engine, server.http() as http:
            assert engine.schema.pipeline_name == "FluxPipeline" and engine.url == f"http://[::1]:{server.port}"
            answer = http.post(GENERATIONS, json={"prompt": prompt, "response_format": "url"}).json()
            assert answer["data"][0]["url"].startswith(server.url + "/")
            assert httpx.get(answer["data"][0]["url"]).status_code == 200
            own = http.post(GENERATIONS, json={"prompt": prompt}, headers={"origin": server.url})
            assert own.status_code == 200
