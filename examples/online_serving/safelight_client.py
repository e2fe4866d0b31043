"""The Python API against a server: the methods, the progress and the pictures of a model in this process."""

import sys

from safelight import DiffusionGenerator

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

with DiffusionGenerator.connect(url) as generator:
    for event in generator.stream("a small yellow star at the bottom on a black background", seed=5):
        print(event.stage, event.step)
    assert event.result is not None
    print(*event.result.save("star.png", overwrite=True))
