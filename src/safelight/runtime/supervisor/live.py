"""A request that has no answer yet, as the API process keeps it, so that any worker can have it. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from safelight.core.form import Form
from safelight.runtime.client import Media, Output, Progress, Ticket
from safelight.runtime.messages import Array, Progressed, Submit, described_image, image_to_array, split_images


@dataclass(eq=False)
class LiveRequest:
    """What is known of a request between its submission and its answer.

    Attributes:
        ticket: that its submitter holds.
        submitted: when, on the monotonic clock.
        cost: of all of it, as `request_cost` counts.
        form: None until it begins; it stays through a worker's death.
        outputs: those that are done, by their index.
        steps: for each output that has begun, the steps done, and those in all.

    """

    ticket: Ticket
    submitted: float
    cost: int
    form: Form | None = None
    outputs: dict[int, Output] = field(default_factory=dict)
    steps: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def remaining_cost(self) -> float:
        """The part of `cost` that is not done; decoding counts as one step more, so that some is left until the end."""
        progress = self.ticket.progress
        return self.cost * (1 - progress.step / (progress.num_inference_steps + 1))

    def begin_again(self) -> None:
        """Forget what a worker made that is lost."""
        self.outputs.clear()
        self.steps.clear()
        self.ticket.advance(
            replace(self.ticket.progress, state="queued", queue_position=None, step=0, stage="", seconds_left=None)
        )

    def advance(self, message: Progressed, arrays: Sequence[Media] = ()) -> None:
        """Tell the submitter how far all outputs are."""
        self.form = message.form
        self.steps[message.output_index] = (message.step, message.num_inference_steps)
        num_outputs = self.ticket.progress.num_outputs
        num_steps = max(total for _, total in self.steps.values())
        step = sum(step for step, _ in self.steps.values())
        a_step = message.seconds_left / max(1, num_steps - message.step)
        progress = Progress(
            state="running",
            stage=message.stage,
            step=step,
            num_inference_steps=num_steps * num_outputs,
            output_index=message.output_index,
            num_outputs=num_outputs,
            seconds_left=a_step * (num_steps * num_outputs - step) if num_steps else None,
            form=message.form,
            arrays=tuple(arrays),
        )
        self.ticket.advance(progress)

    def message(self) -> tuple[Submit, list[Array]]:
        """Return the message that gives it to a worker, with the files, or pixels, of its images."""
        request = self.ticket.request
        fields, images = split_images(request.params)
        deadline = None
        if request.deadline is not None:
            deadline = request.deadline - (time.monotonic() - self.submitted)
        submit = Submit(
            request_id=request.request_id,
            fields=fields,
            images=[described_image(*each) for each in images],
            priority=request.priority,
            deadline=deadline,
            form=self.form,
            tenant=request.tenant,
        )
        return submit, [image_to_array(image) for _, _, image in images]
