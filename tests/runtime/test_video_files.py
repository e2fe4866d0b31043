"""A file of frames is taken by the name that `spool` gives, in its folder, and by no other."""

from __future__ import annotations

import numpy as np
import pytest

from safelight.errors import StorageError
from safelight.runtime.video_files import spool, spooled

NAMES = [b"../secret.frames", b"/etc/passwd", b"", b".", b"0123456789abcdef.frames\n", b"0123456789ABCDEF.frames",
         b"0123456789abcdef", b"0123456789abcdef.frames/../../x",
         b"\xff" * 16 + b".frames", b"0123456789abcde\0.frames"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_other_names_are_refused(tmp_path, name):
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "secret.frames").write_bytes(b"secret")
    with pytest.raises(ValueError, match="not the name"):
        spooled(name, tmp_path / "folder")
    assert (tmp_path / "secret.frames").read_bytes() == b"secret"


def test_a_link_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "0123456789abcdef.frames").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        spooled(b"0123456789abcdef.frames", tmp_path)


@pytest.mark.parametrize("what", ["nothing", "a link", "for all"])
def test_a_folder_that_others_may_look_into_takes_and_gives_nothing(tmp_path, what):
    """As where it was removed, and another made one of its name."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder = tmp_path / "folder"
    if what == "a link":
        folder.symlink_to(tmp_path / "elsewhere")
    elif what == "for all":
        folder.mkdir()
        folder.chmod(0o777)
    (tmp_path / "elsewhere" / "0123456789abcdef.frames").write_bytes(b"another's")
    with pytest.raises(OSError):
        spooled(b"0123456789abcdef.frames", folder)
    with pytest.raises(StorageError):
        spool(memoryview(b"a client's"), folder)
    assert len(list(tmp_path.glob("*/*"))) <= 2, "it is in no other folder"


def test_what_was_spooled_is_read(tmp_path):
    frames = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    read = spooled(spool(memoryview(frames.tobytes()), tmp_path), tmp_path).reshape(frames.shape)
    found = np.stack(list(read))
    read._file.close()
    assert np.array_equal(found, frames) and not list(tmp_path.iterdir())
