"""The blocks of the networks in `unet`: attention, resampling, residual blocks."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .nn import (
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    zero_module,
)

# What `set_attention_backend` offers: a context for each call of the attention kernel. Fused
# kernels have no second derivative; the mathematical one is made of differentiable operations.
ATTENTION_BACKENDS: dict[str, Callable[[], Any]] = {
    "auto": nullcontext,
    "math": partial(sdpa_kernel, SDPBackend.MATH),
}


class ChoosesAttention(nn.Module):
    """A module with attention somewhere inside."""

    def set_attention_backend(self, name: str) -> None:
        """Choose how every attention inside is computed; it holds until the next call.

        "auto" leaves the choice to PyTorch; "math" can be differentiated twice, and needs memory
        for the matrix of weights. The choice is kept in the modules, not in a context around
        `forward`, so it also holds where a checkpointed block is recomputed during backward.

        Raises:
            ValueError: there is no such name.
        """
        if name not in ATTENTION_BACKENDS:
            names = sorted(ATTENTION_BACKENDS)
            raise ValueError(f"attention backend must be one of {names}, got {name!r}")
        for module in self.modules():
            if isinstance(module, QKVAttention):
                module.backend = name


class QKVAttention(ChoosesAttention):
    """Scaled dot-product attention in `n_heads` heads; channels are ordered (q k v), head."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.backend = "auto"

    def _split(self, qkv: Tensor) -> Tensor:
        """Reshape [N, 3 * H * C, T] to [N, 3, H, C, T]."""
        n, _, length = qkv.shape
        return qkv.reshape(n, 3, self.n_heads, -1, length)

    def forward(self, qkv: Tensor) -> Tensor:
        """Let T positions attend to each other: [N, 3 * H * C, T] -> [N, H * C, T].

        On CPU the attention is done in float32 at least, autocast or not: the fused kernel is
        several times slower in bfloat16.
        """
        n, width, length = qkv.shape
        assert width % (3 * self.n_heads) == 0, (qkv.shape, self.n_heads)
        on_cpu = qkv.device.type == "cpu"
        dtype = torch.promote_types(qkv.dtype, torch.float32) if on_cpu else qkv.dtype
        # Fused kernels want the channels of a head next to each other in memory.
        heads = self._split(qkv).transpose(-1, -2)  # [N, 3, H, T, C]
        q, k, v = heads.to(dtype, memory_format=torch.contiguous_format).contiguous().unbind(1)
        plain = torch.autocast("cpu", enabled=False) if on_cpu else nullcontext()
        with plain, ATTENTION_BACKENDS[self.backend]():
            out = F.scaled_dot_product_attention(q, k, v)  # [N, H, T, C]
        return out.to(qkv.dtype).transpose(-1, -2).reshape(n, width // 3, length)


class QKVAttentionLegacy(QKVAttention):
    """`QKVAttention` with channels ordered head, (q k v), as in the older checkpoints."""

    def _split(self, qkv: Tensor) -> Tensor:
        n, _, length = qkv.shape
        return qkv.reshape(n, self.n_heads, 3, -1, length).transpose(1, 2)


class AttentionPool2d(ChoosesAttention):
    """Pool an image by letting its mean attend to its pixels (CLIP, Radford et al., 2021).

    Args:
        spacial_dim: height and width of the images.
        embed_dim: their channels.
        num_heads_channels: channels of each head.
        output_dim: channels of the result; None means `embed_dim`.

    Raises:
        ValueError: the channels do not fill a head, or not a whole number of heads.
    """

    def __init__(
        self,
        spacial_dim: int,
        embed_dim: int,
        num_heads_channels: int,
        output_dim: int | None = None,
    ):
        super().__init__()
        self.positional_embedding = nn.Parameter(
            torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5
        )
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = count_heads(embed_dim, 1, num_heads_channels)
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Pool [N, C, spacial_dim, spacial_dim] to [N, output_dim]."""
        x = x.flatten(2)  # [N, C, H * W]
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)  # [N, C, 1 + H * W]
        assert x.shape[1:] == self.positional_embedding.shape, (
            x.shape,
            self.positional_embedding.shape,
        )
        x = x + self.positional_embedding.to(x.dtype)
        x = self.c_proj(self.attention(self.qkv_proj(x)))
        return x[:, :, 0]


class TimestepBlock(nn.Module):
    """A module whose `forward` takes the timestep embedding as its second argument."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the module to x [N, C, ...] given the embedding emb [N, E]."""
        raise NotImplementedError


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the timestep embedding to those of its modules that take it."""

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """Apply the modules in turn to x [N, C, ...] given emb [N, E].

        Args:
            x: activations.
            emb: embedding of the timestep.
            skip: further channels [N, C', ...] for the first module.
        """
        layers = list(self)
        if skip is not None and isinstance(layers[0], ResBlock):
            x = layers.pop(0)(x, emb, skip)
        elif skip is not None:
            x = torch.cat([x, skip], dim=1)
        for layer in layers:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Double height and width (the last two of 3 dimensions) by repetition, then maybe convolve.

    Args:
        channels: channels of the input.
        use_conv: whether a 3-wide convolution follows.
        dims: number of spatial dimensions.
        out_channels: channels after the convolution; None means `channels`.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, self.channels, self.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge [N, channels, H, W] to [N, out_channels, 2H, 2W]."""
        assert x.shape[1] == self.channels, (x.shape, self.channels)
        factors = (1.0, 2.0, 2.0) if self.dims == 3 else 2.0
        x = F.interpolate(x, scale_factor=factors, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve height and width (the last two of 3 dimensions) by convolution or averaging.

    Args:
        channels: channels of the input.
        use_conv: whether a 3-wide convolution of stride 2 does it, or average pooling.
        dims: number of spatial dimensions.
        out_channels: channels after the convolution; None means `channels`.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, self.channels, self.out_channels, 3, stride=stride, padding=1)
        else:
            assert self.channels == self.out_channels, (self.channels, self.out_channels)
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Shrink [N, channels, H, W] to [N, out_channels, H / 2, W / 2]."""
        assert x.shape[1] == self.channels, (x.shape, self.channels)
        return self.op(x)


class ResBlock(TimestepBlock):
    """A residual block that the timestep embedding shifts, and maybe scales (ADM, section 3).

    Args:
        channels: channels of the input.
        emb_channels: width of the timestep embedding.
        dropout: probability to drop an element.
        out_channels: channels of the output; None means `channels`.
        use_conv: where the channels change, convolve the skip connection 3 wide rather than 1.
        use_scale_shift_norm: scale and shift after the second normalization (FiLM) instead of
            adding the embedding before it.
        dims: number of spatial dimensions.
        use_checkpoint: recompute the block in the backward pass to save memory.
        up: double the resolution inside the block.
        down: halve it.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down
        conv = partial(conv_nd, dims, out_channels=self.out_channels, padding=1, kernel_size=3)
        self.in_layers = nn.Sequential(normalization(channels), SiLU(), conv(channels))
        resample = Upsample if up else Downsample if down else None
        self.h_upd = resample(channels, False, dims) if resample else nn.Identity()
        self.x_upd = resample(channels, False, dims) if resample else nn.Identity()
        emb_out_channels = (2 if use_scale_shift_norm else 1) * self.out_channels
        self.emb_layers = nn.Sequential(SiLU(), linear(emb_channels, emb_out_channels))
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv(self.out_channels)),
        )
        self.skip_connection = nn.Identity()
        if self.out_channels != channels:
            width = 3 if use_conv else 1
            self.skip_connection = conv_nd(
                dims, channels, self.out_channels, width, padding=width // 2
            )

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """Apply the block: x [N, channels, ...], emb [N, E] -> [N, out_channels, ...].

        With `skip` the last of the channels come from there. It is joined to x within what a
        checkpointed block recomputes, so that the joint tensor is not kept.
        """
        inputs = (x, emb) if skip is None else (x, emb, skip)
        return checkpoint(self._forward, inputs, (), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([x, skip], dim=1)
        norm, activation, conv = self.in_layers
        h = self.h_upd(activation(norm(x)))
        x = self.x_upd(x)
        h = conv(h)  # [N, out_channels, ...]
        film = self.emb_layers(emb)  # [N, out_channels or twice as many]
        norm, *rest = self.out_layers
        if self.use_scale_shift_norm:
            h = _modulated(norm, h, *film.chunk(2, dim=1))
        else:
            h = norm(h + _as_images(film, h))
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


def _modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalize x [N, C, ...], then scale and shift it by [N, C] (FiLM)."""
    if isinstance(norm, GroupNorm32):
        return norm(x, scale, shift)
    return norm(x) * (1 + _as_images(scale, x)) + _as_images(shift, x)


def _as_images(table: Tensor, x: Tensor) -> Tensor:
    """Return a table [N, C] as images [N, C, 1, ...] in the dtype of x [N, C, ...]."""
    return table.to(x.dtype).reshape(*table.shape, *[1] * (x.dim() - 2))


def count_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    """Return how many heads `channels` make; `num_head_channels`, unless -1, decides."""
    if num_head_channels != -1:
        if num_head_channels < 1 or channels % num_head_channels:
            raise ValueError(
                f"num_head_channels {num_head_channels} does not divide the {channels} channels "
                "of an attention layer; choose a divisor of num_channels times channel_mult"
            )
        return channels // num_head_channels
    if num_heads < 1 or channels % num_heads:
        raise ValueError(
            f"num_heads {num_heads} does not divide the {channels} channels of an attention layer"
        )
    return num_heads


class AttentionBlock(ChoosesAttention):
    """Self-attention among all positions, added to the input (Ho et al., 2020).

    Args:
        channels: channels of input and output.
        num_heads: number of heads, unless `num_head_channels` is given.
        num_head_channels: channels of each head, or -1.
        use_checkpoint: recompute the block in the backward pass to save memory.
        use_new_attention_order: split q, k, v before the heads (`QKVAttention`) or after
            (`QKVAttentionLegacy`); weights of one order are noise in the other.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        attention = QKVAttention if use_new_attention_order else QKVAttentionLegacy
        self.attention = attention(self.num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x [N, channels, ...]; the shape stays."""
        return checkpoint(self._forward, (x,), (), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2)  # [N, C, T], T the number of positions
        h = self.proj_out(self.attention(self.qkv(h)))
        return x + h.reshape(x.shape)
