"""The lesson's layers as explicit loops in float64 NumPy: slow, but easy to follow.

Shapes are (N, C, H, W); kernels (out, in, kh, kw). Nothing here calls torch.
"""

import numpy as np


def pad(images: np.ndarray, width: int) -> np.ndarray:
    """Zeros around each map: (N, C, H, W) to (N, C, H + 2·width, W + 2·width)."""
    n, channels, height, wide = images.shape
    padded = np.zeros((n, channels, height + 2 * width, wide + 2 * width))
    padded[:, :, width : width + height, width : width + wide] = images
    return padded


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


def batch_statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each map over the batch: (N, C, H, W) to (C,) and (C,)."""
    mean, variance = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for channel in range(values.shape[1]):
        mean[channel] = np.sum(values[:, channel]) / values[:, channel].size
        variance[channel] = np.sum((values[:, channel] - mean[channel]) ** 2) / values[:, channel].size
    return mean, variance


def batch_norm(
    values: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    epsilon: float,
) -> np.ndarray:
    """Normalise each map to mean 0 and variance 1, then scale and shift it; other arrays are (C,)."""
    outputs = np.zeros(values.shape)
    for channel in range(values.shape[1]):
        normal = (values[:, channel] - mean[channel]) / np.sqrt(variance[channel] + epsilon)
        outputs[:, channel] = normal * scale[channel] + shift[channel]
    return outputs


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


def batch_norm_gradients(
    values: np.ndarray, scale: np.ndarray, upstream: np.ndarray, epsilon: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of sum(batch_norm(…) * upstream) with the batch's own statistics: (values, scale, shift).

    A value also changes the mean and the variance of its map, and so every output of the map. The two means
    that are subtracted account for that.
    """
    mean, variance = batch_statistics(values)
    gradient, scale_gradient, shift_gradient = np.zeros(values.shape), *np.zeros((2, len(scale)))
    for channel in range(len(scale)):
        deviation = np.sqrt(variance[channel] + epsilon)
        normal = (values[:, channel] - mean[channel]) / deviation
        up = upstream[:, channel].astype(np.float64)
        scale_gradient[channel], shift_gradient[channel] = np.sum(up * normal), np.sum(up)
        through_mean, through_variance = shift_gradient[channel] / up.size, scale_gradient[channel] / up.size
        gradient[:, channel] = (up - through_mean - normal * through_variance) * scale[channel] / deviation
    return gradient, scale_gradient, shift_gradient


def conv2d_gradients(
    images: np.ndarray, kernels: np.ndarray, upstream: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of sum(conv2d(images, kernels, bias) * upstream): (images, kernels, bias).

    Each output is a sum of products, so its inputs receive the kernel, and its weights the patch,
    each times the upstream value (N, out, H', W').
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
