"""Face alignment: MTCNN finds faces and landmarks, a similarity transform brings them to ArcFace's template."""

from applications.align.detector import Detector, Face, detect
from applications.align.warp import align

__all__ = ["Detector", "Face", "align", "detect"]
