"""Networks that enlarge faces: from a small image in [0, 1] to a large one."""

from model.super_resolution.identify import identify_rcan, rcan_from_state_dict
from model.super_resolution.rcan import RCAN
from model.super_resolution.start import init_as_interpolation

__all__ = ["RCAN", "identify_rcan", "init_as_interpolation", "rcan_from_state_dict"]
