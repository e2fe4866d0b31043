"""Decoding with a causal video VAE of the libraries, one frame at a time, with what it remembers outside its modules.

The libraries' decoders keep the frames that their convolutions look back on in the module, and push the frames of a
latent frame through all blocks together. Here they are a walk over the same modules, in less memory and time:

- behind each doubling of frames the rest of the decoder runs for one frame after the other;
- a convolution over three frames is one over each of them, in two dimensions, with the channels last, and frames
  before the first, which are zero, are not computed;
- one over doubled pixels is four over the pixels themselves.

Results are the same up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.layers.convolution import add_conv, channels_last, conv_in_place, doubled_conv

FeatureCache = dict[str, list[Any]]
"""By the name of each convolution that looks back: the inputs of the last two frames, [1, C, H, W] each, the older
first; of the last convolution, which makes few channels of many, what they add to the next two frames."""

NORM_EPS = 1e-12
WHOLE = slice(None)


class CausalDecoder:
    """The walk over the decoder of one of the libraries' causal VAEs, whose modules are named and made alike.

    Args:
        vae: the library's module. The memory of its decoder's weights is rearranged, their values stay.

    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.decoder = vae.decoder
        self.patch_size: int = vae.config.get("patch_size") or 1
        self.upsamplers = [upsamplers_of(block) for block in self.decoder.up_blocks]
        self.names = {module: name for name, module in self.decoder.named_modules() if isinstance(module, nn.Conv3d)}
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.data = channels_last(module.weight.data)

    def output_shape(self, latent_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the shape [C, T, H, W] of the video, for latents [1, C, T, H, W]."""
        num_frames, height, width = latent_shape[-3:]
        scale = self.patch_size << sum(map(len, self.upsamplers))
        channels = self.decoder.conv_out.out_channels // self.patch_size**2
        return channels, self.first_frame(num_frames), height * scale, width * scale

    def first_frame(self, index: int) -> int:
        """Return how many frames the first `index` latent frames become: the first becomes one."""
        doublings = sum(upsampler.mode == "upsample3d" for found in self.upsamplers for upsampler in found)
        return 1 + ((index - 1) << doublings) if index else 0

    def decode(self, latents: Tensor, cache: FeatureCache | None) -> Iterator[Tensor]:
        """Yield the frames [1, C, H, W], in [-1, 1], of one latent frame: one of the first, several of others.

        Args:
            latents: [1, C, 1, H, W].
            cache: of this video, changed in place; empty before the first latent frame; None for a picture, the only
                frame of which nothing need be remembered.

        """
        first = not cache
        frame = self.trunk(latents, cache)
        return self.pixels(frame, first, cache, [WHOLE] * (len(self.decoder.up_blocks) + 1))

    def trunk(self, latents: Tensor, cache: FeatureCache | None) -> Tensor:
        """Return what the blocks before the first doubling make of a latent frame, [1, C, H, W].

        Their attention is over all pixels of the frame; what follows sees only some neighbours of each.
        """
        mid = self.decoder.mid_block
        frame = self.vae.post_quant_conv(latents)[:, :, 0].contiguous(memory_format=torch.channels_last)
        frame = self._conv(self.decoder.conv_in, frame, cache)
        frame = self._residual(mid.resnets[0], frame, cache)
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            frame = self._residual(resnet, self._attended(attention, frame), cache)
        return frame

    def pixels(self, frame: Tensor, first: bool, cache: FeatureCache | None, kept: Sequence[slice]) -> Iterator[Tensor]:
        """Yield the frames [1, C, H, W], in [-1, 1], of what the blocks before made of a latent frame.

        Args:
            frame: [1, C, H, W], whose memory is used for others.
            first: whether the latent frame is the video's first.
            cache: of what follows the blocks before, for these rows of the video.
            kept: of what each block makes the rows that are kept, and then those of the last convolution: where
                `frame` is some rows of a picture, the outer ones lack their neighbours.

        """
        for decoded in self._up(0, iter([frame]), first, cache, kept):
            pixels = self._last_conv(activated(self.decoder.norm_out, decoded), cache)
            del decoded  # or it would be kept while the next is made
            patches = pixels[:, :, kept[-1]]
            yield unpatchified(patches, self.patch_size).clamp_(-1.0, 1.0)

    def _up(
        self, level: int, frames: Iterator[Tensor], first: bool, cache: FeatureCache | None, kept: Sequence[slice]
    ) -> Iterator[Tensor]:
        """Yield the frames behind the blocks from `level` on, each before the next is begun."""
        if level == len(self.decoder.up_blocks):
            yield from frames
            return
        for frame in frames:
            made = self._up_block(level, frame, first, cache)
            del frame  # the block's own, which it uses up
            yield from self._up(level + 1, (rows[:, :, kept[level]] for rows in made), first, cache, kept)

    def _up_block(self, level: int, frame: Tensor, first: bool, cache: FeatureCache | None) -> Iterator[Tensor]:
        """Yield what a block makes of a frame: one, or two where it doubles them and this is not the first."""
        block = self.decoder.up_blocks[level]
        parts = dict(block.named_children())
        shortcut = parts["avg_shortcut"](frame[:, :, None], first_chunk=first) if "avg_shortcut" in parts else None
        for resnet in block.resnets:
            frame = self._residual(resnet, frame, cache)
        frames, upsamplers = [frame], upsamplers_of(block)
        for upsampler in upsamplers:
            if upsampler.mode == "upsample3d" and not first:
                frames = [half.clone() for half in self._conv(upsampler.time_conv, frame, cache).chunk(2, dim=1)]
        del frame
        for index in range(len(frames)):
            made = frames.pop(0)  # only now made larger, and not kept
            for upsampler in upsamplers:
                made = self._doubled(upsampler.resample[-1], made)
            yield made if shortcut is None else made.add_(shortcut[:, :, index])
            del made

    def _attended(self, attention: Any, frame: Tensor) -> Tensor:
        """Return what attention, each pixel with each, makes of a frame [1, C, H, W]."""
        attended: Tensor = attention(frame[:, :, None])[:, :, 0]
        return attended

    def _doubled(self, conv: Any, frame: Tensor) -> Tensor:
        """Return a convolution over a frame whose pixels are doubled, [1, C_out, 2H, 2W]."""
        return doubled_conv(conv, frame)

    def _residual(self, block: Any, frame: Tensor, cache: FeatureCache | None) -> Tensor:
        """Return two convolutions, each of norm and activation, added to the frame, whose memory is used for others."""
        convolved = self._of_earlier(block.conv2, frame, cache)  # at once, which lets go of its oldest frame
        shortcut = block.conv_shortcut
        convolved += self._conv(shortcut, frame, cache) if shortcut in self.names else frame
        hidden_states = self._of_earlier(block.conv1, frame, cache)
        self._add(hidden_states, block.conv1, activated(block.norm1, frame), cache)
        self._add(convolved, block.conv2, activated(block.norm2, hidden_states), cache)
        return convolved

    def _conv(self, conv: Any, frame: Tensor, cache: FeatureCache | None) -> Tensor:
        """Return a causal convolution at this frame, [1, C, H, W]."""
        convolved = self._of_earlier(conv, frame, cache)
        self._add(convolved, conv, frame, cache)
        return convolved

    def _of_earlier(self, conv: Any, like: Tensor, cache: FeatureCache | None) -> Tensor:
        """Return the bias and what the remembered frames add to this one, of the size of `like`; forget the oldest."""
        before = [] if cache is None else cache.setdefault(self.names[conv], [])
        num_taps = conv.weight.shape[2]
        bias: Tensor = conv.bias[:, None, None]
        if 1 < num_taps == len(before) + 1 and conv.in_channels == conv.out_channels:
            convolved = conv_in_place(before.pop(0), conv.weight[:, :, 0]).add_(bias)
        else:
            convolved = bias.expand(1, -1, *like.shape[2:]).clone(memory_format=torch.channels_last)
        for age in range(len(before), 0, -1):
            add_conv(convolved, before[-age], conv.weight[:, :, -1 - age])
            if age == num_taps - 1:
                del before[0]
        return convolved

    def _add(self, convolved: Tensor, conv: Any, frame: Tensor, cache: FeatureCache | None) -> None:
        """Add what this frame itself adds, in place, and remember the frame if the convolution looks back."""
        add_conv(convolved, frame, conv.weight[:, :, -1])
        if cache is not None and conv.weight.shape[2] > 1:
            cache[self.names[conv]].append(frame)

    def _last_conv(self, frame: Tensor, cache: FeatureCache | None) -> Tensor:
        """Return the last convolution at this frame, [1, C, H, W], and remember what the frame adds to the next two."""
        conv = self.decoder.conv_out
        if cache is None:
            return F.conv2d(frame, conv.weight[:, :, -1], conv.bias, padding=1)
        now, soon, later = (F.conv2d(frame, conv.weight[:, :, tap], padding=1) for tap in (2, 1, 0))
        before = cache.get(self.names[conv])
        cache[self.names[conv]] = [soon, later] if before is None else [soon + before[1], later]
        now += conv.bias[:, None, None]
        return now if before is None else now + before[0]


def upsamplers_of(block: nn.Module) -> list[Any]:
    """Return what doubles a frame, or the frames, in a block of a decoder: one module or none."""
    parts: dict[str, Any] = dict(block.named_children())
    return [parts["upsampler"]] if "upsampler" in parts else list(parts.get("upsamplers", ()))


def activated(norm: Any, frame: Tensor) -> Tensor:
    """Make a frame SiLU of its RMS norm over channels, [B, C, H, W]; lengths are computed in float32."""
    length = torch.linalg.vector_norm(frame, dim=1, keepdim=True, dtype=torch.float32)
    frame = torch.mul(frame, norm.scale / length.clamp_min(NORM_EPS), out=frame)
    return F.silu(frame.mul_(norm.gamma.view(-1, 1, 1)), inplace=True)


def patchified(pixels: Tensor, patch_size: int) -> Tensor:
    """Return [B, C * patch * patch, T, H, W] of pixels [B, C, T, H * patch, W * patch], columns of a patch first."""
    b, c, t, height, width = pixels.shape
    patches = pixels.view(b, c, t, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchified(pixels: Tensor, patch_size: int) -> Tensor:
    """Return [B, C, H, W] of pixels in patches, [B, C * patch * patch, H, W], columns of a patch first."""
    patches = pixels.reshape(pixels.shape[0], -1, patch_size, patch_size, *pixels.shape[2:])  # B C w h H W
    return patches.permute(0, 1, 4, 3, 5, 2).flatten(4, 5).flatten(2, 3)
