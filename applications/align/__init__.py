"""Face alignment: MTCNN finds faces and landmarks, and a similarity transform moves them to ArcFace's template."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from applications.align.detector import Detector, Face, detect
    from applications.align.warp import align

__all__ = ["Detector", "Face", "align", "detect"]


def __getattr__(name: str) -> Any:
    """Import torch at the first use of a name: `python -m applications.align.face_align --help` needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{'warp' if name == 'align' else 'detector'}"), name)
