"""Ten problems of our own, so that the benchmark runs after install: each with a prompt, inputs of growing size, a checker,
and solutions of four tiers: ``wrong``, ``slow`` (by one power of the size), ``ok`` and ``best``, which is the reference."""

from __future__ import annotations

from functools import cache
from textwrap import dedent

from .problems import Problem

_CHECKER = "def __check(input, answer, output):\n    return type(output) == type(answer) and output == answer\n"


def _problem(number: int, signature: str, says: str, levels: str, inputs: str, **tiers: str) -> Problem:
    prompt = f'def {signature}:\n    """{says}"""\n'
    made = "def generate_input(size, lid, cid):\n" + _indented(inputs)
    codes = {name: f"def {signature}:\n" + _indented(body) for name, body in tiers.items()}
    return Problem(
        f"broadsheet/{number}", number, prompt, made, tuple(map(int, levels.split())), codes["best"], _CHECKER,
        signature.partition("(")[0], tuple(codes.items()),
    )  # fmt: skip


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in dedent(text).strip("\n").splitlines())


@cache
def builtin_problems() -> tuple[Problem, ...]:
    """The set, in order."""
    return (
        _problem(
            0, "has_pair(numbers, target)", "Whether two of the numbers, at different places, add up to the target.",
            "8 120 240 400",
            """
            numbers = [2 * random.randint(-10 * size, 10 * size) for _ in range(size)]
            if lid == 0 and cid % 2:
                return numbers + [3, 4], 7
            return numbers, 1
            """,
            wrong="return any(target - a in numbers for a in numbers[1:])[0]",
            slow="""
            for i in range(len(numbers)):
                for j in range(i + 1, len(numbers)):
                    if numbers[i] + numbers[j] == target:
                        return True
            return False
            """,
            ok="""
            left = sorted(numbers)
            i, j = 0, len(left) - 1
            while i < j:
                total = left[i] + left[j]
                if total == target:
                    return True
                if total < target:
                    i += 1
                else:
                    j -= 1
            return False
            """,
            best="""
            seen = set()
            for a in numbers:
                if target - a in seen:
                    return True
                seen.add(a)
            return False
            """,
        ),
        _problem(
            1, "best_run(numbers)", "The largest sum of neighbouring numbers (at least one of them).", "6 80 160 300",
            "return [random.randint(-50, 50) for _ in range(max(size, 1))],",
            wrong="return sum(a for a in numbers if a > 0)",
            slow="""
            best = numbers[0]
            for i in range(len(numbers)):
                total = 0
                for j in range(i, len(numbers)):
                    total += numbers[j]
                    if total > best:
                        best = total
            return best
            """,
            ok="""
            sums, best = [0], None
            for a in numbers:
                sums.append(sums[-1] + a)
            lowest = sums[0]
            for total in sums[1:]:
                if best is None or total - lowest > best:
                    best = total - lowest
                if total < lowest:
                    lowest = total
            return best
            """,
            best="""
            best = here = numbers[0]
            for a in numbers[1:]:
                here = here + a if here > 0 else a
                if here > best:
                    best = here
            return best
            """,
        ),
        _problem(
            2, "primes_below(n)", "All primes below n, ascending.", "20 400 1200 2500",
            "return size + random.randint(0, 10),",
            wrong="return [a for a in range(2, n) if a % 2 or a == 2]",
            slow="return [a for a in range(2, n) if all(a % b for b in range(2, a))]",
            ok="""
            found = []
            for a in range(2, n):
                for b in found:
                    if b * b > a:
                        found.append(a)
                        break
                    if a % b == 0:
                        break
                else:
                    found.append(a)
            return found
            """,
            best="""
            marks = bytearray([1]) * max(n, 2)
            marks[0] = marks[1] = 0
            i = 2
            while i * i < n:
                if marks[i]:
                    marks[i * i :: i] = bytes(len(range(i * i, len(marks), i)))
                i += 1
            return [i for i in range(n) if marks[i]]
            """,
        ),
        _problem(
            3, "fibonacci_mod(n, m)", "The n-th Fibonacci number (F(0) = 0) modulo m.", "10 2000 8000 20000",
            "return size + random.randint(0, 99), random.randint(2, 10**9)",
            wrong="return n % m",
            slow="""
            a, b = 0, 1
            for _ in range(n):
                a, b = b, (a + b) % m
            return a % m
            """,
            ok="""
            a, b, c, d = 1, 0, 0, 1
            p, q, r, s = 1, 1, 1, 0
            while n:
                if n % 2:
                    a, b, c, d = (a * p + b * r) % m, (a * q + b * s) % m, (c * p + d * r) % m, (c * q + d * s) % m
                p, q, r, s = (p * p + q * r) % m, (p * q + q * s) % m, (r * p + s * r) % m, (r * q + s * s) % m
                n //= 2
            return b % m
            """,
            best="""
            a, b = 0, 1
            for bit in bin(n)[2:]:
                a, b = a * (2 * b - a) % m, (a * a + b * b) % m
                if bit == "1":
                    a, b = b, (a + b) % m
            return a % m
            """,
        ),
        _problem(
            4, "longest_distinct(text)", "The length of the longest piece of the text without a repeated letter.",
            "8 60 120 240",
            "return ''.join(chr(32 + random.randint(0, 90)) for _ in range(size)),",
            wrong="return len(set(text))",
            slow="""
            best = 0
            for i in range(len(text)):
                for j in range(i + 1, len(text) + 1):
                    piece = text[i:j]
                    if len(set(piece)) == len(piece):
                        best = max(best, j - i)
            return best
            """,
            ok="""
            best, start, inside = 0, 0, set()
            for i, letter in enumerate(text):
                while letter in inside:
                    inside.remove(text[start])
                    start += 1
                inside.add(letter)
                best = max(best, i - start + 1)
            return best
            """,
            best="""
            best, start, last = 0, 0, {}
            for i, letter in enumerate(text):
                before = last.get(letter, -1)
                if before >= start:
                    start = before + 1
                last[letter] = i
                if i - start >= best:
                    best = i - start + 1
            return best
            """,
        ),
        _problem(
            5, "divisible_pairs(numbers, k)", "How many pairs of places i < j have numbers whose sum k divides.",
            "8 100 200 350",
            "return [random.randint(0, 10**6) for _ in range(size)], random.randint(2, 9)",
            wrong="return sum(a % k == 0 for a in numbers) // 2",
            slow="""
            found = 0
            for i in range(len(numbers)):
                for j in range(i + 1, len(numbers)):
                    if (numbers[i] + numbers[j]) % k == 0:
                        found += 1
            return found
            """,
            ok="""
            counts, found = {}, 0
            for a in numbers:
                rest = a % k
                found += counts.get((k - rest) % k, 0)
                counts[rest] = counts.get(rest, 0) + 1
            return found
            """,
            best="""
            counts = [0] * k
            found = 0
            for a in numbers:
                found += counts[-a % k]
                counts[a % k] += 1
            return found
            """,
        ),
        _problem(
            6, "window_maxima(numbers, k)", "The maximum of every k neighbouring numbers, in order.", "8 100 200 400",
            "return [random.randint(0, 10**6) for _ in range(size)], max(1, size // 3)",
            wrong="return sorted(numbers)[k - 1 :]",
            slow="""
            found = []
            for i in range(len(numbers) - k + 1):
                best = numbers[i]
                for j in range(i, i + k):
                    if numbers[j] > best:
                        best = numbers[j]
                found.append(best)
            return found
            """,
            ok="""
            import heapq
            heap, found = [], []
            for i, a in enumerate(numbers):
                heapq.heappush(heap, (-a, i))
                if i >= k - 1:
                    while heap[0][1] <= i - k:
                        heapq.heappop(heap)
                    found.append(-heap[0][0])
            return found
            """,
            best="""
            from collections import deque
            line, found = deque(), []
            for i, a in enumerate(numbers):
                while line and numbers[line[-1]] <= a:
                    line.pop()
                line.append(i)
                if line[0] <= i - k:
                    line.popleft()
                if i >= k - 1:
                    found.append(numbers[line[0]])
            return found
            """,
        ),
        _problem(
            7, "edit_distance(a, b)", "How many letters must be inserted, deleted or replaced to make a into b.",
            "3 8 14 24",
            "return tuple(''.join(random.choice('abc') for _ in range(size + random.randint(0, 2))) for _ in range(2))",
            wrong="return sum(x != y for x, y in zip(a, b))",
            slow="""
            table = {}
            for i in range(len(a) + 1):
                for j in range(len(b) + 1):
                    options = []
                    if i == 0 and j == 0:
                        options.append(0)
                    if i > 0:
                        options.append(table[(i - 1, j)] + 1)
                    if j > 0:
                        options.append(table[(i, j - 1)] + 1)
                    if i > 0 and j > 0:
                        options.append(table[(i - 1, j - 1)] + (0 if a[i - 1] == b[j - 1] else 1))
                    table[(i, j)] = sorted(options)[0]
            return table[(len(a), len(b))]
            """,
            ok="""
            row = list(range(len(b) + 1))
            for i in range(1, len(a) + 1):
                new = [i] + [0] * len(b)
                for j in range(1, len(b) + 1):
                    cost = 0 if a[i - 1] == b[j - 1] else 1
                    new[j] = min(row[j] + 1, new[j - 1] + 1, row[j - 1] + cost)
                row = new
            return row[len(b)]
            """,
            best="""
            row = list(range(len(b) + 1))
            for i, x in enumerate(a, 1):
                corner, left = i - 1, i
                row[0] = i
                for j, y in enumerate(b, 1):
                    above = row[j]
                    if x != y:
                        if above < corner:
                            corner = above
                        if left < corner:
                            corner = left
                        corner += 1
                    row[j] = left = corner
                    corner = above
            return left if a and b else len(a) or len(b)
            """,
        ),
        _problem(
            8, "common_count(a, b)", "How many different numbers are in both lists.", "8 100 200 400",
            """
            most = 10 * size
            return tuple([random.randint(0, most) for _ in range(size)] for _ in range(2))
            """,
            wrong="return len([x for x in a if x in b and a.count(x) == 1]) + 1",
            slow="""
            found = []
            for x in a:
                for y in b:
                    if x == y and x not in found:
                        found.append(x)
            return len(found)
            """,
            ok="""
            there, found = set(b), set()
            for x in a:
                if x in there:
                    found.add(x)
            return len(found)
            """,
            best="""
            there, found = set(b), 0
            for x in set(a):
                if x in there:
                    found += 1
            return found
            """,
        ),
        _problem(
            9, "power_mod(base, exponent, m)", "base to the power of exponent, modulo m.", "5 1000 4000 10000",
            "return random.randint(2, 10**6), size + random.randint(0, 9), random.randint(2, 10**9)",
            wrong="return base * exponent % m",
            slow="""
            value = 1
            for _ in range(exponent):
                value = value * base
                value = value % m
            return value % m
            """,
            ok="""
            value, base = 1 % m, base % m
            while exponent > 0:
                if exponent % 2 == 1:
                    value = (value * base) % m
                base = (base * base) % m
                exponent = exponent // 2
            return value
            """,
            best="""
            value = 1 % m
            for bit in bin(exponent)[2:]:
                value = value * value % m
                if bit == "1":
                    value = value * base % m
            return value
            """,
        ),
    )  # fmt: skip
