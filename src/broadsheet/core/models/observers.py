"""What calibration keeps of a layer's inputs: small statistics in float32, summed over batches.

An observer is called with the input [batch, tokens, channels] of each batch, see `walker.Block.observe`.
"""

from __future__ import annotations

import torch


class Gram:
    """The mean of x xᵀ over tokens: ``matrix`` [channels, channels] (GPTQ's and AQLM's Hessian, up to a factor)."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.tokens = 0

    def __call__(self, x: torch.Tensor) -> None:
        rows = x.flatten(0, -2).float()
        product = (rows.T @ rows).double()
        self.total = product if self.total is None else self.total + product
        self.tokens += rows.shape[0]

    @property
    def matrix(self) -> torch.Tensor:
        if self.total is None:
            raise ValueError("no input was observed: the calibration set is empty")
        return (self.total / self.tokens).float()


class Range:
    """Per channel: ``low`` and ``high`` over all tokens, ``largest`` |x|, and ``midpoint``, the mean over samples of
    (max over tokens + min over tokens) / 2. All [channels]."""

    def __init__(self) -> None:
        self.low: torch.Tensor = torch.tensor(float("inf"))
        self.high: torch.Tensor = torch.tensor(float("-inf"))
        self.middles: torch.Tensor | None = None
        self.samples = 0

    def __call__(self, x: torch.Tensor) -> None:
        x = x.float()
        low, high = x.amin(-2), x.amax(-2)  # of each sample
        self.low = torch.minimum(self.low.to(x.device), low.amin(0))
        self.high = torch.maximum(self.high.to(x.device), high.amax(0))
        middles = ((low + high) / 2).sum(0)
        self.middles = middles if self.middles is None else self.middles + middles
        self.samples += x.shape[0]

    @property
    def largest(self) -> torch.Tensor:
        return torch.maximum(-self.low, self.high)

    @property
    def midpoint(self) -> torch.Tensor:
        if self.middles is None:
            raise ValueError("no input was observed: the calibration set is empty")
        return self.middles / self.samples


class Norms:
    """Per channel: ``mean``, the mean over samples of the 2-norm over tokens (BitStack, equation 1), ``magnitude``, the
    mean of |x| over tokens (AWQ), and ``norm``, the 2-norm over all tokens (Wanda). All [channels]."""

    def __init__(self) -> None:
        self.norms = self.squares = self.magnitudes = torch.zeros(())
        self.samples = self.tokens = 0

    def __call__(self, x: torch.Tensor) -> None:
        x = x.float()
        squares = x.square().sum(-2)  # of each sample
        self.norms = self.norms.to(x.device) + squares.sqrt().sum(0)
        self.squares = self.squares.to(x.device) + squares.sum(0)
        self.magnitudes = self.magnitudes.to(x.device) + x.abs().sum((0, 1))
        self.samples += x.shape[0]
        self.tokens += x.shape[0] * x.shape[1]

    @property
    def mean(self) -> torch.Tensor:
        return self.norms / self.samples

    @property
    def magnitude(self) -> torch.Tensor:
        return self.magnitudes / self.tokens

    @property
    def norm(self) -> torch.Tensor:
        return self.squares.sqrt()


class Keep:
    """The inputs themselves, a tensor a batch: for methods that search by trying."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> None:
        self.inputs.append(x)
