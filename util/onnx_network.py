"""An ONNX network that computes embeddings on the CPU, as a module for evaluation.

A network that applications.export wrote has metadata: `channel_order`, `input_scale` and `crop` say what it takes, with
the names of util.face. With preprocessing inside, it takes (N, 112, 112, 3) uint8.
"""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from util.errors import DataError, RunError
from util.face import CHANNEL_ORDERS, CROPS, FACE_SIZE, INPUT_SCALES
from util.transform import to_pixels

# The metadata that evaluation relies on, with the values that it may have.
_KNOWN = {"channel_order": CHANNEL_ORDERS, "input_scale": INPUT_SCALES, "crop": CROPS}
_LAYOUTS = {  # {type of the input: its shape after N}
    "tensor(float)": (3, FACE_SIZE, FACE_SIZE),
    "tensor(uint8)": (FACE_SIZE, FACE_SIZE, 3),
}


class OnnxNetwork(nn.Module):
    """(N, 3, 112, 112) -> (N, embedding_size). It has no parameters, passes no gradients on and cannot be trained.

    Args:
        path: an ONNX file with one input, (N, 3, 112, 112) float32 or (N, 112, 112, 3) uint8 with N fixed or dynamic,
            and one output.

    Attributes:
        embedding_size: length of an embedding.
        reverses_channels: whether the images are turned from RGB to BGR, or back, first.
        takes_bytes: whether its input is uint8. The module takes images in [-1, 1] all the same.
        metadata: what the file says of itself, {} for a file of another project.

    Raises:
        DataError: onnxruntime cannot read the file, or its input, output or metadata are others.
    """

    def __init__(self, path: Path):
        super().__init__()
        # It takes a quarter of a second to import, and few commands need it.
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # only fatal errors are printed: exceptions tell the rest
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise DataError(f"{path}: not an ONNX network that can be run ({reason}). Take another.") from None
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        face = _LAYOUTS.get(inputs[0].type) if len(inputs) == len(outputs) == 1 else None
        # A size that is not fixed is a name or None.
        if (
            face is None
            or len(inputs[0].shape) != 4
            or any(isinstance(size, int) and size != side for size, side in zip(inputs[0].shape[1:], face, strict=True))
        ):
            raise DataError(
                f"{path}: it has the inputs {_signature(inputs)} and the outputs {_signature(outputs)}. Take a network "
                f"with one float32 input (N, 3, {FACE_SIZE}, {FACE_SIZE}) and one output."
            )
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        for key, known in _KNOWN.items():
            if self.metadata.get(key, known[0]) not in known:
                raise DataError(
                    f"{path}: its metadata has {key} {self.metadata[key][:40]!r}, and not {' or '.join(known)}. "
                    "Export the network again."
                )
        self.takes_bytes = inputs[0].type == "tensor(uint8)"
        self._input = inputs[0].name
        self._batch = inputs[0].shape[0] if isinstance(inputs[0].shape[0], int) else None
        self.reverses_channels = False
        try:
            shape = self._run(torch.zeros(1, *face, dtype=torch.uint8 if self.takes_bytes else torch.float32)).shape
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise DataError(f"{path}: does not run on a face ({reason}). Take another.") from None
        if len(shape) != 2:
            raise DataError(
                f"{path}: gives {tuple(shape)} for one face. Take a network that gives (1, embedding size)."
            )
        self.embedding_size = shape[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # it has no state that could change

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad and torch.is_grad_enabled():
            raise RunError("an ONNX network passes no gradients on. Give a PyTorch file of it.")
        if self.reverses_channels:
            images = images.flip(1)
        images = to_pixels(images) if self.takes_bytes else images.float()
        batch = self._batch or len(images)
        parts = [self._run(part) for part in images.cpu().split(batch)]
        return torch.cat(parts).to(images.device)

    def _run(self, images: Tensor) -> Tensor:
        """Run the network. A fixed batch is filled up with black images."""
        count = len(images)
        if self._batch is not None and count < self._batch:
            images = torch.cat([images, images.new_zeros(self._batch - count, *images.shape[1:])])
        (output,) = self._session.run(None, {self._input: images.contiguous().numpy()})
        return torch.from_numpy(output)[:count]


def _signature(arguments: list[Any]) -> str:
    """Return names, types and shapes of inputs or outputs."""
    return ", ".join(f"{each.name[:80]!r} {each.type} {each.shape}" for each in arguments) or "none"
