"""From a function to its MLIR text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def capture(function: Callable[..., Any], *arguments: Any, dialect: str = "stablehlo") -> str:
    """The text of a JAX function (or a torch module) for arguments of these shapes.

    ``arguments``: arrays, or anything with ``shape`` and ``dtype``. ``dialect``: stablehlo, or linalg (tensors), which
    comes out of it by the passes of StableHLO. A torch module is exported with `torch.export` and lowered by torchax, if
    that is installed; its parameters and buffers become the first arguments. Raises ValueError for another dialect
    (affine text is read here, but nothing that is installed with JAX lowers to it) and for what is not installed.
    """
    if dialect not in ("stablehlo", "linalg"):
        raise ValueError(
            f"dialect '{dialect}' cannot be captured, only stablehlo and linalg; lower with mlir-opt and give the text"
        )
    text = _torch(function, arguments) if _is_module(function) else _jax(function, arguments)
    return text if dialect == "stablehlo" else to_linalg(text)


def _jax(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    try:
        import jax
    except ImportError:
        raise ValueError("capturing needs jax: pip install 'broadsheet[mlir]'") from None
    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) if hasattr(one, "shape") else one for one in arguments]
    return jax.jit(function).lower(*shapes).as_text()


def _is_module(function: Any) -> bool:
    import torch

    return isinstance(function, torch.nn.Module)


def _torch(module: Any, arguments: tuple[Any, ...]) -> str:
    import torch

    try:
        from torchax.export import exported_program_to_stablehlo
    except ImportError:
        raise ValueError(
            "capturing a torch module needs torchax: pip install torchax; or write the function in JAX"
        ) from None
    return exported_program_to_stablehlo(torch.export.export(module.eval(), arguments))[1].mlir_module()


def to_linalg(text: str) -> str:
    """StableHLO text as linalg on tensors. Raises ValueError for an operation that the passes leave as it is."""
    try:
        from jax.interpreters.mlir import make_ir_context
        from jaxlib.mlir import ir, passmanager
        from jaxlib.mlir.dialects import stablehlo
    except ImportError:
        raise ValueError("lowering needs jax: pip install 'broadsheet[mlir]'") from None
    stablehlo.register_stablehlo_passes()
    with make_ir_context():
        try:
            module = ir.Module.parse(text)
            passes = "builtin.module(func.func(chlo-legalize-to-stablehlo),stablehlo-legalize-to-linalg)"
            passmanager.PassManager.parse(passes).run(module.operation)
        except ir.MLIRError as error:
            raise ValueError(f"line 1: MLIR refuses the text: {' '.join(str(error).split())[:200]}") from None
        return str(module)
