"""Float32 sums in a fixed order: the same bytes for any number of threads and any x86-64 CPU with AVX2.

The last bits of a float32 sum depend on the order of its terms. oneDNN computes each output of a convolution
as a chain: one fused multiply-add after the other, in the order of the terms, however many outputs share a
vector and whichever thread computes them. A chain breaks where the sum itself is split: over threads (oneDNN
in gradients by weight, MKL in matrix products), or into blocks that depend on the instruction set, the cache
and the number of threads (oneDNN in long sums, and where rows of outputs are longer than rows of inputs).

This module replaces ATen's kernels for these operations on the CPU, so models and training loops stay as
they are. Gradients by weight and linear layers become matrix products. A matrix product becomes a convolution
of single pixels, whose groups are chains of at most CHAIN terms; their results are then added in order.

`torch.ops.mkldnn` is not public: tests/test_fixed_order.py fails if another torch sums in another order.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch.nn import functional as F

from lib.stage.errors import StageError

CHAIN = 320  # terms; with AVX2, oneDNN reads at most 40 vectors of 8 input channels in one block
CACHED = 600_000  # numbers: what of a long matrix product is computed at once, so that it fits into the cache


@cache
def use_fixed_order() -> torch.library.Library:
    """Replace the kernels in this process. Raises StageError if this torch lacks what that needs.

    From then on, a float32 operation that has no fixed order here, such as a grouped convolution, raises
    StageError. Other types are computed as before. The replacement lasts as long as what this returns.
    """
    try:
        library = torch.library.Library("aten", "IMPL")
        for name, kernel in KERNELS.items():
            own = torch.library.get_kernel(f"aten::{name}", "CPU")
            replacement = partial(_for_float32, own.call_boxed, kernel)
            library.impl(name, replacement, "CPU", with_keyset=True, allow_override=True)
        _ = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_transpose_pointwise
    except (AttributeError, RuntimeError, TypeError) as error:
        raise StageError(
            f"torch {torch.__version__} cannot sum in a fixed order ({str(error).splitlines()[0]}); "
            "expected the torch that requirements.lock pins"
        ) from None
    return library


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The matrix product of `a` (M, K) and `b` (K, N): (M, N)."""
    if _copied(a.T, b.T) + len(a) * b.shape[1] < _copied(a, b):
        return product(b.T, a.T).T.contiguous()  # the same chains, with less to copy
    (m, k), n = a.shape, b.shape[1]
    least = -(-k // CHAIN)
    groups = next((groups for groups in range(least, 2 * least) if k % groups == 0), least)
    if more := -k % groups:
        a, b, k = _padded(a, 0, more), _padded(b, 0, 0, 0, more), k + more
    # A transposed convolution, since its weights lie as `b` does: (input channels, output channels).
    pixels = a.contiguous().view(1, 1, m, k).permute(0, 3, 1, 2)  # (1, k, 1, m)
    sums = _transposed_convolution(pixels, b.contiguous().view(k, n, 1, 1), [0, 0], groups)
    return sums.permute(0, 2, 3, 1).reshape(m, groups, n).sum(1)


def _copied(*matrices: torch.Tensor) -> int:
    return sum(matrix.numel() for matrix in matrices if not matrix.is_contiguous())


def _convolution(
    _own, images, weight, bias, stride, padding, dilation, transposed, _output_padding, groups
) -> torch.Tensor:
    _check_covered(images, weight, stride, padding, dilation, transposed, groups)
    down, right = padding
    more = max(0, right - (weight.shape[3] - 1) // 2)  # padded here, so that rows of outputs are not longer
    images, weight = _in_whole_blocks(_padded(images, more, more), 1), _in_whole_blocks(weight, 1)
    operands = _channels_last(images), _channels_last(weight), bias, [down, right - more]
    return torch.ops.mkldnn._convolution_pointwise(*operands, [1, 1], [1, 1], 1, "none", [], "")


def _convolution_backward(
    _own, gradient, images, weight, _bias_sizes,
    stride, padding, dilation, transposed, _output_padding, groups, wanted,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    _check_covered(images, weight, stride, padding, dilation, transposed, groups)
    gradient = _channels_last(gradient)
    by_images = by_weight = by_bias = None
    if wanted[0]:
        down, right = padding
        more = max(0, images.shape[3] - gradient.shape[3] + 1) // 2  # as above
        wide = _in_whole_blocks(_padded(gradient, more, more), 1)
        whole = _in_whole_blocks(weight, 0)
        by_images = _transposed_convolution(_channels_last(wide), whole, [down, right + more])
    if wanted[1]:
        by_weight = _weight_gradient(gradient, images, weight.shape, padding)
    if wanted[2]:
        by_bias = gradient.sum((0, 2, 3))
    return by_images, by_weight, by_bias


def _weight_gradient(gradient, images, shape: torch.Size, padding: list[int]) -> torch.Tensor:
    """The gradient (N, O, H, W) of a convolution's outputs, times what each weight met in `images`."""
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


def _in_whole_blocks(tensor: torch.Tensor, dimension: int) -> torch.Tensor:
    """With channels of zeros, for which AVX2 and AVX-512 take the same order: 2 to 8, or a multiple of 16."""
    channels = tensor.shape[dimension]
    more = 1 if channels == 1 else -channels % 16 if channels > 8 else 0
    return _padded(tensor, *(0, 0) * (3 - dimension), 0, more)


def _padded(tensor: torch.Tensor, *sides: int) -> torch.Tensor:
    return F.pad(tensor, sides) if any(sides) else tensor  # F.pad would copy it


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _batch_norm(own, *given) -> tuple[torch.Tensor, ...]:
    """ATen's own, forward or backward, which sums over threads in channels_last, but not in this layout."""
    images, *others = own(*(one.contiguous() if isinstance(one, torch.Tensor) else one for one in given))
    return _channels_last(images), *others


def _addmm(_own, added, a, b, *, beta=1, alpha=1) -> torch.Tensor:
    if (beta, alpha) != (1, 1):
        _refuse(f"addmm with beta {beta} and alpha {alpha}", "1 and 1")
    return product(a, b).add_(added)


def _check_covered(images, weight, stride, padding, dilation, transposed, groups) -> None:
    """Raise StageError for what oneDNN may compute in another order elsewhere."""
    if images.ndim != 4 or list(stride) != [1, 1] or list(dilation) != [1, 1] or transposed or groups != 1:
        _refuse("a strided, dilated, transposed, grouped or not two-dimensional convolution", "a plain one")
    kernel = list(weight.shape[2:])
    if max(weight.shape[:2]) > 128 or max(kernel) > 3:
        _refuse(f"a convolution with weights {list(weight.shape)}", "at most [128, 128, 3, 3]")
    if padding[0] >= kernel[0] or padding[1] >= kernel[1]:
        _refuse(f"padding {list(padding)}", f"less than the kernel, {kernel}")


def _refuse(what: str, expected: str, *_, **__) -> None:
    raise StageError(f"{what} has no fixed order of sums (lib/models/fixed_order.py), expected {expected}")


def _for_float32(own: Callable, kernel: Callable, keys, first: torch.Tensor, *others, **named):
    if first.dtype != torch.float32:
        return own(keys, first, *others, **named)
    return kernel(partial(own, keys), first, *others, **named)


REFUSED = ("addmv", "baddbmm", "dot", "mv", "vdot")
KERNELS: dict[str, Callable] = {name: partial(_refuse, name, "mm, bmm or a linear layer") for name in REFUSED}
KERNELS |= {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "mm": lambda _, a, b: product(a, b),
    "bmm": lambda _, a, b: torch.stack([product(*pair) for pair in zip(a, b, strict=True)]),
    "addmm": _addmm,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm,
}
