"""Float32 sums in a fixed order: the same bytes for any number of threads and any x86-64 CPU with AVX2.

The last bits of a float32 sum depend on the order of its terms. oneDNN computes each output of a convolution
as a chain: one fused multiply-add after the other, in the order of the terms, however many outputs share a
vector and whichever thread computes them. A chain breaks where the sum itself is split: over threads (oneDNN
in gradients by weight, MKL in matrix products), or into blocks that depend on the instruction set, the cache
and the number of threads (oneDNN in long sums, and where rows of outputs are longer than rows of inputs).

This module replaces ATen's kernels for these operations on the CPU, so models and training loops stay as
they are. Gradients by weight and linear layers become matrix products, and a matrix product becomes a
convolution of single pixels, whose groups are chains of at most CHAIN terms; their results are then added in
order.

`torch.ops.mkldnn` is not a public interface of torch. requirements.lock pins a version that was tested, and
tests/test_fixed_order.py fails if another one computes in another order.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from lib.stage.errors import StageError

CHAIN = 320  # terms; with AVX2, oneDNN reads at most 40 vectors of 8 input channels in one block
CACHED = 600_000  # numbers: what of a long matrix product is computed at once, so that it fits into the cache

_library: torch.library.Library | None = None


def use_fixed_order() -> None:
    """Replace the kernels in this process; a second call changes nothing.

    From then on, a float32 operation that has no fixed order here, such as a grouped convolution, raises
    StageError. Other types are computed as before. Raises StageError if this torch lacks what is needed.
    """
    global _library
    if _library is not None:
        return
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
    _library = library  # the replacement lasts as long as this object


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The matrix product of `a` (M, K) and `b` (K, N): (M, N)."""
    if _copied(a.T) + _copied(b.T) + len(a) * b.shape[1] < _copied(a) + _copied(b):
        return _product(b.T, a.T).T.contiguous()  # the same chains, with less to copy
    return _product(a, b)


def _copied(matrix: torch.Tensor) -> int:
    return 0 if matrix.is_contiguous() else matrix.numel()


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (m, k), n = a.shape, b.shape[1]
    least = -(-k // CHAIN)
    groups = next((groups for groups in range(least, 2 * least) if k % groups == 0), least)
    if more := -k % groups:
        a, b, k = F.pad(a, (0, more)), F.pad(b, (0, 0, 0, more)), k + more
    # A transposed convolution, since its weights lie as `b` does: (input channels, output channels).
    pixels = a.contiguous().view(1, 1, m, k).permute(0, 3, 1, 2)  # (1, k, 1, m)
    sums = _transposed_convolution(pixels, b.contiguous().view(k, n, 1, 1), [0, 0], groups)
    return sums.permute(0, 2, 3, 1).reshape(m, groups, n).sum(1)


def _convolution(
    _own, images, weight, bias, stride, padding, dilation, transposed, _output_padding, groups
) -> torch.Tensor:
    _check_covered(images, weight, stride, dilation, transposed, groups)
    if images.shape[1] == 1:  # for one channel, AVX2 and AVX-512 differ: add one of zeros
        images, weight = (
            torch.stack([one[:, 0], torch.zeros_like(one[:, 0])], -1).permute(0, 3, 1, 2)
            for one in (images, weight)
        )
    return torch.ops.mkldnn._convolution_pointwise(
        _channels_last(images), _channels_last(weight), bias, padding, [1, 1], [1, 1], 1, "none", [], ""
    )  # fmt: skip


def _convolution_backward(
    _own, gradient, images, weight, _bias_sizes,
    stride, padding, dilation, transposed, _output_padding, groups, wanted,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    _check_covered(images, weight, stride, dilation, transposed, groups)
    gradient = _channels_last(gradient)
    by_images = by_weight = by_bias = None
    if wanted[0]:
        down, right = padding
        more = max(0, images.shape[3] - gradient.shape[3]) // 2  # so that its rows are as long as the images'
        wide = _channels_last(F.pad(gradient, (more, more)))
        by_images = _transposed_convolution(wide, weight, [down, right + more])
    if wanted[1]:
        by_weight = _weight_gradient(gradient, images, weight.shape, padding)
    if wanted[2]:
        by_bias = gradient.sum((0, 2, 3))
    return by_images, by_weight, by_bias


def _weight_gradient(gradient, images, shape: torch.Size, padding: list[int]) -> torch.Tensor:
    """The gradient (N, O, H, W) of a convolution's outputs, times what each weight met in `images`."""
    outputs, channels, height, width = shape
    down, right = padding
    rows = F.pad(images.permute(0, 2, 3, 1), (0, 0, right, right, down, down))  # (N, H + …, W + …, C)
    met = rows.unfold(1, height, 1).unfold(2, width, 1)  # a view, (N, H, W, C, height, width)
    met = met.permute(0, 1, 2, 4, 5, 3)  # as a convolution's sum takes them: channels last
    at_once = max(1, CACHED // met[0].numel())
    total = torch.zeros(outputs, channels * height * width)
    for theirs, some in zip(gradient.split(at_once), met.split(at_once), strict=True):
        total += product(theirs.transpose(0, 1).reshape(outputs, -1), some.reshape(-1, total.shape[1]))
    return total.view(outputs, height, width, channels).permute(0, 3, 1, 2)


def _transposed_convolution(inputs, weight, padding, groups: int = 1) -> torch.Tensor:
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        inputs, weight, None, padding, [0, 0], [1, 1], [1, 1], groups, "none", [], ""
    )


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _batch_norm(own, images, *others) -> tuple[torch.Tensor, ...]:
    """ATen's own, which sums over threads in channels_last, and by channel in this layout."""
    outputs, *saved = own(images.contiguous(), *others)
    return _channels_last(outputs), *saved


def _batch_norm_backward(own, gradient, images, *others) -> tuple[torch.Tensor, ...]:
    by_images, *by_parameters = own(gradient.contiguous(), images.contiguous(), *others)
    return _channels_last(by_images), *by_parameters


def _addmm(_own, added, a, b, *, beta=1, alpha=1) -> torch.Tensor:
    if (beta, alpha) != (1, 1):
        _refuse(f"addmm with beta {beta} and alpha {alpha}", "1 and 1")
    return product(a, b).add_(added)


def _check_covered(images, weight, stride, dilation, transposed, groups) -> None:
    """Raise StageError for what oneDNN may compute in another order elsewhere."""
    channels, kernel = weight.shape[1], list(weight.shape[2:])
    if images.ndim != 4 or list(stride) != [1, 1] or list(dilation) != [1, 1] or transposed or groups != 1:
        _refuse("a strided, dilated, transposed, grouped or not two-dimensional convolution", "a plain one")
    if channels != 1 and (channels % 16 or channels > 128):
        _refuse(f"a convolution of {channels} channels", "1, or a multiple of 16 up to 128")
    if not {*kernel} <= {1, 3}:
        _refuse(f"a convolution with a kernel of {kernel}", "sides of 1 or 3")


def _refuse(what: str, expected: str) -> None:
    raise StageError(f"{what} has no fixed order of sums (lib/models/fixed_order.py), expected {expected}")


def _refused(name: str, *_, **__) -> None:
    _refuse(name, "mm, bmm or a linear layer")


def _for_float32(own: Callable, kernel: Callable, keys, first: torch.Tensor, *others, **named):
    if first.dtype != torch.float32:
        return own(keys, first, *others, **named)
    return kernel(partial(own, keys), first, *others, **named)


REFUSED: dict[str, Callable] = {
    name: partial(_refused, name) for name in ("addmv", "baddbmm", "dot", "mv", "vdot")
}
KERNELS: dict[str, Callable] = REFUSED | {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "mm": lambda _, a, b: product(a, b),
    "bmm": lambda _, a, b: torch.stack([product(*pair) for pair in zip(a, b, strict=True)]),
    "addmm": _addmm,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
}
