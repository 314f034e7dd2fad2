"""The repair that lets imgaug load. Import it from here, not from the package."""

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
