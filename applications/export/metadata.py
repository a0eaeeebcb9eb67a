"""What an exported file says of itself."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from util.calibration import Calibration
from util.face import FACE_SIZE
from util.image_tree import printable
from util.public_networks import PublicNetwork, settings_of_run
from util.training.report import format_far

_RATES = (1e-3, 1e-4)  # whose thresholds are written
# Of the settings of a run: what a user of the network may want to know. Paths stay here.
_SETTINGS = ("head", "loss", "epochs", "batch_size", "lr", "train_crop", "LR_train", "LR_scale", "seed")


def describe(
    network: PublicNetwork,
    file: Path,
    calibration: Calibration | None,
    *,
    made_from: str,
    preprocessing: bool,
    flip: bool,
    int8: bool,
) -> dict[str, str]:
    """Return the metadata of an exported network, all text.

    Args:
        network: the network.
        file: the file it was read from.
        calibration: how alike it finds strangers; adds thresholds (cosines) at fixed false accept rates.
        made_from: SHA-256 of the file.
        preprocessing: whether the program takes bytes and gives normalized embeddings.
        flip: whether it adds the embedding of the mirror image.
        int8: whether it is quantized. Then its embeddings are others than those of the file.
    """
    is_onnx = not network.is_trainable  # whose graph is copied, and takes what it took
    takes_bytes = preprocessing or network.takes_bytes
    scale = "0..255" if takes_bytes else network.input_scale if is_onnx else "-1..1"
    order = network.channel_order if is_onnx else "RGB"
    shape = f"N, {FACE_SIZE}, {FACE_SIZE}, 3) uint8" if takes_bytes else f"N, 3, {FACE_SIZE}, {FACE_SIZE}) float32"
    normalized = preprocessing or network.metadata.get("normalized") == "true"
    metadata = {
        "description": f"({shape} {order} in {scale} -> (N, {network.embedding_size}) embeddings"
        + (", normalized" if normalized else "")
        + (", int8" if int8 else ""),
        "network": network.metadata.get("network", network.name),
        "input_size": str(FACE_SIZE),
        "channel_order": order,
        "input_scale": scale,
        "crop": "whole" if preprocessing else network.crop,
        "embedding_size": str(network.embedding_size),
        "normalized": _text(normalized),
        "flip": _text(flip or network.metadata.get("flip") == "true"),
        "source_file": printable(file.name),
        "torch_version": torch.__version__,
    }
    if int8:
        metadata["quantized_from_sha256"] = made_from
    else:
        metadata["source_sha256"] = network.metadata.get("source_sha256", made_from)
    settings = settings_of_run(file)
    if settings is not None:
        run: Mapping[str, object] = {name: settings[name] for name in _SETTINGS if name in settings}
        metadata["training_run"] = json.dumps({"run": file.resolve().parent.name, **run})
    elif "training_run" in network.metadata:
        metadata["training_run"] = network.metadata["training_run"]
    if calibration is not None:
        metadata["calibration"] = calibration.to_json()
        for far in _RATES:
            if far >= calibration.lowest_far:
                metadata[f"threshold_at_far_{format_far(far)}"] = f"{calibration.threshold(far):.4f}"
    return metadata


def _text(value: bool) -> str:
    return "true" if value else "false"
