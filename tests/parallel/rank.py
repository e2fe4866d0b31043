"""The ranks of a pool: imports once, forks each, and each answers [function, arguments], a line each.

`python -m tests.parallel.rank STORE REQUESTS_FD ANSWERS_FD ...`, two a rank.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import torch.distributed as dist

from tests.parallel import work

TIMEOUT = timedelta(seconds=60)


def main() -> None:
    store, descriptors = sys.argv[1], [int(text) for text in sys.argv[2:]]
    torch.set_num_threads(1)
    pairs = list(zip(descriptors[::2], descriptors[1::2], strict=True))
    children = []
    for rank, pair in enumerate(pairs):
        child = os.fork()
        if child == 0:
            for fd in set(descriptors) - set(pair):
                os.close(fd)
            serve(rank, len(pairs), store, *pair)
            os._exit(0)
        children.append(child)
    for fd in descriptors:
        os.close(fd)
    for child in children:
        os.waitpid(child, 0)


def serve(rank: int, size: int, store: str, requests: int, answers: int) -> None:
    """Answer until there are no more requests."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as replies:
        for line in lines:
            function, arguments = json.loads(line)
            try:
                answer = {"result": vars(work)[function](**arguments)}
            except Exception:
                answer = {"error": traceback.format_exc()}
            replies.write(json.dumps(answer) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
