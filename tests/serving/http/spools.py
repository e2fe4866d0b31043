"""Bodies that have been received."""

from __future__ import annotations

from safelight.serving.http.spool import Spool


def spooled(data, folder, in_file=False):
    found = Spool(folder)
    found.keep(data)
    if in_file:
        found.flush()
    return found
