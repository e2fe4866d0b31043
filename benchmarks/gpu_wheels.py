"""Fetch, as wheels, the packages that a machine with a GPU may lack, into a folder that can be carried there.

Such a machine has Python 3.12 with torch, triton, transformers, safetensors, pillow, click and rich, and no registry.
There: `python -m pip install --no-index --no-deps --target SITE FOLDER/*.whl`, and
`PYTHONPATH=SITE:src:. python -m benchmarks.gpu_day`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    *("diffusers", "accelerate", "importlib-metadata", "zipp", "ftfy", "wcwidth"),  # pipelines
    *("msgspec", "pyzmq"),  # between processes
    *("fastapi", "starlette", "pydantic", "pydantic-core", "typing-inspection", "annotated-types", "annotated-doc"),
    *(
        "uvicorn",
        "h11",
        "python-multipart",
        "httpx",
        "httpcore",
        "prometheus-client",
        "opentelemetry-api",
    ),  # the server
)
LARGE = "av"
"""Of videos alone; left out where there is no room."""
MOST = 60_000_000
"""Bytes in all."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def fetch(packages: tuple[str, ...], folder: Path, constraints: Path) -> None:
    """Fetch wheels of exactly these packages, in the versions that the tests have."""
    platforms = [part for name in PLATFORMS for part in ("--platform", f"{name}_x86_64")]
    pinned = ["--constraint", str(constraints)] if constraints.is_file() else []
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
        "--abi",
        "cp312",
        "--abi",
        "abi3",
        "--abi",
        "none",
    ]
    subprocess.run([*command, *platforms, *pinned, "--dest", str(folder), *packages], check=True)


def size_of(folder: Path) -> int:
    """Return the bytes of the wheels."""
    return sum(path.stat().st_size for path in folder.glob("*.whl"))


def main() -> None:
    """Fetch everything, and say how much it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".gpu-wheels"), help="[default: %(default)s]")
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"), help="[default: %(default)s]")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    fetch(PACKAGES, arguments.folder, arguments.constraints)
    fetch((LARGE,), arguments.folder, arguments.constraints)
    if size_of(arguments.folder) > MOST:
        for path in arguments.folder.glob(f"{LARGE}-*"):
            path.unlink()
        print(f"{LARGE} is left out: there is no room for it")
    count = len(list(arguments.folder.glob("*.whl")))
    print(f"{count} wheels, {size_of(arguments.folder) / 1e6:.1f} MB, in {arguments.folder}")


if __name__ == "__main__":
    main()
