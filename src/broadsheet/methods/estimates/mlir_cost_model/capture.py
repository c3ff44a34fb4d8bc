"""From a function to its MLIR text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def capture(function: Callable[..., Any], *arguments: Any, dialect: str = "stablehlo") -> str:
    """The text of a JAX function for arguments of these shapes.

    ``arguments``: arrays, or anything with ``shape`` and ``dtype``. ``dialect``: stablehlo, or linalg (tensors), which
    comes out of it by the passes of StableHLO. Raises ValueError for another dialect (affine text is read here, but nothing
    that is installed with JAX lowers to it), for torch modules (torchax 0.0.13, the way from `torch.export` to StableHLO,
    does not load beside torch 2.13) and where JAX is not installed.
    """
    if dialect not in ("stablehlo", "linalg"):
        raise ValueError(
            f"dialect '{dialect}' cannot be captured, only stablehlo and linalg; lower with mlir-opt and give the text"
        )
    try:
        import jax
    except ImportError:
        raise ValueError("capturing needs jax: pip install 'broadsheet[mlir]'") from None
    if any(kind.__module__.startswith("torch.nn") for kind in type(function).__mro__):
        raise ValueError(
            "torch modules cannot be captured; write the function in JAX, or give StableHLO text made elsewhere"
        )
    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) if hasattr(one, "shape") else one for one in arguments]
    text = jax.jit(function).lower(*shapes).as_text()
    return text if dialect == "stablehlo" else to_linalg(text)


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
