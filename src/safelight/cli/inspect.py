"""Commands that look at things: pipelines, schemas, pictures, the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from safelight import media, video
from safelight.cli.options import key_value
from safelight.core.registry import pipelines
from safelight.errors import MAX_NAME
from safelight.runtime.logs import printable
from safelight.version import __version__

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "huggingface_hub", "numpy", "pillow")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve")


@click.command()
@click.option("--all", "every", is_flag=True, help="Those of the diffusers package too; why not, where one cannot run.")
def models(every: bool) -> None:
    """List the pipelines that run here, and known models of each."""
    from safelight.loading.repository import SHIPPED_MODEL, open_repository

    if SHIPPED_MODEL.is_dir():
        shipped = open_repository(weights=False)
        click.echo(f"shipped with Safelight, the default: {SHIPPED_MODEL.name} ({shipped.index['_class_name']})")
    for name, entry in pipelines().items():
        click.echo(f"{name} ({entry.model_family})")
        for path in entry.hf_model_paths:
            click.echo(f"    {path}")
    if every:
        from safelight.loading.listing import listed_pipelines

        for listed in listed_pipelines():
            if listed.name not in pipelines():
                click.echo(printable(f"{listed.name} (diffusers){listed.about()}"))


@click.command()
@click.argument("model", required=False)
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option("--backend", default="auto", help="auto, native or diffusers.")
@click.option("--pipeline", help="Class name of a pipeline, in the place of the index's.")
@click.option("--component", type=key_value, multiple=True, help="One from elsewhere, as controlnet=PATH_OR_ID.")
def schema(
    model: str | None, revision: str | None, backend: str, pipeline: str | None, component: tuple[tuple[str, str], ...]
) -> None:
    """Print what MODEL takes, as JSON Schema; loads no weights. Without MODEL: the shipped one."""
    from safelight.loading.loader import describe
    from safelight.loading.repository import open_repository

    added = dict(component)
    repository = open_repository(model, revision, backend=backend, weights=False, pipeline=pipeline, component=added)
    click.echo(json.dumps(describe(repository).json_schema(), indent=2))


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info(file: Path, as_json: bool) -> None:
    """Print how the picture or video FILE was made."""
    found = (video if file.suffix.lower() == ".mp4" else media).read_metadata(file)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    _print_rows({printable(name[:MAX_NAME]): printable(str(value)) for name, value in found.items()})


@click.command()
def env() -> None:
    """Print versions, devices and processor features, for a report."""
    import torch

    rows = {"safelight": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    rows["cpu"] = f"{os.cpu_count()} cores; {' '.join(_cpu_features()) or 'features unknown'}"
    rows["threads"] = str(torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        rows["cuda"] = "none"
    _print_rows(rows)


def _print_rows(rows: Mapping[str, str]) -> None:
    """Print texts behind their names, in two columns."""
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        click.echo(f"{name:<{width}}  {text}")


def _cpu_features() -> list[str]:
    """Return the features that matter here, where the system lists them."""
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return []
    words = set(listing.read_text(encoding="utf-8", errors="replace").split())
    return [feature for feature in CPU_FEATURES if feature in words]
