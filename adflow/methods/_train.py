"""The one training loop: Adam, schedule, gradient clipping, guard against NaN, checkpoints that resume.

What a method gives is a loss of a batch and an endless iterator of batches that draws from the fit's
generator. The loss itself draws nothing, so the whole training is a function of the seed: an interrupted
fit starts again from the seed, lets the batches that were done pass unused, takes its weights from the
checkpoint and ends with the same bits.

Under ``torchrun`` every process takes its share of each batch: see :mod:`adflow._ranks`. As a loss is a mean over its
batch, the gradient is that of the whole batch.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adflow import _ranks
from adflow._clock import Progress
from adflow._files import atomic_write
from adflow.errors import InputError, TrainingError
from adflow.methods._checks import above_0, at_least, within

Schedule = Callable[[int], float]
Batch = TypeVar("Batch")

# Seconds between two checkpoints: what a kill can cost at most, against the time that writing takes.
CHECKPOINT_SECONDS = 20.0
# Steps between two copies of good weights in memory, and how often training may fall back to one, with half
# the learning rate each time, before it gives up.
SNAPSHOT_STEPS = 25
MAX_ROLLBACKS = 5


def one_cycle(steps: int, warm_up: float = 0.2, start: float = 0.04, end: float = 1e-4) -> Schedule:
    """Return factors of the learning rate: cosine from ``start`` up to 1, then down to ``end``.

    Source: L. N. Smith, N. Topin, Super-convergence, 2018, https://arxiv.org/abs/1708.07120; ``start`` as in
    ``torch.optim.lr_scheduler.OneCycleLR``, but a shorter rise and a higher end.
    """
    top = max(1, round(warm_up * steps))

    def factor(step: int) -> float:
        if step < top:
            low, share = start, 1 - step / top
        else:
            low, share = end, min(1.0, (step - top) / max(1, steps - top))
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))

    return factor


def train(
    module: nn.Module,
    loss: Callable[[Batch], Tensor],
    batches: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    schedule: Schedule | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = None,
    average: float | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Minimise ``loss`` over the trainable parameters of ``module`` with Adam; one batch a step.

    Parameters that a loss does not reach keep weights and moments in that step (gradients are None, not
    zero).

    Args:
        module: holds the parameters; those with ``requires_grad`` are trained.
        loss: a batch to a scalar.
        batches: endless, or at least ``steps`` long; drawn from ``generator`` only.
        steps: optimiser steps.
        lr: learning rate.
        schedule: step number, from 0, to a factor of ``lr``; None = constant.
        betas: Adam's decay rates.
        eps: Adam's denominator term.
        weight_decay: L2 term added to gradients, as in ``torch.optim.Adam``.
        clip: largest L2 norm of all gradients together; longer ones are scaled down.
        average: decay of an exponential moving average of the weights, which are the result then.
        generator: what ``batches`` draws from; its state goes into the checkpoint as a check of identity.
        progress: called with (steps done, steps, message) after every step; training ends when it returns True.
        checkpoint: file that an interrupted training is continued from; written beside and moved.

    Raises:
        InputError: the checkpoint belongs to another training.
        UsageError: a negative ``lr``, ``eps`` or ``weight_decay``, no positive ``clip``, an ``average`` beyond 0 to 1.
        TrainingError: the loss did not stay finite; the last good weights are in ``module``.
    """
    at_least(0, lr=lr, eps=eps, weight_decay=weight_decay)
    if clip is not None:
        above_0(clip=clip)
    if average is not None:
        within(0, 1, average=average)
    run = _Run(module, betas, eps, weight_decay, average)
    start = "" if generator is None else bytes(generator.get_state().numpy()).hex()[:256]
    settings = repr((lr, betas, eps, weight_decay, clip, average))
    identity = {"steps": str(steps), "settings": settings, "generator": start}
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint, identity)
        for _ in range(run.done):
            next(batches)
    written = time.monotonic()
    good = run.snapshot()
    while run.done < steps:
        rate = lr * run.slower * (schedule(run.done) if schedule else 1.0)
        batch, weight = _ranks.share(next(batches))
        stepped = run.step(functools.partial(_weighted, loss, batch, weight), rate, clip)
        run.done += 1
        if not stepped:
            run.restore(good)
            run.rollbacks += 1
            run.slower *= 0.5
            if run.rollbacks > MAX_ROLLBACKS:
                raise TrainingError(
                    f"the training loss was not finite {run.rollbacks} times, last in step {run.done} of "
                    f"{steps}; the last good weights are kept",
                    hint="Use a smaller learning rate (--set lr=...), and look at the training images.",
                )
        elif run.done % SNAPSHOT_STEPS == 0:
            good = run.snapshot()
        if progress and progress(run.done, steps, "training"):
            break
        if checkpoint is not None and time.monotonic() - written > CHECKPOINT_SECONDS and run.done < steps:
            if _ranks.rank() == 0:
                run.save(checkpoint, identity)
            written = time.monotonic()
    run.finish()


def _weighted(loss: Callable[[Batch], Tensor], batch: Batch, weight: float) -> Tensor:
    return loss(batch) if weight == 1.0 else loss(batch) * weight


class _Run:
    """Weights, moments, average and counters of one training."""

    def __init__(
        self,
        module: nn.Module,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        average: float | None,
    ) -> None:
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        # Running statistics change with every batch too; the backbone's are frozen.
        self.statistics = {
            f"{owner}.{name}": buffer
            for owner, part in module.named_modules()
            if isinstance(part, nn.modules.batchnorm._NormBase) and not owner.startswith("backbone")
            for name, buffer in part.named_buffers(recurse=False)
        }
        if not self.parameters:
            raise InputError("there is no parameter to train")
        self.optimiser = torch.optim.Adam(self.parameters.values(), betas=betas, eps=eps, weight_decay=weight_decay)
        self.decay = average
        self.mean = {n: p.detach().clone() for n, p in self.parameters.items()} if average is not None else {}
        self.done = 0
        self.rollbacks = 0
        self.slower = 1.0

    def step(self, loss: Callable[[], Tensor], rate: float, clip: float | None) -> bool:
        """Do one step; return False when loss or gradient was not finite, and nothing changed."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        value = loss()
        total = value.detach().clone()
        _ranks.add_up([total])
        if not math.isfinite(float(total)):
            return False
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        reached = [p for p in self.parameters.values() if p.grad is not None]
        _ranks.add_up(p.grad for p in reached if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(reached, clip if clip is not None else math.inf)
        if not math.isfinite(float(norm)):
            return False
        self.optimiser.step()
        if self.decay is not None:
            # A short memory first (Adam's warm-up is not worth remembering), the full one later.
            decay = min(self.decay, (1 + self.done) / (10 + self.done))
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    self.mean[name].lerp_(parameter, 1 - decay)
        return True

    def tensors(self) -> dict[str, Tensor]:
        found = {f"weight.{n}": p.detach() for n, p in self.parameters.items()}
        found |= {f"statistic.{n}": b for n, b in self.statistics.items()}
        found |= {f"mean.{n}": m for n, m in self.mean.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                found[f"adam.{key}.{name}"] = value
        return found

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"weight.{name}"])
            moments = {
                key: state[f"adam.{key}.{name}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{key}.{name}" in state
            }
            self.optimiser.state.pop(parameter, None)
            if moments:
                self.optimiser.state[parameter] = moments
        for name, buffer in self.statistics.items():
            buffer.copy_(state[f"statistic.{name}"])
        for name, mean in self.mean.items():
            mean.copy_(state[f"mean.{name}"])

    def save(self, path: Path, identity: dict[str, str]) -> None:
        numbers = {
            "done": str(self.done),
            "rollbacks": str(self.rollbacks),
            "slower": repr(self.slower),
        }
        with atomic_write(path) as temporary:
            tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
            save_file(tensors, temporary, metadata={**identity, **numbers})

    def load(self, path: Path, identity: dict[str, str]) -> None:
        wrong = InputError(
            f"{path} is not a checkpoint of this training",
            hint="Fit without --resume, with the same options.",
        )
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise wrong from error
        if any(found.get(key) != value for key, value in identity.items()):
            raise wrong
        if any(name not in state or state[name].shape != tensor.shape for name, tensor in self.tensors().items()):
            raise wrong
        self.restore(state)
        self.done, self.rollbacks = int(found["done"]), int(found["rollbacks"])
        self.slower = float(found["slower"])

    @torch.no_grad()
    def finish(self) -> None:
        for name, mean in self.mean.items():
            self.parameters[name].copy_(mean)
        _ranks.from_first([*self.parameters.values(), *self.statistics.values()])
        self.optimiser.zero_grad(set_to_none=True)
