"""Feature Pyramid Network (arXiv 1612.03144), the neck between a backbone and the head of a dense task."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from catmodel.fixed_order import repeat


class FPN(nn.Module):
    """Maps of a backbone's stages -> maps of the same sizes with `out_channels` channels each, finest first.

    A 1 x 1 convolution of each map; from the coarsest on, each sum is enlarged by 2 (nearest) and added to the next
    finer map; a 3 x 3 convolution of each sum. All convolutions have biases and neither norm nor activation, as in
    mmdetection's and mmsegmentation's published configurations.

    channels: of the maps, finest first; each map's sides are half of the one's before it, rounded up.
    extra: number of further, coarser maps, each half as large as the one before (3 x 3 convolutions of stride 2). The
        first is computed from the coarsest map of the result or, with extra_on_input, of the backbone; the others from
        the one before, with extra_relu after a ReLU.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int = 256,
        extra: int = 0,
        extra_on_input: bool = False,
        extra_relu: bool = False,
    ):
        super().__init__()
        self.extra_on_input, self.extra_relu = extra_on_input, extra_relu
        self.lateral_convs = nn.ModuleList(nn.Conv2d(count, out_channels, 1) for count in channels)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in channels)
        for i in range(extra):
            count = channels[-1] if extra_on_input and i == 0 else out_channels
            self.fpn_convs.append(nn.Conv2d(count, out_channels, 3, stride=2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, channels_i, H_i, W_i] -> [B, out_channels, H_i, W_i], and the further ones."""
        sums: list[Tensor] = []
        for conv, x_BCHW in zip(reversed(self.lateral_convs), reversed(maps), strict=True):
            lateral = conv(x_BCHW)
            if sums:
                height, width = lateral.shape[2:]
                lateral = lateral + repeat(sums[-1], 2)[:, :, :height, :width]
            sums.append(lateral)
        results = [conv(total) for conv, total in zip(self.fpn_convs, reversed(sums), strict=False)]
        for i, conv in enumerate(self.fpn_convs[len(sums) :]):
            source = maps[-1] if self.extra_on_input and i == 0 else results[-1]
            # Padded here: in bf16 on a CPU, torch 2.15 does not write the gradient of weights that meet a convolution's
            # own padding alone, as on a map of one pixel.
            padded = F.pad(source, (1, 1, 1, 1))
            results.append(conv(F.relu(padded) if self.extra_relu and i else padded))
        return results
