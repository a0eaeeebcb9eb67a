"""Make an int8 network from an ONNX network, by static quantization with onnxruntime."""

import io
import logging
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch.nn import functional as F

from applications.export.graph import run_program, write_model

CALIBRATION_FACES = 128
_BATCH = 16
_PERCENTILE = 99.99


class _Faces(CalibrationDataReader):
    """Batches of faces from which onnxruntime learns the range of each layer's values."""

    def __init__(self, graph: onnx.GraphProto, images: torch.Tensor):
        self._name = graph.input[0].name
        batch = graph.input[0].type.tensor_type.shape.dim[0].dim_value or _BATCH  # 0: any
        self._batches = [part.numpy() for part in images.split(batch) if len(part) == batch]
        self._left: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = self._batches[start_index:end_index]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return {self._name: self._left.pop()} if self._left else None


def _is_depthwise(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)


def quantize(source: Path, faces: torch.Tensor, others: torch.Tensor, metadata: Mapping[str, str], path: Path) -> float:
    """Write the int8 network of an ONNX network, and compare their embeddings.

    Weights are quantized channel by channel. Depthwise convolutions stay in float32: they are a small part of the time,
    and their channels differ most. The range of a layer leaves out the 1e-4 of its values that are largest: with them,
    one outlier would cost all others their precision (MobileFaceNet: a cosine of 0.85 instead of 0.98).

    Args:
        source: the float32 network.
        faces: images as the network takes them, to measure the range of values of each layer.
        others: images for the comparison.
        metadata: for the new file.
        path: the new file.

    Returns:
        The mean cosine of the embeddings of an image by both networks.
    """
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime logs advice to the root, and prints its progress
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        folded, quantized = (Path(folder) / name for name in ("folded.onnx", "int8.onnx"))
        quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
        graph = onnx.load(folded).graph
        quantize_static(
            folded,
            quantized,
            _Faces(graph, faces),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=[node.name for node in graph.node if _is_depthwise(node)],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": _PERCENTILE, "CalibStridedMinMax": 1},  # holds one batch's values
        )
        write_model(onnx.load(quantized), metadata, path)
    before, after = (F.normalize(run_program(file, others)) for file in (source, path))
    return (before * after).sum(1).mean().item()
