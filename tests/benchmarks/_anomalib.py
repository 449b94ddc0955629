"""anomalib's models on adflow's backbone: built, fitted and asked for predictions by anomalib's own engine.

Every model gets EfficientNet-Lite0 with the weights that adflow uses, at the strides of the peer's own defaults; its
other constants are its defaults. Without this anomalib fetches ResNets from a hub, and the backbones would be compared
instead of the methods. Validation, visualisation, logging and checkpoints are off, which is faster than the default.
"""

from __future__ import annotations

import datetime
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from anomalib import models
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from anomalib.models.image.csflow import torch_model as csflow
from anomalib.models.image.uflow import feature_extraction
from anomalib.models.image.uflow import torch_model as uflow
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, Normalize, Resize

from adflow._weights import find_weights, read_weights, rename_lite

NAME = "tf_efficientnet_lite0"
# Strides 4, 8, 16 and 32 of the net, 24, 40, 112 and 320 channels: where a ResNet has layer1 .. layer4.
_S4, _S8, _S16, _S32 = "blocks.1", "blocks.2", "blocks.4", "blocks.6"
_SIZE = (256, 256)
_create_model = timm.create_model

for _name in ("lightning", "lightning.pytorch", "lightning.fabric", "anomalib", "timm"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def build(method: str, **settings: Any) -> Any:
    """Return an unfitted model with the peer's defaults; ``settings`` override them."""
    parts: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
    parts["pre_processor"] = PreProcessor(
        Compose([Resize(_SIZE, antialias=True), Normalize([0.5] * 3, [0.5] * 3)])  # what these weights were trained on
    )
    parts |= settings
    with _lite0():
        if method == "padim":
            # 100 random channels, as for the peer's default net.
            return models.Padim(NAME, [_S4, _S8, _S16], pre_trained=False, n_features=100, **parts)
        if method == "cflow":
            return models.Cflow(NAME, (_S8, _S16, _S32), pre_trained=False, **parts)
        if method == "patchcore":
            return models.Patchcore(NAME, (_S8, _S16), pre_trained=False, **parts)
        if method == "fastflow":
            return models.Fastflow("resnet18", pre_trained=False, **parts)
        if method == "uflow":
            return models.Uflow("resnet18", **parts)
        return models.Csflow(**parts)


@contextmanager
def _lite0() -> Iterator[None]:
    """Let everything that asks timm for a net get EfficientNet-Lite0 with the local weights."""

    def create(name: str, *, out_indices: Any = None, **_: Any) -> nn.Module:
        indices = {} if out_indices is None else {"out_indices": out_indices}
        net: nn.Module = _create_model(NAME, pretrained=False, features_only=True, **indices)
        state = rename_lite(read_weights(find_weights("lite0").path), (1, 2, 2, 3, 3, 4, 1))
        missing, _ = net.load_state_dict(state, strict=False)  # the classifier's tensors are left over
        assert not [key for key in missing if not key.endswith("num_batches_tracked")], missing
        return net

    def extractor(_: str, size: tuple[int, int]) -> nn.Module:
        return feature_extraction.LayerNormFeatureExtractor(NAME, size, layers=(_S4, _S8, _S16))

    with (
        mock.patch.object(timm, "create_model", create),
        mock.patch.object(uflow, "get_feature_extractor", extractor),
        mock.patch.object(csflow, "CsFlowMultiScaleFeatureExtractor", _ThreeScales),
    ):
        yield


class _ThreeScales(nn.Module):
    """What CS-Flow reads, from the other net: its flow is built for 304 channels, so that 304 of the 320 are taken."""

    def __init__(self, n_scales: int, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.n_scales = n_scales
        self.net = timm.create_model(NAME, out_indices=(4,)).requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        self.net.eval()
        sizes = [(images.shape[2] >> k, images.shape[3] >> k) for k in range(self.n_scales)]
        with torch.no_grad():
            return [self.net(nn.functional.interpolate(images, size))[0][:, :304] for size in sizes]


def engine(epochs: int = 1, seconds: float | None = None) -> Engine:
    """Return an engine that is silent; ``seconds`` end the training after the batch in which they run out."""
    limit = None if seconds is None else datetime.timedelta(seconds=max(1.0, seconds))
    return Engine(
        accelerator="cpu", devices=1, max_epochs=epochs, max_time=limit, logger=False, barebones=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        default_root_dir=tempfile.mkdtemp(prefix="bench-anomalib-"),
    )  # fmt: skip


def training_data(root: Path) -> Folder:
    """Return the good training images of a folder laid out like MVTec AD."""
    # Processes that load images gain nothing on two cores (PaDiM 33.7 s instead of 34.2), and start for seconds.
    return Folder(root.name, "train/good", root=root, num_workers=0, test_split_mode="none", val_split_mode="none")


def prediction_data(paths: Sequence[Path], batch_size: int = 32) -> DataLoader[Any]:
    """Return a loader of image files."""
    data = PredictDataset(paths[0], transform=Resize(_SIZE, antialias=True))
    data.image_filenames = list(paths)
    return DataLoader(data, batch_size, collate_fn=data.collate_fn)


def predict(model: Any, runner: Engine, paths: Sequence[Path], batch_size: int = 32) -> tuple[list[Any], list[float]]:
    """Return score maps [h, w] float32 and image scores of ``paths``."""
    maps: list[np.ndarray] = []
    scores: list[float] = []
    for batch in runner.predict(model, dataloaders=prediction_data(paths, batch_size)) or []:
        maps += list(batch.anomaly_map.reshape(-1, *batch.anomaly_map.shape[-2:]).float().numpy())
        scores += batch.pred_score.flatten().tolist()
    return maps, scores
