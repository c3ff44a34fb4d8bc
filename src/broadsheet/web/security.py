"""What keeps strangers from doing harm: headers, forms that only our own pages can send, signed tokens.

Nothing in a page runs or loads from elsewhere: the content security policy allows this server's own files and no inline
script.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Annotated

from fastapi import Form, Header, HTTPException, Request
from itsdangerous import BadSignature, URLSafeTimedSerializer

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
CSRF_COOKIE = "broadsheet_form"


def hashed(token: str) -> str:
    """What is stored of a token: a thief of the database cannot use it."""
    return hashlib.sha256(token.encode()).hexdigest()


class Signer:
    """Tokens that carry a value, a purpose and their age: made for one purpose, they are worth nothing for another."""

    def __init__(self, secret: str):
        self.secret = secret

    def sign(self, purpose: str, value: object) -> str:
        """A token for an address line."""
        return str(URLSafeTimedSerializer(self.secret, salt=f"broadsheet.{purpose}").dumps(value))

    def read(self, purpose: str, token: str, seconds: int | None = None) -> object | None:
        """What was signed, or None: forged, for something else, or older than ``seconds``."""
        try:
            return URLSafeTimedSerializer(self.secret, salt=f"broadsheet.{purpose}").loads(token, max_age=seconds)
        except BadSignature:
            return None


def csrf_token(request: Request) -> str:
    """What a form of ours must send back: it belongs to the browser's cookie, which other sites can neither read nor set.

    A browser without one gets its cookie with the answer (`render.page`).
    """
    known = request.cookies.get(CSRF_COOKIE, "")
    if not known:
        known = getattr(request.state, "csrf_cookie", "") or secrets.token_urlsafe(16)
        request.state.csrf_cookie = known
    return _mac(request, known)


def _mac(request: Request, cookie: str) -> str:
    return hmac.new(request.app.state.settings.secret.encode(), f"csrf:{cookie}".encode(), "sha256").hexdigest()


def from_our_page(request: Request, csrf: Annotated[str, Form()] = "", x_csrf: Annotated[str, Header()] = "") -> None:
    """A dependency of everything that changes something for a browser: 403 unless a page of ours sent it."""
    cookie = request.cookies.get(CSRF_COOKIE, "")
    given = csrf or x_csrf
    if not cookie or not hmac.compare_digest(_mac(request, cookie).encode(), given.encode()):
        raise HTTPException(403, "this form is out of date or came from elsewhere; load the page again and repeat")
