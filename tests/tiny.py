"""Networks small enough for any test."""

import torch
from diffusers import UNet2DModel


def tiny_unet(
    channels: int = 1, size: int = 8, num_class_embeds: int | None = None, out_channels: int | None = None, dropout: float = 0.0
) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=out_channels or channels,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=num_class_embeds,
        dropout=dropout,
    )
