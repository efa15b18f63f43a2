"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

import numpy as np

from stillroom.readers.stored import ArrayImages, Source, Split


def read_digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 gray, values 0 ... 16 scaled to 0 ... 255 and rounded; each pixel
    becomes a 4x4 block (32x32: the size of the small networks, and no value is invented). Every fifth image of a
    class, in the stored order, is a test image: 1,442 for training, 355 for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    pixels = pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None]  # [n, 32, 32, 1]
    labels = digits.target.astype(np.int64)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    train, test = (
        Split(ArrayImages(pixels[chosen], f"digits {name}", enlarged=16), labels[chosen])
        for name, chosen in (("train", ~is_test), ("test", is_test))
    )
    return Source(train, test)
