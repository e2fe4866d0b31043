"""A model repository is data: what its JSON may name, and that nothing in it is ever run."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safelight import ServerArgs
from safelight.errors import ModelNotFoundError
from safelight.loading.loader import describe, load_pipeline
from safelight.loading.repository import open_repository
from tests.loading.conftest import edit_json, refusal

COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nowhere",
        "./nowhere",
        "a/b/c",
        "../x/y",
        "~nobody-of-that-name/model",
        "x" * 5000,
        "a\0b",
        "https://hub/a/b",
    ],
    ids=lambda name: repr(name[:20]),
)
def test_no_such_model(name):
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        open_repository(name)


@pytest.mark.parametrize("name", ["scheduler", "model_index.json"])
def test_a_folder_or_file_that_is_no_model(damaged, name):
    assert "no model_index.json there" in refusal(damaged / name)


INDEXES = {
    "": "not readable as JSON",
    "{": "not readable as JSON",
    "\x80": "not readable as JSON",
    "[" * 100_000: "not readable as JSON",
    "[]": "a JSON object is expected, not list",
    "null": "a JSON object is expected, not NoneType",
    "{}": "_class_name: got None",
    '{"_class_name": ["FluxPipeline"]}': "_class_name: got ['FluxPipeline']",
    '{"_class_name": "os.system"}': "'os.system' is not supported; known are Flux",
}


@pytest.mark.parametrize(("content", "words"), INDEXES.items(), ids=lambda value: value[:30])
def test_an_index_that_is_none(damaged, content, words):
    (damaged / "model_index.json").write_text(content, encoding="latin-1")
    assert words in refusal(damaged)


ENTRIES = [
    (["os", "system"], "class 'system' of 'os' is refused"),
    (["diffusers", "os.system"], "class 'os.system' is not supported"),
    (["diffusers", "FluxTransformer2DModel "], "did you mean 'FluxTransformer2DModel'?"),
    (["my_module", "FluxTransformer2DModel"], "of 'my_module' is refused"),
    (["diffusers", "StableDiffusionPipeline"], "class 'StableDiffusionPipeline' is not supported"),
    (["diffusers"], "it takes [library, class]"),
    ("FluxTransformer2DModel", "it takes [library, class]"),
    ({"diffusers": "x"}, "it takes [library, class]"),
    ([None, "FluxTransformer2DModel"], "it takes [library, class]"),
    (None, "transformer is missing"),
    ([None, None], "transformer is missing"),
    (..., "transformer is missing"),
]


@pytest.mark.parametrize(("entry", "words"), ENTRIES, ids=lambda value: str(value)[:40])
def test_a_component_names_a_known_class(damaged, entry, words):
    edit_json(damaged / "model_index.json", transformer=entry)
    message = refusal(damaged)
    assert words in message and message.startswith("model_index.json: transformer")


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"steps": 4}, "steps, which this pipeline does not"),
        ([], "list"),
    ],
)
def test_a_repositorys_own_defaults_are_checked(damaged, stated, words):
    (damaged / "generation_config.json").write_text(json.dumps(stated))
    assert words in refusal(damaged)


def test_a_repository_states_its_own_defaults(damaged):
    (damaged / "generation_config.json").write_text(json.dumps({"num_inference_steps": 4, "height": 32}))
    schema = describe(open_repository(damaged, weights=False))
    properties = schema.json_schema()["properties"]
    assert (properties["num_inference_steps"]["default"], properties["height"]["default"]) == (4, 32)


TRAP = "import pathlib\npathlib.Path({marker!r}).touch()\n"

WATCH = """
import json, sys
folder = sys.argv[1]
import diffusers, transformers, torch
from safelight import DiffusionGenerator
heard, listening = [], True

def hook(event, args):
    if not listening:
        return
    if event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "socket.connect"):
        heard.append([event, str(args)])
    elif event in ("compile", "exec", "import", "open") and folder in str(args) and "site-packages" not in str(args):
        heard.append([event, str(args[1] if event == "import" else args[0])])

sys.addaudithook(hook)
generator = DiffusionGenerator.from_pretrained(folder, device="cpu")
generator.generate("x", height=16, width=16, num_inference_steps=1, seed=0)
listening = False
maps = [line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if ".safetensors" in line]
print(json.dumps({"heard": heard, "maps": sorted(set(maps))}))
"""


def set_traps(folder, marker):
    """Put code and pickles wherever something in the repository might ask for them."""
    code = TRAP.format(marker=str(marker))
    auto_map = dict.fromkeys(("AutoModel", "AutoConfig", "AutoTokenizer", "AutoencoderKL"), "model.Model")
    for component in COMPONENTS:
        for name in ("model.py", "__init__.py", "pipeline.py", "modeling_flux.py", "tokenization.py"):
            (folder / component / name).write_text(code)
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
            torch.save({"x": torch.zeros(1)}, folder / component / name)
        for path in (folder / component).glob("*config.json"):
            changes = {"auto_map": auto_map, "custom_pipelines": {"x": "pipeline.py"}, "_auto_class": "AutoModel"}
            edit_json(path, **changes if component not in ("transformer", "vae") else {"_auto_map": auto_map})
    (folder / "pipeline.py").write_text(code)
    (folder / "requirements.txt").write_text("surplus")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_nothing_in_a_repository_is_run(damaged, tmp_path):
    """Every import, exec, unpickling, process and connection while a model full of traps is loaded and run."""
    marker = tmp_path / "marker"
    set_traps(damaged, marker)
    runpy.run_path(str(damaged / "pipeline.py"))
    assert marker.exists(), "the trap works"
    marker.unlink()
    done = subprocess.run(
        [sys.executable, "-c", WATCH, damaged], capture_output=True, text=True, timeout=240, cwd=damaged
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert not marker.exists()
    assert [event for event, _ in seen["heard"] if event != "open"] == []
    opened = {Path(name).suffix for event, name in seen["heard"] if event == "open"}
    assert opened <= {".json", ".safetensors", ""}
    assert seen["maps"] and all(Path(name).is_relative_to(damaged) for name in seen["maps"])


def test_auto_map_in_the_transformers_configuration_has_no_effect(damaged, tmp_path, caplog):
    """A setting that no class knows is left out, whatever it names."""
    edit_json(damaged / "transformer" / "config.json", auto_map={"AutoModel": "model.Model"})
    (damaged / "transformer" / "model.py").write_text(TRAP.format(marker=str(tmp_path / "marker")))
    load_pipeline(ServerArgs(str(damaged), device="cpu"))
    assert "auto_map" in caplog.text
    assert not (tmp_path / "marker").exists()
