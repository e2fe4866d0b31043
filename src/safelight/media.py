"""Pictures in and out of files. Imports no torch."""

from __future__ import annotations

import io
import json
import os
import secrets
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from safelight.encoded import EncodedImage, upright
from safelight.errors import InvalidParameterError, OutputError, shown
from safelight.file_kinds import HEAD_BYTES, kind_of
from safelight.version import __version__

READ_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_INPUT_PIXELS = 100_000_000
"""Of an input image; a larger one is refused from its header, before anything is decoded."""
METADATA_KEY = "parameters"
_USER_COMMENT = b"ASCII\0\0\0"
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is no whole picture."""


def file_metadata(model: str, pipeline_name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written into a file of how it was made. `params` are one output's, as JSON can hold them."""
    return {
        "software": f"safelight {__version__}",
        "model": model,
        "pipeline": pipeline_name,
        **{name: value for name, value in params.items() if name not in ("n", "output_type")},
    }


def open_image(source: Any, param: str = "image", mode: str = "RGB", needs_alpha: bool = False) -> Image.Image:
    """Return a picture, turned as its EXIF says.

    Args:
        source: a PIL image, or the path of a PNG, JPEG or WebP file. An `EncodedImage` stays one.
        param: the field that an error names.
        mode: of the result, RGB or RGBA.
        needs_alpha: whether its transparency is what matters.

    Raises:
        InvalidParameterError: if it cannot be read as such, is too large, or has no transparency where it needs it.

    """
    if not isinstance(source, Image.Image | str | os.PathLike):
        raise InvalidParameterError(param, source, "a path, a PIL image, or a list of these")
    name = "a PIL image" if isinstance(source, Image.Image) else os.fspath(source)
    try:
        kind = None if isinstance(source, Image.Image) else _foreign_kind(source)
        if kind is not None:
            raise InvalidParameterError(param, name, f"a {', '.join(READ_FORMATS)} file of one picture; this is {kind}")
        with _opened(source) as image:
            if needs_alpha and not _has_alpha(image):
                raise InvalidParameterError(param, "a picture without transparency", "one that has it")
            return _converted(image, param, name, mode)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise InvalidParameterError(param, name, f"a readable {', '.join(READ_FORMATS)} file ({reason})") from error


def _foreign_kind(path: str | os.PathLike[str]) -> str | None:
    """Say what a file is, if it is known and no picture that is taken."""
    with Path(path).open("rb") as file:
        return kind_of(file.read(HEAD_BYTES))


@contextmanager
def _opened(source: Image.Image | str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Read a file's header; its pixels are read when they are first needed. A picture is open already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of size, where MAX_INPUT_PIXELS is our limit, and of damaged EXIF
        if isinstance(source, Image.Image):
            yield source
        else:
            with Image.open(source, formats=READ_FORMATS) as image:
                yield image


def _converted(image: Image.Image, param: str, name: str, mode: str) -> Image.Image:
    if image.width * image.height > MAX_INPUT_PIXELS:
        takes = f"at most {MAX_INPUT_PIXELS // 10**6} megapixels, not {image.width}x{image.height}"
        raise InvalidParameterError(param, name, takes)
    source_mode = image.source_mode if isinstance(image, EncodedImage) else image.mode
    if source_mode in ("I", "F"):
        raise InvalidParameterError(param, name, f"8 or 16 bits a channel, not Pillow's mode {source_mode}")
    return image.converted(mode) if isinstance(image, EncodedImage) else upright(image, mode)


def has_alpha(source: Any) -> bool:
    """Say whether a picture, one that `open_image` takes, has transparency."""
    with _opened(source) as image:
        return _has_alpha(image)


def _has_alpha(image: Image.Image) -> bool:
    return image.has_alpha if isinstance(image, EncodedImage) else image.has_transparency_data


IMAGE_FORMATS: Mapping[str, str] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""By the ending of a file's name."""
ALPHA_ENDINGS = (".png", ".webp")
"""Of formats that keep transparency."""
BEST_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "png": {},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"lossless": True, "method": 0},
}
"""What Pillow is told, by format, where nothing is asked for."""


def encoded(image: Image.Image, kind: str, options: Mapping[str, Any], metadata: str | None) -> bytes:
    """Return a picture's file.

    Args:
        image: the picture.
        kind: its format: png, jpeg or webp.
        options: what Pillow is told.
        metadata: ASCII, in a PNG's text, or the EXIF user comment of the others; None is none.

    """
    file, described = io.BytesIO(), dict[str, Any]()
    if metadata is not None and kind == "png":
        described["pnginfo"] = PngImagePlugin.PngInfo()
        described["pnginfo"].add_text(METADATA_KEY, metadata)
    elif metadata is not None:
        described["exif"] = exif(metadata)
    image.save(file, format=kind, **options, **described)
    return file.getvalue()


def exif(metadata: str) -> Image.Exif:
    """Return EXIF whose user comment is `metadata`, which is ASCII."""
    tags = Image.Exif()
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _USER_COMMENT + metadata.encode("ascii")
    return tags


def output_paths(path: Path, count: int) -> list[Path]:
    """Return a path a picture: the path itself for one, numbered for several."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def check_output(path: Path, overwrite: bool, alpha: bool = False) -> None:
    """Refuse a path that cannot be written as a picture, before any work is done for it.

    Args:
        path: where to.
        overwrite: whether an existing file is replaced.
        alpha: whether the picture has transparency.

    Raises:
        OutputError: naming the path and what it takes.

    """
    if path.suffix.lower() not in IMAGE_FORMATS:
        raise OutputError(f"output: got {str(path)!r}; it takes a name that ends in {', '.join(IMAGE_FORMATS)}")
    if alpha and path.suffix.lower() not in ALPHA_ENDINGS:
        takes = f"a name that ends in {' or '.join(ALPHA_ENDINGS)}, which keep the picture's transparency"
        raise OutputError(f"output: got {str(path)!r}; it takes {takes}")
    check_place(path, overwrite)


def check_place(path: Path, overwrite: bool) -> None:
    """Refuse a path under which no file could be put.

    A path without an ending is a folder's, which must not exist yet, or be empty.

    Raises:
        OutputError: naming the path and what is the matter.

    """
    try:
        if path.name in ("", ".."):
            raise OutputError(f"output: {str(path)!r} has no name of its own")
        check_folder(path.parent)
        with suppress(FileNotFoundError):
            path.lstat()  # of a name that cannot be, the system says more than pathlib
        if path.suffix and path.is_dir():
            raise OutputError(f"output: {str(path)!r} is a folder")
        taken = path.exists() if path.suffix else path.is_file() or (path.is_dir() and any(path.iterdir()))
        if taken and (not overwrite or not path.suffix):
            instead = "--overwrite (overwrite=True) replaces it" if path.suffix else "name a new folder"
            raise OutputError(f"output: {str(path)!r} exists already; {instead}")
    except (OSError, ValueError) as error:  # a name that is too long, or that the system does not know
        raise OutputError(f"output: {shown(str(path))}: {reason_of(error)}") from error


def check_folder(folder: Path) -> None:
    """Refuse a folder in which no file can be made: by making one, without a name, which is gone at once.

    Raises:
        OutputError: naming the folder.

    """
    if not folder.is_dir():
        raise OutputError(f"output: folder {str(folder)!r} {'is no folder' if folder.exists() else 'does not exist'}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"output: folder {str(folder)!r} cannot be written: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Return what the system says."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def save_image(image: Image.Image, path: Path, metadata: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write a picture and how it was made: whole, or not at all.

    Args:
        image: the picture.
        path: where to; its ending chooses PNG, JPEG or WebP.
        metadata: what JSON can hold; in a PNG's text, or the EXIF user comment of JPEG and WebP.
        overwrite: whether an existing file is replaced.

    Raises:
        OutputError: if it cannot be written there, or would lose its transparency.

    """
    check_output(path, overwrite, image.has_transparency_data)
    temporary = path.with_name(f".safelight-{secrets.token_hex(8)}")
    kind = IMAGE_FORMATS[path.suffix.lower()]
    picture = image.convert("RGB") if kind == "jpeg" else image
    try:
        # Pillow writes a JPEG by the file's number, and takes a short write for a whole one.
        temporary.write_bytes(encoded(picture, kind, BEST_OPTIONS[kind], json.dumps(metadata)))
        put(temporary, path)
    except (OSError, ValueError) as error:  # ValueError: more metadata than the format holds
        raise OutputError(f"output: {str(path)!r} cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # it has its name, or the disk fails
            temporary.unlink()


def put(made: Path, path: Path) -> None:
    """Give a finished file or folder its name, once what it holds is on the disk."""
    sync(made)
    made.replace(path)


def sync(path: Path) -> None:
    """Wait until a file, or what names a directory has, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return how a picture was made, as `save_image` wrote it.

    Raises:
        InvalidParameterError: if it is no picture, or carries no parameters of ours.

    """
    check_is_file(path)
    try:
        with _opened(path) as image:
            text = image.info.get(METADATA_KEY)
            if text is None:
                comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
                text = comment.removeprefix(_USER_COMMENT).decode("ascii") if isinstance(comment, bytes) else ""
    except UNREADABLE as error:
        kind = _foreign_kind(path)
        takes = f"a picture or video that Safelight made{f'; this is {kind}' if kind else ''}"
        raise InvalidParameterError("file", str(path), takes) from error
    return parameters_in(text, path)


def check_is_file(path: Path) -> None:
    """Refuse what is no file that can be read.

    Raises:
        InvalidParameterError: saying why.

    """
    try:
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        raise InvalidParameterError("file", str(path), f"a file that can be read ({reason_of(error)})") from error


def parameters_in(text: str, path: Path) -> dict[str, Any]:
    """Return the parameters that a file carries.

    Raises:
        InvalidParameterError: if they are none of ours, or there are none.

    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        takes = "a file that carries its parameters, as `safelight generate`, result.save and a server write it"
        raise InvalidParameterError("file", str(path), f"{takes}; this one has none of Safelight's")
    return found
