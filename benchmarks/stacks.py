"""What the benchmarks of transformers measure: for each family its sizes, its inputs, and the transformer of each side.

Each stack comes in three sizes: `small` for one thread of a CPU, `full` as published, and `tiny`, which only shows that
the code runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from safelight.acceleration.fused.fusion import fusable_layers
from safelight.acceleration.fused.operations import OPERATIONS
from safelight.families.flux.transformer import FluxArchitecture, FluxTransformer2DModel
from safelight.families.qwen_image.transformer import QwenImageArchitecture, QwenImageTransformer2DModel
from safelight.families.wan.transformer import WanArchitecture, WanTransformer3DModel
from safelight.layers.rotary import rotary_table

Grid = tuple[int, int, int]
"""Tokens of a picture or video: frames, rows, columns."""
Noise = Callable[..., Tensor]
"""Random numbers of the shape given."""


def use_operators(module: nn.Module) -> None:
    """Let every layer that has a fused form use its operator, unchecked; without a kernel it is the plain form."""
    for layer in fusable_layers(module):
        if layer.plain.__name__ in OPERATIONS:
            layer.operation = OPERATIONS[layer.plain.__name__].fused


def unfuse(module: nn.Module) -> None:
    """Let every layer use the plain form."""
    for layer in fusable_layers(module):
        layer.operation = layer.plain


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward, as either side takes them.

    Attributes:
        activations: of both sides, in the model's dtype.
        common: of both sides, in a dtype of their own.
        ours: of Safelight's transformer alone; its rotary table is made once a request.
        diffusers: of Diffusers' transformer alone; it makes its rotary table at every step.

    """

    activations: Mapping[str, Tensor]
    ours: Mapping[str, Any]
    diffusers: Mapping[str, Any]
    common: Mapping[str, Any] = field(default_factory=dict)

    def for_safelight(self) -> dict[str, Any]:
        """Return the arguments of Safelight's transformer."""
        return {**self.activations, **self.common, **self.ours}

    def for_diffusers(self) -> dict[str, Any]:
        """Return the arguments of Diffusers' transformer."""
        return {**self.activations, **self.common, **self.diffusers, "return_dict": False}

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return the same inputs with activations in another dtype."""
        return replace(self, activations={name: tensor.to(dtype) for name, tensor in self.activations.items()})


@dataclass(frozen=True)
class Size:
    """One size of a stack.

    Attributes:
        architecture: the numbers of its transformer.
        grids: tokens of what is made, by what it is.
        num_text: tokens of text.

    """

    architecture: Any
    grids: Mapping[str, Grid]
    num_text: int


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kind: their name for people, the module's attribute, and the architecture's field of how many."""

    label: str
    attribute: str
    field: str


@dataclass(frozen=True)
class Stack:
    """A family's transformer.

    Attributes:
        name: for people.
        transformer_cls: ours.
        reference: Diffusers' class.
        blocks: the kinds of blocks.
        make_inputs: inputs for an architecture, a grid, tokens of text, a source of noise, and a device.
        forward_flops: operations of one forward's matrix products, a multiplication and an addition each counting one,
            for an architecture, tokens of what is made, and tokens of text.
        solver: Diffusers' class, and what its repositories set.
        time_scale: the transformer's unit of time, in the solver's timesteps.
        num_branches: forwards of a step, with guidance as the model is used.
        in_float32: names of parts that stay in float32.
        small, full, tiny: sizes.

    """

    name: str
    transformer_cls: type[nn.Module]
    reference: str
    blocks: tuple[Blocks, ...]
    make_inputs: Callable[[Any, Grid, int, Noise, str], Inputs]
    forward_flops: Callable[[Any, int, int], int]
    solver: tuple[str, Mapping[str, Any]]
    time_scale: float
    num_branches: int
    small: Size
    full: Size
    tiny: Size
    in_float32: tuple[str, ...] = ()

    def inputs(self, size: Size, grid: Grid, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """Return random inputs."""
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        return self.make_inputs(size.architecture, grid, size.num_text, noise, device).to(dtype)

    def diffusers_transformer(self, architecture: Any, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
        """Return Diffusers' transformer with random weights."""
        import diffusers

        cls = getattr(diffusers, self.reference)
        known = inspect.signature(cls.__init__).parameters
        torch.manual_seed(0)
        with default_dtype(dtype), torch.device(device):
            made = cls(**{name: value for name, value in asdict(architecture).items() if name in known})
        return self._ready(made)

    def random_transformer(self, architecture: Any, dtype: torch.dtype, device: str) -> nn.Module:
        """Return Safelight's transformer with random weights."""
        with default_dtype(dtype), torch.device(device):
            return self._ready(self.transformer_cls(architecture))

    def our_transformer(self, architecture: Any, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return Safelight's transformer over the very tensors of a state dict; every key has to fit."""
        with torch.device("meta"):
            transformer = self.transformer_cls(architecture)
        transformer.load_state_dict(dict(weights), assign=True)
        return transformer.eval().requires_grad_(False)

    def new_solver(self) -> Any:
        """Return a solver of its own."""
        import diffusers

        name, config = self.solver
        return getattr(diffusers, name)(**config)

    def _ready(self, transformer: nn.Module) -> nn.Module:
        for name, parameter in transformer.named_parameters():
            if not set(self.in_float32).isdisjoint(name.split(".")):
                parameter.data = parameter.data.float()
        return transformer.eval().requires_grad_(False)

    def count_per_block(self, transformer: nn.Module, count: Callable[[], int]) -> list[int]:
        """Return what `count` counts in a block of each kind, and last in all that is no block.

        Both sides' transformers name their blocks alike; for the time of a count they have one or two of each.
        """
        kinds = [(kind.attribute, list(getattr(transformer, kind.attribute))) for kind in self.blocks]

        def counted(*, doubled: str = "") -> int:
            for attribute, blocks in kinds:
                setattr(transformer, attribute, nn.ModuleList(blocks[: 2 if attribute == doubled else 1]))
            return count()

        try:
            least = counted()
            each = [counted(doubled=attribute) - least for attribute, _ in kinds]
        finally:
            for attribute, blocks in kinds:
                setattr(transformer, attribute, nn.ModuleList(blocks))
        return [*each, least - sum(each)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` that of fresh parameters, so that a large model never exists in another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def num_tokens(grid: Grid) -> int:
    """Return how many tokens a grid has."""
    return grid[0] * grid[1] * grid[2]


def picture(side: int) -> dict[str, Grid]:
    """Return the grid of a square picture, whose tokens are 16 pixels along each side."""
    return {f"{side}x{side}": (1, side // 16, side // 16)}


def flux_inputs(architecture: FluxArchitecture, grid: Grid, num_text: int, noise: Noise, device: str) -> Inputs:
    """Return latents [1, S, C], text [1, S_text, C] and its pooled vector; text lies at the origin."""
    rows, columns = (torch.arange(size) for size in grid[1:])
    positions = torch.cartesian_prod(rows, columns).float()
    img_ids = torch.cat((torch.zeros(len(positions), 1), positions), dim=1).to(device)
    txt_ids = torch.zeros(num_text, 3, device=device)
    freqs_cis = rotary_table(torch.cat((txt_ids, img_ids)), architecture.axes_dims_rope)
    return Inputs(
        activations={
            "hidden_states": noise(1, num_tokens(grid), architecture.in_channels),
            "encoder_hidden_states": noise(1, num_text, architecture.joint_attention_dim),
            "pooled_projections": noise(1, architecture.pooled_projection_dim),
            "timestep": torch.tensor([0.7], device=device),
        },
        common={"guidance": torch.tensor([3.5], device=device)},
        ours={"freqs_cis": freqs_cis},
        diffusers={"txt_ids": txt_ids, "img_ids": img_ids},
    )


def qwen_image_inputs(
    architecture: QwenImageArchitecture, grid: Grid, num_text: int, noise: Noise, device: str
) -> Inputs:
    """Return latents [1, S, C] and text [1, S_text, C], whose positions go on where the centred picture's end."""
    first, centred = max(grid[1:]) // 2, [torch.arange(size) - (size - size // 2) for size in grid[1:]]
    text_ids = torch.arange(first, first + num_text)[:, None].expand(-1, 3)
    ids = torch.cat((text_ids, torch.cartesian_prod(torch.arange(grid[0]), *centred))).to(device)
    freqs_cis = rotary_table(ids, architecture.axes_dims_rope, dtype=torch.float32)
    return Inputs(
        activations={
            "hidden_states": noise(1, num_tokens(grid), architecture.in_channels),
            "encoder_hidden_states": noise(1, num_text, architecture.joint_attention_dim),
            "timestep": torch.tensor([0.7], device=device),
        },
        ours={"freqs_cis": freqs_cis},
        diffusers={"img_shapes": [[grid]]},
    )


def wan_inputs(architecture: WanArchitecture, grid: Grid, num_text: int, noise: Noise, device: str) -> Inputs:
    """Return latents [1, C, T, H, W] and text [1, S_text, C]; timesteps stay in float32."""
    frames, height, width = (size * patch for size, patch in zip(grid, architecture.patch_size, strict=True))
    positions = torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid))
    axis = 2 * (architecture.attention_head_dim // 6)
    axes_dims = (architecture.attention_head_dim - 2 * axis, axis, axis)
    return Inputs(
        activations={
            "hidden_states": noise(1, architecture.in_channels, frames, height, width),
            "encoder_hidden_states": noise(1, num_text, architecture.text_dim),
        },
        ours={"timestep": torch.tensor([[700.0]], device=device), "freqs_cis": rotary_table(positions, axes_dims)},
        diffusers={"timestep": torch.tensor([700.0], device=device)},
    )


def flux_flops(architecture: FluxArchitecture, num_image: int, num_text: int) -> int:
    """Count: a token takes 12 C² weights in either kind of block.

    In two streams 4 C² of attention's projections and 8 C² of the MLP, in one stream 3 + 4 + 5. Attention adds S C for
    the scores and as much for the values.
    """
    dim, total = architecture.dim, num_image + num_text
    num_blocks = architecture.num_layers + architecture.num_single_layers
    in_blocks = num_blocks * (12 * dim**2 * total + 2 * total**2 * dim)
    modulation = dim**2 * (12 * architecture.num_layers + 3 * architecture.num_single_layers + 2)
    at_the_ends = dim * (2 * num_image * architecture.in_channels + num_text * architecture.joint_attention_dim)
    return 2 * (in_blocks + modulation + at_the_ends)


def qwen_image_flops(architecture: QwenImageArchitecture, num_image: int, num_text: int) -> int:
    """Count: as in FLUX's blocks of two streams."""
    dim, total = architecture.dim, num_image + num_text
    in_blocks = architecture.num_layers * (12 * dim**2 * (total + 1) + 2 * total**2 * dim)
    at_the_ends = dim * (2 * num_image * architecture.in_channels + num_text * architecture.joint_attention_dim)
    return 2 * (in_blocks + at_the_ends)


def wan_flops(architecture: WanArchitecture, num_video: int, num_text: int) -> int:
    """Count: a token takes 6 C² weights in the projections of both attentions, and the MLP's; text takes 2 C²."""
    dim = architecture.dim
    weights = (6 * dim**2 + 2 * dim * architecture.ffn_dim) * num_video + 2 * dim**2 * num_text
    attention = 2 * num_video * (num_video + num_text) * dim
    at_the_ends = dim * (8 * num_video * architecture.in_channels + num_text * (architecture.text_dim + dim))
    return 2 * (architecture.num_layers * (weights + attention) + at_the_ends)


EULER = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
UNIPC = ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0})
SMALL_PICTURE, TINY_PICTURES = picture(512), {**picture(64), **picture(32)}

STACKS: Mapping[str, Stack] = {
    "flux": Stack(
        name="FLUX",
        transformer_cls=FluxTransformer2DModel,
        reference="FluxTransformer2DModel",
        blocks=(
            Blocks("two-stream", "transformer_blocks", "num_layers"),
            Blocks("one-stream", "single_transformer_blocks", "num_single_layers"),
        ),
        make_inputs=flux_inputs,
        forward_flops=flux_flops,
        solver=EULER,
        time_scale=0.001,
        num_branches=1,
        small=Size(
            FluxArchitecture(
                num_layers=2,
                num_single_layers=4,
                attention_head_dim=64,
                num_attention_heads=12,
                joint_attention_dim=768,
                guidance_embeds=True,
                axes_dims_rope=(8, 28, 28),
            ),
            SMALL_PICTURE,
            num_text=64,
        ),
        full=Size(FluxArchitecture(guidance_embeds=True), {**picture(1024), **picture(512)}, num_text=512),
        tiny=Size(
            FluxArchitecture(
                num_layers=2, num_single_layers=3, num_attention_heads=2, joint_attention_dim=64, guidance_embeds=True
            ),
            TINY_PICTURES,
            num_text=16,
        ),
    ),
    "qwen_image": Stack(
        name="Qwen-Image",
        transformer_cls=QwenImageTransformer2DModel,
        reference="QwenImageTransformer2DModel",
        blocks=(Blocks("block", "transformer_blocks", "num_layers"),),
        make_inputs=qwen_image_inputs,
        forward_flops=qwen_image_flops,
        solver=EULER,
        time_scale=0.001,
        num_branches=2,
        small=Size(
            QwenImageArchitecture(num_layers=4, joint_attention_dim=768, attention_head_dim=128, num_attention_heads=6),
            SMALL_PICTURE,
            num_text=64,
        ),
        full=Size(QwenImageArchitecture(), {**picture(1024), **picture(512)}, num_text=128),
        tiny=Size(
            QwenImageArchitecture(
                num_layers=2,
                joint_attention_dim=64,
                axes_dims_rope=(4, 6, 6),
                attention_head_dim=16,
                num_attention_heads=2,
            ),
            TINY_PICTURES,
            num_text=16,
        ),
    ),
    "wan": Stack(
        name="Wan 2.1",
        transformer_cls=WanTransformer3DModel,
        reference="WanTransformer3DModel",
        blocks=(Blocks("block", "blocks", "num_layers"),),
        make_inputs=wan_inputs,
        forward_flops=wan_flops,
        solver=UNIPC,
        time_scale=1.0,
        num_branches=2,
        in_float32=WanTransformer3DModel._keep_in_fp32_modules,
        small=Size(
            WanArchitecture(num_layers=4, text_dim=768, ffn_dim=4480, attention_head_dim=128, num_attention_heads=6),
            {"65 frames of 128x128": (17, 8, 8)},
            num_text=64,
        ),
        full=Size(
            WanArchitecture(num_layers=30, num_attention_heads=12, ffn_dim=8960),
            {"81 frames of 832x480": (21, 30, 52)},
            num_text=512,
        ),
        tiny=Size(
            WanArchitecture(
                num_layers=2, text_dim=64, ffn_dim=64, freq_dim=32, attention_head_dim=16, num_attention_heads=2
            ),
            {"9 frames of 64x32": (3, 2, 4)},
            num_text=16,
        ),
    ),
}
