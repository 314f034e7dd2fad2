"""Two repairs that let old and mismatched packages load. Import from here, not from the packages."""

import numpy as np


def import_imgaug_augmenters():
    """Return imgaug.augmenters.

    imgaug 0.4.0, its last release, reads np.sctypes, which NumPy 2 removed. This can go when
    imgaug does, or when a release of it stops reading np.sctypes.
    """
    if not hasattr(np, "sctypes"):
        np.sctypes = {
            "int": [np.int8, np.int16, np.int32, np.int64],
            "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
            "float": [np.float16, np.float32, np.float64],
            "complex": [np.complex64, np.complex128],
            "others": [bool, object, bytes, str, np.void],
        }
    from imgaug import augmenters

    return augmenters


def import_torchvision():
    """Return torchvision.

    A torchvision built for CUDA cannot load its operators beside a CPU-only torch, and its
    import then fails for want of two operator schemas. Transforms and datasets need neither:
    declaring the schemas is enough. Matching builds keep their own operators. This can go when
    both packages come from one index.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:  # "operator torchvision::nms does not exist"
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # the schemas live as long as this object
        import torchvision
    return torchvision
