"""Networks that enlarge faces: from a small image in [0, 1] to a large one."""

from model.super_resolution.rcan import RCAN

__all__ = ["RCAN"]
