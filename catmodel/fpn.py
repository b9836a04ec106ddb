"""Feature Pyramid Network (arXiv 1612.03144), the neck between a backbone and the head of a dense task."""

from collections.abc import Sequence

from torch import Tensor, nn

from catmodel.fixed_order import repeat


class FPN(nn.Module):
    """Maps of a backbone's stages -> maps of the same sizes with `out_channels` channels each, finest first.

    A 1 x 1 convolution of each map; from the coarsest on, each sum is enlarged by 2 (nearest) and added to the next
    finer map; a 3 x 3 convolution of each sum. All convolutions have biases and neither norm nor activation, as in
    mmdetection's and mmsegmentation's published configurations.

    channels: of the maps, finest first; each map's sides are half of the one's before it, rounded up.
    """

    def __init__(self, channels: Sequence[int], out_channels: int = 256):
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(count, out_channels, 1) for count in channels)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, channels_i, H_i, W_i] -> [B, out_channels, H_i, W_i]."""
        sums: list[Tensor] = []
        for conv, x_BCHW in zip(reversed(self.lateral_convs), reversed(maps), strict=True):
            lateral = conv(x_BCHW)
            if sums:
                height, width = lateral.shape[2:]
                lateral = lateral + repeat(sums[-1], 2)[:, :, :height, :width]
            sums.append(lateral)
        return [conv(total) for conv, total in zip(self.fpn_convs, reversed(sums), strict=True)]
