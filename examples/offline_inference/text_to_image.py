"""A picture from a prompt, in this process, with the model that ships with Safelight (or another: give its name)."""

import sys

from safelight import DiffusionGenerator

PROMPT = "a large red circle at the left on a white background"

with DiffusionGenerator.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None) as generator:
    result = generator.generate(PROMPT, seed=7)
    for path in result.save("circle.png", overwrite=True):
        print(path)
    print("seed", result.seeds[0], "took", {stage: round(seconds, 3) for stage, seconds in result.timings.items()})
