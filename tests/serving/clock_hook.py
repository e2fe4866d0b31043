"""`safelight` whose clock for people a file sets, in this process alone: `python -m tests.serving.clock_hook ...`."""

from __future__ import annotations

import os
import time
from pathlib import Path

_real, _file = time.time, Path(os.environ["CLOCK_OFFSET_FILE"])


def _set() -> float:
    return _real() + float(_file.read_text() or 0)


time.time = _set

if __name__ == "__main__":
    from safelight.cli.main import main

    main()
