"""Response lengths: what a policy believes of a response that does not exist yet.

An estimator is a frozen dataclass whose fields are its Hydra options. There are two kinds, and one of them is enough:

- every estimator tells what it would say of responses of known length (`Lengths`), which is how a simulated workload
  without prompts is tagged: a learned estimator answers with its own measured errors (`errors`);
- one that *reads* (`Reader`) tells it from prompts, which is how real requests are tagged.

`Oracle` makes the policy the paper's Block; any other makes it Block*. `compact` and `roberta` are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol, final, runtime_checkable

import numpy as np

from block.core.arrays import Floats, Ints
from block.core.rng import generator
from block.core.types import Request


class Estimates(NamedTuple):
    """Of n prompts: tokens int[n], at least 1; spread float[n], the standard deviation of the length's logarithm."""

    tokens: Ints
    spread: Floats


class Lengths(Protocol):
    """Estimates response lengths."""

    @property
    def outrun_share(self) -> float:
        """How long a response that has outrun its estimate is expected to go on, as a share of what it has; 0 leaves it
        at the paper's 10 tokens, which are the least.
        """
        ...

    def estimate(self, output_tokens: Ints, rng: np.random.Generator) -> Ints:
        """int[n] estimates, at least 1, for responses whose true lengths are `output_tokens`.

        FileNotFoundError or ValueError, in one line, if what was learned is not there or not to be used.
        """
        ...


@runtime_checkable
class Reader(Lengths, Protocol):
    """Estimates them from prompts as well."""

    def predict(self, prompts: Sequence[str]) -> Estimates:
        """What to expect of each prompt, of any text; the same for the same prompt, whatever stands beside it.

        FileNotFoundError or ValueError, in one line, if what was learned is not there or not to be used.
        """
        ...


def tag(requests: Sequence[Request], lengths: Lengths, seed: int) -> list[Request]:
    """The requests, each with its predicted_output_tokens set: from their prompts, if they have any and it reads.

    What is drawn comes from a generator of its own, "lengths".
    """
    prompts = [request.prompt for request in requests if request.prompt is not None]
    if isinstance(lengths, Reader) and len(prompts) == len(requests):
        estimates = lengths.predict(prompts).tokens
    else:
        truth = np.array([request.output_tokens for request in requests], dtype=np.int64)
        estimates = lengths.estimate(truth, generator(seed, "lengths"))
        if estimates is truth and all(r.predicted_output_tokens == r.output_tokens for r in requests):
            return list(requests)
    return [
        replace(r, predicted_output_tokens=estimate) for r, estimate in zip(requests, estimates.tolist(), strict=True)
    ]


@final
@dataclass(frozen=True)
class Oracle:
    """The true lengths, as in the paper's Block."""

    outrun_share: ClassVar[float] = 0.0

    def estimate(self, output_tokens: Ints, rng: np.random.Generator) -> Ints:
        """`output_tokens` themselves."""
        return output_tokens


@final
@dataclass(frozen=True)
class Constant:
    """The same length for all: what is believed where nothing is known of requests.

    spread: claimed standard deviation of the length's logarithm.
    """

    tokens: int = 256
    spread: float = 1.0
    outrun_share: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"lengths.tokens={self.tokens}: must be at least 1")
        if not 0 <= self.spread < float("inf"):
            raise ValueError(f"lengths.spread={self.spread}: must be 0 or more")

    def estimate(self, output_tokens: Ints, rng: np.random.Generator) -> Ints:
        """`tokens` for each."""
        return np.full(len(output_tokens), self.tokens, dtype=np.int64)

    def predict(self, prompts: Sequence[str]) -> Estimates:
        """`tokens` for each."""
        return Estimates(np.full(len(prompts), self.tokens, dtype=np.int64), np.full(len(prompts), self.spread))


@final
@dataclass(frozen=True)
class Noisy:
    """An error model of a learned estimator.

    Most estimates are the truth times 1 + N(bias, spread²); a share `outliers` of them has nothing to do with its
    prompt: it is the length of some other response of the workload. The defaults give an error rate, the sum of errors
    over the sum of lengths, of 10–15 % on ShareGPT, which the paper reports for its estimator.
    """

    spread: float = 0.1
    outliers: float = 0.05
    bias: float = 0.0
    outrun_share: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.spread < float("inf"):
            raise ValueError(f"lengths.spread={self.spread}: must be 0 or more")
        if not 0 <= self.outliers <= 1:
            raise ValueError(f"lengths.outliers={self.outliers}: must be between 0 and 1")
        if not -1 < self.bias < float("inf"):
            raise ValueError(f"lengths.bias={self.bias}: must be greater than -1")

    def estimate(self, output_tokens: Ints, rng: np.random.Generator) -> Ints:
        """The truth, blurred; some of it shuffled."""
        factors = rng.normal(1.0 + self.bias, self.spread, len(output_tokens))
        others = rng.permutation(output_tokens)
        astray = rng.random(len(output_tokens)) < self.outliers
        estimates = np.rint(np.where(astray, others, output_tokens * factors))
        return np.asarray(np.maximum(estimates, 1), dtype=np.int64)


@final
@dataclass(frozen=True)
class Injected:
    """The truth times a Gaussian factor N(1, sigma²), cut to 0.1 … 5: what the camera-ready's Fig 12 injects."""

    sigma: float = 0.0
    outrun_share: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"lengths.sigma={self.sigma}: must be 0 or more")

    def estimate(self, output_tokens: Ints, rng: np.random.Generator) -> Ints:
        """The truth, stretched or shrunk."""
        factors = rng.normal(1.0, self.sigma, len(output_tokens)).clip(0.1, 5.0)
        return np.asarray(np.maximum(np.rint(output_tokens * factors), 1), dtype=np.int64)
