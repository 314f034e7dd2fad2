"""The layers by explicit loops, as the lesson does them, in float64 NumPy: slow and plain to see.

Shapes are (N, C, H, W); kernels (out, in, kh, kw). Nothing here calls torch.
"""

import numpy as np


def conv2d(images: np.ndarray, kernels: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Valid cross-correlation, stride 1: (N, in, H, W) to (N, out, H - kh + 1, W - kw + 1)."""
    n, _, height, width = images.shape
    n_out, _, kernel_height, kernel_width = kernels.shape
    sums = np.zeros((n, n_out, height - kernel_height + 1, width - kernel_width + 1))
    for i in range(sums.shape[2]):
        for j in range(sums.shape[3]):
            patches = images[:, :, i : i + kernel_height, j : j + kernel_width]  # (N, in, kh, kw)
            for image in range(n):
                for out in range(n_out):
                    sums[image, out, i, j] = np.sum(patches[image] * kernels[out]) + bias[out]
    return sums


def max_pool2d(images: np.ndarray, size: int = 2) -> np.ndarray:
    """Largest value of each size×size window; a border too small for a window is dropped."""
    n, channels, height, width = images.shape
    pooled = np.zeros((n, channels, height // size, width // size))
    for i in range(pooled.shape[2]):
        for j in range(pooled.shape[3]):
            window = images[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
            pooled[:, :, i, j] = window.max(axis=(2, 3))
    return pooled


def linear(inputs: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(N, in) to (N, out), with `weights` (out, in)."""
    outputs = np.zeros((len(inputs), len(weights)))
    for row, values in enumerate(inputs):
        for out, weight in enumerate(weights):
            outputs[row, out] = np.sum(values * weight) + bias[out]
    return outputs


def relu(values: np.ndarray) -> np.ndarray:
    """Negative values become 0."""
    return np.maximum(values, 0)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Any value becomes one between 0 and 1."""
    return 1 / (1 + np.exp(-values))


def conv2d_gradients(
    images: np.ndarray, kernels: np.ndarray, upstream: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of sum(conv2d(images, kernels, bias) * upstream): (images, kernels, bias).

    Each output is a sum of products, so each of its inputs receives the kernel, and each of its
    weights the patch, times the upstream value (N, out, H', W').
    """
    image_gradient = np.zeros(images.shape)
    kernel_gradient = np.zeros(kernels.shape)
    bias_gradient = np.zeros(len(kernels))
    _, _, kernel_height, kernel_width = kernels.shape
    for (image, out, i, j), value in np.ndenumerate(upstream):
        window = np.s_[image, :, i : i + kernel_height, j : j + kernel_width]
        image_gradient[window] += value * kernels[out]
        kernel_gradient[out] += value * images[window]
        bias_gradient[out] += value
    return image_gradient, kernel_gradient, bias_gradient
