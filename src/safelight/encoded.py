"""Pictures that stay files until their pixels are needed. Imports no torch.

A file of 100 KB can hold 25 megapixels, which are 100 MB once they are decoded. So whoever keeps a picture for later, a
queue above all, keeps the file; what must be known before (size, transparency) is in its header.
"""

from __future__ import annotations

import ctypes
import io
import struct
import threading
import warnings
import weakref
from collections import deque
from typing import Any, Protocol, Self

from PIL import ExifTags, Image

BYTES_PER_PIXEL = 4
"""Of Pillow's pictures in memory, RGB ones too."""
KEPT_BYTES = 256 << 20
"""Of decoded pixels in one process, over all files whose pixels were asked for; the first decoded are let go first."""
LEAST_KEPT = 3
"""Decoded pictures that stay whatever their size: as many as one operation of Pillow's takes."""
LARGE_BYTES = 4 << 20
"""From which on memory is given back to the system when pixels are let go."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its EXIF's orientation."""
_BROKEN_EXIF = (OSError, SyntaxError, EOFError, struct.error, ValueError, TypeError, LookupError, ArithmeticError)
"""What Pillow raises for EXIF whose entries are not what they should be."""


def orientation(image: Image.Image) -> int:
    """Return how a picture is turned, from 1, which is upright, to 8; 1 where its EXIF does not say it."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*_BROKEN_EXIF, AttributeError):
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) of a picture once it is turned as its EXIF says."""
    return (image.height, image.width) if orientation(image) >= 5 else image.size


def upright(image: Image.Image, mode: str) -> Image.Image:
    """Return a picture turned as its EXIF says, and in a mode. Nothing else of the EXIF is read, and none is kept."""
    turn = _TURNS.get(orientation(image))
    image.load()
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):  # which Pillow cuts at 255 instead of scaling it
        image = image.point(lambda value: value / 256).convert("L")
    return image.convert(mode)


class Kept(Protocol):
    """A file that is somewhere else than in memory."""

    def read(self) -> bytes:
        """Return its bytes."""
        ...


class EncodedImage(Image.Image):
    """A picture whose pixels are decoded when they are first needed, and again if they were let go meanwhile.

    Its size is that of the upright picture.

    Args:
        file: a PNG, JPEG or WebP file, or where it is kept.
        kind: Pillow's name of its format.
        mode: that its pixels are converted to.
        size: (width, height), upright.

    Attributes:
        kind: its format.
        source_mode: of the pixels in the file, as Pillow names it.
        has_alpha: whether the file has transparency, whatever `mode` is.

    """

    def __init__(self, file: bytes | Kept, kind: str, mode: str, size: tuple[int, int]) -> None:
        super().__init__()
        self._file, self.kind = file, kind
        self.source_mode, self.has_alpha = mode, False
        self._mode, self._size = mode, size

    @property
    def file(self) -> bytes:
        """The file; of one that is kept elsewhere, read anew each time."""
        return self._file if isinstance(self._file, bytes) else self._file.read()

    @classmethod
    def read(cls, file: bytes, kinds: tuple[str, ...], kept: Kept | None = None) -> Self:
        """Read a file's header. Whatever Pillow raises for a damaged file, this does.

        Args:
            file: its bytes.
            kinds: the formats that are taken.
            kept: where the file is kept, in the place of its bytes.

        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes and damaged EXIF, which are judged elsewhere
            with Image.open(io.BytesIO(file), formats=kinds) as image:
                found = cls(file if kept is None else kept, image.format or "", image.mode, upright_size(image))
                found.has_alpha = image.has_transparency_data
        return found

    def converted(self, mode: str) -> EncodedImage:
        """Return the same file as a picture of another mode; nothing is decoded."""
        other = EncodedImage(self._file, self.kind, mode, self.size)
        other.source_mode, other.has_alpha = self.source_mode, self.has_alpha
        return other

    def load(self) -> Any:
        """Decode the file, unless its pixels are there. Raises what Pillow raises for a damaged one."""
        if self._im is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(self.file), formats=(self.kind,)) as image:
                    self.im = upright(image, self.mode).im
            DECODED.keep(self)
        return super().load()

    def check(self) -> None:
        """Decode the file once, and keep nothing. Raises what `load` would.

        Turning and converting, for which there would be as much memory again, are tried on one pixel.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(self.file), formats=(self.kind,)) as image:
                image.load()
                upright(image.crop((0, 0, 1, 1)), self.mode)
        if self.num_bytes >= LARGE_BYTES:
            give_back_memory()

    def let_go(self) -> None:
        """Forget the pixels, and keep the file."""
        if self._im is not None:
            self._im = None
            if self.num_bytes >= LARGE_BYTES:
                give_back_memory()

    @property
    def num_bytes(self) -> int:
        """What the pixels take in memory."""
        return self.width * self.height * BYTES_PER_PIXEL


class Decoded:
    """The files of this process whose pixels are in memory.

    Args:
        most: bytes of pixels together; beyond, the first decoded are let go, and `LEAST_KEPT` stay.

    """

    def __init__(self, most: int = KEPT_BYTES) -> None:
        self._most = most
        self._images: deque[weakref.ref[EncodedImage]] = deque()
        self._lock = threading.Lock()

    def keep(self, image: EncodedImage) -> None:
        """Count a picture that has just been decoded."""
        with self._lock:
            self._images.append(weakref.ref(image))
            alive = [each for ref in self._images if (each := ref()) is not None and each._im is not None]
            held = sum(each.num_bytes for each in alive)
            while held > self._most and len(alive) > LEAST_KEPT:
                first = alive.pop(0)
                held -= first.num_bytes
                first.let_go()
            self._images = deque(map(weakref.ref, alive))


DECODED = Decoded()


def give_back_memory() -> None:
    """Give the system what the allocator keeps of freed memory, where it does not do so by itself (glibc)."""
    if _TRIM is not None:
        _TRIM(0)


def give_back_large_blocks() -> None:
    """Let every large block of memory go back to the system as soon as it is freed, whichever thread had it (glibc).

    The allocator otherwise takes the largest block that was ever freed, up to 32 MiB, for a usual one, and keeps as
    much as two of it for each thread; what a thread keeps so, `give_back_memory` does not give back.
    """
    if _MALLOPT is not None:
        _MALLOPT(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 1 << 19


def _of_libc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None


_TRIM, _MALLOPT = _of_libc("malloc_trim"), _of_libc("mallopt")
