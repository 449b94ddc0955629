"""A fitted detector as a program in another format: from RGB pixels to map, score, verdict and mask.

One image is traced; a batch is that program repeated over its images (ONNX ``Scan``, a loop in TorchScript). So the
score of an image depends on that image alone there too, and methods whose code loops over images export as they are.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adflow.bundle import OUTPUTS
from adflow.detector import Detector
from adflow.errors import UnavailableError

OPSET = 18


@dataclass(frozen=True)
class Thresholds:
    """Levels above which an image or a pixel counts as defective; infinity = nothing is promised, so nothing does."""

    image: float = math.inf
    pixel: float = math.inf


@dataclass
class Stages:
    """Tensors on the way from image to score, in the order they arise."""

    names: list[str] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


@contextlib.contextmanager
def watch(detector: Any) -> Iterator[Stages]:
    """Record the backbone's maps and the method's grid map of each pass, for as long as this lasts."""
    seen = Stages()
    taps = detector.backbone.taps

    def after_backbone(module: nn.Module, inputs: Any, pyramid: list[Tensor]) -> None:
        seen.names[:] = [f"backbone {taps[i] if i < len(taps) else i}" for i in range(len(pyramid))]
        seen.values[:] = list(pyramid)

    hook = detector.backbone.register_forward_hook(after_backbone)
    inner = getattr(detector, "score_features", None)
    if inner is not None:

        def score_features(pyramid: list[Tensor]) -> Tensor:
            grid_map: Tensor = inner(pyramid)
            seen.names.append("grid map")
            seen.values.append(grid_map)
            return grid_map

        detector.score_features = score_features
    try:
        yield seen
    finally:
        hook.remove()
        if inner is not None:
            del detector.score_features


class Program(nn.Module):
    """One image [1, H, W, 3], RGB float32 in 0..255, to map, score, verdict, mask, and the stages between."""

    def __init__(self, detector: Detector, thresholds: Thresholds, stages: Stages | None = None) -> None:
        super().__init__()
        self.detector, self.thresholds, self.stages = detector, thresholds, stages

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs named in :data:`adflow.bundle.OUTPUTS`, then the stages."""
        scores = self.detector._score(images.permute(0, 3, 1, 2) / 255, None)
        verdict, mask = scores.image > self.thresholds.image, scores.map > self.thresholds.pixel
        between = [] if self.stages is None else self.stages.values
        return (scores.map, scores.image, verdict, mask, *between)


class _EachImage(nn.Module):
    def __init__(self, one: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.one = one

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        maps: list[Tensor] = []
        scores: list[Tensor] = []
        verdicts: list[Tensor] = []
        masks: list[Tensor] = []
        for image in torch.split(images, 1):
            score_map, score, verdict, mask = self.one(image)
            maps.append(score_map)
            scores.append(score)
            verdicts.append(verdict)
            masks.append(mask)
        return torch.cat(maps), torch.cat(scores), torch.cat(verdicts), torch.cat(masks)


def write_program(detector: Detector, thresholds: Thresholds, kind: str, path: Path) -> None:
    """Write ``detector`` to ``path`` as "onnx", "torchscript" or "torch" (a ``torch.export`` program).

    Raises:
        UnavailableError: this format cannot hold the method; says what stood in the way and which format can.
    """
    assert detector.size is not None
    example = torch.full((1, *detector.size, 3), 127.0)
    writers = {"onnx": _write_onnx, "torchscript": _write_torchscript, "torch": _write_torch}
    try:
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # Traces note every shape that becomes a constant: all are, on purpose.
            warnings.simplefilter("ignore")
            detector.eval()
            detector._score(example.permute(0, 3, 1, 2) / 255, None)
            writers[kind](detector, thresholds, example, path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # exporters raise whatever they met
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        other = "torch" if kind == "torchscript" else "torchscript"
        raise UnavailableError(
            f"{kind} cannot hold {detector.method()}: {reason}", hint=f"Use another format: --format {other}"
        ) from error


def _write_torchscript(detector: Detector, thresholds: Thresholds, example: Tensor, path: Path) -> None:
    jit: Any = torch.jit
    one = jit.trace(Program(detector, thresholds).eval(), (example,), check_trace=False)
    jit.script(_EachImage(one).eval()).save(str(path))


def _write_torch(detector: Detector, thresholds: Thresholds, example: Tensor, path: Path) -> None:
    torch.export.save(torch.export.export(Program(detector, thresholds).eval(), (example,)), path)


def _write_onnx(detector: Detector, thresholds: Thresholds, example: Tensor, path: Path) -> None:
    import onnx

    buffer: Any = io.BytesIO()
    with watch(detector) as stages, _stable_sort():
        program = Program(detector, thresholds, stages).eval()
        program(example)
        names = [f"one_{name}" for name in (*OUTPUTS, *stages.names)]
        torch.onnx.export(
            program,
            (example,),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=["one_images"],
            output_names=[name.replace(" ", "_") for name in names],
        )
    model = over_batch(onnx.load_from_string(buffer.getvalue()))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def _stable_sort() -> Iterator[None]:
    """Teach the exporter ``Tensor.sort(stable=True)``: ONNX's TopK breaks ties by the lower index, which is stable."""
    exporter: Any = torch.onnx  # its types are not exported

    def sort(g: Any, values: Any, *options: Any) -> Any:
        # (dim, descending), or (stable, dim, descending).
        dim = exporter.symbolic_helper._get_const(options[-2], "i", "dim")
        descending = exporter.symbolic_helper._get_const(options[-1], "i", "descending")
        axis = g.op("Constant", value_t=torch.tensor([dim]))
        length = g.op("Gather", g.op("Shape", values), axis)
        return g.op("TopK", values, length, axis_i=dim, largest_i=descending, sorted_i=1, outputs=2)

    exporter.register_custom_op_symbolic("aten::sort", sort, OPSET)
    try:
        yield
    finally:
        exporter.unregister_custom_op_symbolic("aten::sort", OPSET)


def over_batch(one: Any) -> Any:
    """Return the ONNX model that applies ``one`` (batch of 1) to each image of a batch of any length.

    The stages' tensors stay inside under their names; :func:`with_stages` shows them.
    """
    from onnx import TensorProto, helper, numpy_helper

    body = one.graph
    height, width = (d.dim_value for d in body.input[0].type.tensor_type.shape.dim[1:3])
    axis = numpy_helper.from_array(torch.zeros(1, dtype=torch.int64).numpy(), "one_axis")
    body.initializer.append(axis)
    nodes = [helper.make_node("Unsqueeze", ["one_image", "one_axis"], ["one_images"]), *body.node]
    shapes = {"map": ["B", height, width], "score": ["B"], "verdict": ["B"], "mask": ["B", height, width]}
    types = {name: TensorProto.FLOAT if name in ("map", "score") else TensorProto.BOOL for name in OUTPUTS}
    results = []
    for name in OUTPUTS:
        nodes.append(helper.make_node("Squeeze", [f"one_{name}", "one_axis"], [f"each_{name}"]))
        results.append(helper.make_tensor_value_info(f"each_{name}", types[name], shapes[name][1:]))
    inner = helper.make_graph(
        nodes,
        "one_image",
        [helper.make_tensor_value_info("one_image", TensorProto.FLOAT, [height, width, 3])],
        results,
        initializer=list(body.initializer),
    )
    scan = helper.make_node("Scan", ["images"], list(OUTPUTS), name="batch", num_scan_inputs=1, body=inner)
    outer = helper.make_graph(
        [scan],
        "adflow",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", height, width, 3])],
        [helper.make_tensor_value_info(name, types[name], shapes[name]) for name in OUTPUTS],
    )
    return helper.make_model(
        outer, opset_imports=list(one.opset_import), ir_version=one.ir_version, producer_name="adflow"
    )


def with_stages(model: Any, names: list[str]) -> Any:
    """Return a copy of an exported model that also gives the tensors of the stages ``names``, [B, 1, ...]."""
    import copy

    from onnx import TensorProto, helper

    shown = copy.deepcopy(model)
    scan = shown.graph.node[0]
    inner = next(a for a in scan.attribute if a.name == "body").g
    for name in names:
        tensor = f"one_{name}".replace(" ", "_")
        inner.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
        scan.output.append(f"stage_{tensor}")
        shown.graph.output.append(helper.make_tensor_value_info(f"stage_{tensor}", TensorProto.FLOAT, None))
    return shown
