"""What the tuning of a model is told, and what decides its codes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from shardq.errors import BadOption
from shardq.tune.block_gptq import GptqOptions
from shardq.tune.signround import SignRoundOptions

AlgorithmName = Literal["signround", "gptq", "opt-rtn", "rtn"]
ALGORITHMS: Final[tuple[AlgorithmName, ...]] = ("signround", "gptq", "opt-rtn", "rtn")


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Calibration data, under AutoRound's names."""

    dataset: str = "random"
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises BadOption."""
        if self.nsamples < 1 or self.seqlen < 1:
            raise BadOption(f"calibration needs a sample of a token, not {self.nsamples} of {self.seqlen}")


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """All that decides codes, beside the plan."""

    algorithm: AlgorithmName = "gptq"
    data: DataOptions = field(default_factory=DataOptions)
    dtype: str = "float32"  # what is computed with; auto: the model's own
    enable_quanted_input: bool = True  # a block is tuned with what comes out of those before it with their codes
    gptq: GptqOptions = field(default_factory=GptqOptions)
    signround: SignRoundOptions = field(default_factory=SignRoundOptions)

    def __post_init__(self) -> None:
        """Raises BadOption."""
        if self.algorithm not in ALGORITHMS:
            raise BadOption(f"--algorithm {self.algorithm!r}: expected one of {', '.join(ALGORITHMS)}")

    def as_dict(self) -> Mapping[str, Any]:
        """Plain values, for the identity of a folder."""
        values = asdict(self)
        for name in ("gptq", "signround"):
            if self.algorithm != name:
                del values[name]
        return values
