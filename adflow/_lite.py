"""EfficientNet-Lite, written out: the default backbones need no import of timm, which takes seconds.

Tensors have timm's names, shapes and order (``tf_efficientnet_lite0`` to ``lite2``): either kind of weight file
fits, and a test compares both nets. As in TensorFlow, where the weights come from: "same" padding, uneven at stride 2,
and batch norm with epsilon 1e-3.

Source: M. Tan, Q. Le, EfficientNet, ICML 2019, https://arxiv.org/abs/1905.11946, table 1; the Lite variant has ReLU6,
no squeeze-and-excitation, and stem and head of fixed width
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

# Kernel, stride, expansion and channels of each stage.
_STAGES = (
    (3, 1, 1, 16),
    (3, 2, 6, 24),
    (5, 2, 6, 40),
    (3, 2, 6, 80),
    (5, 1, 6, 112),
    (5, 2, 6, 192),
    (3, 1, 6, 320),
)
_STEM, _HEAD, _CLASSES = 32, 1280, 1000


class Conv2dSame(nn.Conv2d):
    """A convolution whose padding gives ceil(side / stride) cells, the odd cell after the image."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for side, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(input, pads))


class _Norm(nn.BatchNorm2d):
    """Batch norm, and ReLU6 behind it where ``act`` is set."""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels, eps=1e-3)
        self.act = nn.ReLU6(inplace=True) if act else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(input))
        return y


def _conv(taken: int, given: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    kind, padding = (nn.Conv2d, kernel // 2) if stride == 1 else (Conv2dSame, 0)
    return kind(taken, given, kernel, stride, padding, groups=groups, bias=False)


class _Separable(nn.Module):
    """Depthwise, then 1x1: the block of the first stage."""

    has_skip = False

    def __init__(self, taken: int, given: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw, self.bn1 = _conv(taken, taken, kernel, stride, taken), _Norm(taken)
        self.conv_pw, self.bn2 = _conv(taken, given, 1), _Norm(given, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv_pw(self.bn1(self.conv_dw(x))))
        return y

    def convolutions(self) -> list[nn.Module]:
        return [self.conv_dw, self.conv_pw]


class _Inverted(nn.Module):
    """1x1 to more channels, depthwise, 1x1 to fewer, and a skip where shapes allow."""

    def __init__(self, taken: int, given: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = taken * expansion
        self.has_skip = stride == 1 and taken == given
        self.conv_pw, self.bn1 = _conv(taken, wide, 1), _Norm(wide)
        self.conv_dw, self.bn2 = _conv(wide, wide, kernel, stride, wide), _Norm(wide)
        self.se = nn.Identity()  # a name that OpenStage knows from timm: there is no squeeze here
        self.conv_pwl, self.bn3 = _conv(wide, given, 1), _Norm(given, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn3(self.conv_pwl(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))))
        return y + x if self.has_skip else y

    def convolutions(self) -> list[nn.Module]:
        return [self.conv_pw, self.conv_dw, self.conv_pwl]


class Lite(nn.Module):
    """The whole classifier; only ever used cut after a stage.

    Args:
        width: factor of the stages' channels, rounded to multiples of 8, never down by more than a tenth.
        depths: blocks of each stage.
    """

    def __init__(self, width: float, depths: Sequence[int]) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = _conv(3, _STEM, 3, 2), _Norm(_STEM)
        stages, taken = [], _STEM
        for (kernel, stride, expansion, channels), depth in zip(_STAGES, depths, strict=True):
            given = _rounded(channels * width)
            blocks: list[nn.Module] = []
            for number in range(depth):
                step = stride if number == 0 else 1
                if expansion == 1:
                    blocks.append(_Separable(taken, given, kernel, step))
                else:
                    blocks.append(_Inverted(taken, given, kernel, step, expansion))
                taken = given
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = _conv(taken, _HEAD, 1), _Norm(_HEAD)
        self.classifier = nn.Linear(_HEAD, _CLASSES)


def _rounded(channels: float) -> int:
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8
