"""Float32 matrix products on a CPU, by the faster of the two libraries in torch.

    x [..., K], w [N, K] ──▶ x wᵀ [..., N]      MKL on Intel's processors, oneDNN on others

torch uses MKL for float32 products. On an AMD Zen 5, MKL has half the throughput of oneDNN, which
torch ships for smaller number types and for convolutions; without 512-bit units, oneDNN is still a
tenth faster (lab log; of other processors only Intel's were measured). The choice depends on the
processor and not on a measurement, so that a run repeats bit for bit.

A stock model needs no change: inside of :func:`linear_layers`, calls of
``torch.nn.functional.linear`` with positional arguments, as in ``nn.Linear``, are computed here.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.jit import is_tracing  # type: ignore[attr-defined]  # exported at run time
from torch.overrides import TorchFunctionMode

CPU_FACTS = Path("/proc/cpuinfo")
"""Where Linux reports the maker of the processor."""

SHAPES = 32
"""Compiled shapes that oneDNN caches; each takes nearly 1 MiB. A micro-batch has about fifteen, and
lengths seldom repeat: of the 1,024 that it caches by default few are used again."""

WIDE = 4
"""From this ratio of outputs to inputs on, a layer's gradient is computed transposed."""


def has_both() -> bool:
    """Whether this torch has both libraries."""
    mkl, mkldnn = torch.backends.mkl, torch.backends.mkldnn
    if not (mkl.is_available() and mkldnn.is_available()):
        return False
    # torch's compiler calls this for linear layers. It is undocumented and may be removed.
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) is not None


@cache
def by_onednn() -> bool:
    """Whether oneDNN computes float32 products on this processor."""
    if not has_both() or maker() in ("GenuineIntel", ""):
        return False
    # Read at the first product: one by oneDNN, one by torch's wrapper around it.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(SHAPES))
    return True


def maker() -> str:
    """The processor's vendor id, as x86 processors report it; empty when unknown."""
    if not CPU_FACTS.is_file():
        name = platform.processor()  # on Windows: "AMD64 Family 25 Model 33, AuthenticAMD"
        return next((m for m in ("GenuineIntel", "AuthenticAMD") if m in name), "")
    for line in CPU_FACTS.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("vendor_id"):
            return line.partition(":")[2].strip()
    return ""


def product(x: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x wᵀ + bias without a gradient: x [..., K] -> [..., N]. Any strides, K of 1 or more.

    Example:
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
        >>> product(x, w)
        tensor([[11., 17.]])
    """
    if not _fits(x, w_NK):
        return F.linear(x, w_NK, bias_N)
    compute = _scripted() if is_tracing() else onednn
    return compute(x, w_NK, bias_N)


def linear_layers() -> AbstractContextManager[object]:
    """A context in which linear layers are computed here, with their gradients."""
    return _LinearLayers() if by_onednn() else nullcontext()


def _fits(x: Tensor, w_NK: Tensor) -> bool:
    return by_onednn() and all(
        t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, w_NK)
    )


def onednn(x: Tensor, w_NK: Tensor, bias_N: Optional[Tensor] = None) -> Tensor:  # noqa: UP045  # script
    """x wᵀ + bias by oneDNN, on any processor."""
    return torch.ops.mkldnn._linear_pointwise(x, w_NK, bias_N, "none", [], "")  # type: ignore[no-any-return]


@cache
def _scripted() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A scripted ``onednn``: the tracer cannot record the operator with its list of options."""
    return torch.jit.script(onednn)


class _LinearLayers(TorchFunctionMode):
    """Computes ``F.linear``; passes all other functions on."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and _fits(args[0], args[1]):
            graded = torch.is_grad_enabled() and any(
                t is not None and t.requires_grad for t in args
            )
            return _Linear.apply(*args) if graded else product(*args)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """x [..., K], w [N, K], bias [N] or None -> [..., N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, w_NK)
        return product(x, w_NK, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w_NK = ctx.saved_tensors
        wants_x, wants_w, *wants_bias = ctx.needs_input_grad
        grad_MN, x_MK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return (
            product(grad, w_NK.t()) if wants_x else None,
            weight_gradient(grad_MN, x_MK) if wants_w else None,
            *(grad_MN.sum(0) if wants else None for wants in wants_bias),
        )


def weight_gradient(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """gradᵀ x: the gradient [N, K] of the weights of :func:`product`; may be a transposed view.

    oneDNN transposes the left side of a product in memory: for a wide head that should be x.
    """
    if not len(x_MK):  # oneDNN rejects empty sums
        return grad_MN.t() @ x_MK
    if grad_MN.shape[1] > WIDE * x_MK.shape[1]:
        return product(x_MK.t(), grad_MN.t()).t()
    return product(grad_MN.t(), x_MK.t())
