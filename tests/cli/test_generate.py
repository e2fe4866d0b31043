"""`safelight generate`: files, their names and parameters, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import signal
import stat

import numpy as np
import pytest
from PIL import Image

from safelight.cli.main import main
from safelight.core.pipeline import ComposedPipeline
from safelight.generator import DiffusionGenerator
from safelight.loading import component_plan, repository
from tests.cli.conftest import SMALL
from tests.recipes import wan
from tests.recipes.qwen_image import LAYERED, patch_areas, picture


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def test_a_picture_is_made_and_named(generate, checkpoints, tmp_path):
    path = tmp_path / "cat.png"
    ended = generate("a cat", "--seed", 7, "-o", path)
    assert (ended.code, ended.out) == (0, f"{path}\n")
    assert ended.err.startswith("seed 7, 1 steps, ")
    assert list(tmp_path.iterdir()) == [path]
    with DiffusionGenerator.from_pretrained(checkpoints.folder()) as generator:
        result = generator.generate("a cat", height=16, width=16, num_inference_steps=1, max_sequence_length=8, seed=7)
    assert np.array_equal(pixels(path), np.asarray(result.images[0]))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_a_file_says_how_it_was_made(generate, run, tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    ended = generate("naïve 漢字 \U0001f431", "--seed", 2**64 - 1, "--guidance-scale", 1.5, "-o", path)
    assert ended.code == 0, ended.err
    found = json.loads(run("info", path, "--json").out)
    expected = {"prompt": "naïve 漢字 \U0001f431", "seed": 2**64 - 1, "guidance_scale": 1.5, "height": 16}
    assert {name: found[name] for name in expected} == expected
    rows = dict(line.split(maxsplit=1) for line in run("info", path).out.splitlines())
    assert rows.keys() == found.keys()
    assert rows["prompt"] == expected["prompt"] and rows["pipeline"] == "FluxPipeline"
    with Image.open(path) as image:
        assert image.format == {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(suffix, "PNG")
        assert image.size == (16, 16)


def test_outputs_are_numbered(generate, run, tmp_path):
    ended = generate("x", "--n", 2, "--seed", 5, "-o", tmp_path / "x.png")
    assert ended.out == f"{tmp_path}/x-1.png\n{tmp_path}/x-2.png\n"
    assert ended.err.startswith("seed 5, 6, ")
    assert [json.loads(run("info", path, "--json").out)["seed"] for path in ended.out.split()] == [5, 6]
    alone = generate("x", "--seed", 6, "-o", tmp_path / "alone.png")
    assert alone.code == 0
    assert np.array_equal(pixels(tmp_path / "alone.png"), pixels(tmp_path / "x-2.png"))


def test_a_name_is_found_when_none_is_given(generate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [generate("x", "--seed", 3).out for _ in range(2)]
    assert names == ["safelight-3.png\n", "safelight-3-a.png\n"]
    assert generate("x", "--seed", 3, "-n", 2).out == "safelight-3-1.png\nsafelight-3-2.png\n"


def test_a_name_that_is_no_text(checkpoints, tmp_path, capfdbinary):
    """The name on standard output is the file's, byte for byte."""
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "x", "--model", str(checkpoints.folder()), *SMALL, "-o", str(path)])
    assert capfdbinary.readouterr().out == os.fsencode(path) + b"\n"
    assert path.exists()


def test_overwrite(generate, tmp_path):
    path = tmp_path / "x.png"
    path.write_text("mine")
    path.chmod(0o600)
    assert generate("x", "--overwrite", "-o", path).code == 0
    assert pixels(path).shape == (16, 16, 3)
    assert stat.S_IMODE(path.stat().st_mode) != 0o600, "it is a new file, with the mode of new files"


def test_without_a_model_the_shipped_one_runs(run, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(repository, "SHIPPED_MODEL", checkpoints.folder("schnell"))
    ended = run("generate", "x", *SMALL, "-o", tmp_path / "x.png")
    assert ended.code == 0
    assert json.loads(run("info", tmp_path / "x.png", "--json").out)["model"] == "the shipped model"


def test_warnings_are_lines(generate, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = "a long prompt " * 20
    ended = generate(text, "--guidance-scale", 2, "-o", tmp_path / "x.png", variant="schnell")
    warnings = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert len(ended.err.splitlines()) == len(warnings) + 1 and len(warnings) == 3, ended.err
    assert warnings[0].startswith("warning: guidance_scale has no effect")


def test_an_image_goes_in(generate, run, tmp_path):
    Image.new("RGB", (24, 20), "red").save(tmp_path / "in.png")
    options = ("--image", tmp_path / "in.png", "--no-auto-resize", "--max-area", 256)
    ended = generate("x", *options, "-o", tmp_path / "x.png", variant="kontext")
    assert ended.code == 0, ended.err
    assert json.loads(run("info", tmp_path / "x.png", "--json").out)["image"] == ["24x20"]


@pytest.fixture
def no_weights(monkeypatch):
    """Fail if anything is loaded."""

    def load(*args):
        pytest.fail("weights are loaded before the request is checked")

    monkeypatch.setattr(component_plan, "load_component", load)


def refused(ended, code, *words):
    """One line on standard error, nothing on standard output, no traceback."""
    assert (ended.code, ended.out) == (code, ""), ended
    assert ended.err.startswith("safelight: ") and ended.err.count("\n") == 1 and ended.err.endswith("\n"), ended.err
    assert all(word in ended.err for word in words), ended.err
    assert "internal error" not in ended.err and "Traceback" not in ended.err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("there.png", ["exists already", "--overwrite"]),
        ("x.gif", ["x.gif", ".png, .jpg, .jpeg, .webp"]),
        ("x", [".png, .jpg, .jpeg, .webp"]),
        (".png", [".png, .jpg, .jpeg, .webp"]),
        ("nowhere/x.png", ["nowhere' does not exist"]),
        ("there.png/x.png", ["there.png' is no folder"]),
        ("/proc/x.png", ["folder '/proc' cannot be written"]),  # by root neither
        ("..", [".png, .jpg, .jpeg, .webp"]),
        ("folder.png", ["is a folder"]),
        ("x" * 300 + ".png", ["too long"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_output_is_refused_before_anything_is_loaded(generate, tmp_path, name, words):
    (tmp_path / "there.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    refused(generate("x", "-o", tmp_path / name), 2, "output: ", *words)
    assert (tmp_path / "there.png").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"there.png", "folder.png"}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("way", ["written", "gone", "taken"])
def test_a_folder_is_looked_at_when_no_name_is_given_too(generate, tmp_path, monkeypatch, way):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here if way != "written" else "/proc")
    if way == "gone":
        here.rmdir()
    if way == "taken":
        for letter in ("", *(f"-{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")):
            (here / f"safelight-3{letter}.png").touch()
    words = {"written": "cannot be written", "gone": "", "taken": "every name"}[way]
    refused(generate("x", "--seed", 3), 2, "output: ", words)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos") / "model"
    wan.DMD.build(folder, "default")
    return folder


VIDEOS = {
    "there.mp4": "exists already",
    "full": "exists already",
    "folder.mp4": "is a folder",
    "/proc/x.mp4": "cannot be written",
    "/proc/frames": "cannot be written",
    "nowhere/x.mp4": "does not exist",
    "there.mp4/frames": "is no folder",
    "x" * 300 + ".mp4": "too long",
    "x.gif": ".mp4, .webp",
    "..": "no name of its own",
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("name", "words"), VIDEOS.items(), ids=[name[:20] for name in VIDEOS])
def test_a_videos_place_is_looked_at_before_anything_is_loaded(videos, run, tmp_path, name, words):
    (tmp_path / "there.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "full" / "frame").mkdir(parents=True)
    refused(run("generate", "x", "--model", videos, "-o", tmp_path / name), 2, "output: ", words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("no_weights")
def test_a_folder_that_is_closed(generate, tmp_path):
    tmp_path.chmod(0o500)
    refused(generate("x", "-o", tmp_path / "x.png"), 2, "cannot be written")


def test_one_of_several_outputs_exists(generate, tmp_path):
    (tmp_path / "x-2.png").write_text("mine")
    refused(generate("x", "--n", 2, "-o", tmp_path / "x.png"), 2, "x-2.png", "--overwrite")


BAD_VALUES = {
    "unknown option": (["--num-inference-step", "4"], ["--num-inference-step", "--num-inference-steps"]),
    "height": (["--height", "37"], ["height: got 37", "multiple of 4", "36 and 40"]),
    "width": (["--width", "3"], ["width: got 3", "nearest: 4"]),
    "height 0": (["--height", "0"], ["height: got 0", "from 1 to 16384"]),
    "height, huge": (["--height", "1000000000000"], ["height: got 1000000000000", "from 1 to 16384"]),
    "steps 0": (["--num-inference-steps", "0"], ["num_inference_steps: got 0", "from 1 to 1000"]),
    "steps 2.5": (["--num-inference-steps", "2.5"], ["--num-inference-steps", "2.5"]),
    "n 0": (["--n", "0"], ["n: got 0", "from 1 to 1024"]),
    "n, huge": (["--n", "1000000000000"], ["n: got 1000000000000", "from 1 to 1024"]),
    "seed -1": (["--seed", "-1"], ["seed: got -1", f"from 0 to {2**64 - 1}"]),
    "seed 2**64": (["--seed", str(2**64)], [f"seed: got {2**64}"]),
    "last seed": (["--seed", str(2**64 - 1), "--n", "2"], ["seed: got", f"at most {2**64 - 2} with n=2"]),
    "scale": (["--guidance-scale", "nan"], ["guidance_scale: got nan", "finite"]),
    "sigmas": (["--sigmas", "1.0,x"], ["'1.0,x' is not a list of numbers"]),
    "sigmas, range": (["--sigmas", "1.5"], ["sigmas: got (1.5,)", "from 0.0 to 1.0"]),
    "steps and sigmas": (["--sigmas", "1.0,0.5", "--num-inference-steps", "3"], ["num_inference_steps", "(2)"]),
    "dtype": (["--dtype", "int7"], ["dtype: got 'int7'", "bfloat16"]),
    "component": (["--component-dtypes", "unet=float32"], ["component_dtypes: got 'unet'", "transformer"]),
    "component's dtype": (["--component-dtypes", "vae=int7"], ["component_dtypes['vae']: got 'int7'"]),
    "component from nowhere": (
        ["--component", "vae=/no/where"],
        ["component['vae']: got '/no/where'", "a folder, or a"],
    ),
    "component, no pair": (["--component", "vae"], ["'vae' is not of the form name=value"]),
    "pipeline": (["--pipeline", "Nothing"], ["pipeline: got 'Nothing'", "safelight models --all"]),
    "no pair": (["--component-dtypes", "vae"], ["'vae' is not of the form name=value"]),
    "device": (["--device", "tpu:9"], ["device: got 'tpu:9'"]),
    "device, not here": (["--device", "cuda:99"], ["device: got 'cuda:99'"]),
    "image, text model": (["--image", "x.png"], ["--image"]),
    "two prompts": (["another"], ["unexpected extra argument"]),
    "no value": (["--seed"], ["--seed", "requires an argument"]),
    "revision of a folder": (["--revision", "main"], ["revision: got 'main'"]),
    "negative prompt": (["--negative-prompt", "x" * 8193], ["negative_prompt: got", "8192 characters"]),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("options", "words"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values_are_one_line(generate, tmp_path, options, words):
    refused(generate("x", "-o", tmp_path / "x.png", *options), 2, *words)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_attention_backend(generate, tmp_path, monkeypatch):
    """It is said once the first model of ours is mapped, before a library loads anything."""
    monkeypatch.setattr("safelight.loading.components._load_library_module", pytest.fail)
    ended = generate("x", "--attention-backend", "magic", "-o", tmp_path / "x.png")
    refused(ended, 2, "attention_backend: got 'magic'", "sdpa")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], ["prompt", "safelight generate"]), (["caf\udce9"], ["prompt: got 'caf\\udce9'"]), (["x" * 8193], ["8192"])],
    ids=["none", "lone surrogate", "too long"],
)
def test_prompts_that_are_none(generate, tmp_path, prompt, words):
    refused(generate(*prompt, "-o", tmp_path / "x.png"), 2, *words)
    assert list(tmp_path.iterdir()) == []


def write_images(folder):
    """Write pictures that cannot be read, or used; return what is said of each."""
    Image.new("RGB", (64, 64), "red").save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[:-60])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    Image.new("RGB", (1, 1)).save(folder / "1x1.png")
    Image.new("RGB", (64, 64)).save(folder / "picture.gif")
    return {
        "truncated.png": "truncated",
        "text.png": "readable PNG, JPEG, WEBP",
        "empty.png": "this is an empty file",
        "1x1.png": "1x1 pixels",
        "picture.gif": "this is a GIF",
        "missing.png": "No such file",
        ".": "Is a directory",
    }


@pytest.mark.usefixtures("no_weights")
def test_images_that_cannot_be_used(generate, tmp_path):
    for name, words in write_images(tmp_path).items():
        before = set(tmp_path.iterdir())
        ended = generate("x", "--image", tmp_path / name, "-o", tmp_path / "x.png", variant="kontext")
        refused(ended, 2, "image: got", words)
        assert set(tmp_path.iterdir()) == before
    both = ("--image", tmp_path / "whole.png") * 2
    refused(generate("x", *both, "-o", tmp_path / "x.png", variant="kontext"), 2, "2 images", "0 to 1")


@pytest.mark.parametrize("name", ["", "empty", "missing", "no/such/thing", "file.txt"])
def test_models_that_are_none(run, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    model = tmp_path / name if name else ""
    refused(run("generate", "x", "--model", model, "-o", tmp_path / "x.png"), 3, str(tmp_path) if name else "''")
    assert not (tmp_path / "x.png").exists()


def test_a_damaged_checkpoint(run, checkpoints, tmp_path):
    folder = checkpoints.copy(tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"1234567")
    ended = run("generate", "x", "--model", folder, *SMALL, "-o", tmp_path / "x.png")
    refused(ended, 3, "vae/diffusion_pytorch_model.safetensors: not a whole safetensors file")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_bug_is_one_line_too(generate, tmp_path, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("a\nbug")

    monkeypatch.setattr(component_plan, "load_component", broken)
    ended = generate("x", "-o", tmp_path / "x.png")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith("safelight: internal error: ZeroDivisionError: a bug")


def test_a_picture_of_nan_is_not_written(run, checkpoints, tmp_path):
    """Exit code 1: a generation that failed."""
    from safetensors.torch import load_file, save_file

    folder = checkpoints.copy(tmp_path / "model")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.weight"] *= float("nan")
    save_file(tensors, path)
    refused(run("generate", "x", "--model", folder, *SMALL, "-o", tmp_path / "x.png"), 1, "not finite")
    assert list(tmp_path.iterdir()) == [folder]


def test_an_interrupt_ends_with_130_and_writes_nothing(generate, tmp_path, monkeypatch):
    """A real signal, in the middle of the third step."""
    forward, calls = ComposedPipeline.forward, []

    def interrupted(pipeline, call):
        calls.append(call)
        if sum(each.component == "transformer" for each in calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(pipeline, call)

    monkeypatch.setattr(ComposedPipeline, "forward", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job does not have
    try:
        ended = generate("x", "--num-inference-steps", 50, "-o", tmp_path / "x.png")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.code, ended.out, ended.err.strip()) == (130, "", "safelight: interrupted")
    assert calls[-1].key.step == 2 and list(tmp_path.iterdir()) == []


@pytest.fixture
def layers(run, tmp_path_factory, monkeypatch):
    """Run `safelight generate` on a tiny model that decomposes a picture, and captions it where there is no prompt."""
    patch_areas(monkeypatch)
    folder = tmp_path_factory.getbasetemp() / "layered"
    if not folder.exists():
        LAYERED.build(folder, "default")
        picture(90, 100).save(folder / "in.png")
    image = ("--image", folder / "in.png")
    return lambda *args: run("generate", "--model", folder, *image, "--num-inference-steps", 2, *args)


@pytest.mark.parametrize("prompt", [(), ("",), (" ",)], ids=["none", "empty", "blank"])
def test_a_prompt_may_be_missing_where_the_model_writes_it(layers, run, tmp_path, prompt):
    ended = layers(*prompt, "--layers", 2, "--seed", 3, "-o", tmp_path / "x.webp")
    assert ended.code == 0, ended.err
    assert ended.out == f"{tmp_path}/x-1.webp\n{tmp_path}/x-2.webp\n"
    found = json.loads(run("info", tmp_path / "x-2.webp", "--json").out)
    assert found["prompt"].strip() and found["seed"] == 3
    with Image.open(tmp_path / "x-1.webp") as image:
        assert image.mode == "RGBA"


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("options", "last"), [([], 4), (["--layers", 3, "--n", 2], 6)])
def test_every_file_of_several_pictures_is_checked_before_anything_is_loaded(layers, tmp_path, options, last):
    (tmp_path / f"x-{last}.png").write_text("mine")
    refused(layers(*options, "-o", tmp_path / "x.png"), 2, f"x-{last}.png", "--overwrite")


@pytest.mark.usefixtures("no_weights")
def test_a_format_without_transparency_is_refused_before_anything_is_loaded(layers, tmp_path):
    refused(layers("-o", tmp_path / "x.jpg"), 2, "x-1.jpg", ".png or .webp", "transparency")
    assert list(tmp_path.iterdir()) == []


def test_steps_that_the_model_counts_itself_are_told(run, tmp_path):
    """The model's schedule says how many there are; no option does."""
    wan.DMD.build(tmp_path / "model", "default")
    small = ("--height", 48, "--width", 80, "--num-frames", 5, "--max-sequence-length", 48)
    for options, steps in (((), 3), (("--timesteps", "900,500"), 2)):
        path = tmp_path / f"{steps}.mp4"
        ended = run("generate", "x", "--model", tmp_path / "model", *small, *options, "-o", path)
        assert (ended.code, ended.out) == (0, f"{path}\n"), ended.err
        assert f", {steps} steps, " in ended.err
