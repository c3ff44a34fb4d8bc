"""Number types of outlier-victim pairs: which values a code stands for (OliVe, arXiv 2304.07493, section 3).

A value is a small integer times the tensor's scale. Every type has two code tables of the same width:

- *normals*: int (two's complement) or flint (ANT, arXiv 2208.14286), each without one code, the identifier;
- *outliers*: abfloat, a sign, two exponent bits e and the mantissa m: magnitude (2**mantissa + m) << (e + bias), where
  bias lets outliers begin where normals end ("adaptive bias"). Magnitude code 0 is not used, and no outlier has the
  identifier for its code: where there is no sign, abfloat codes have the identifier's bits flipped.

A code is an outlier if, and only if, its neighbour in the pair is the identifier; the identifier itself is 0.

| type          | normals                                  | outliers                          | identifier |
|---------------|------------------------------------------|-----------------------------------|------------|
| int4          | 0, ±1 .. ±7                              | ±(12 16 24 32 48 64 96)           | 1000       |
| flint4        | 0, ±(1 2 3 4 6 8 16)                     | ±(24 32 48 64 96 128 192)         | 1000       |
| int8          | 0, ±1 .. ±127                            | ±132 .. ±2016, five mantissa bits | 10000000   |
| int4 unsigned | 0 .. 14                                  | 20 24 28 32 40 .. 224             | 1111       |
| flint4 uns.   | 0 .. 8, 10 12 14 16 24 32                | 40 48 56 64 80 .. 448             | 1000       |
| int8 unsigned | 0 .. 254                                 | 260 .. 4064, six mantissa bits    | 11111111   |

The official code measures all types on one ruler, where normals end at 32: int4 is its grid divided by 4, signed flint4
by 2, int8 times 4, and so on; the sets are the same.

Deviations: the official code keeps all 16 (256) unsigned normals and so leaves no code for the identifier; its unsigned
tensors fit no pair of 4-bit slots. Here unsigned int gives up its largest value and unsigned flint code 1000, its 64: that
keeps the identifier of the signed type, and with outliers starting after 32 its error is the least of all choices.
8-bit outliers have two exponent bits, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

#: magnitudes of the three-bit and four-bit flint codes: 0xx as it stands, then 11x, 101, 100 in ever larger steps
_FLINT = {3: (0, 1, 2, 3, 16, 8, 4, 6), 4: (0, 1, 2, 3, 4, 5, 6, 7, 64, 32, 16, 24, 8, 10, 12, 14)}
EXPONENT_BITS = 2
NAMES = ("int4", "flint4", "int8")


@dataclass(frozen=True)
class PairType:
    """A number type: ``name`` "int4", "flint4" or "int8", with a sign or without.

    ``outliers`` off leaves the normals alone, in the same codes: plain quantisation, to compare with.
    """

    name: str
    signed: bool = True
    outliers: bool = True

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"type must be one of {', '.join(NAMES)}, got '{self.name}'")

    @property
    def bits(self) -> int:
        return 8 if self.name == "int8" else 4

    @property
    def identifier(self) -> int:
        """The code that makes its neighbour an outlier."""
        return 2**self.bits - 1 if not self.signed and self.name != "flint4" else 2 ** (self.bits - 1)

    @cached_property
    def normal_values(self) -> tuple[int, ...]:
        """The value of every code beside a normal; 0 for the identifier."""
        codes = range(2**self.bits)
        half = 2 ** (self.bits - 1)
        if self.name == "flint4":
            magnitudes = _FLINT[3 if self.signed else 4]
            values = [magnitudes[code % len(magnitudes)] * (-1) ** (code // len(magnitudes)) for code in codes]
        else:
            values = [code - 2 * half if self.signed and code >= half else code for code in codes]
        values[self.identifier] = 0
        return tuple(values)

    @property
    def top(self) -> int:
        """G: the largest normal."""
        return max(self.normal_values)

    @property
    def bias(self) -> int:
        """Outliers of the least exponent are shifted by this."""
        return 3 if self.name == "flint4" else 2

    @cached_property
    def outlier_values(self) -> tuple[int, ...]:
        """The value of every code beside the identifier; 0 for the codes that are not used there."""
        if not self.outliers:
            return (0,) * 2**self.bits
        magnitude_bits = self.bits - self.signed
        mantissa_bits = magnitude_bits - EXPONENT_BITS
        values = []
        for code in range(2**self.bits):
            sign, magnitude = divmod(code if self.signed else code ^ self.identifier, 2**magnitude_bits)
            exponent, mantissa = divmod(magnitude, 2**mantissa_bits)
            value = (2**mantissa_bits + mantissa) << (exponent + self.bias)
            values.append((-value if sign else value) if magnitude else 0)
        return tuple(values)

    @property
    def reach(self) -> int:
        """The largest value; whatever is beyond saturates."""
        return max(self.values)

    @cached_property
    def values(self) -> tuple[int, ...]:
        """All values, normals and outliers, in order."""
        return tuple(sorted({*self.normal_values, *self.outlier_values}))

    @cached_property
    def code_of(self) -> dict[int, int]:
        """The code of every value, normal or outlier."""
        found = {value: code for code, value in enumerate(self.outlier_values) if value}
        return found | {value: code for code, value in enumerate(self.normal_values) if code != self.identifier}


@lru_cache
def tables(kind: PairType) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normals, outliers (int16, by code), nearest (int16, by place) and codes (uint8, by value + reach).

    ``nearest`` rounds: all borders between neighbouring values are multiples of 1/2, so the place of y is
    floor(2 y) + ceil(2 y) + 4 reach, which tells a border from what lies on either side. A tie goes to the later value of
    the sorted normals followed by the sorted outliers (the official rule): up, but from the largest normal to the first
    outlier on both sides of zero.
    """
    order = [value for value in kind.values if abs(value) <= kind.top] + [v for v in kind.values if abs(v) > kind.top]
    rank = {value: place for place, value in enumerate(order)}
    nearest, index, values = [], 0, kind.values
    for place in range(-4 * kind.reach, 4 * kind.reach + 1):
        while index + 1 < len(values):
            here, following = values[index], values[index + 1]
            border = 2 * (here + following)  # in quarters, as place is
            if place < border or (place == border and rank[here] > rank[following]):
                break
            index += 1
        nearest.append(values[index])
    codes = torch.full((2 * kind.reach + 1,), kind.identifier, dtype=torch.uint8)
    for value, code in kind.code_of.items():
        codes[value + kind.reach] = code
    normals, outliers, rounded = (
        torch.tensor(some, dtype=torch.int16) for some in (kind.normal_values, kind.outlier_values, nearest)
    )
    return normals, outliers, rounded, codes
