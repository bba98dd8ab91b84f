"""The U-Net of ADM (Dhariwal and Nichol, 2021): denoiser, upsampler and noisy classifier.

All three share one trunk, built by `_UNetTrunk`: an embedding of the timestep, `input_blocks` that
go down in resolution, and `middle_block`. The names of the modules and the order in which they are
created are those of the released checkpoints: optimizer files index parameters by that order.
The blocks themselves are in `blocks`, and importable from here.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import (  # noqa: F401  (all blocks are importable from here)
    AttentionBlock,
    AttentionPool2d,
    ChoosesAttention,
    Downsample,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
)
from .fp16_util import convert_module_to_f16, convert_module_to_f32
from .nn import SiLU, conv_nd, linear, normalization, timestep_embedding, zero_module

Builder: TypeAlias = Callable[..., nn.Module]  # (channels, out_channels=...) -> block

TORSO = ("input_blocks", "middle_block", "output_blocks")


class _UNetTrunk(ChoosesAttention):
    """What all networks here share: timestep embedding, `input_blocks` and `middle_block`.

    A subclass may add a way back up in `_build_decoder`.

    Args:
        image_size: height and width of the images; only attention pooling depends on it.
        in_channels: channels of the images.
        model_channels: width of the network where `channel_mult` is 1.
        out_channels: channels, or classes, of the output.
        num_res_blocks: residual blocks per resolution on the way down.
        attention_resolutions: downsampling factors at which attention follows each of them.
        dropout: probability to drop an element in residual blocks.
        channel_mult: width of each resolution, as a multiple of `model_channels`.
        conv_resample: change resolution by convolutions rather than by plain pooling.
        dims: number of spatial dimensions, 1, 2 or 3.
        num_classes: number of classes of a class-conditional network, else None.
        use_checkpoint: recompute blocks in the backward pass to save memory.
        use_fp16: compute the torso in float16, once `convert_to_fp16` has converted it.
        num_heads: heads of each attention layer.
        num_head_channels: channels of each head instead; -1 where `num_heads` counts.
        num_heads_upsample: heads on the way up; -1 means `num_heads`.
        use_scale_shift_norm: let the timestep scale as well as shift (FiLM).
        resblock_updown: change resolution inside residual blocks.
        use_new_attention_order: see `AttentionBlock`.

    Raises:
        ValueError: `dims` is not 1, 2 or 3, or heads do not divide the channels they split.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        emb_channels = model_channels * 4
        self.time_embed = nn.Sequential(
            linear(model_channels, emb_channels), SiLU(), linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)
        self._build_blocks(use_scale_shift_norm, resblock_updown, use_new_attention_order)

    def _build_blocks(self, film: bool, resblock_updown: bool, new_attention_order: bool) -> None:
        """Bind what all blocks have in common, then create them from input to output."""
        res = partial(
            ResBlock,
            emb_channels=self.model_channels * 4,
            dropout=self.dropout,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=film,
        )
        attend = partial(
            AttentionBlock,
            num_heads=self.num_heads,
            num_head_channels=self.num_head_channels,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=new_attention_order,
        )
        resample = {"use_conv": self.conv_resample, "dims": self.dims}
        down = partial(res, down=True) if resblock_updown else partial(Downsample, **resample)
        up = partial(res, up=True) if resblock_updown else partial(Upsample, **resample)
        widths = self._build_encoder(res, attend, down)
        # The channels of each input block, then those of the middle block.
        self._widths = (*widths, widths[-1])
        self._build_decoder(res, attend, up)

    def _build_encoder(self, res: Builder, attend: Builder, down: Builder) -> list[int]:
        """Create `input_blocks` and `middle_block`; return the channels of each input block."""
        width = int(self.channel_mult[0] * self.model_channels)
        widths = [width]
        stem = conv_nd(self.dims, self.in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(stem)])
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                layers = [res(width, out_channels=int(mult * self.model_channels))]
                width = int(mult * self.model_channels)
                if 2**level in self.attention_resolutions:
                    layers.append(attend(width))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                widths.append(width)
            if level < len(self.channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(down(width, out_channels=width)))
                widths.append(width)
        self.middle_block = TimestepEmbedSequential(res(width), attend(width), res(width))
        return widths

    def _build_decoder(self, res: Builder, attend: Builder, up: Builder) -> None:
        """Create what leads back to the resolution of the input; an encoder has nothing."""

    def _torso(self) -> list[nn.Module]:
        """Return the modules that `convert_to_fp16` converts."""
        blocks = (getattr(self, name, None) for name in TORSO)
        return [block for block in blocks if block is not None]

    def convert_to_fp16(self) -> None:
        """Make the convolutions of the torso float16; norms and linear layers stay float32."""
        self.dtype = torch.float16
        for block in self._torso():
            block.apply(convert_module_to_f16)

    def convert_to_fp32(self) -> None:
        """Make the convolutions of the torso float32 again."""
        self.dtype = torch.float32
        for block in self._torso():
            block.apply(convert_module_to_f32)

    def _outer_dtype(self) -> torch.dtype:
        """Return the dtype of the weights outside the torso."""
        return self.time_embed[0].weight.dtype

    def _embed(self, timesteps: Tensor) -> Tensor:
        """Embed [N] timesteps as [N, 4 * model_channels]."""
        table = timestep_embedding(timesteps, self.model_channels)
        return self.time_embed(table.to(self._outer_dtype()))

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Return the outputs of every input block and, last, of the middle block."""
        h = x.to(self.dtype)
        features = []
        for block in self.input_blocks:
            h = block(h, emb)
            features.append(h)
        return [*features, self.middle_block(h, emb)]


class UNetModel(_UNetTrunk):
    """The denoiser of ADM: predicts the noise, and maybe a variance, in a noisy image.

    Built from the arguments of `_UNetTrunk`; the decoder mirrors the encoder, and each of its
    blocks also sees the output of its mirror image.
    """

    def _build_decoder(self, res: Builder, attend: Builder, up: Builder) -> None:
        *skips, width = self._widths
        attend = partial(attend, num_heads=self.num_heads_upsample)
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                out_width = int(mult * self.model_channels)
                layers = [res(width + skips.pop(), out_channels=out_width)]
                width = out_width
                if 2**level in self.attention_resolutions:
                    layers.append(attend(width))
                if level > 0 and i == self.num_res_blocks:
                    layers.append(up(width, out_channels=width))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            normalization(width),
            SiLU(),
            zero_module(conv_nd(self.dims, width, self.out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Apply the network.

        Args:
            x: images [N, in_channels, H, W]; H and W divisible by 2 ** (levels - 1).
            timesteps: [N], possibly fractional.
            y: labels [N], given if and only if the network is class-conditional.

        Returns:
            [N, out_channels, H, W], in the dtype of x.
        """
        assert (y is not None) == (self.num_classes is not None), (
            "y must be given if and only if the model is class-conditional"
        )
        emb = self._embed(timesteps)  # [N, E]
        if self.num_classes is not None:
            assert y.shape == (len(x),), (y.shape, x.shape)
            emb = emb + self.label_emb(y)
        *skips, h = self._encode(x, emb)
        for block in self.output_blocks:
            skip = skips.pop()
            if self.use_checkpoint:  # a block that is recomputed joins them itself
                h = block(h, emb, skip)
            else:
                h = block(torch.cat([h, skip], dim=1), emb)
        return self.out(h.to(self._outer_dtype())).to(x.dtype)


class SuperResModel(UNetModel):
    """A `UNetModel` that also sees a smaller image, enlarged and concatenated to its input."""

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any):
        super().__init__(image_size, in_channels * 2, *args, **kwargs)

    def forward(
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Apply the network to x [N, C, H, W] next to low_res [N, C, h, w], of any size."""
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)
        return super().forward(torch.cat([x, enlarged], dim=1), timesteps, **kwargs)


def _adaptive_head(net: "EncoderUNetModel") -> nn.Module:
    """Average each channel, then classify."""
    width = net._widths[-1]
    return nn.Sequential(
        normalization(width),
        SiLU(),
        nn.AdaptiveAvgPool2d((1, 1)),
        zero_module(conv_nd(net.dims, width, net.out_channels, 1)),
        nn.Flatten(),
    )


def _attention_head(net: "EncoderUNetModel") -> nn.Module:
    """Let the mean attend to the pixels of the lowest resolution."""
    width = net._widths[-1]
    head_channels = net.num_head_channels
    if head_channels == -1:
        head_channels = width // net.num_heads
    size = net.image_size // 2 ** (len(net.channel_mult) - 1)
    pool = AttentionPool2d(size, width, head_channels, net.out_channels)
    return nn.Sequential(normalization(width), SiLU(), pool)


def _spatial_head(net: "EncoderUNetModel") -> nn.Module:
    """Classify the spatial means of all features."""
    return nn.Sequential(
        nn.Linear(sum(net._widths), 2048), nn.ReLU(), nn.Linear(2048, net.out_channels)
    )


def _spatial_v2_head(net: "EncoderUNetModel") -> nn.Module:
    """Classify the spatial means of all features, normalized on the way."""
    return nn.Sequential(
        nn.Linear(sum(net._widths), 2048),
        normalization(2048),
        SiLU(),
        nn.Linear(2048, net.out_channels),
    )


POOLS: dict[str, Callable[["EncoderUNetModel"], nn.Module]] = {
    "adaptive": _adaptive_head,
    "attention": _attention_head,
    "spatial": _spatial_head,
    "spatial_v2": _spatial_v2_head,
}


class EncoderUNetModel(_UNetTrunk):
    """The first half of a `UNetModel` with a pooled output: the noisy classifier.

    Takes the arguments of `UNetModel` without `num_classes`, and

    Args:
        pool: "adaptive" averages the last features, "attention" lets their mean attend to them;
            "spatial" and "spatial_v2" read the spatial means of all features.

    Raises:
        ValueError: `pool` is none of these, or what `UNetModel` raises.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {sorted(POOLS)}, got {pool!r}")
        super().__init__(
            image_size,
            in_channels,
            model_channels,
            out_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            dims,
            None,
            use_checkpoint,
            use_fp16,
            num_heads,
            num_head_channels,
            num_heads_upsample,
            use_scale_shift_norm,
            resblock_updown,
            use_new_attention_order,
        )
        self.pool = pool
        self.out = POOLS[pool](self)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Classify images x [N, in_channels, H, W] at timesteps [N]: [N, out_channels]."""
        features = self._encode(x, self._embed(timesteps))
        dtype = self._outer_dtype()
        if self.pool.startswith("spatial"):
            means = [h.to(dtype).flatten(2).mean(dim=-1) for h in features]
            return self.out(torch.cat(means, dim=-1)).to(x.dtype)  # [N, sum of all widths]
        return self.out(features[-1].to(dtype)).to(x.dtype)
