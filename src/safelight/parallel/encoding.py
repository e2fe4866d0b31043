"""Encoders that are not divided: one rank has the weights and runs them, and the others are sent what it makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from torch import Tensor

from safelight.errors import RankFailedError
from safelight.parallel.collectives import Communicator

OUTPUTS = ("last_hidden_state", "pooler_output")
"""Of what the libraries' encoders return, what the stages use."""


class EncoderOnOneRank:
    """Stands for an encoder of the libraries in a pipeline's stages, on every rank.

    If the encoder fails, its rank tells the others in the place of a result, so that all end the request alike.

    Args:
        encoder: on the rank that has it; None on the others.
        ranks: all that run the stage.
        device: where embeddings go.
        source: the rank that has the encoder.

    """

    def __init__(self, encoder: Any, ranks: Communicator, device: torch.device, source: int = 0) -> None:
        assert (encoder is not None) == (ranks.rank == source), "the source alone has the encoder"
        self.encoder = encoder
        self.ranks = ranks
        self.device = device
        self.source = source

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        """Return the encoder's outputs, as attributes.

        Raises:
            RankFailedError: on all ranks, if the encoder failed; on its own, from what it raised.

        """
        if self.encoder is None:
            return self._received()
        try:
            made = self.encoder(**inputs)
        except Exception as error:  # the others wait for a result, or to hear that there is none
            self.ranks.broadcast_bytes(msgspec.msgpack.encode({"error": repr(error)}), self.source, self.device)
            raise RankFailedError("this rank's encoder failed") from error
        outputs = {name: made[name] for name in OUTPUTS if made.get(name) is not None}
        self.ranks.broadcast_bytes(msgspec.msgpack.encode({"outputs": list(outputs)}), self.source, self.device)
        self.ranks.broadcast_tensors(list(outputs.values()), self.device, self.source)
        return SimpleNamespace(**outputs)

    def _received(self) -> SimpleNamespace:
        told = msgspec.msgpack.decode(self.ranks.broadcast_bytes(None, self.source, self.device))
        if "error" in told:
            raise RankFailedError(f"the rank that encodes failed: {told['error']}")
        tensors = self.ranks.broadcast_tensors(None, self.device, self.source)
        return SimpleNamespace(**dict(zip(told["outputs"], tensors, strict=True)))
