"""From a function to its StableHLO text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def capture(function: Callable[..., Any], *arguments: Any, dialect: str = "stablehlo") -> str:
    """The text of a JAX function (or a torch module) for arguments of these shapes.

    ``arguments``: arrays, or anything with ``shape`` and ``dtype``. A torch module is exported with `torch.export` and lowered by
    torchax, if that is installed; its parameters and buffers become the first arguments of the function. Raises ValueError
    for another dialect (linalg and affine text is read, but nothing here lowers to it) and for what is not installed.
    """
    if dialect != "stablehlo":
        raise ValueError(f"dialect '{dialect}' cannot be captured here, only stablehlo; lower with torch-mlir or iree and give the text")
    try:
        import torch

        if isinstance(function, torch.nn.Module):
            return _torch(function, arguments)
    except ImportError:
        pass
    try:
        import jax
    except ImportError:
        raise ValueError("capturing needs jax: pip install 'broadsheet[mlir]'") from None
    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) if hasattr(one, "shape") else one for one in arguments]
    return jax.jit(function).lower(*shapes).as_text()


def _torch(module: Any, arguments: tuple[Any, ...]) -> str:
    import torch

    try:
        from torchax.export import exported_program_to_stablehlo
    except ImportError:
        raise ValueError("capturing a torch module needs torchax: pip install torchax; or write the function in JAX") from None
    weights, lowered = exported_program_to_stablehlo(torch.export.export(module.eval(), arguments))
    return lowered.mlir_module()
