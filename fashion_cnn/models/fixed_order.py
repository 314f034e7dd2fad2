"""Float32 sums in a fixed order: the same bytes for any number of threads and any x86-64 CPU with AVX2.

The last bits of a float32 sum depend on the order of its terms. oneDNN computes each output of a convolution
as a chain of fused multiply-adds in the order of the terms, however many outputs share a vector and whichever
thread computes them. A chain breaks where the sum itself is split: over threads (oneDNN in weight gradients,
MKL in matrix products), or into blocks whose size depends on instruction set, cache and threads (oneDNN in
long sums, and where rows of outputs are longer than rows of inputs).

This module replaces ATen's kernels for these operations on the CPU, so models and training loops need no
change. Weight gradients and linear layers become matrix products, which become grouped 1×1 convolutions: each
group is a chain of at most CHAIN terms, and the groups' results are then added in order.
"""

from collections.abc import Callable
from functools import cache, partial, reduce

import torch
from torch.nn import functional as F

from fashion_cnn.project.errors import StageError

CHAIN = 320  # terms; with AVX2, oneDNN reads at most 40 vectors of 8 input channels in one block
CACHED = 600_000  # numbers that a weight gradient reads at once, so that they stay in the cache


@cache
def use_fixed_order() -> torch.library.Library:
    """Replace the kernels in this process. Raises StageError if this torch lacks what it needs.

    From then on, a float32 operation that has no fixed order here, such as a grouped convolution, raises
    StageError. Other types are computed as before. The replacement lasts as long as the returned library.
    """
    try:  # private names: tests/test_fixed_order.py fails if another torch sums in another order
        _ = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_transpose_pointwise
        library = torch.library.Library("aten", "IMPL")
        for name, kernel in KERNELS.items():
            own = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, partial(kernel, own.call_boxed), "CPU", with_keyset=True, allow_override=True)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise StageError(
            f"torch {torch.__version__} cannot sum in a fixed order ({str(error).splitlines()[0]}); "
            "expected the torch that requirements.lock pins"
        ) from None
    return library


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The matrix product of `a` (M, K) and `b` (K, N): (M, N)."""
    if not a.numel() or not b.numel():
        return a.new_zeros(len(a), b.shape[1])
    if _copied(a.T, b.T) + len(a) * b.shape[1] < _copied(a, b):
        return product(b.T, a.T).T.contiguous()  # the same chains, with less to copy
    (m, k), n = a.shape, b.shape[1]
    least = -(-k // CHAIN)
    groups = next((groups for groups in range(least, 2 * least) if k % groups == 0), least)
    more = -k % groups
    a, b, k = _padded(a, 0, more), _padded(b, 0, 0, 0, more), k + more
    # A transposed convolution, because its weights have the layout of `b`: (input channels, output channels).
    pixels = a.contiguous().view(1, 1, m, k).permute(0, 3, 1, 2)  # (1, k, 1, m)
    sums = _transposed_convolution(pixels, b.contiguous().view(k, n, 1, 1), [0, 0], groups)
    parts = sums.permute(0, 2, 3, 1).reshape(m, groups, n).unbind(1)
    return reduce(torch.Tensor.add_, parts).contiguous()  # .sum(1) may use another order


def _copied(*matrices: torch.Tensor) -> int:
    return sum(matrix.numel() for matrix in matrices if not matrix.is_contiguous())


def _convolution(images, weight, bias, stride, padding, dilation, transposed, _output_padding, groups):
    _check_covered(images, weight, stride, padding, dilation, transposed, groups)
    down, right = padding
    more = max(0, right - (weight.shape[3] - 1) // 2)  # pad here, so that output rows are not longer
    images, weight = _with_zero_channels(_padded(images, more, more), 1), _with_zero_channels(weight, 1)
    operands = _channels_last(images), _channels_last(weight), bias, [down, right - more]
    return torch.ops.mkldnn._convolution_pointwise(*operands, [1, 1], [1, 1], 1, "none", [], "")


def _convolution_backward(
    gradient, images, weight, _sizes, stride, padding, dilation, transposed, _output_padding, groups, wanted
):
    _check_covered(images, weight, stride, padding, dilation, transposed, groups)
    gradient = _channels_last(gradient)
    by_images = by_weight = by_bias = None
    if wanted[0]:
        more = max(0, images.shape[3] - gradient.shape[3] + 1) // 2  # as in _convolution
        wide = _with_zero_channels(_padded(gradient, more, more), 1)
        whole = _with_zero_channels(weight, 0)
        by_images = _transposed_convolution(_channels_last(wide), whole, [padding[0], padding[1] + more])
    if wanted[1]:
        by_weight = _weight_gradient(gradient, images, weight.shape, padding)
    if wanted[2]:
        # Threads split the channels into whole vectors if their number is a multiple of 32.
        by_bias = _padded(gradient, 0, 0, 0, 0, 0, -len(weight) % 32).sum((0, 2, 3))[: len(weight)]
    return by_images, by_weight, by_bias


def _weight_gradient(gradient, images, shape: torch.Size, padding: list[int]) -> torch.Tensor:
    """The outputs' `gradient` (N, O, H, W) times what each weight was multiplied by in `images`, summed."""
    outputs, channels, height, width = shape
    down, right = padding
    rows = _padded(images.permute(0, 2, 3, 1), 0, 0, right, right, down, down)  # (N, H + …, W + …, C)
    met = rows.unfold(1, height, 1).unfold(2, width, 1).movedim(3, 5)  # a view, (N, H, W, height, width, C)
    at_once = max(1, CACHED // met[0].numel())
    total = torch.zeros(outputs, channels * height * width)
    for theirs, some in zip(gradient.split(at_once), met.split(at_once), strict=True):
        total += product(theirs.transpose(0, 1).reshape(outputs, -1), some.reshape(-1, total.shape[1]))
    return total.view(outputs, height, width, channels).permute(0, 3, 1, 2)


def _transposed_convolution(inputs, weight, padding, groups: int = 1) -> torch.Tensor:
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        inputs, weight, None, padding, [0, 0], [1, 1], [1, 1], groups, "none", [], ""
    )


def _with_zero_channels(tensor: torch.Tensor, dimension: int) -> torch.Tensor:
    """Add zero channels up to a number that AVX2 and AVX-512 sum in one order: 2 to 8 or n times 16."""
    channels = tensor.shape[dimension]
    more = 1 if channels == 1 else -channels % 16 if channels > 8 else 0
    return _padded(tensor, *(0, 0) * (3 - dimension), 0, more)


def _padded(tensor: torch.Tensor, *sides: int) -> torch.Tensor:
    return F.pad(tensor, sides) if any(sides) else tensor  # F.pad would copy it


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _addmm(added, a, b, *, beta=1, alpha=1) -> torch.Tensor:
    if (beta, alpha) != (1, 1):
        _refuse(f"addmm with beta {beta} and alpha {alpha}", "1 and 1")
    return product(a, b).add_(added)


def _check_covered(images, weight, stride, padding, dilation, transposed, groups) -> None:
    """Raise StageError for a convolution whose order of sums may depend on the machine."""
    plain = images.ndim == 4 and list(stride) == list(dilation) == [1, 1] and not transposed and groups == 1
    if not plain or not images.numel():
        _refuse("an empty, strided, dilated, transposed, grouped or not 2-D convolution", "a plain one")
    kernel = list(weight.shape[2:])
    if max(weight.shape[:2]) > 128 or max(kernel) > 3:
        _refuse(f"a convolution with weights {list(weight.shape)}", "at most [128, 128, 3, 3]")
    if padding[0] >= kernel[0] or padding[1] >= kernel[1]:
        _refuse(f"padding {list(padding)}", f"less than the kernel, {kernel}")


def _refuse(what: str, expected: str, *_, **__) -> None:
    raise StageError(f"{what} has no fixed order of sums in {__name__}, expected {expected}")


def _for_float32(kernel: Callable) -> Callable:
    def replacement(own, keys, first: torch.Tensor, *others, **named):
        if first.dtype != torch.float32:
            return own(keys, first, *others, **named)
        return kernel(first, *others, **named)

    return replacement


def _batch_norm(own, keys, *given) -> tuple[torch.Tensor | None, ...]:
    """ATen's own, forward or backward, on contiguous tensors; it splits channels_last ones over threads."""
    given = tuple(one.contiguous() if isinstance(one, torch.Tensor) else one for one in given)
    images, *others = own(keys, *given)
    return images if images is None else _channels_last(images), *others


KERNELS = {
    "convolution": _for_float32(_convolution),
    "convolution_backward": _for_float32(_convolution_backward),
    "mm": _for_float32(product),
    "bmm": _for_float32(lambda a, b: torch.stack([product(*pair) for pair in zip(a, b, strict=True)])),
    "addmm": _for_float32(_addmm),
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm,
}
NOT_COVERED = [f"{name}{form}" for name in ("addbmm", "addmv", "baddbmm") for form in ("", ".out", "_")]
NOT_COVERED += ["addmm.out", "addmm_", "bmm.out", "dot", "mm.out", "mv", "vdot"]
KERNELS |= {name: _for_float32(partial(_refuse, name, "mm, bmm or a linear layer")) for name in NOT_COVERED}
