"""What is promised, how each promise can be broken in a line or two, and which test fails then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """A change that breaks a promise.

    Attributes:
        promise: what is promised, in a sentence.
        path: of the source file, under `src/safelight`.
        old: text that is there once.
        new: what takes its place.
        test: the test that must fail.

    """

    promise: str
    path: str
    old: str
    new: str
    test: str

    @property
    def name(self) -> str:
        """The promise as an option has it."""
        return self.promise.partition(":")[0].replace(" ", "-")

    def apply(self, root: Path) -> str:
        """Change the file in a copy of the project, and return what it was."""
        file = root / "src" / "safelight" / self.path
        text = file.read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.path} has {text.count(self.old)} times {self.old!r}"
        file.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text

    def revert(self, root: Path, text: str) -> None:
        """Put the file back."""
        (root / "src" / "safelight" / self.path).write_text(text, encoding="utf-8")


MUTATIONS = (
    Mutation(
        "one key check: every route but /livez needs the key",
        "serving/auth.py",
        "        if principal is None:\n            raise AuthenticationError",
        "        if principal is None:\n            return ANYONE\n            raise AuthenticationError",
        "tests/serving/test_auth.py::test_every_route_but_livez_needs_the_key",
    ),
    Mutation(
        "safe by default: a host for all needs a key",
        "serving/http_args.py",
        "if not is_loopback(self.host):",
        "if False:",
        "tests/reliability/test_process.py::test_a_bad_start_is_one_line_and_an_exit_code",
    ),
    Mutation(
        "one door: processes talk in a folder that is this user's alone",
        "runtime/sockets.py",
        "    if found.st_mode != stat.S_IFDIR | 0o700 or found.st_uid != os.getuid():\n        raise PermissionError",
        "    if False:\n        raise PermissionError",
        "tests/runtime/supervisor/test_start.py::test_a_folder_of_sockets_that_is_taken_away_ends_the_server",
    ),
    Mutation(
        "no code from data: nothing reads what can run",
        "serving/principals.py",
        "yaml.safe_load(text)",
        "yaml.load(text, yaml.Loader)",
        "tests/test_layout.py::test_nothing_runs_code_from_data",
    ),
    Mutation(
        "unknown fields: each is refused by its name",
        "serving/fields.py",
        "    if option is None and not (name in refused and value is None):",
        "    if False:",
        "tests/serving/test_openai_sdk.py::test_an_unknown_field_suggests_the_nearest",
    ),
    Mutation(
        "no fetching: an address in a request is asked by nobody",
        "serving/input_pictures.py",
        "    text = value.start if isinstance(value, LongText) else value\n",
        "    text = value.start if isinstance(value, LongText) else value\n"
        "    if isinstance(text, str) and text.startswith('http'):\n"
        "        import urllib.request\n\n"
        "        return bytes(urllib.request.urlopen(text).read())\n",
        "tests/serving/test_app.py",
    ),
    Mutation(
        "bounded input: a picture is judged before anything of it is decoded",
        "serving/input_pictures.py",
        "if max(size) > limits.image_side or width * height > limits.image_pixels:",
        "if max(size) > limits.image_side:",
        "tests/serving/test_input_pictures.py::test_pictures",
    ),
    Mutation(
        "bounded work: a request has a ceiling of cost",
        "serving/cost.py",
        "    if cost > limits.max_cost:",
        "    if False:",
        "tests/serving/test_admission.py",
    ),
    Mutation(
        "bounded queue: what is more than may wait is refused at once",
        "runtime/supervisor/replicas.py",
        "if self.stats.num_waiting >= self.settings.max_waiting:",
        "if False:",
        "tests/runtime/supervisor/test_replicas.py",
    ),
    Mutation(
        "slow clients: headers have a deadline",
        "serving/http/protocol.py",
        "        self._set_deadline(self.limits.header_seconds)",
        "        self._set_deadline(None)",
        "tests/serving/http/test_protocol.py::test_headers_have_a_deadline",
    ),
    Mutation(
        "bad requests: what fails ends its own request alone",
        "runtime/worker/engine.py",
        "            except Exception as error:  # a request's boundary: apart, only the one at fault fails",
        "            except KeyError as error:  # a request's boundary: apart, only the one at fault fails",
        "tests/runtime/worker/test_engine.py::test_a_failing_forward_of_several_fails_only_the_one_at_fault",
    ),
    Mutation(
        "dead workers: the request whose unit ran is answered, all others run again",
        "runtime/supervisor/supervisor.py",
        "            if request_id in culprits:",
        "            if True:",
        "tests/reliability/test_deaths.py::test_a_dead_worker_costs_one_answer",
    ),
    Mutation(
        "hung workers: a unit has a limit",
        "runtime/supervisor/group.py",
        "            if unit is not None and unit.is_late():",
        "            if False:",
        "tests/reliability/test_deaths.py::test_a_hung_worker_is_killed",
    ),
    Mutation(
        "memory: its want ends one request, by its name",
        "runtime/worker/scheduler.py",
        "        if is_out_of_memory(error):",
        "        if False:",
        "tests/reliability/test_faults.py::test_a_failing_request_is_answered_by_name",
    ),
    Mutation(
        "durable jobs: a job is on the disk before it is accepted",
        "serving/jobs/sqlite.py",
        'connection.execute("PRAGMA synchronous = FULL")',
        'connection.execute("PRAGMA synchronous = OFF")',
        "tests/serving/jobs/test_sqlite.py::test_every_commit_is_synced",
    ),
    Mutation(
        "two attempts: a job that began twice is not begun again",
        "serving/jobs/runner.py",
        "                if run.job.attempts >= MAX_ATTEMPTS:",
        "                if False:",
        "tests/serving/jobs/test_runner.py",
    ),
    Mutation(
        "whole outputs: a file has its name when it is on the disk",
        "serving/jobs/folder.py",
        "        media.sync(self._directory)\n\n    def discard",
        "\n    def discard",
        "tests/serving/jobs/test_folder.py::test_a_file_is_synced_then_named_then_its_directory_synced",
    ),
    Mutation(
        "cancelling: it stops the work within a step",
        "runtime/worker/engine.py",
        "cancelled = [task for task in self.tasks if task.request_id == request_id]",
        "cancelled: list[Task] = []",
        "tests/runtime/worker/test_engine.py::test_cancel_ends_all_outputs_of_a_request_at_once",
    ),
    Mutation(
        "health: it tells the truth",
        "serving/health.py",
        '        if context.engine.state != "ready":',
        "        if False:",
        "tests/reliability/test_deaths.py::test_a_dead_worker_costs_one_answer",
    ),
    Mutation(
        "a kind stop: what runs may finish",
        "serving/server.py",
        "        while engine.stats.num_running + engine.stats.num_waiting:",
        "        await engine.close()\n        while False:",
        "tests/reliability/test_process.py::test_sigterm_lets_running_requests_finish",
    ),
    Mutation(
        "no garbage: what is not finite becomes no picture",
        "stages/decoding.py",
        "    if not torch.isfinite(tensor).all():",
        "    if False:",
        "tests/reliability/test_faults.py::test_nan_is_never_a_picture",
    ),
    Mutation(
        "a loud start: it ends with a code of its own",
        "cli/main.py",
        "        _end(str(error), error.exit_code)",
        "        _end(str(error), 1)",
        "tests/reliability/test_process.py::test_a_bad_start_is_one_line_and_an_exit_code",
    ),
    Mutation(
        "errors: no answer tells of the inside",
        "runtime/worker/scheduler.py",
        '            error = SafelightError("the request failed inside the server; its log says more")',
        "            error = InvalidParameterError.rebuilt(repr(error), None)",
        "tests/reliability/test_faults.py::test_a_failing_request_is_answered_by_name",
    ),
    Mutation(
        "no leaks: what is over is forgotten",
        "runtime/worker/scheduler.py",
        "        for task in self.tasks.pop(request_id, ()):",
        "        for task in self.tasks.get(request_id, ()):",
        "tests/runtime/worker/test_scheduler.py",
    ),
    Mutation(
        "several ranks: what fails on one has failed on all",
        "runtime/worker/ranks.py",
        "        if self.size == 1 or not errors:\n            return list(errors)",
        "        if True:\n            return list(errors)",
        "tests/runtime/worker/test_ranks.py::test_what_fails_outside_a_shared_forward_on_one_rank_ends_that_request_alone",
    ),
    Mutation(
        "shares: each key has its part of the time",
        "runtime/worker/policy.py",
        "            if tenant.share and tenant.name not in self._tenants:",
        "            if False:",
        "tests/runtime/worker/test_tenants.py",
    ),
)
