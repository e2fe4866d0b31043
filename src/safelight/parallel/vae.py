"""VAE parallelism: each rank decodes a band of the picture's rows.

A convolution takes the rows next to its band from the neighbours, a group norm takes its moments from all ranks, and
the one attention in the middle, where pictures are small, is computed over all rows on every rank. Nothing else is
computed twice, and results are the same up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.layers.causal_vae import CausalDecoder, FeatureCache
from safelight.layers.convolution import doubled_conv
from safelight.parallel.collectives import Communicator


class RowBands:
    """Which rows each rank has. A picture with fewer rows than there are ranks is whole on each.

    Args:
        ranks: among which the rows are divided.

    """

    def __init__(self, ranks: Communicator) -> None:
        self.ranks = ranks
        self.edges: tuple[int, ...] = (0, 1)  # of the latents: rank r has the rows from edges[r] to edges[r + 1]

    def begin(self, height: int) -> None:
        """Take in the height of the latents that are decoded next."""
        size = self.ranks.size
        self.edges = tuple(rank * height // size for rank in range(size + 1)) if height >= size else (0, height)

    @property
    def is_divided(self) -> bool:
        """Whether this decode is divided."""
        return len(self.edges) > 2

    def own(self, whole: Tensor) -> Tensor:
        """Return this rank's rows of [B, C, H, W], at whatever scale."""
        if not self.is_divided:
            return whole
        scale = whole.shape[2] // self.edges[-1]
        return whole[:, :, self.edges[self.ranks.rank] * scale : self.edges[self.ranks.rank + 1] * scale]

    def whole(self, own: Tensor) -> Tensor:
        """Return the rows of all ranks, given this rank's, [B, C, rows, W]."""
        if not self.is_divided:
            return own
        rows = [below - above for above, below in zip(self.edges, self.edges[1:], strict=False)]
        scale = own.shape[2] // rows[self.ranks.rank]
        filled = F.pad(own, (0, 0, 0, max(rows) * scale - own.shape[2]))
        bands = self.ranks.all_gather_list(filled)
        return torch.cat([band[:, :, : count * scale] for band, count in zip(bands, rows, strict=True)], dim=2)

    def framed(self, own: Tensor, halo: int) -> Tensor:
        """Return [B, C, halo + rows + halo, W]: the neighbours' rows around this rank's, zeros beyond the picture."""
        if halo == 0:
            return own
        above = below = None
        if self.is_divided:
            above, below = self.ranks.exchange_edges(own[:, :, :halo], own[:, :, -halo:])
        nothing = torch.zeros_like(own[:, :, :halo])
        return torch.cat((nothing if above is None else above, own, nothing if below is None else below), dim=2)

    def moments(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance, float32 [B, G, 1], over the last dimension of [B, G, N] on all ranks.

        Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
        """
        mean = groups.mean(-1)
        distances = (groups - mean[..., None]).square().sum(-1)
        own = torch.stack((torch.full_like(mean, groups.shape[-1]), mean, distances)).double()
        counts, means, squares = torch.stack(self.ranks.all_gather_list(own) if self.is_divided else [own]).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        return mean.float()[..., None], variance.float()[..., None]


def divide_decoder(decoder: nn.Module, bands: RowBands) -> None:
    """Let a decoder of the libraries' `AutoencoderKL` work on this rank's rows; it is given and returns whole pictures.

    Args:
        decoder: changed in place, by hooks and by norms that ask the other ranks.
        bands: which rows they are.

    """
    decoder.register_forward_pre_hook(lambda _, args: _begin(bands, args))
    decoder.register_forward_hook(lambda _, args, pixels: bands.whole(pixels))
    attentions = [(name, part) for name, part in decoder.named_modules() if name.split(".")[-2:-1] == ["attentions"]]
    for _, attention in attentions:
        attention.register_forward_pre_hook(lambda _, args: (bands.whole(args[0]), *args[1:]))
        attention.register_forward_hook(lambda _, args, attended: bands.own(attended))
    inside = tuple(f"{name}." for name, _ in attentions)
    for name, module in list(decoder.named_modules()):
        if name.startswith(inside):
            continue
        if isinstance(module, nn.GroupNorm):
            decoder.set_submodule(name, GroupNormOverRanks(module, bands))
        elif isinstance(module, nn.Conv2d) and isinstance(module.padding, tuple) and module.padding[0]:
            assert module.padding[0] == module.kernel_size[0] // 2 and module.stride == (1, 1), f"{name} keeps the size"
            halo, module.padding = module.padding[0], (0, module.padding[1])
            module.register_forward_pre_hook(lambda _, args, halo=halo: (bands.framed(args[0], halo),))


def _begin(bands: RowBands, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Divide a decoder's first argument, latents [B, C, H, W]."""
    bands.begin(args[0].shape[2])
    return (bands.own(args[0]), *args[1:])


class GroupNormOverRanks(nn.Module):
    """A group norm over a picture whose rows lie on several ranks.

    Args:
        norm: with its weights.
        bands: which rows they are.

    """

    def __init__(self, norm: nn.GroupNorm, bands: RowBands) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.bands = bands

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [B, C, rows, W]; computed in float32."""
        groups = hidden_states.float().reshape(hidden_states.shape[0], self.num_groups, -1)
        mean, variance = self.bands.moments(groups)
        normed = ((groups - mean) * torch.rsqrt(variance + self.eps)).view(hidden_states.shape)
        return torch.addcmul(self.bias[:, None, None], normed, self.weight[:, None, None]).to(hidden_states.dtype)


class BandedCausalDecoder(CausalDecoder):
    """The walk over a causal VAE's decoder, over this rank's rows; the frames that it yields are whole.

    What it remembers of a frame has the neighbours' rows around it, so that they are asked for once.

    Args:
        vae: the library's module.
        ranks: among which the rows are divided.

    """

    def __init__(self, vae: Any, ranks: Communicator) -> None:
        super().__init__(vae)
        self.bands = RowBands(ranks)

    def decode(self, latents: Tensor, cache: FeatureCache | None) -> Iterator[Tensor]:
        """Yield the frames [1, C, H, W], in [-1, 1], of one latent frame [1, C, 1, H, W]."""
        cache = {} if cache is None else cache
        self.bands.begin(latents.shape[3])
        own = self.bands.own(latents[:, :, 0])[:, :, None]
        for frame in super().decode(own, cache):
            yield self.bands.whole(frame)

    def _attended(self, attention: Any, frame: Tensor) -> Tensor:
        """Attend over all rows, and keep those of this rank."""
        return self.bands.own(super()._attended(attention, self.bands.whole(frame)))

    def _doubled(self, conv: Any, frame: Tensor) -> Tensor:
        """Convolve doubled pixels; a neighbour's row is two of them."""
        return doubled_conv(conv, self.bands.framed(frame, 1))[:, :, 2:-2]

    def _of_earlier(self, conv: Any, like: Tensor, cache: FeatureCache | None) -> Tensor:
        """Return the bias and what the remembered frames add to this one, of the size of `like`; forget the oldest."""
        assert cache is not None
        before, num_taps = cache.setdefault(self.names[conv], []), conv.weight.shape[2]
        bias: Tensor = conv.bias[:, None, None]
        convolved = bias.expand(1, -1, *like.shape[2:]).contiguous(memory_format=torch.channels_last)
        for age in range(len(before), 0, -1):
            convolved += conv_of_framed(before[-age], conv.weight[:, :, -1 - age])
        if len(before) == num_taps - 1:
            del before[:1]
        return convolved

    def _add(self, convolved: Tensor, conv: Any, frame: Tensor, cache: FeatureCache | None) -> None:
        """Add what this frame itself adds, in place, and remember the frame if the convolution looks back."""
        framed = self.bands.framed(frame, conv.weight.shape[3] // 2)
        convolved += conv_of_framed(framed, conv.weight[:, :, -1])
        if conv.weight.shape[2] > 1:
            assert cache is not None
            cache[self.names[conv]].append(framed)

    def _last_conv(self, frame: Tensor, cache: FeatureCache | None) -> Tensor:
        """Return the last convolution at this frame, [1, C, rows, W]; it remembers as the others do."""
        return self._conv(self.decoder.conv_out, frame, cache)


def decode_at_once(decoder: CausalDecoder, latents: Tensor) -> Tensor:
    """Return the pixels [B, C, T, H, W] of latents of the same form, all frames at once."""
    videos = []
    for video in torch.split(latents, 1):
        cache: FeatureCache = {}
        frames = [frame for latent in torch.split(video, 1, dim=2) for frame in decoder.decode(latent, cache)]
        videos.append(torch.stack(frames, dim=2))
    return torch.cat(videos)


def conv_of_framed(framed: Tensor, weight: Tensor) -> Tensor:
    """Return a convolution [1, C_out, rows, W] of a frame with as many rows around it as the weight needs."""
    return F.conv2d(framed, weight, padding=(0, weight.shape[3] // 2))
