"""A real SMTP server in a process of its own, which writes down what it takes.

    python smtp_server.py FOLDER [--slow SECONDS] [--well]

Prints its port. Every message that it takes is a file in FOLDER before it says so. Addresses that begin with a code
(``550-...@``, ``450-...@``) are refused with it, ``data-550-...@`` when the text has come; ``drop-...@`` loses the
connection after the text. ``--well``: none of that.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from pathlib import Path

from aiosmtpd.smtp import SMTP


class Handler:
    def __init__(self, folder: Path, slow: float, well: bool):
        self.folder, self.slow, self.well = folder, slow, well

    async def handle_RCPT(self, server, session, envelope, address, options):  # aiosmtpd's name
        if address[:3].isdecimal() and not self.well:
            return f"{address[:3]} no thanks"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        await asyncio.sleep(self.slow)
        first, _, rest = envelope.rcpt_tos[0].partition("-")
        if first == "data" and not self.well:
            return f"{rest[:3]} not this text"
        name = f"{envelope.rcpt_tos[0]} {uuid.uuid4().hex}"
        part = self.folder / f".{name}"
        part.write_bytes(envelope.content)
        part.rename(self.folder / name)
        if first == "drop" and not self.well:
            server.transport.abort()
        return "250 taken"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--well", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    handler = Handler(arguments.folder, arguments.slow, arguments.well)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(handler, enable_SMTPUTF8=True, loop=loop), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until its starter goes


asyncio.run(main())
