"""Turn a network into an ONNX or torch.export program with metadata, and compare the program with the network."""

import json
import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F

from util.errors import RunError
from util.face import CROP_FROM, FACE_SIZE
from util.files import atomic_write
from util.transform import normalize

INPUT, OUTPUT = "images", "embeddings"
TOLERANCE = 1e-4  # largest difference of a number in a normalized embedding
METADATA_FILE = "metadata.json"  # in a torch.export archive


class Deployed(nn.Module):
    """A network with what users of the exported program want in it.

    Args:
        network: (N, 3, 112, 112) RGB in [-1, 1] -> (N, D).
        crop: one of util.face.CROPS; what the network is shown of a face.
        preprocessing: take (N, 112, 112, 3) RGB uint8, complete aligned faces, and return normalized embeddings.
        flip: add the embedding of the mirror image.
    """

    def __init__(self, network: nn.Module, crop: str, *, preprocessing: bool, flip: bool):
        super().__init__()
        self.network = network
        self.crop = crop
        self.preprocessing = preprocessing
        self.flip = flip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.preprocessing:
            images = normalize(_center_of_128(images) if self.crop == "128" else images).contiguous()
        if self.flip:
            both = self.network(torch.cat([images, images.flip(3)]))
            embeddings = both.reshape(2, -1, both.shape[1]).sum(0)
        else:
            embeddings = self.network(images)
        return F.normalize(embeddings) if self.preprocessing else embeddings

    def example(self) -> torch.Tensor:
        """Return two black images as the program takes them. (torch would take a single one for a constant size.)"""
        if self.preprocessing:
            return torch.zeros(2, FACE_SIZE, FACE_SIZE, 3, dtype=torch.uint8)
        return torch.zeros(2, 3, FACE_SIZE, FACE_SIZE)

    def prepare(self, crops: np.ndarray, faces: np.ndarray) -> torch.Tensor:
        """Return the program's input, from evaluation crops and complete faces, both (N, 112, 112, 3) uint8."""
        return torch.from_numpy(faces) if self.preprocessing else normalize(torch.from_numpy(crops)).contiguous()


def _center_of_128(images: torch.Tensor) -> torch.Tensor:
    """Compute util.transform.eval_crop with the same bits: (N, 112, 112, 3) uint8 -> the same.

    OpenCV interpolates bytes with integers: rows exactly, then columns in quarters of a gray level, rounded down, whose
    sum is rounded. The weights are multiples of 1/16, so all numbers here are exact in float32.
    """
    start = (CROP_FROM - FACE_SIZE) // 2
    position = (torch.arange(start, start + FACE_SIZE) + 0.5) * (FACE_SIZE / CROP_FROM) - 0.5
    low = position.floor().long()
    weight = position - low
    pixels = images.permute(0, 3, 1, 2).float()
    rows = pixels[..., low] * (1 - weight) + pixels[..., low + 1] * weight
    upper = (4 * rows[:, :, low] * (1 - weight[:, None])).floor()
    lower = (4 * rows[:, :, low + 1] * weight[:, None]).floor()
    return ((upper + lower + 2) / 4).floor().to(torch.uint8).permute(0, 2, 3, 1)


def write_onnx(module: Deployed, metadata: Mapping[str, str], path: Path) -> None:
    """Write a module as an ONNX file whose batch size is dynamic."""
    with _quiet():
        converted = torch.onnx.export(
            _traced(module),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert converted is not None
    write_model(clean(converted.model_proto), metadata, path)


def clean(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what the exporter notes of each operation, like paths of this machine, and name the batch size N."""
    del model.metadata_props[:]
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == batch:
                size.dim_param = "N"
    return model


def write_model(model: onnx.ModelProto, metadata: Mapping[str, str], path: Path) -> None:
    """Write an ONNX model with this metadata. Raise RunError if it has more than the 2 GiB that one file can hold."""
    onnx.helper.set_model_props(model, dict(metadata))
    try:
        content = model.SerializeToString()
    except Exception as error:  # protobuf's EncodeError, or ValueError, depends on its version
        raise RunError(f"{path}: the network does not fit into one ONNX file ({error}). Take a smaller one.") from None
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def copy_onnx(source: Path, metadata: Mapping[str, str], path: Path) -> None:
    """Write a copy of an ONNX file with other metadata. RunError if it keeps its weights in other files."""
    model = onnx.load(source, load_external_data=False)
    if any(onnx.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer):
        raise RunError(f"{source}: keeps its weights in other files, and only one file is copied. Join them first.")
    write_model(model, metadata, path)


def write_torch_export(module: Deployed, metadata: Mapping[str, str], path: Path) -> None:
    """Write a module as a torch.export archive, which torch.export.load() reads."""
    with _quiet(), atomic_write(path) as partial:
        torch.export.save(_traced(module), partial, extra_files={METADATA_FILE: json.dumps(dict(metadata))})


def _traced(module: Deployed) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("N", min=1)
    return torch.export.export(module.eval(), (module.example(),), dynamic_shapes=({0: batch},))


@contextmanager
def _quiet():
    """Silence what torch prints while it traces: it warns about its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            yield
    finally:
        logger.setLevel(level)


def run_program(path: Path, images: torch.Tensor) -> torch.Tensor:
    """Return what an exported file gives for images, in batches of several sizes, or of its own fixed size."""
    sizes = [1, 2, *[32] * len(images)]
    if path.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (taken,) = session.get_inputs()
        if isinstance(taken.shape[0], int):  # a network of another project
            sizes = [taken.shape[0]] * len(images)

        def run(part: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {taken.name: part.numpy()})[0])
    else:
        run = torch.export.load(path).module()
    outputs = []
    with torch.inference_mode():
        for size in sizes:
            if not len(images):
                break
            outputs.append(run(images[:size]))
            images = images[size:]
    return torch.cat(outputs)


def check_program(module: Deployed, path: Path, images: torch.Tensor) -> float:
    """Compare an exported file with the module it was made from, on images as it takes them.

    Returns:
        The largest difference of a number in the L2-normalized embeddings.

    Raises:
        RunError: it is above TOLERANCE.
    """
    with torch.inference_mode():
        expected = torch.cat([module.eval()(part) for part in images.split(32)])
    difference = (F.normalize(run_program(path, images)) - F.normalize(expected)).abs().max().item()
    if not difference <= TOLERANCE:
        raise RunError(
            f"{path}: its embeddings differ from torch's by {difference:.1e}, more than {TOLERANCE}. Do not use it; "
            "report the network and the versions of torch and onnxruntime."
        )
    return difference
