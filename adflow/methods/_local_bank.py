"""Nearest normal patches around every position: one batched matrix product an image.

The bank is laid out by cell, [P, width, samples]. A cell's samples are met by the queries of the cells around
it, so one product per cell, [9, width] x [width, samples], reads the bank once and answers all nine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adflow.errors import InputError


class LocalBank(nn.Module):
    """Squared distance of a patch to the nearest of the patches kept at its own cell and the cells around.

    Args:
        grid: (h, w) cells.
        width: coordinates of a patch.
        radius: cells on each side that count as around.
    """

    bank_: Tensor
    halves_: Tensor
    meets: Tensor
    found: Tensor

    def __init__(self, grid: tuple[int, int], width: int, radius: int) -> None:
        super().__init__()
        h, w = grid
        self.register_buffer("bank_", torch.zeros(h * w, width, 0))
        self.register_buffer("halves_", torch.zeros(h * w, 1, 0))
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        span = torch.arange(-radius, radius + 1)
        dy, dx = (part.reshape(1, -1) for part in torch.meshgrid(span, span, indexing="ij"))
        ty, tx = y.reshape(-1, 1) + dy, x.reshape(-1, 1) + dx  # [P, s]
        inside = (ty >= 0) & (ty < h) & (tx >= 0) & (tx < w)
        own = (y * w + x).reshape(-1, 1)
        slots = span.numel() ** 2
        # Outside the grid the cell itself takes the place: seen twice, a minimum does not change.
        meets = torch.where(inside, ty * w + tx, own)  # [P, s]: the query in slot s of cell p
        # Query q meets the bank of cell q - offset in slot s; the offsets are symmetric, so that cell is
        # meets[q, -s].
        slot = torch.where(inside, torch.arange(slots).flip(0), torch.tensor(slots // 2))
        self.register_buffer("meets", meets, persistent=False)
        self.register_buffer("found", meets * slots + slot, persistent=False)
        self._held: list[Tensor] = []
        self._numbers = torch.zeros(h * w, 0, dtype=torch.int64)
        self._samples = 0
        self._seen = 0

    # --- fill -----------------------------------------------------------------------------------------------

    def start(self, samples: int, first: int = 0) -> None:
        """Begin an empty bank that keeps at most ``samples`` patches a cell, of images from number ``first`` on."""
        self._samples, self._seen, self._held = samples, first, []
        self._numbers = torch.zeros(len(self.meets), 0, dtype=torch.int64)

    def add(self, patches: Tensor) -> None:
        """Take the patches [n, P, width] of n further images; at most twice ``samples`` are held."""
        for part in torch.split(patches, self._samples):
            numbers = torch.arange(self._seen, self._seen + len(part)).expand(len(self.meets), -1)
            self.take(part.transpose(0, 1), numbers)
            self._seen += len(part)

    def take(self, kept: Tensor, numbers: Tensor) -> None:
        """Take what another bank has :meth:`kept` of other images."""
        if self._numbers.shape[1] + kept.shape[1] > 2 * self._samples:
            self._reduce()
        self._held.append(kept)
        self._numbers = torch.cat([self._numbers, numbers], dim=1)

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return the patches [P, n, width] kept, at most ``samples`` a cell, and the numbers [P, n] of their images."""
        if not self._held:
            raise InputError("there is no image to fit on, expected at least 1")
        if self._numbers.shape[1] > self._samples:
            self._reduce()
        return torch.cat(self._held, dim=1), self._numbers

    def finish(self) -> None:
        """Pack what was added; numbers of the images are kept until the next save, for leaving images out."""
        held, _ = self.kept()
        self._held = []
        self.halves_ = (held.square().sum(dim=2) / 2).unsqueeze(1).contiguous()  # [P, 1, n]
        self.bank_ = held.transpose(1, 2).contiguous()  # [P, width, n]

    def _reduce(self) -> None:
        """Keep ``samples`` patches a cell, always the one farthest from those kept, in all cells at once."""
        held = torch.cat(self._held, dim=1)  # [P, n, width]
        norms = held.square().sum(dim=2)
        cells = torch.arange(len(held))
        kept = torch.zeros(len(held), self._samples, dtype=torch.int64)
        # Farthest from the mean comes first: a choice that needs no seed.
        reach = (held - held.mean(dim=1, keepdim=True)).square().sum(dim=2)
        for i in range(self._samples):
            pick = reach.argmax(dim=1)
            kept[:, i] = pick
            chosen = held[cells, pick]  # [P, width]
            products = torch.bmm(held, chosen.unsqueeze(2)).squeeze(2)
            distance = norms + norms[cells, pick].unsqueeze(1) - 2 * products
            reach = torch.minimum(reach, distance.clamp(min=0))
            reach[cells, pick] = -1.0
        kept = kept.sort(dim=1).values
        self._held = [held.gather(1, kept.unsqueeze(2).expand(-1, -1, held.shape[2]))]
        self._numbers = self._numbers.gather(1, kept)

    # --- search ---------------------------------------------------------------------------------------------

    def forward(self, patches: Tensor, own: int | None = None) -> Tensor:
        """Return squared distances [B, P] to the nearest patch around, measured directly.

        Args:
            patches: [B, P, width].
            own: number of a training image to leave out (only right after the fit); None = none.
        """
        batch, cells, width = patches.shape
        slots = self.meets.shape[1]
        queries = patches[:, self.meets]  # [B, P, s, width]
        queries = queries.transpose(0, 1).reshape(cells, batch * slots, width)
        # |b|^2 / 2 - q.b ranks the samples as the distance does.
        ranks = torch.baddbmm(self.halves_, queries, self.bank_, alpha=-1)  # [P, B s, n]
        if own is not None:
            ranks = ranks.masked_fill((self._numbers == own).unsqueeze(1), float("inf"))
        least = ranks.amin(dim=2).reshape(cells, batch, slots).transpose(0, 1)  # [B, P, s]
        least = least.reshape(batch, cells * slots)[:, self.found]  # [B, P, s]: by query
        slot = least.argmin(dim=2)  # [B, P]
        pair = self.found.expand(batch, -1, -1).gather(2, slot.unsqueeze(2)).squeeze(2)
        cell, place = pair // slots, pair % slots
        row = torch.arange(batch, device=patches.device).unsqueeze(1) * slots + place
        sample = ranks[cell, row].argmin(dim=2)  # [B, P]
        nearest = self.bank_[cell, :, sample]  # [B, P, width]
        return (patches - nearest).square().sum(dim=2)
