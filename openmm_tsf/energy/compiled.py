"""torch.compile for energies and forces, where it can be had.

The function is traced once into a flat graph of forward and backward operations with a batch size left open, and that
graph is compiled. The compiler keeps its results in its own cache on disk, so later processes start in seconds.
"""

from __future__ import annotations

import os
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[[Tensor], tuple[Tensor, Tensor]]
LANES = 16
"""Batches are padded to a multiple of this: full vector registers, and never the sizes 0 and 1, which would need
kernels of their own."""
TRACED_BATCH = 64

_told: set[str] = set()


def compile_kernel(kernel: Kernel, example: Tensor) -> Kernel | None:
    """The kernel compiled for any batch size, or None where that is not possible; why not is said once in a warning.

    Args:
        kernel: energies (batch,) and forces (atoms, 3, batch) of positions (atoms, 3, batch).
        example: sound positions (atoms, 3, n), on which the compiled kernel has to agree with the plain one.
    """
    try:
        reason = obstacle(example.device)
        if reason is None:
            example = example.repeat(1, 1, -(-TRACED_BATCH // example.shape[2]))[..., :TRACED_BATCH].contiguous()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the compiler's own use of torch
                compiled = _compile(kernel, example)
                reason = _disagreement(compiled(example), kernel(example))
            if reason is None:
                return compiled
    except Exception as error:  # whatever breaks in a compiler must not break the energy
        reason = f"it failed: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}"
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"energies run without torch.compile, several times slower: {reason}", stacklevel=2)
    return None


def obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, None if nothing speaks against it."""
    for what, path in (("torch", Path(torch.__file__).parent), ("its cache", _cache_folder())):
        if " " in str(path):
            return f"the path of {what} has a space in it ({path})"
    if device.type == "cpu" and not _compiler():
        return "there is no C++ compiler (install g++ or clang++, or name one in the variable CXX)"
    return None


def _compiler() -> str | None:
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["g++", "clang++", "c++", "cl"]
    return next((found for name in names if (found := shutil.which(name))), None)


def _cache_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _compile(kernel: Kernel, example: Tensor) -> Kernel:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    sizes: Any = [DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC]
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fake = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    graph = make_fx(kernel, tracing_mode="fake", _allow_non_fake_inputs=True)(fake)
    torch._dynamo.mark_dynamic(example, 2)
    return torch.compile(graph)


def _disagreement(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> str | None:
    rounding = 1e3 * torch.finfo(found[0].dtype).eps
    for what, a, b in zip(("energies", "forces"), found, wanted, strict=True):
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        error, size = (a - b).abs().amax(0), b.abs().amax(0)
        wrong = size.isfinite() & ~(error <= rounding * (1.0 + size))
        if wrong.any():
            return f"compiled {what} differ from plain ones by {float(error[wrong].max()):.3g}"
    return None
