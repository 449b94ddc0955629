"""A fitted detector as a program in another format: from RGB pixels to map, score, verdict and mask.

One image is traced; a batch is that program repeated over its images (ONNX ``Scan``, a loop in TorchScript). So the
score of an image depends on that image alone there too, and methods whose code loops over images export as they are.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from adflow.bundle import MODELS, OUTPUTS
from adflow.detector import Detector, Scores
from adflow.errors import UnavailableError
from adflow.imaging import Box
from adflow.tasks._onnx import SMALL, finish, half_type, lay_straight, name_stages, stable_sort
from adflow.tasks._resize import fit_inside, within

# What torch's exporter writes.
OPSETS = range(16, 21)


@dataclass(frozen=True)
class Thresholds:
    """Levels above which an image or a pixel counts as defective; infinity = nothing is promised, so nothing does."""

    image: float = math.inf
    pixel: float = math.inf


@dataclass(frozen=True)
class Form:
    """What an exported program takes, and how it is written.

    Attributes:
        kind: "onnx", "openvino", "torchscript" or "torch" (a ``torch.export`` program).
        pixels: "uint8", or "float" for float32 in [0, 1].
        any_batch: take any number of images at once, not one.
        any_size: take images of any size and resize them inside.
        half: store weights in 16 bits.
        opset: of ONNX.
    """

    kind: str
    pixels: str = "uint8"
    any_batch: bool = False
    any_size: bool = False
    half: bool = False
    opset: int = 18


@dataclass
class Stages:
    """Tensors on the way from image to score, in the order they arise."""

    names: list[str] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> None:
        """Record ``value``; a name that is there gets a number: a module can run more than once."""
        count = sum(known == name or known.startswith(f"{name} #") for known in self.names)
        self.names.append(f"{name} #{count + 1}" if count else name)
        # A copy: the next layer may work in place.
        self.values.append(value.clone())


@contextlib.contextmanager
def watch(detector: Any) -> Iterator[Stages]:
    """Record what every module gives and the method's grid map, of each pass anew, for as long as this lasts."""
    seen = Stages()
    hooks = [
        module.register_forward_hook(_recorder(seen, name, detector.backbone.taps if name == "backbone" else ()))
        for name, module in detector.named_modules()
        if name
    ]
    inner = {name: getattr(detector, name) for name in ("_score", "score_features") if hasattr(detector, name)}

    def score(*arguments: Any) -> Any:
        seen.names.clear()
        seen.values.clear()
        return inner["_score"](*arguments)

    def score_features(pyramid: list[Tensor]) -> Tensor:
        grid_map: Tensor = inner["score_features"](pyramid)
        seen.add("grid map", grid_map)
        return grid_map

    detector._score = score
    if "score_features" in inner:
        detector.score_features = score_features
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for name in inner:
            delattr(detector, name)


def _recorder(seen: Stages, name: str, labels: Sequence[str]) -> Callable[[nn.Module, Any, Any], None]:
    def record(module: nn.Module, inputs: Any, outputs: Any) -> None:
        tensors = outputs if isinstance(outputs, list | tuple) else [outputs]
        for number, value in enumerate(tensors):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1:
                label = labels[number] if number < len(labels) else number
                seen.add(name if len(tensors) == 1 and not labels else f"{name} {label}", value)

    return record


class Program(nn.Module):
    """One image [1, H, W, 3] to map, score, verdict and mask (:data:`adflow.bundle.OUTPUTS`), then the stages."""

    def __init__(self, detector: Detector, thresholds: Thresholds, form: Form, stages: Stages | None = None) -> None:
        super().__init__()
        assert detector.size is not None
        self.size, self.keep_aspect = detector.size, detector.keep_aspect
        self.thresholds, self.form, self.stages = thresholds, form, stages
        pixels = torch.full((1, 3, *self.size), 0.5)
        self.detector = _Recorded(detector, pixels, stages) if _differentiates(detector, pixels) else detector

    def example(self) -> Tensor:
        """Return an image to trace with; of another size and shape than the network's where any size is taken."""
        height, width = (2 * self.size[0] + 6, self.size[1] + 10) if self.form.any_size else self.size
        grey = torch.full((1, height, width, 3), 0.5)
        return grey if self.form.pixels == "float" else (grey * 255).to(torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs."""
        box = Box(0, 0, *self.size)
        if self.form.any_size:
            pixels, box = fit_inside(images, self.size, self.keep_aspect)
        else:
            pixels = images.permute(0, 3, 1, 2)
            pixels = pixels.float() / 255 if self.form.pixels == "uint8" else pixels
        scores = self.detector._score(pixels, [box] if self.keep_aspect else None)
        verdict, mask = scores.image > self.thresholds.image, scores.map > self.thresholds.pixel
        if self.keep_aspect:
            mask = mask & within(box, self.size)
        between = [] if self.stages is None else self.stages.values
        return (scores.map, scores.image, verdict, mask, *between)


def _differentiates(detector: Detector, pixels: Tensor) -> bool:
    """Return whether scoring takes gradients: then something is kept for a backward pass."""
    kept: list[None] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(None)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        detector._score(pixels, None)
    return bool(kept)


class _Recorded(nn.Module):
    """A detector whose score, backward pass included, is recorded as plain operators, which tracers can follow."""

    def __init__(self, detector: Detector, pixels: Tensor, stages: Stages | None) -> None:
        super().__init__()
        self.stages = stages

        def score(pixels: Tensor) -> tuple[Tensor, ...]:
            scores = detector._score(pixels, None)
            return (scores.map, scores.image, *(stages.values if stages else ()))

        aten = torch.ops.aten
        simpler: Any = get_decompositions([aten.threshold_backward])
        self.graph = make_fx(score, decomposition_table=simpler)(pixels)
        for node in self.graph.graph.nodes:
            # Operators that recording makes, in names that every exporter knows.
            if node.target == aten.lift_fresh_copy.default:
                node.target = aten.clone.default
            elif node.target == aten._unsafe_view.default:
                node.target = aten.reshape.default
            elif node.target == aten._to_copy.default:
                node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.kwargs["dtype"]), {}
        self.graph.recompile()

    def backward_operators(self) -> list[str]:
        """Return the operators that only torch has."""
        return sorted({str(node.target) for node in self.graph.graph.nodes if "_backward" in str(node.target)})

    def _score(self, pixels: Tensor, boxes: Sequence[Box] | None) -> Scores:
        score_map, score, *between = self.graph(pixels)
        if self.stages is not None:
            self.stages.values[:] = between
        return Scores(score_map, score)


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


class _Halved(nn.Module):
    """A program whose large tensors are kept in 16 bits; it computes in float32."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.inside = (program,)  # in a tuple: its float32 tensors are no part of this module
        self.places: list[tuple[dict[str, Any], str]] = []
        for module in program.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None and tensor.dtype == torch.float32 and tensor.numel() >= SMALL:
                        half = tensor.detach().to(half_type(tensor))
                        self.register_buffer(f"half_{len(self.places)}", half)
                        self.places.append((store, name))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what the program does."""
        kept = [store[name] for store, name in self.places]
        try:
            for number, (store, name) in enumerate(self.places):
                store[name] = getattr(self, f"half_{number}").float()
            found: tuple[Tensor, ...] = self.inside[0](images)
        finally:
            for (store, name), tensor in zip(self.places, kept, strict=True):
                store[name] = tensor
        return found


def write_program(
    detector: Detector, thresholds: Thresholds, form: Form, folder: Path, ranges: Sequence[np.ndarray] = ()
) -> None:
    """Write ``detector`` into ``folder`` under the name that :data:`adflow.bundle.MODELS` has for ``form.kind``.

    Args:
        detector: fitted.
        thresholds: of verdict and mask.
        form: what is written.
        folder: where to.
        ranges: images as the program takes them; if there are any, convolutions are rounded to 8 bits, with the ranges
            of activations that these images give.

    Raises:
        UnavailableError: this format cannot hold the method; says what stood in the way and which format can.
    """
    path = folder / MODELS[form.kind][0]
    writers = {"onnx": _write_onnx, "openvino": _write_onnx, "torchscript": _write_torchscript, "torch": _write_torch}
    try:
        with torch.no_grad(), warnings.catch_warnings(), _silent():
            # Traces note every shape that becomes a constant: all are, on purpose.
            warnings.simplefilter("ignore")
            writers[form.kind](detector.eval(), thresholds, form, path, ranges)
    except (OSError, MemoryError, UnavailableError):
        raise
    except Exception as error:  # exporters raise whatever they met
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UnavailableError(
            f"{form.kind} cannot hold {detector.method()}: {reason}", hint=f"Use another format: {_other(form.kind)}"
        ) from error


def _other(kind: str) -> str:
    return f"--format {'torch' if kind == 'torchscript' else 'torchscript'}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep exporters from talking: in Python, and in C++, which writes a whole graph to the process's stdout."""
    with Path(os.devnull).open("w") as none, contextlib.redirect_stdout(none), contextlib.redirect_stderr(none):
        kept = os.dup(1)
        os.dup2(none.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _program(detector: Detector, thresholds: Thresholds, form: Form, stages: Stages | None = None) -> Program:
    program = Program(detector, thresholds, form, stages).eval()
    if isinstance(program.detector, _Recorded) and form.kind != "torch" and program.detector.backward_operators():
        raise UnavailableError(
            f"{form.kind} cannot hold {detector.method()}, which takes gradients of its network: there is no "
            f"{', '.join(program.detector.backward_operators())}",
            hint="Use --format torch.",
        )
    # Once, so that what is made on first use is there and no part of the trace.
    program(program.example())
    return program


def _write_torchscript(
    detector: Detector, thresholds: Thresholds, form: Form, path: Path, ranges: Sequence[np.ndarray]
) -> None:
    jit: Any = torch.jit
    program = _program(detector, thresholds, form)
    whole = _Halved(program).eval() if form.half else program
    one = jit.trace(whole, (program.example(),), check_trace=False)
    (jit.script(_EachImage(one).eval()) if form.any_batch else one).save(str(path))


def _write_torch(
    detector: Detector, thresholds: Thresholds, form: Form, path: Path, ranges: Sequence[np.ndarray]
) -> None:
    if form.any_batch:
        raise UnavailableError(
            "torch.export programs take one image: a loop over a batch would be unrolled",
            hint="Leave batch out of --dynamic, or use --format onnx or torchscript.",
        )
    program = _program(detector, thresholds, form)
    whole = _Halved(program).eval() if form.half else program
    sides = {1: torch.export.Dim("height", min=2), 2: torch.export.Dim("width", min=2)} if form.any_size else None
    exported = torch.export.export(whole, (program.example(),), dynamic_shapes=None if sides is None else (sides,))
    torch.export.save(exported, path)


def _write_onnx(
    detector: Detector, thresholds: Thresholds, form: Form, path: Path, ranges: Sequence[np.ndarray]
) -> None:
    import onnx

    buffer: Any = io.BytesIO()
    with watch(detector) as stages, stable_sort(form.opset):
        program = _program(detector, thresholds, form, stages)
        torch.onnx.export(
            program,
            (program.example(),),
            buffer,
            dynamo=False,
            opset_version=form.opset,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_axes={"images": {1: "H", 2: "W"}} if form.any_size else None,
        )
    model = onnx.load_from_string(buffer.getvalue())
    # Named only now: what is recorded may run other modules than a plain pass, which fuses some.
    name_stages(model.graph, stages.names)
    if form.kind == "onnx":
        path.write_bytes(finish(model, form.half, form.any_batch, ranges).SerializeToString())
        return
    import openvino

    lay_straight(model.graph)
    whole = openvino.Core().read_model(finish(model, False, form.any_batch, ranges).SerializeToString())
    openvino.save_model(whole, str(path), compress_to_fp16=form.half)
