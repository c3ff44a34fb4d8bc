"""`broadsheet serve` as a process: it listens, says so, keeps its worker and ends with it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from command import broadsheet

SERVE = "from broadsheet.cli import main; main()"


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = broadsheet("serve", "--port", str(taken.getsockname()[1]), "--no-worker", check=False)
    assert done.returncode == 2
    assert re.fullmatch(
        r"broadsheet: cannot listen on 127\.0\.0\.1:\d+: .*; give another --port \(0: a free one\)\n", done.stderr
    )


@pytest.fixture
def serve(tmp_path):
    """Starts a server; ``serve(*arguments, **environment)`` gives the process and its address."""
    started = []

    def start(*arguments, code=SERVE, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "BROADSHEET_HOME": str(tmp_path / "home"), "PYTHONPATH": ":".join(sys.path), **environment},
        )  # fmt: skip
        started.append(process)
        line = process.stdout.readline()
        found = re.search(r"Broadsheet at (http://\S+?),? ", line)
        assert found, (line, process.stderr.read() if process.poll() is not None else "")
        return process, found[1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def get(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
        return answer.status, answer.read().decode()


def test_it_serves_and_stops_at_ctrl_c(serve):
    process, address = serve("--no-worker")
    assert get(f"{address}/healthz")[0] == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped" in out
    assert '"route": "/healthz"' in err


def test_the_worker_is_kept_alive_and_ends_with_the_server(serve, tmp_path):
    """A worker that dies is started again; with the server, however that ends, it goes."""
    beats = tmp_path / "beats"
    body = f"import os, time; open({str(beats)!r}, 'a').write(str(os.getpid()) + '\\n'); time.sleep(300)"
    code = (
        "import subprocess, sys\n"
        "real = subprocess.Popen\n"
        f"def popen(command, **more):\n"
        f"    return real([sys.executable, '-c', {body!r}] if command[-1] == 'worker' else command, **more)\n"
        "subprocess.Popen = popen\n"
        "from broadsheet.cli import main; main()"
    )
    process, _ = serve(code=code)

    def pids(count):
        for _ in range(600):
            found = beats.read_text().split() if beats.exists() else []
            if len(found) >= count:
                return [int(pid) for pid in found]
            time.sleep(0.1)
        raise AssertionError(found)

    (first,) = pids(1)
    os.kill(first, signal.SIGKILL)
    _, second = pids(2)
    process.kill()
    for _ in range(100):
        if not alive(second):
            break
        time.sleep(0.1)
    assert not alive(second)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_page_that_others_see_asks_for_a_token_and_believes_no_stranger_s_header(serve):
    process, address = serve("--no-worker", "--host", "0.0.0.0", BROADSHEET_URL="http://127.0.0.1:1")
    port = address.rpartition(":")[2]
    assert get(f"http://127.0.0.1:{port}/robots.txt", **{"X-Forwarded-For": "1.2.3.4"})[0] == 200
    assert (
        "Sitemap: http://0.0.0.0" in get(f"http://127.0.0.1:{port}/robots.txt")[1]
    )  # an address of the loopback is not believed
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "set BROADSHEET_OWNER_TOKEN" in err
    assert "set BROADSHEET_URL" in err
