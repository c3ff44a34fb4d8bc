"""Talking to models: one asynchronous client over OpenAI-compatible endpoints, local models and an instrument.

    chat = Chat(backend, ledger="calls.sqlite")
    chat.complete([{"role": "user", "content": "2 + 2 ="}], max_tokens=8)[0].text

Every answer is kept in a ledger by what was asked, so that a run that was killed goes on where it stopped and pays for
nothing twice. See `client`, `protocol`, `ledger`; `simulated` for the instrument.
"""

from .client import Budget, Chat, in_order, run
from .ledger import Ledger
from .protocol import BudgetSpent, ChatError, Choice, Message, Price, Request, Usage

__all__ = [
    "Budget",
    "BudgetSpent",
    "Chat",
    "ChatError",
    "Choice",
    "Ledger",
    "Message",
    "Price",
    "Request",
    "Usage",
    "in_order",
    "run",
]
