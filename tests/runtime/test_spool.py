"""A file of frames is taken by the name that `spool` gives, in its folder, and by no other."""

from __future__ import annotations

import numpy as np
import pytest

from safelight.runtime.spool import spool, spooled

NAMES = [b"../secret.frames", b"/etc/passwd", b"", b".", b"0123456789abcdef.frames\n", b"0123456789ABCDEF.frames",
         b"0123456789abcdef", b"0123456789abcdef.frames/../../x",
         b"\xff" * 16 + b".frames", b"0123456789abcde\0.frames"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_other_names_are_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret.frames").write_bytes(b"secret")
    with pytest.raises(ValueError, match="not the name"):
        spooled(name, tmp_path / "folder")
    assert (tmp_path / "secret.frames").read_bytes() == b"secret"


def test_a_link_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "0123456789abcdef.frames").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        spooled(b"0123456789abcdef.frames", tmp_path)


def test_what_was_spooled_is_read(tmp_path):
    frames = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    read = spooled(spool(memoryview(frames.tobytes()), tmp_path), tmp_path).reshape(frames.shape)
    found = np.stack(list(read))
    read._file.close()
    assert np.array_equal(found, frames) and not list(tmp_path.iterdir())
