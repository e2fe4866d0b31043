"""The other commands, help, and what start-up imports."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from PIL import Image, PngImagePlugin

from safelight.cli.main import COMMANDS, main
from safelight.core.registry import pipelines
from safelight.core.server_args import ServerArgs
from safelight.loading import repository
from safelight.loading.loader import describe
from safelight.loading.repository import open_repository
from safelight.media import METADATA_KEY
from safelight.version import __version__

VARIANTS = ("dev", "schnell", "kontext")


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(run, args):
    ended = run(*args)
    assert (ended.code, ended.err) == (0, "")
    assert re.findall(r"^  (\w[\w-]*)  ", ended.out, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(run, checkpoints, monkeypatch, command):
    monkeypatch.setattr(repository, "SHIPPED_MODEL", checkpoints.folder())
    ended = run(command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"Usage: safelight {command}")


def test_version(run):
    assert run("--version").out == f"safelight, version {__version__}\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generat", "x"], ["unknown command 'generat'", "did you mean 'generate'"]),
        (["xyzzy"], ["unknown command 'xyzzy'", f"known are {', '.join(sorted(COMMANDS))}"]),
        (["--modle"], ["No such option", "--modle"]),
        (["schema", "a", "b"], ["unexpected extra argument"]),
        (["info"], ["Missing argument 'FILE'"]),
    ],
)
def test_usage_errors_are_one_line(run, args, words):
    ended = run(*args)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert all(word in ended.err for word in words)


def test_help_and_info_import_no_torch(checkpoints, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    model = str(checkpoints.folder())
    lines = [["--help"], ["generate", "--model", model, "--help"], ["info", str(tmp_path / "x.png")], ["--version"]]
    script = (
        "import contextlib, sys\n"
        "from safelight.cli.main import main\n"
        f"for line in {lines!r}:\n"
        "    with contextlib.suppress(SystemExit): main(line)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "--num-inference-steps" in done.stdout


def schema(run, folder):
    ended = run("schema", folder)
    assert (ended.code, ended.err) == (0, "")
    return json.loads(ended.out)


def conforms(value, entry):
    """Check a value against the part of JSON Schema that our schemas use."""
    if "anyOf" in entry:
        return any(conforms(value, choice) for choice in entry["anyOf"])
    types: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
    }
    return (
        isinstance(value, types[entry["type"]])
        and entry.get("minimum", value) <= value <= entry.get("maximum", value)
        and value in entry.get("enum", [value])
        and ("multipleOf" not in entry or value % entry["multipleOf"] == 0)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_schema_states_the_defaults_that_are_used(run, checkpoints, variant):
    folder = checkpoints.folder(variant)
    found = schema(run, folder)
    described = describe(open_repository(folder))
    resolved = described.params_cls.from_fields({"prompt": "x"}).resolve(described).set_fields()
    defaults = {name: entry["default"] for name, entry in found["properties"].items() if "default" in entry}
    assert defaults == {name: value for name, value in resolved.items() if name != "prompt"}
    assert all(conforms(default, found["properties"][name]) for name, default in defaults.items())
    assert all({"description", "x-group"} <= entry.keys() for entry in found["properties"].values())
    assert found["required"] == ["prompt"] and found["additionalProperties"] is False
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema" and found["type"] == "object"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_options_of_generate_are_the_properties_of_the_schema(run, checkpoints, variant):
    folder = checkpoints.folder(variant)
    flags = re.findall(r"^  (?:-\w, )?--([\w-]+)", run("generate", "--model", folder, "--help").out, re.MULTILINE)
    own = {"output", "overwrite", "server", "api_key_file", "help"}
    others = {field.name for field in dataclasses.fields(ServerArgs)} | own
    offered = {flag.replace("-", "_") for flag in flags} - others
    assert offered == schema(run, folder)["properties"].keys() - {"prompt", "output_type"}
    assert others <= {flag.replace("-", "_") for flag in flags}


def test_schema_of_no_model(run, tmp_path):
    ended = run("schema", tmp_path)
    assert (ended.code, ended.err.count("\n")) == (3, 1)


def test_models_lists_pipelines_and_known_repositories(run, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(repository, "SHIPPED_MODEL", tmp_path / "none")
    lines = run("models").out.splitlines()
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert names == list(pipelines())
    assert "    black-forest-labs/FLUX.1-dev" in lines
    monkeypatch.setattr(repository, "SHIPPED_MODEL", checkpoints.folder())
    assert run("models").out.startswith("shipped with Safelight, the default: dev (FluxPipeline)\n")


def test_env_names_versions_and_devices(run):
    rows = dict(line.split(maxsplit=1) for line in run("env").out.splitlines())
    assert rows["safelight"] == __version__
    assert rows["torch"] == version("torch") and rows["diffusers"] == version("diffusers")
    assert "cores" in rows["cpu"]
    assert any(name.startswith("cuda") for name in rows)


NOT_OURS = {
    "nothing": (None, "can be read (No such file"),
    "an empty file": (b"", "this is an empty file"),
    "a GIF": (b"GIF89a", "this is a GIF"),
    "text": (b"text", "a picture or video that Safelight made"),
    "half a picture": (b"\x89PNG\r\n\x1a\n", "a picture or video that Safelight made"),
}


@pytest.mark.parametrize(("content", "says"), NOT_OURS.values(), ids=NOT_OURS)
@pytest.mark.parametrize("name", ["x.png", "x.mp4"])
def test_info_of_what_is_no_picture_of_ours(run, tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    ended = run("info", path)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert says in ended.err or (name == "x.mp4" and "Safelight" in ended.err.removeprefix("safelight: "))


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_info_of_a_picture_that_was_saved_without_its_parameters(run, tmp_path, ending):
    Image.new("RGB", (8, 8)).save(tmp_path / f"x{ending}")
    ended = run("info", tmp_path / f"x{ending}")
    assert ended.code == 2 and "result.save" in ended.err and "has none of Safelight's" in ended.err


def test_verbose_shows_where_an_error_came_from(monkeypatch):
    monkeypatch.setattr("safelight.core.registry.pipelines", lambda: 1 / 0)
    monkeypatch.setattr("safelight.cli.inspect.pipelines", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["-v", "models"])


def test_info_shows_control_characters_and_obeys_none(run, tmp_path):
    """What a file says of itself is anybody's words: a terminal would clear its screen, or type them."""
    orders = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x202E, 0x2028)))
    text = PngImagePlugin.PngInfo()
    text.add_text(METADATA_KEY, json.dumps({"prompt": f"é {orders}", f"a{orders}": 1, "n" * 100_000: {"b": orders}}))
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png", pnginfo=text)
    ended = run("info", tmp_path / "x.png")
    assert ended.code == 0 and len(ended.out) < 3000
    assert "é" in ended.out and r"\x1b" in ended.out and not set(ended.out) & (set(orders) - {"\n"})
    assert len(ended.out.splitlines()) == 3
    assert json.loads(run("info", tmp_path / "x.png", "--json").out)["prompt"] == f"é {orders}"


def test_the_schema_of_another_pipeline_with_a_component(run, checkpoints, tmp_path):
    folder = checkpoints.folder()
    transformer: Any = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    heads = {name: transformer.config[name] for name in ("attention_head_dim", "num_attention_heads")}
    control = FluxControlNetModel.from_transformer(transformer, num_layers=1, num_single_layers=1, **heads)
    control.save_pretrained(tmp_path)
    line = ("schema", folder, "--pipeline", "FluxControlNetPipeline")
    refused = run(*line)
    assert refused.code == 2 and "needs controlnet, which the model has not" in refused.err
    found = json.loads(run(*line, "--component", f"controlnet={tmp_path}").out)
    assert found["title"] == "FluxControlNetPipeline" and "control_image" in found["properties"]
    assert [each["pipeline"] for each in found["x-pipelines"]][1:] == [
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    ]
    help = run("generate", "--model", folder, *line[2:], "--component", f"controlnet={tmp_path}", "--help").out
    assert "--control-image" in help and "--mask" in help and "--pipeline" in help
