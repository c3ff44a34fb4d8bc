"""Runs secret-shared operators under SecretFlow SPU and counts what every party sends.

A program of its own: it runs in the SPU environment (spu 0.9.5, jax 0.4.34, numpy < 2; see the docstring of
`broadsheet.methods.caches.mpc_prices`), reads one JSON job on stdin and writes one JSON answer on stdout.

    {"protocol": "aby3" | "semi2k" | "cheetah", "seed": 0,
     "ops": [{"op": "softmax", "T": 512, "k": 0, "H": 8, "d": 64, "repeats": 1}, ...]}

Every party is a process of its own, linked over loopback TCP, so bytes, messages and CPU time are known for
every rank. A real link is used (not SPU's in-process simulator) because the simulator reports rank 0 only,
and the ABY3 protocol draws at random which rank does the larger share of each truncation and conversion: only
the sum over ranks is the same from run to run. SEMI2K uses SPU's default trusted dealer, so its bytes leave
out the triples; CHEETAH makes its own. What a protocol sends once per session (keys, base oblivious
transfers) is reported as "setup".

Answer: {"protocol", "parties", "versions", "setup": sample, "results": [{op, T, k, H, d, samples,
max_abs_error, max_fixed_point_error}, ...]}; a sample is {"bytes": [per rank], "actions": [per rank],
"cpu_s": [per rank]}, where an action is one message handed to the link. Errors are absolute, against numpy in
float64. SPU computes exp(x) as (1 + x/256)**256, whose relative error is -x**2/512 whatever the protocol;
`max_fixed_point_error` compares with plaintext that does the same, so what is left is the arithmetic.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import socket
import sys
import tempfile
import time
from importlib.metadata import version

PARTIES = {"aby3": 3, "semi2k": 2, "cheetah": 2}
TIMEOUT_S = 600
LINK_STATS = re.compile(rb"Link details: total send bytes (\d+), recv bytes \d+, send actions (\d+)")


# ---------------------------------------------------------------------------------------------- the operators
# Each builder returns (function on secret inputs, inputs, check), where check(outputs) gives the two errors
# above. T: tokens (or clusters), k: entries picked, H: heads, d: head_dim (or row width of a gather).


def operators():
    """The operator builders by name; imports jax, so it is called in the driving process only."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def normal(rng, *shape):
        return rng.normal(size=shape).astype(np.float32)

    def transpose(x):
        return jnp.swapaxes(x, -1, -2)

    def mpc_softmax(x):
        """Subtract the max, cut exp below -14 to 0, multiply by one reciprocal of the sum per row."""
        x = x - jnp.max(x, -1, keepdims=True)
        e = jnp.exp(x) * (x > -14)
        return e * (1 / jnp.sum(e, -1, keepdims=True))

    def plain_softmax(x, exp=np.exp):
        e = exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def spu_exp(x):
        return (1 + x / 256) ** 256

    def difference(expected, with_spu_exp=None):
        def check(outputs):
            return tuple(
                max(float(np.abs(np.asarray(got, np.float64) - want).max()) for got, want in zip(outputs, wanted))
                for wanted in (expected, with_spu_exp or expected)
            )

        return check

    def qk(rng, T, k, H, d):
        q, K = normal(rng, H, 1, d), normal(rng, H, T, d)
        return (
            lambda q, K: q @ transpose(K),
            (q, K),
            difference([q.astype(np.float64) @ np.swapaxes(K, -1, -2)]),
        )

    def softmax(rng, T, k, H, d, secret=mpc_softmax):
        x = normal(rng, H, T)
        exact, approximate = (plain_softmax(x.astype(np.float64), exp) for exp in (np.exp, spu_exp))
        return secret, (x,), difference([exact], [approximate])

    def softmax_stock(rng, T, k, H, d):
        return softmax(rng, T, k, H, d, secret=lambda x: jax.nn.softmax(x))

    def attention(rng, T, k, H, d, secret=mpc_softmax):
        # The factor 1/sqrt(d) is public, so it is folded into the query projection and costs nothing here.
        q, K, V = normal(rng, H, 1, d) / np.float32(math.sqrt(d)), normal(rng, H, T, d), normal(rng, H, T, d)
        scores = q.astype(np.float64) @ np.swapaxes(K, -1, -2)
        exact, approximate = (plain_softmax(scores, exp) @ V for exp in (np.exp, spu_exp))
        return lambda q, K, V: secret(q @ transpose(K)) @ V, (q, K, V), difference([exact], [approximate])

    def attention_stock(rng, T, k, H, d):
        return attention(rng, T, k, H, d, secret=lambda x: jax.nn.softmax(x))

    def topk(rng, T, k, H, d):
        x = normal(rng, H, T)

        def check(outputs):  # the picked set is right if its sorted values are; the order is not asked for
            picked = np.take_along_axis(x, np.asarray(outputs[0]).astype(int), -1)
            return (float(np.abs(np.sort(picked, -1) - np.sort(x, -1)[:, T - k :]).max()),) * 2

        return lambda x: jax.lax.top_k(x, k)[1], (x,), check

    def one_hot(rng, T, k, H, d):
        index = rng.integers(0, T, (H, k)).astype(np.int32)
        return lambda i: jax.nn.one_hot(i, T, dtype=jnp.int32), (index,), difference([np.eye(T)[index]])

    def one_hot_arithmetic(rng, T, k, H, d):
        # An equality test leaves *boolean* shares; a product needs arithmetic ones. Adding a secret zero
        # forces the conversion and sends nothing itself.
        index = rng.integers(0, T, (H, k)).astype(np.int32)
        secret = lambda i, zero: jax.nn.one_hot(i, T, dtype=jnp.int32) + zero  # noqa: E731
        return secret, (index, np.zeros((1, 1, 1), np.int32)), difference([np.eye(T)[index]])

    def gather(rng, T, k, H, d, dtype=np.int32):
        index = rng.integers(0, T, (H, k))
        picked, table = np.eye(T, dtype=dtype)[index], normal(rng, H, T, d)
        return (
            lambda o, t: o @ t,
            (picked, table),
            difference([np.take_along_axis(table, index[..., None], 1)]),
        )

    def gather_fixed(rng, T, k, H, d):  # one-hot as fixed-point numbers: one truncation more than integers
        return gather(rng, T, k, H, d, dtype=np.float32)

    def cosine(rng, T, k, H, d):
        q, K = normal(rng, H, 1, d), normal(rng, H, T, d)

        def secret(q, K):
            q_norm = jax.lax.rsqrt(jnp.sum(q * q, -1, keepdims=True))
            return (q @ transpose(K)) * q_norm * jax.lax.rsqrt(jnp.sum(K * K, -1))[:, None]

        norms = np.linalg.norm(q, axis=-1, keepdims=True) * np.linalg.norm(K, axis=-1)[:, None]
        return secret, (q, K), difference([q @ np.swapaxes(K, -1, -2) / norms])

    def clusters(rng, T, H, d):
        a, b = normal(rng, H, T, d), normal(rng, H, T, d)
        return normal(rng, H, 1, d), np.maximum(a, b), np.minimum(a, b)

    def sim_max(rng, T, k, H, d):
        q, r_max, r_min = clusters(rng, T, H, d)
        want = np.maximum(q.astype(np.float64) * r_max, q.astype(np.float64) * r_min).sum(-1)
        return lambda q, a, b: jnp.sum(jnp.maximum(q * a, q * b), -1), (q, r_max, r_min), difference([want])

    def sim_max_by_sign(rng, T, k, H, d):
        # The same bound without a comparison per cluster: r_max >= r_min, so a channel takes r_max where q >
        # 0 and r_min elsewhere. Only the H*d signs of q are compared; the rest is one product.
        q, r_max, r_min = clusters(rng, T, H, d)
        want = np.maximum(q.astype(np.float64) * r_max, q.astype(np.float64) * r_min).sum(-1)

        def secret(q, a, b):
            positive = jnp.maximum(q, 0)
            halves = jnp.concatenate([positive, q - positive], -1)
            return (halves @ transpose(jnp.concatenate([a, b], -1)))[:, 0]

        return secret, (q, r_max, r_min), difference([want])

    def sim_linear(rng, T, k, H, d):
        q, r_max, r_min = clusters(rng, T, H, d)
        want = (q.astype(np.float64) * (0.6 * r_max + 0.4 * r_min)).sum(-1)
        return lambda q, a, b: jnp.sum(q * (0.6 * a + 0.4 * b), -1), (q, r_max, r_min), difference([want])

    def sim_linear_matmul(rng, T, k, H, d):
        # Builds u_c = 0.6 r_max + 0.4 r_min for every cluster at every step. With u_c kept, a step is `qk`.
        q, r_max, r_min = clusters(rng, T, H, d)
        want = (q.astype(np.float64) * (0.6 * r_max + 0.4 * r_min)).sum(-1)[:, None]
        return lambda q, a, b: q @ transpose(0.6 * a + 0.4 * b), (q, r_max, r_min), difference([want])

    def cluster_update(rng, T, k, H, d):
        r_max, r_min = np.sort(np.stack([normal(rng, H, d), normal(rng, H, d)]), 0)[::-1]
        key = normal(rng, H, d)

        def secret(a, b, x):
            a, b = jnp.maximum(a, x), jnp.minimum(b, x)
            return a, b, 0.6 * a + 0.4 * b

        high, low = np.maximum(r_max, key), np.minimum(r_min, key)
        return secret, (r_max, r_min, key), difference([high, low, 0.6 * high + 0.4 * low])

    return {
        f.__name__: f
        for f in (
            qk,
            softmax,
            softmax_stock,
            attention,
            attention_stock,
            topk,
            one_hot,
            one_hot_arithmetic,
            gather,
            gather_fixed,
            cosine,
            sim_max,
            sim_max_by_sign,
            sim_linear,
            sim_linear_matmul,
            cluster_update,
        )
    }


# ------------------------------------------------------------------------------------- one party, one process


def runtime_config(protocol):
    from spu import libspu

    kind = {
        "aby3": libspu.ProtocolKind.ABY3,
        "semi2k": libspu.ProtocolKind.SEMI2K,
        "cheetah": libspu.ProtocolKind.CHEETAH,
    }[protocol]
    return libspu.RuntimeConfig(protocol=kind, field=libspu.FieldType.FM64)


def rebuild(meta, chunks):
    """A share from the parts that travel through a pipe."""
    from spu import libspu

    share = libspu.Share()
    share.meta, share.share_chunks = meta, chunks
    return share


def party(rank, ports, protocol, pipe, log_path):
    """Runs each program it is sent on this rank's shares; answers with the result shares and what it sent."""
    log = os.open(log_path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from spu import api, libspu

    desc = libspu.link.Desc()
    desc.recv_timeout_ms = TIMEOUT_S * 1000
    for r, port in enumerate(ports):
        desc.add_party(f"party_{r}", f"127.0.0.1:{port}")
    link = libspu.link.create_brpc(desc, rank)
    config = runtime_config(protocol)
    config.enable_pphlo_profile = True  # makes SPU log the link statistics of every program
    runtime = api.Runtime(link, config)
    pipe.send("ready")
    while (message := pipe.recv()) is not None:
        code, inputs = message
        program = libspu.Executable()
        program.ParseFromString(code)
        for name, part in inputs.items():
            runtime.set_var(name, rebuild(*part))
        log_start, cpu = os.fstat(log).st_size, time.process_time()
        runtime.run(program)
        cpu = time.process_time() - cpu
        sent, actions = LINK_STATS.findall(os.pread(log, os.fstat(log).st_size - log_start, log_start))[-1]
        outputs = [runtime.get_var(name) for name in program.output_names]
        for name in (*inputs, *program.output_names):
            runtime.del_var(name)
        pipe.send(
            {
                "shares": [(s.meta, list(s.share_chunks)) for s in outputs],
                "bytes": int(sent),
                "actions": int(actions),
                "cpu_s": cpu,
            }
        )
    link.stop_link()


class Session:
    """All parties of one protocol, alive for a whole job."""

    def __init__(self, protocol, folder):
        from spu import api

        self.protocol, self.parties = protocol, PARTIES[protocol]
        self.io = api.Io(self.parties, runtime_config(protocol))
        self.logs = [os.path.join(folder, f"party_{r}.log") for r in range(self.parties)]
        ports, context = free_ports(self.parties), multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(self.parties):
            ours, theirs = context.Pipe()
            process = context.Process(target=party, args=(rank, ports, protocol, theirs, self.logs[rank]), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.answers()

    def answers(self):
        """One message from every party, or an error that carries the end of the log of the party that
        failed."""
        got = []
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(TIMEOUT_S):
                    raise TimeoutError
                got.append(pipe.recv())
            except (EOFError, TimeoutError) as error:
                with open(self.logs[rank], errors="replace") as log:
                    tail = log.read()[-2000:]
                raise RuntimeError(f"{self.protocol} party {rank} stopped ({type(error).__name__}):\n{tail}") from None
        return got

    def compile(self, function, arguments):
        from spu import libspu
        from spu.utils import frontend

        names = [f"in{i}" for i in range(len(arguments))]
        program, _ = frontend.compile(
            frontend.Kind.JAX,
            function,
            arguments,
            {},
            names,
            [libspu.Visibility.VIS_SECRET] * len(arguments),
            lambda outputs: [f"out{i}" for i in range(len(outputs))],
        )
        return program

    def run(self, program, arguments):
        """Shares the arguments, runs the program on every party; returns (outputs, sample)."""
        import numpy as np
        from spu import libspu

        shares = [self.io.make_shares(np.ascontiguousarray(x), libspu.Visibility.VIS_SECRET) for x in arguments]
        code = program.SerializeToString()
        for rank, pipe in enumerate(self.pipes):
            pipe.send(
                (
                    code,
                    {name: (s[rank].meta, list(s[rank].share_chunks)) for name, s in zip(program.input_names, shares)},
                )
            )
        answers = self.answers()
        outputs = [self.io.reconstruct([rebuild(*part) for part in parts]) for parts in zip(*(a["shares"] for a in answers))]
        return outputs, {key: [a[key] for a in answers] for key in ("bytes", "actions", "cpu_s")}

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)


def free_ports(count):
    """Ports that were free a moment ago; all are held open until the last is chosen, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


# ---------------------------------------------------------------------------------------------- the job


def run_job(job):
    import numpy as np

    protocol = job["protocol"]
    if protocol not in PARTIES:
        raise SystemExit(f"unknown protocol {protocol!r}: use one of {', '.join(PARTIES)}")
    builders = operators()
    for item in job["ops"]:
        if item["op"] not in builders:
            raise SystemExit(f"unknown op {item['op']!r}: use one of {', '.join(builders)}")
    rng = np.random.default_rng(job.get("seed", 0))
    with tempfile.TemporaryDirectory() as folder:
        session = Session(protocol, folder)
        # The first product and comparison of a session also pay for keys and base transfers: run them twice
        # and report the difference as "setup".
        function, arguments, _ = builders["attention"](rng, 16, 0, 1, 16)
        program = session.compile(function, arguments)
        first, second = (session.run(program, arguments)[1] for _ in range(2))
        setup = {key: [a - b for a, b in zip(first[key], second[key])] for key in first}
        results = []
        for item in job["ops"]:
            sizes = {name: int(item.get(name, 0)) for name in ("T", "k", "H", "d")}
            samples, errors, program = [], [], None
            for _ in range(item.get("repeats", 1)):
                function, arguments, check = builders[item["op"]](rng, **sizes)
                program = program or session.compile(function, arguments)
                outputs, sample = session.run(program, arguments)
                samples.append(sample)
                errors.append(check(outputs))
            results.append(
                {
                    "op": item["op"],
                    **sizes,
                    "samples": samples,
                    "max_abs_error": max(plain for plain, _ in errors),
                    "max_fixed_point_error": max(own for _, own in errors),
                }
            )
        session.close()
    versions = {name: version(name) for name in ("spu", "jax", "numpy")}
    return {
        "protocol": protocol,
        "parties": PARTIES[protocol],
        "field": "FM64",
        "fraction_bits": 18,
        "versions": versions,
        "setup": setup,
        "results": results,
    }


def main():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    answer = os.dup(1)
    os.dup2(2, 1)  # SPU logs to stdout: keep that apart from the answer
    text = json.dumps(run_job(json.load(sys.stdin)))
    with os.fdopen(answer, "w") as out:
        out.write(text + "\n")


if __name__ == "__main__":
    main()
