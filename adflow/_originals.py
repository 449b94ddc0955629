"""Checkpoints of original implementations into blocks of :mod:`adflow.flows`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adflow.errors import InputError


def load_original(module: nn.Module, state: Mapping[str, Tensor], *, prefix: str = "") -> None:
    """Load a state dict of an original implementation into ``module``, strictly.

    FrEIA's C x C matrix ``w_perm`` becomes our index vector ``permutation`` (it must then be a permutation
    matrix) or our ``rotation``, whichever the block has; ``w_perm_inv`` is checked to be its transpose and
    dropped, as is the constant ``downsample_kernel`` of i-RevNet up-sampling.

    Args:
        module: chain, graph or whole model whose remaining names equal the original's.
        state: the original's tensors.
        prefix: only keys that begin with it are used, and it is cut off.

    Raises:
        InputError: names or shapes do not fit, or a matrix is not what the block needs.
    """
    ours = set(module.state_dict())
    adapted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        key = name[len(prefix) :]
        stem, _, leaf = key.rpartition(".")
        stem = f"{stem}." if stem else ""
        if leaf == "w_perm":
            matrix = tensor.flatten(1)
            inverse = state.get(f"{prefix}{stem}w_perm_inv")
            # Rotations are stored in float32: their transpose is exact, so anything else is another layout.
            if inverse is not None and not torch.equal(inverse.flatten(1), matrix.T):
                raise InputError(f"{name} and its inverse are not each other's transpose")
            if f"{stem}permutation" in ours:
                adapted[f"{stem}permutation"] = _as_index(matrix, name)
            else:
                adapted[f"{stem}rotation"] = matrix
        elif leaf not in ("w_perm_inv", "downsample_kernel"):
            adapted[key] = tensor
    missing, unexpected = sorted(ours - set(adapted)), sorted(set(adapted) - ours)
    if missing or unexpected:
        raise InputError(
            f"the checkpoint does not fit: {len(missing)} tensors missing (first: {missing[:1]}), "
            f"{len(unexpected)} not expected (first: {unexpected[:1]})",
            hint="Build the model with the checkpoint's number of blocks, channels and conditions.",
        )
    try:
        module.load_state_dict(adapted, strict=True)
    except RuntimeError as error:
        raise InputError(f"the checkpoint does not fit: {str(error).splitlines()[-1].strip()}") from error


def _as_index(matrix: Tensor, name: str) -> Tensor:
    index = matrix.argmax(1)
    exact = torch.equal(torch.eye(len(matrix), dtype=matrix.dtype)[index], matrix)
    if not exact or len(set(index.tolist())) < len(index):
        raise InputError(
            f"{name} is not a permutation matrix, but this block needs one", hint="Use permutation='soft'."
        )
    return index
