"""Several pictures with progress after every step; leaving the loop stops the work within one step."""

from safelight import DiffusionGenerator

PROMPTS = [
    "a small blue star at the top on a yellow background",
    "a large green square at the center on a black background",
]

with DiffusionGenerator.from_pretrained() as generator:
    for event in generator.stream(PROMPTS, seed=1, n=2):
        print(f"output {event.output_index + 1} of {event.num_outputs}: {event.stage}, step {event.step}")
    assert event.result is not None
    print(*event.result.save("pictures.png", overwrite=True), sep="\n")

    for event in generator.stream(PROMPTS[0], num_inference_steps=1000):
        if event.step == 3:
            break
    print("stopped after step", event.step)
