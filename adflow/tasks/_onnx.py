"""What happens to an ONNX model after torch has written it: batches, 16-bit weights, 8-bit convolutions, stages."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adflow.bundle import OUTPUTS

# Tensors with fewer numbers stay float32 when weights are halved: they are means and scales, and weigh nothing.
SMALL = 1024
STAGE = "stage "
_TAP = f"{STAGE}backbone "  # features, the finest first


def finish(one: Any, half: bool, any_batch: bool, ranges: Sequence[np.ndarray]) -> Any:
    """Return the model of one image as it is shipped; stages stay inside under their names.

    Args:
        one: torch's model [1, H, W, 3] -> outputs, then stages.
        half: keep weights in 16 bits.
        any_batch: take any number of images.
        ranges: images to take the ranges of 8-bit activations from; none: all stays float32.
    """
    import onnx

    del one.graph.output[len(OUTPUTS) :]
    if len(ranges):
        one = _quantised(one, ranges)
    if half:
        _halve(one.graph)
    model = over_batch(one) if any_batch else one
    model.producer_name = "adflow"
    onnx.checker.check_model(model)
    return model


def name_stages(graph: Any, names: Sequence[str]) -> None:
    """Give the outputs behind :data:`adflow.bundle.OUTPUTS` the names of the stages."""
    outputs = [output.name for output in graph.output[len(OUTPUTS) :]]
    new = {old: STAGE + name for old, name in zip(outputs, names, strict=True)}
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [new.get(end, end) for end in ends]
    for output in graph.output:
        output.name = new.get(output.name, output.name)


def half_type(tensor: Tensor) -> torch.dtype:
    """Return float16, or bfloat16 for values that are too large or too small for it."""
    largest = float(tensor.abs().max())
    # Below 6e-8 / 2^-9 the steps of float16's smallest numbers are coarser than bfloat16's.
    return torch.float16 if 3e-5 <= largest <= 65504 or largest == 0 else torch.bfloat16


def _halve(graph: Any) -> None:
    """Keep large float32 tensors in 16 bits; a cast, which runtimes do once, gives them back as float32."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in list(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < SMALL:
            continue
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        kind = half_type(values)
        stored = helper.make_tensor(
            f"{tensor.name} half",
            TensorProto.FLOAT16 if kind == torch.float16 else TensorProto.BFLOAT16,
            list(tensor.dims),
            values.to(kind).view(torch.uint8 if values.ndim == 0 else torch.int16).numpy().tobytes(),
            raw=True,
        )
        casts.append(helper.make_node("Cast", [stored.name], [tensor.name], to=TensorProto.FLOAT))
        graph.initializer.remove(tensor)
        graph.initializer.append(stored)
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])


def lay_straight(graph: Any) -> None:
    """Store matrices that are used both as they are and transposed twice, instead of transposing one.

    OpenVINO (seen in 2026.4) keeps one packed copy of a constant and takes it for both: square ones come out wrong.
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("Gemm", "MatMul")]
    transposed = [node for node in products if any(a.name == "transB" and a.i for a in node.attribute)]
    straight = {node.input[1] for node in products if node not in transposed}
    made: set[str] = set()
    for node in transposed:
        name = node.input[1]
        if name not in stored or name not in straight:
            continue
        node.input[1] = f"{name} transposed"
        node.attribute.remove(next(a for a in node.attribute if a.name == "transB"))
        if name not in made:
            turned = np.ascontiguousarray(numpy_helper.to_array(stored[name]).T)
            graph.initializer.append(numpy_helper.from_array(turned, node.input[1]))
            made.add(name)


def _quantised(one: Any, ranges: Sequence[np.ndarray]) -> Any:
    """Round the backbone's convolutions, weights per channel and activations, to 8 bits; the rest stays float32.

    So do the convolutions that the finest features are made of: their rounding errors go into all that follows, and
    with them in 8 bits no method that whitens features stood it.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime carries no types
        def __init__(self) -> None:
            self.rest = iter(ranges)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.rest, None)
            return None if image is None else {"images": image}

    convolutions = [node for node in one.graph.node if node.op_type == "Conv"]
    early = _made_from(one.graph, next((name for name in _outputs(one.graph) if name.startswith(_TAP)), ""))
    # Methods that train a net of their own have no convolution in a backbone: then it is all of them.
    chosen = [node for node in convolutions if "/backbone/" in node.name and node.name not in early] or convolutions
    # With its activation a convolution needs to hold what that lets through only, not all that it cuts off.
    ends = {node.output[0] for node in chosen}
    acts = [node for node in one.graph.node if node.op_type in ("Clip", "Relu") and node.input[0] in ends]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(one, str(source))
        quantize_static(
            str(source),
            str(target),
            Images(),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=[node.name for node in (*chosen, *acts)],
            per_channel=True,
            # Seven bits: processors without VNNI add products of two full bytes in 16 bits, which overflow.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(str(target))


def _outputs(graph: Any) -> Iterator[str]:
    return (name for node in graph.node for name in node.output)


def _made_from(graph: Any, tensor: str) -> set[str]:
    """Return the names of the nodes that ``tensor`` is computed by."""
    wanted, found = {tensor}, set()
    for node in reversed(graph.node):
        if not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            found.add(node.name)
    return found


@contextlib.contextmanager
def stable_sort(opset: int) -> Iterator[None]:
    """Teach the exporter ``Tensor.sort(stable=True)``: ONNX's TopK breaks ties by the lower index, which is stable."""
    exporter: Any = torch.onnx  # its types are not exported

    def sort(g: Any, values: Any, *options: Any) -> Any:
        # (dim, descending), or (stable, dim, descending).
        dim = exporter.symbolic_helper._get_const(options[-2], "i", "dim")
        descending = exporter.symbolic_helper._get_const(options[-1], "i", "descending")
        axis = g.op("Constant", value_t=torch.tensor([dim]))
        length = g.op("Gather", g.op("Shape", values), axis)
        return g.op("TopK", values, length, axis_i=dim, largest_i=descending, sorted_i=1, outputs=2)

    exporter.register_custom_op_symbolic("aten::sort", sort, opset)
    try:
        yield
    finally:
        exporter.unregister_custom_op_symbolic("aten::sort", opset)


def over_batch(one: Any) -> Any:
    """Return the model that applies ``one`` (a batch of 1) to each image of a batch of any length."""
    from onnx import compose, helper, numpy_helper

    one = compose.add_prefix(one, "one ")
    body = one.graph
    image = body.input[0].type.tensor_type
    sides = [side.dim_param or side.dim_value for side in image.shape.dim[1:]]
    body.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), "one axis"))
    nodes = [helper.make_node("Unsqueeze", ["each image", "one axis"], ["one images"]), *body.node]
    inside, outside = [], []
    for name, output in zip(OUTPUTS, body.output, strict=True):
        nodes.append(helper.make_node("Squeeze", [f"one {name}", "one axis"], [f"each {name}"]))
        kind = output.type.tensor_type.elem_type
        shape = [side.dim_value for side in output.type.tensor_type.shape.dim[1:]]
        inside.append(helper.make_tensor_value_info(f"each {name}", kind, shape))
        outside.append(helper.make_tensor_value_info(name, kind, ["B", *shape]))
    inner = helper.make_graph(
        nodes,
        "one image",
        [helper.make_tensor_value_info("each image", image.elem_type, sides)],
        inside,
        initializer=list(body.initializer),
    )
    scan = helper.make_node("Scan", ["images"], list(OUTPUTS), name="batch", num_scan_inputs=1, body=inner)
    outer = helper.make_graph(
        [scan],
        "adflow",
        [helper.make_tensor_value_info("images", image.elem_type, ["B", *sides])],
        outside,
    )
    return helper.make_model(outer, opset_imports=list(one.opset_import), ir_version=one.ir_version)


def with_stages(model: Any) -> tuple[Any, list[str]]:
    """Return a copy of a shipped model that also gives its stages, each [1, ...] or [B, 1, ...], and their names."""
    from onnx import TensorProto, helper

    shown = copy.deepcopy(model)
    scan = next((node for node in shown.graph.node if node.op_type == "Scan" and node.name == "batch"), None)
    graph = shown.graph if scan is None else next(a for a in scan.attribute if a.name == "body").g
    before = STAGE if scan is None else f"one {STAGE}"
    names = [output.removeprefix(before) for node in graph.node for output in node.output if output.startswith(before)]
    for name in names:
        value = helper.make_tensor_value_info(before + name, TensorProto.FLOAT, None)
        graph.output.append(value)
        if scan is not None:
            scan.output.append(STAGE + name)
            shown.graph.output.append(helper.make_tensor_value_info(STAGE + name, TensorProto.FLOAT, None))
    return shown, names
