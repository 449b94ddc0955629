"""The sub-networks of couplings, their initial weights drawn from a generator that is passed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

Subnet = Callable[[int, int], nn.Module]

# A sub-network's output is multiplied by this before it is used (FrEIA, AllInOneBlock: "for stability").
SUBNET_GAIN = 0.1


def linear_layer(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """Return ``nn.Linear`` with torch's default initialisation, drawn from ``generator``."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # no draw from the global generator
    _initialise(layer, inputs, generator)
    return layer


def conv_layer(inputs: int, outputs: int, kernel: int, generator: torch.Generator | None) -> nn.Conv2d:
    """Return a 'same'-padded ``nn.Conv2d`` with torch's default initialisation, drawn from ``generator``."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, device="meta").to_empty(device="cpu")
    _initialise(layer, inputs * kernel * kernel, generator)
    return layer


def _initialise(layer: nn.Linear | nn.Conv2d, fan_in: int, generator: torch.Generator | None) -> None:
    # torch's default, Kaiming-uniform with a = sqrt(5), is U(-b, b), b = 1/sqrt(fan_in), for weight and bias.
    bound = 1.0 / math.sqrt(max(fan_in, 1))
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        if layer.bias is not None:
            layer.bias.uniform_(-bound, bound, generator=generator)


def linear_subnet(
    *,
    generator: torch.Generator | None = None,
    width: float = 2.0,
    hidden: int | None = None,
    zero_init: bool = False,
) -> Subnet:
    """Return a factory of Linear - ReLU - Linear networks.

    Args:
        generator: source of the initial weights.
        width: hidden units as a multiple of the input width (CFLOW-AD: 2).
        hidden: hidden units as a number; overrides ``width``.
        zero_init: start with zero output, so that a coupling starts as the identity.
    """

    def build(inputs: int, outputs: int) -> nn.Module:
        middle = int(inputs * width) if hidden is None else hidden
        return _two_layers(linear_layer(inputs, middle, generator), linear_layer(middle, outputs, generator), zero_init)

    return build


def conv_subnet(
    kernel: int, *, generator: torch.Generator | None = None, ratio: float = 1.0, zero_init: bool = False
) -> Subnet:
    """Return a factory of conv k - ReLU - conv k networks with ``int(ratio * inputs)`` hidden channels."""

    def build(inputs: int, outputs: int) -> nn.Module:
        middle = max(1, int(inputs * ratio))
        return _two_layers(
            conv_layer(inputs, middle, kernel, generator),
            conv_layer(middle, outputs, kernel, generator),
            zero_init,
        )

    return build


def _two_layers(first: nn.Module, last: nn.Linear | nn.Conv2d, zero_init: bool) -> nn.Sequential:
    if zero_init:
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.ReLU(), last)
