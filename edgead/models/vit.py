"""DINOv2 vision transformers with registers, ViT-S/14 and ViT-B/14: the frozen network of FBFT.

Source: Oquab et al., "DINOv2", arXiv 2304.07193; Darcet et al., "Vision Transformers Need Registers",
arXiv 2309.16588. Parameters have the names and shapes of the published `dinov2_vits14_reg4_pretrain.pth`
and `dinov2_vitb14_reg4_pretrain.pth`, so that these fit as they are; timm's files are renamed.

`ViT` is the network to learn with, `MergedViT` the same function with all folded that folds exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.errors import TrainingError, WeightsError
from edgead.models.files import WeightsInfo, load_strict, read_state_dict, sha256
from edgead.models.folding import IMAGENET_MEAN, IMAGENET_STD

PATCH_PX = 14
REGISTERS = 4
TAPS = (7, 11)
"""Blocks, counted from 0, whose outputs FBFT reads."""

_EPS = 1e-6


@dataclass(frozen=True)
class ViTConfig:
    """What differs between the sizes.

    Attributes:
        dim: Channels of a token.
        heads: Attention heads; they share the channels evenly.
        depth: Number of blocks.
        grid: Patches per side in the position embedding of the file; 37 are 518 px.
    """

    dim: int
    heads: int
    depth: int = 12
    grid: int = 37


CONFIGS = {"s": ViTConfig(384, 6), "b": ViTConfig(768, 12)}


class ViT(nn.Module):
    """A vision transformer with a class token and four registers, which stays as the file has it.

    Call `for_size` after the weights are in and before the first image.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, dim))  # class, patches by rows
        self.register_tokens = nn.Parameter(torch.zeros(1, REGISTERS, dim))
        self.patch_embed = _PatchEmbed(dim)
        self.blocks = nn.ModuleList(_Block(dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, _EPS)
        self.cells = 0  # patches per side of the images, once `for_size` was called
        self.register_buffer("positions", None, persistent=False)

    @torch.no_grad()
    def for_size(self, side_px: int) -> None:
        """Resample the position embedding for square images of this side and keep the result.

        Bicubic with antialiasing, no offset: the rule of the models with registers.

        Raises:
            TrainingError: the side is no multiple of 14 px.
        """
        cells, rest = divmod(side_px, PATCH_PX)
        if rest or cells < 1:
            nearest = [n * PATCH_PX for n in (max(cells, 0), max(cells, 0) + 1) if n]
            raise TrainingError(
                f"images of {side_px} px side do not divide into patches of {PATCH_PX} px;"
                f" take {' or '.join(map(str, nearest))}"
            )
        grid, dim = self.config.grid, self.config.dim
        trained = self.pos_embed[:, 1:].float().reshape(1, grid, grid, dim).permute(0, 3, 1, 2)
        resampled = F.interpolate(
            trained, size=(cells, cells), mode="bicubic", align_corners=False, antialias=True
        )
        self.cells, self.positions = cells, resampled.flatten(2).transpose(1, 2).contiguous()

    def features(self, x: Tensor, taps: Sequence[int] = TAPS) -> list[Tensor]:
        """Outputs of some blocks after the final LayerNorm; blocks behind the last of them do not run.

        Args:
            x: ImageNet-normalised RGB, float32 [N, 3, H, W] with H = W = the side given to `for_size`.
            taps: Blocks, counted from 0.

        Returns:
            For every tap, the patch tokens as a float32 map [N, dim, H / 14, W / 14].

        Raises:
            ValueError: images of another size, or an unknown block.
        """
        self._check(taps)
        side = self.cells * PATCH_PX
        if x.shape[-2:] != (side, side):
            raise ValueError(f"images {tuple(x.shape)}, expected a side of {side} px; call for_size")
        patches = self.patch_embed.proj(x).flatten(2).transpose(1, 2) + self.positions
        prefix = torch.cat([self.cls_token + self.pos_embed[:, :1], self.register_tokens], 1)
        tokens = torch.cat([prefix.expand(len(x), -1, -1), patches], 1)  # N, 5 + patches, dim
        found = {}
        for index, block in enumerate(self.blocks[: max(taps) + 1]):
            tokens = block(tokens)
            if index in taps:
                found[index] = _as_map(self.norm(tokens), self.cells)
        return [found[tap] for tap in taps]

    def merged(self, dtype: torch.dtype, taps: Sequence[int] = TAPS) -> MergedViT:
        """The form to export, for images of the side given to `for_size`.

        Args:
            dtype: Of weights and products: float32 or float16.
            taps: As in `features`.

        Raises:
            ValueError: `for_size` was not called, or an unknown block.
        """
        self._check(taps)
        return MergedViT(self, dtype, tuple(taps))

    def _check(self, taps: Sequence[int]) -> None:
        if not self.cells:
            raise ValueError("the size of the images is not known: call for_size(side_px) first")
        if not taps or not all(0 <= tap < self.config.depth for tap in taps):
            raise ValueError(f"taps {tuple(taps)}, expected blocks from 0 to {self.config.depth - 1}")


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_PX, PATCH_PX)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _heads(self.qkv(x), self.heads)
        return self.proj(_joined(F.scaled_dot_product_attention(q, k, v)))


class _Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, _EPS), nn.LayerNorm(dim, _EPS)
        self.attn, self.mlp = _Attention(dim, heads), _Mlp(dim)
        self.ls1, self.ls2 = _LayerScale(dim), _LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class MergedViT(nn.Module):
    """`ViT.features` as it ships; the ViT is copied, not changed.

    Normalisation is in the patch embedding, LayerScale in the products before it, the attention's scale
    in the query, and the five tokens before the patches are a constant, as the position embedding is.
    The products are in `dtype`. LayerNorm and softmax are in float32, because LayerNorm squares and
    float16 ends at 65504; so is the sum that they read, because every block adds to it.
    """

    def __init__(self, vit: ViT, dtype: torch.dtype, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.dtype, self.taps, self.cells = dtype, taps, vit.cells
        with torch.no_grad():
            mean, std = (255 * x.double().view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
            proj, dim = vit.patch_embed.proj, vit.config.dim
            scaled = proj.weight.double() / std.to(proj.weight.device)
            self.patches = nn.Conv2d(3, dim, PATCH_PX, PATCH_PX).to(scaled.device, dtype)
            self.patches.weight.copy_(scaled)
            # From the rounded weights: an image of the mean colour then stays exact in float16.
            mean = mean.to(scaled.device)
            bias = proj.bias.double() - (self.patches.weight.double() * mean).sum(dim=(1, 2, 3))
            self.patches.bias.copy_(bias)
            rounding = bias - self.patches.bias.double()
            prefix = torch.cat([vit.cls_token + vit.pos_embed[:, :1], vit.register_tokens], 1)
            constant = torch.cat([prefix, vit.positions + rounding], 1)
            self.register_buffer("constant", constant.float())
        self.blocks = nn.ModuleList(_MergedBlock(block, dtype) for block in vit.blocks[: max(taps) + 1])
        self.norm = _copy_of(vit.norm)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """What `ViT.features` gives, for images that are not normalised.

        Args:
            x: RGB 0..255, float [N, 3, H, W] with H = W = the side of `for_size`.

        Returns:
            For every tap a float32 map [N, dim, H / 14, W / 14].
        """
        patches = self.patches(x.to(self.dtype)).float().flatten(2).transpose(1, 2)
        tokens = F.pad(patches, (0, 0, 1 + REGISTERS, 0)) + self.constant
        found = {}
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in self.taps:
                found[index] = _as_map(self.norm(tokens), self.cells)
        return [found[tap] for tap in self.taps]


class _MergedBlock(nn.Module):
    def __init__(self, block: _Block, dtype: torch.dtype) -> None:
        super().__init__()
        attn, mlp, dim = block.attn, block.mlp, block.attn.proj.in_features
        self.dtype, self.heads = dtype, attn.heads
        query = torch.ones(3 * dim, dtype=torch.float64)
        query[:dim] = (dim // attn.heads) ** -0.5
        self.norm1, self.norm2 = _copy_of(block.norm1), _copy_of(block.norm2)
        self.qkv = _scaled(attn.qkv, query, dtype)
        self.proj = _scaled(attn.proj, block.ls1.gamma, dtype)
        self.fc1 = _scaled(mlp.fc1, torch.ones(mlp.fc1.out_features), dtype)
        self.fc2 = _scaled(mlp.fc2, block.ls2.gamma, dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _heads(self.qkv(self.norm1(x).to(self.dtype)), self.heads)
        attention = torch.softmax((q @ k.transpose(-2, -1)).float(), dim=-1).to(self.dtype)
        x = x + self.proj(_joined(attention @ v)).float()
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x).to(self.dtype)))).float()


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, T, 3 dim] to query, key and value [N, heads, T, dim / heads]."""
    count, tokens, width = qkv.shape
    split = qkv.reshape(count, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return split[0], split[1], split[2]


def _joined(x: Tensor) -> Tensor:
    """[N, heads, T, dim / heads] to [N, T, dim]."""
    return x.transpose(1, 2).flatten(2)


def _as_map(tokens: Tensor, cells: int) -> Tensor:
    """The patches of [N, 5 + cells^2, dim] as a float32 map [N, dim, cells, cells]."""
    patches = tokens[:, 1 + REGISTERS :].float().transpose(1, 2)
    return patches.unflatten(2, (cells, cells))


def _copy_of(norm: nn.LayerNorm) -> nn.LayerNorm:
    copy = nn.LayerNorm(norm.normalized_shape, norm.eps)
    copy.load_state_dict(norm.state_dict())
    return copy.to(norm.weight.device)


@torch.no_grad()
def _scaled(linear: nn.Linear, factor: Tensor, dtype: torch.dtype) -> nn.Linear:
    """The layer with every output multiplied by its factor; computed in float64."""
    factor = factor.double().to(linear.weight.device)
    result = nn.Linear(linear.in_features, linear.out_features, device=factor.device, dtype=dtype)
    result.weight.copy_(factor.unsqueeze(1) * linear.weight.double())
    result.bias.copy_(factor * linear.bias.double())
    return result


def load_vit(path: Path | str) -> tuple[ViT, WeightsInfo]:
    """The frozen ViT of a file in the published layout or in timm's; call `for_size` before use.

    Raises:
        WeightsError: no DINOv2 ViT-S/14 or ViT-B/14 with registers; or something in it is missing,
            surplus or mis-shaped.
    """
    path = Path(path)
    state, metadata = read_state_dict(path)
    position = state.get("pos_embed")
    if position is None or position.ndim != 3 or "patch_embed.proj.weight" not in state:
        raise WeightsError(
            f"{path} is no DINOv2 vision transformer: expected pos_embed [1, patches, dim] and"
            f" patch_embed.proj.weight, as in Meta's and timm's files; got {', '.join(list(state)[:5])}"
        )
    if not {"register_tokens", "reg_token"} & set(state):
        raise WeightsError(
            f"{path} holds a vision transformer without register tokens, whose position embedding needs"
            " another rule; take dinov2_vits14_reg4_pretrain.pth or dinov2_vitb14_reg4_pretrain.pth"
        )
    sizes = {config.dim: size for size, config in CONFIGS.items()}
    size = sizes.get(position.shape[2])
    if size is None:
        known = ", ".join(f"{dim} (ViT-{name.upper()}/14)" for dim, name in sizes.items())
        raise WeightsError(f"{path} has tokens of {position.shape[2]} channels, expected {known}")
    layout = "official" if "register_tokens" in state else "timm"
    if layout == "timm":
        state = from_timm(state)
    state.pop("mask_token", None)  # for training DINOv2
    vit = ViT(CONFIGS[size])
    load_strict(vit, state, path)
    info = WeightsInfo(path.name, sha256(path), f"dinov2_vit{size}14_reg ({layout} keys)", metadata)
    return vit.eval().requires_grad_(False), info


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of timm's `vit_*_patch14_reg4_dinov2` under the published names.

    timm has added the class token's position to the class token, so that the position is 0 here.
    """
    renamed = {"register_tokens" if key == "reg_token" else key: x for key, x in state.items()}
    position = renamed["pos_embed"]
    renamed["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], 1)
    return renamed
