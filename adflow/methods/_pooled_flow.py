"""The flow of DifferNet: reorderings and two-sided couplings on the pooled features of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow.errors import InputError
from adflow.flows import FixedPermutation, GlowCoupling, linear_layer
from adflow.flows import load_original as load_strictly


class Perceptron(nn.Module):
    """Four linear layers with ReLU between (the original's network of a coupling, names included)."""

    def __init__(
        self, inputs: int, outputs: int, hidden: int, zero_init: bool, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.fc1 = linear_layer(inputs, hidden, generator)
        self.fc2 = linear_layer(hidden, hidden, generator)
        self.fc2b = linear_layer(hidden, hidden, generator)
        self.fc3 = linear_layer(hidden, outputs, generator)
        if zero_init:
            nn.init.zeros_(self.fc3.weight)
            nn.init.zeros_(self.fc3.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs] to [B, outputs]."""
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc2b(x))
        return self.fc3(x)  # type: ignore[no-any-return]


class PooledFlow(nn.Module):
    """A chain of ``blocks`` reorderings, each followed by a two-sided coupling, on vectors [B, D]."""

    def __init__(
        self,
        width: int,
        blocks: int,
        *,
        hidden: int = 2048,
        clamp: float = 3.0,
        zero_init: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()

        def subnet(inputs: int, outputs: int) -> nn.Module:
            return Perceptron(inputs, outputs, hidden, zero_init, generator)

        self.orders = nn.ModuleList(FixedPermutation([(width,)], generator=generator) for _ in range(blocks))
        self.couplings = nn.ModuleList(GlowCoupling([(width,)], subnet=subnet, clamp=clamp) for _ in range(blocks))

    def forward(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Map [B, D] forward, or backward with ``rev``; return the log-determinants [B] too."""
        total = x.new_zeros(len(x))
        pairs = list(zip(self.orders, self.couplings, strict=True))
        for order, coupling in reversed(pairs) if rev else pairs:
            for part in (coupling, order) if rev else (order, coupling):
                (x,), gained = part((x,), rev=rev)
                total = total + gained
        return x, total

    def load_original(self, state: Mapping[str, Tensor], orders: Sequence[Tensor]) -> None:
        """Load the original's weights.

        Args:
            state: the original's tensors; its networks hold a batch normalisation that is never used.
            orders: per block the order of the entries, which the original does not save: it draws them with numpy from
                the block's number.

        Raises:
            InputError: names or shapes do not fit.
        """
        prefix = "nf.module_list."
        nodes = sorted({int(key.split(".")[2]) for key in state if key.startswith(prefix)})
        if len(nodes) != len(self.couplings) or len(orders) != len(self.couplings):
            raise InputError(f"the checkpoint has {len(nodes)} couplings, this flow {len(self.couplings)}")
        for mine, coupling, node, order in zip(self.orders, self.couplings, nodes, orders, strict=True):
            used = {key: value for key, value in state.items() if ".bn." not in key}
            load_strictly(coupling, used, prefix=f"{prefix}{node}.")
            load_strictly(mine, {"permutation": torch.as_tensor(order)})


def pool(pyramid: Sequence[Tensor]) -> Tensor:
    """Return the averages over positions of all maps side by side [B, D]."""
    return torch.cat([level.mean((2, 3)) for level in pyramid], 1)


def pooled_loss(z: Tensor, logdet: Tensor) -> Tensor:
    """Return mean_batch(|z|^2 / 2 - logdet) per entry, in nats."""
    return (0.5 * z.square().sum(1) - logdet).mean() / z.shape[1]
