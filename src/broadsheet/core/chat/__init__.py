"""Talking to models: one asynchronous client over OpenAI-compatible endpoints, local models and an instrument.

    chat = connect("http://localhost:8000", "llama-3-8b")        # or connect("pocket-2m"), a folder, a hub name
    chat.complete([{"role": "user", "content": "2 + 2 ="}], max_tokens=8)[0].text

Every answer is kept in a ledger by what was asked, so that a run that was killed goes on where it stopped and pays for
nothing twice. See `client`, `protocol`, `ledger`; the backends `endpoint`, `local`, and `simulated` for the instrument;
`server` serves any of them.
"""

from __future__ import annotations

from typing import Any

from .client import Budget, Chat, in_order, run
from .ledger import Ledger
from .protocol import Backend, BudgetSpent, ChatError, Choice, Message, Price, Request, Usage

__all__ = [
    "Backend",
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
    "connect",
    "in_order",
    "run",
]

#: options of a connection that are the client's; the others are the backend's
_CLIENT = {"ledger", "concurrency", "requests_per_minute", "price", "budget", "tries", "backoff"}


def connect(url_or_model: str, model_name: str = "", **options: Any) -> Chat:
    """A chat with a model: behind an http(s) address, else a local one (built-in, a folder, a hub name).

    ``model_name``: the model's name at the endpoint, which may be left out where it has one only; or what tables call a
    local one. ``options``: those of `Chat` (``ledger``: ``ledger.sqlite`` of the home folder unless given; None keeps
    nothing), of `endpoint.Endpoint` (``api_key``, ``seconds``, ...) or of `local.LocalModel` (``device``, ``batch``, ...).
    Raises ChatError.
    """
    client = {name: options.pop(name) for name in list(options) if name in _CLIENT}
    backend: Backend
    if url_or_model.startswith(("http://", "https://")):
        from .endpoint import Endpoint

        backend = Endpoint(url_or_model, model_name, **options)
        if not model_name:
            backend.name = run(backend.only_model())
    else:
        from .local import LocalModel

        backend = LocalModel(url_or_model, name=model_name, **options)
    if "ledger" not in client:
        from ..records import home

        client["ledger"] = home() / "ledger.sqlite"
    return Chat(backend, **client)
