"""What is set once reaches the parts of a whole server."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from safelight.core.server_args import ServerArgs
from safelight.errors import SafelightError
from safelight.serving import server
from safelight.serving.http.listening import bound
from safelight.serving.http_args import HTTPArgs
from safelight.serving.limits import Limits
from safelight.serving.server import Server
from tests.live_server import free_port


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
