"""A monitor as an approver of Inspect: it judges before every tool call, and a flag ends the sample.

eval(task, approval=[ApprovalPolicy(monitor_approver(monitor), "*")])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from . import SequentialMonitor

Flagged = Literal["terminate", "reject", "escalate"]


def stream_of(history: Sequence[Any], call: Any = None, calls: bool = True) -> list[str]:
    """What is watched: the user's messages in order and, with ``calls``, every tool call made so far and the one to come."""
    found = []
    for message in history:
        if message.role == "user" and message.text.strip():
            found.append(message.text)
        for made in (getattr(message, "tool_calls", None) or []) if calls and message.role == "assistant" else []:
            if call is None or made.id != call.id:
                found.append(_shown(made))
    return [*found, _shown(call)] if calls and call is not None else found


def _shown(call: Any) -> str:
    return f"{call.function}({json.dumps(call.arguments, ensure_ascii=False, sort_keys=True, default=str)})"


def monitor_approver(monitor: SequentialMonitor, calls: bool = True, on_flag: Flagged = "terminate") -> Any:
    """An Inspect approver. ``calls``: tool calls are steps too (the paper's monitor sees requests only). ``on_flag``: what
    a flag decides. All steps so far are judged, so a sample that was flagged once stays so. Needs inspect-ai."""
    from inspect_ai.approval import Approval, approver

    if on_flag not in ("terminate", "reject", "escalate"):
        raise ValueError(f"on_flag is terminate, reject or escalate, got {on_flag}")

    @approver(name="sequential_monitor")
    def made() -> Any:
        async def approve(message: str, call: Any, view: Any, history: list[Any]) -> Approval:
            steps = stream_of(history, call, calls)
            if not steps:
                return Approval(decision="approve", explanation="nothing was requested yet")
            decision = await monitor.ahalt(steps)
            score = "no score" if decision.score is None else f"score {decision.score:.3f}"
            said = f"step {decision.step} of {len(steps)}: {score} ({decision.outcome})"
            return Approval(decision=on_flag if decision.flag else "approve", explanation=said)

        return approve

    return made()
