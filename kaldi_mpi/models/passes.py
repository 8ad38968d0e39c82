"""Passes over rows of activations: an elementwise function, and sums over its columns.

On a CPU each is one reading of the rows in C (csrc/passes.c), where PyTorch takes three to five; elsewhere, and for
numbers that are not float32, it is what PyTorch has. Sums are float64 from C, else of the rows' type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kaldi_mpi.models._csrc import ffi, lib

_threshold_backward = torch.ops.aten.threshold_backward


def column_sums(values: Tensor) -> Tensor:
    """(columns,) of (..., columns): as a product with ones, which is several times as fast on a CPU."""
    rows = values.reshape(-1, values.shape[-1])
    return (rows.new_ones(1, len(rows)) @ rows)[0]


def _in_c(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _shape(rows: Tensor) -> tuple[int, int]:
    columns = rows.shape[-1]
    return rows.numel() // columns if columns else 0, columns


def _floats(tensor: Tensor | None) -> Any:
    return ffi.NULL if tensor is None else ffi.cast("float *", tensor.data_ptr())


def _doubles(tensor: Tensor | None) -> Any:
    return ffi.NULL if tensor is None else ffi.cast("double *", tensor.data_ptr())


def batch_norm(x: Tensor, epsilon: float, target_rms: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = (x - mean) scale, (rows, columns); means over rows of x and of x^2, and scale, (columns,) each.

    scale = target_rms / sqrt(variance + epsilon).
    """
    if _in_c(x):
        z = torch.empty_like(x)
        mean, mean_square, scale = torch.empty(3, x.shape[1]).unbind(0)
        outputs = (_floats(out) for out in (z, mean, mean_square, scale))
        lib.km_batch_norm(_floats(x), *x.shape, epsilon, target_rms, *outputs)
        return z, mean, mean_square, scale
    mean, mean_square = column_sums(x) / len(x), column_sums(x.square()) / len(x)
    variance = (mean_square - mean * mean).clamp_min(0.0)
    scale = target_rms * (variance + epsilon).rsqrt()
    return (x - mean).mul_(scale), mean, mean_square, scale


def batch_norm_backward(derivative: Tensor, z: Tensor, scale: Tensor, target_rms: float) -> Tensor:
    """The derivative at `batch_norm`'s input, (rows, columns), of that at its output z.

    scale (derivative - mean of it - z mean(derivative z) / target_rms^2), as in nnet3.
    """
    derivative = derivative.contiguous()
    if _in_c(derivative, z, scale):
        out = torch.empty_like(z)
        lib.km_batch_norm_backward(
            _floats(derivative), _floats(z), *z.shape, target_rms, _floats(scale), _floats(out)
        )  # fmt: skip
        return out
    along = column_sums(derivative * z) * (-1.0 / (len(z) * target_rms**2))
    x = derivative - column_sums(derivative) / len(z)
    return x.addcmul_(z, along).mul_(scale)


def relu(x: Tensor, sums: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """max(x, 0), (..., columns), and the sums over rows of that and of its slope, (columns,) each, if wanted."""
    if _in_c(x):
        y = torch.empty_like(x)
        kept = torch.empty(2, x.shape[-1], dtype=torch.float64) if sums else None
        of_y, of_slope = (None, None) if kept is None else kept.unbind(0)
        lib.km_relu(_floats(x), *_shape(x), _floats(y), _doubles(of_y), _doubles(of_slope))
        return y, None if of_y is None or of_slope is None else (of_y, of_slope)
    y = torch.relu(x)
    return y, (column_sums(y), column_sums(torch.sign(y))) if sums else None


def relu_backward(derivative: Tensor, y: Tensor, add: Tensor | None, squares: bool) -> tuple[Tensor, Tensor | None]:
    """The derivative at the input of `relu`, and sums over rows of the squares of `derivative`, if wanted.

    Args:
        derivative, y: (..., columns): at the output, and the output.
        add: (columns,), added to each row; or None.
    """
    derivative = derivative.contiguous()
    if _in_c(derivative, y) and (add is None or _in_c(add)):
        out = torch.empty_like(y)
        kept = torch.empty(y.shape[-1], dtype=torch.float64) if squares else None
        lib.km_relu_backward(
            _floats(derivative), _floats(y), *_shape(y), _floats(add), _floats(out), _doubles(kept)
        )  # fmt: skip
        return out, kept
    gradient = _threshold_backward(derivative, y, 0)
    if add is not None:
        gradient = gradient + add
    return gradient, column_sums(derivative.square()) if squares else None


def keep_memory() -> None:
    """Let memory that is freed stay with this process; with glibc, see csrc/passes.h."""
    lib.km_keep_memory()
