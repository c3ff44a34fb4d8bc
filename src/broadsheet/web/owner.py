"""Whom the page belongs to: who may start and cancel runs.

On a page that only this machine sees that is whoever uses it. On a public page it is who once showed the owner's token, and
has a signed cookie since; where no token is set it is nobody.
"""

from __future__ import annotations

import hmac
import re
from ipaddress import ip_address
from typing import Annotated

from fastapi import Depends, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from . import turns
from .render import page
from .security import Buckets, Rate, from_our_page, hashed
from .settings import Settings

router = turns.router(default_response_class=HTMLResponse, include_in_schema=False)

COOKIE = "broadsheet_owner"
#: Seconds that it is good for.
AGE = 30 * 86400
#: Tokens that one address may try.
TRIES = Rate(5, 1 / 60)


def is_owner(request: Request) -> bool:
    """Whether who asks may start and cancel runs."""
    settings = request.app.state.settings
    if not settings.public:
        return _from_this_machine(request)
    shown = request.app.state.signer.read("owner", request.cookies.get(COOKIE, ""), AGE)
    return bool(settings.owner_token) and shown == _mark(settings)


def _mark(settings: Settings) -> str:
    """What the cookie holds: another token makes it void, and it tells nothing of this one."""
    return hashed(f"{settings.secret} {settings.owner_token}")


def only_owner(request: Request) -> None:
    """A dependency of what only the owner may do: 403 for others."""
    if not is_owner(request):
        raise HTTPException(403, f"only the owner of this page may do this: {request.app.state.settings.url}/owner")


def _from_this_machine(request: Request) -> bool:
    """Whether the request comes from here and asked for here: a name of somebody else's that leads to this machine (DNS
    rebinding) would let a strange page act as one of ours."""
    try:
        names = [request.url.hostname or "", *([request.client.host] if request.client else [])]
        return all(name == "localhost" or ip_address(name).is_loopback for name in names)
    except ValueError:
        return False


@router.get("/owner")
def ask(request: Request, then: str = "") -> HTMLResponse:
    """Where the owner shows the token."""
    return page(request, "owner.html", then=_inside(then), known=is_owner(request), error="")


@router.post("/owner", dependencies=[Depends(from_our_page)])
def show(request: Request, token: Annotated[str, Form(max_length=500)] = "", then: Annotated[str, Form()] = "") -> Response:
    """Takes the token, once; from then on the browser's cookie stands for it."""
    state = request.app.state
    if not hasattr(state, "owner_tries"):
        state.owner_tries = Buckets(TRIES)
    if wait := state.owner_tries.take(request.client.host if request.client else ""):
        raise HTTPException(429, "that was tried too often: wait a minute", {"retry-after": str(int(wait) + 1)})
    right = state.settings.owner_token
    if not right or not hmac.compare_digest(hashed(right), hashed(token)):
        return page(request, "owner.html", 403, then=_inside(then), known=False, error="This is not the owner’s token.")
    answer = RedirectResponse(_inside(then) or "/runs", 303)
    value = state.signer.sign("owner", _mark(state.settings))
    answer.set_cookie(COOKIE, value, max_age=AGE, httponly=True, samesite="lax", secure=state.settings.https)
    return answer


@router.post("/owner/leave", dependencies=[Depends(from_our_page)])
def leave() -> Response:
    """Forgets that this browser is the owner's."""
    answer = RedirectResponse("/owner", 303)
    answer.delete_cookie(COOKIE)
    return answer


def _inside(address: str) -> str:
    """An address of ours to go on to, or nothing."""
    return address if re.fullmatch(r"/(papers|runs)/[\w.-]{1,80}(/run)?", address, re.ASCII) else ""
