"""Networks that enlarge faces: small images in [0, 1] to large images."""

from model.super_resolution.identify import identify_rcan, rcan_from_state_dict
from model.super_resolution.init import init_as_interpolation
from model.super_resolution.rcan import RCAN

__all__ = ["RCAN", "identify_rcan", "init_as_interpolation", "rcan_from_state_dict"]
