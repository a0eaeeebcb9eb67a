"""Face alignment: MTCNN finds faces and landmarks, and a similarity transform moves them to ArcFace's template."""

from applications.align.detector import Detector, Face, detect
from applications.align.warp import align

__all__ = ["Detector", "Face", "align", "detect"]
