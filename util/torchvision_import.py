"""torchvision's Python parts, also beside a torch that its compiled parts were not built for."""

import torch


def _import_utils():
    """torchvision.utils. With a CPU build of torch and a CUDA build of torchvision, the import first fails because the
    compiled operators that torchvision describes do not exist; declaring their schemas is all that it needs.
    """
    try:
        from torchvision import utils
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _import_utils.library = library  # the declarations live as long as this object
        from torchvision import utils
    return utils


make_grid = _import_utils().make_grid
