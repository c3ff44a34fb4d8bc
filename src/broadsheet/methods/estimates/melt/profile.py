"""Time by operator on the PyTorch runtime, as the logs of timed runtimes have it: the same tables for both.

Every module without children, and every compressed layer, is timed by hooks; what is left of a pass (scores, softmax,
rotation, residuals) is one row. Hooks cost some microseconds a module, so small models look slower than they are.
"""

from __future__ import annotations

import time
from typing import Any

from broadsheet.core.numerics.packed import PackedLinear

from .opslog import Node, OpsLog
from .runtimes import TorchRuntime


def profile(runtime: TorchRuntime, tokens: int = 16, held: int = 64) -> OpsLog:
    """``tokens`` decoded one by one behind ``held`` random ones; the runtime is loaded. An evaluation is one token.

    Raises ValueError for lengths that the context does not hold.
    """
    if tokens < 1 or held < 1 or tokens + held > runtime.settings.context:
        raise ValueError(f"{held} + {tokens} tokens do not fit a context of {runtime.settings.context}")
    from torch import nn

    nodes: list[Node] = []
    open_since: dict[int, tuple[float, float]] = {}
    evaluation = -1

    def before(module: Any, _: Any) -> None:
        open_since[id(module)] = (time.perf_counter(), time.process_time())

    def after(name: str) -> Any:
        def hook(module: Any, _: Any, output: Any) -> None:
            wall, cpu = open_since.pop(id(module))
            shape = "x".join(map(str, getattr(output, "shape", ())))
            wall, cpu = 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)
            kind = "MUL_MAT" if isinstance(module, nn.Linear | PackedLinear) else type(module).__name__
            nodes.append(Node(evaluation, len(nodes), kind, shape, 1, cpu, wall, _module(name)))

        return hook

    hooks = []
    for name, module in runtime.network.named_modules():
        if isinstance(module, PackedLinear) or not list(module.children()):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after(name))]
    runtime.clear()
    runtime.prefill([1] * held)
    nodes.clear()
    try:
        for evaluation in range(tokens):
            known, start, cpu = len(nodes), time.perf_counter(), time.process_time()
            runtime.run([1])
            wall, cpu = 1000 * (time.perf_counter() - start), 1000 * (time.process_time() - cpu)
            inside = nodes[known:]
            rest = (cpu - sum(node.cpu_ms or 0 for node in inside), wall - sum(node.wall_ms for node in inside))
            nodes.append(Node(evaluation, len(nodes), "rest", "", 1, max(rest[0], 0), max(rest[1], 0), "attention and rest"))
    finally:
        for one in hooks:
            one.remove()
    return OpsLog("torch", tuple(nodes))


def _module(name: str) -> str:
    for part, module in (("attn", "attention"), ("mlp", "mlp"), ("embed", "embedding"), ("lm_head", "output")):
        if part in name:
            return module
    return "norms"
