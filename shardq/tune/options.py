"""What the tuning of a model is told, and what decides its codes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Final, Literal

from shardq.errors import BadOption
from shardq.tune.settings import AwqOptions, ComputeOptions, GptqOptions, SignRoundOptions

CodesBy = Literal["signround", "gptq", "opt-rtn", "rtn"]
CODES: Final[tuple[CodesBy, ...]] = ("signround", "gptq", "opt-rtn", "rtn")
AWQ: Final = "awq"  # scales matrices before another algorithm finds their codes
ALGORITHMS: Final = (*CODES, AWQ, *(f"{AWQ},{name}" for name in CODES))  # awq alone: with opt-rtn
OPTIONS: Final[Mapping[str, Any]] = MappingProxyType(
    {"gptq": GptqOptions, "signround": SignRoundOptions, AWQ: AwqOptions}
)  # of algorithms


TUNING: Final = 4  # of the algorithms: another one where the same words give other codes
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "default": {},
        "light": {"iters": 50, "lr": 5e-3},
        "best": {"iters": 1000, "nsamples": 512},
        "opt-rtn": {"algorithm": "opt-rtn"},
        "rtn": {"algorithm": "rtn", "nsamples": 1},
    }
)  # auto-round 0.16.1, cli/main.py


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Calibration data, under AutoRound's names."""

    dataset: str = "NeelNanda/pile-10k"
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

    algorithm: str = "signround"  # one of ALGORITHMS
    data: DataOptions = field(default_factory=DataOptions)
    dtype: str | None = None  # what is computed with; auto: the model's own. None: that for signround, else float32
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    enable_quanted_input: bool = True  # a block is tuned with what comes out of those before it with their codes
    enable_act_quant: bool = True  # with inputs of matrices as a server quantizes them, where the scheme says so
    gptq: GptqOptions = field(default_factory=GptqOptions)
    signround: SignRoundOptions = field(default_factory=SignRoundOptions)
    awq: AwqOptions = field(default_factory=AwqOptions)

    def __post_init__(self) -> None:
        """Raises BadOption."""
        if self.precision not in DTYPES:
            raise BadOption(f"--dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.algorithm not in ALGORITHMS:
            raise BadOption(f"--algorithm {self.algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
        if self.is_scaling and self.awq.awq_clip_as_init and self.codes != "signround":
            raise BadOption(
                f"--awq-clip-as-init: {self.codes} does not begin with ranges; take --algorithm awq,signround"
            )
        if self.is_scaling and self.signround.nblocks > 1:
            raise BadOption("awq scales one block after the other: leave --nblocks out")

    @property
    def is_scaling(self) -> bool:
        """True if matrices are scaled before they get codes."""
        return self.algorithm.partition(",")[0] == AWQ

    @property
    def codes(self) -> CodesBy:
        """What finds the codes."""
        return next((name for name in CODES if name == self.algorithm.rpartition(",")[2]), "opt-rtn")

    @property
    def scaling(self) -> AwqOptions:
        """AWQ's, with the codes under which it judges scales: searched where those that follow have searched scales."""
        searched = self.codes == "opt-rtn" or (self.codes == "gptq" and self.gptq.scales == "search")
        return replace(self.awq, awq_codes=self.awq.awq_codes or ("searched" if searched else "nearest"))

    @property
    def precision(self) -> str:
        """What is computed with."""
        return self.dtype or ("auto" if self.codes == "signround" else "float32")

    @property
    def has_plain_chain(self) -> bool:
        """Hidden states go through the model twice, also as its own weights have them."""
        return self.codes == "signround" or not self.enable_quanted_input

    def as_dict(self) -> Mapping[str, Any]:
        """Plain values, for the identity of a folder."""
        values = {**asdict(self), AWQ: asdict(self.scaling), "dtype": self.precision, "tuning": TUNING}
        for name in OPTIONS.keys() - set(self.algorithm.split(",")):
            del values[name]
        del values["compute"]  # but for the kind of device, whose arithmetic is its own
        if (kind := self.compute.place().type) != "cpu":
            values["device"] = kind
        return values


def build_options(words: Mapping[str, Any]) -> TuneOptions:
    """Options from words by their names, those of all parts together; `recipe` names a row of RECIPES, whose values
    others replace; `disable_amp` is float32 for what is computed with. Raises BadOption for a word that the algorithm
    has no use for, or that nobody knows."""
    given = {k: v for k, v in words.items() if k not in ("recipe", "disable_amp") and v is not None}
    if words.get("disable_amp") and given.setdefault("dtype", "float32") != "float32":
        raise BadOption(f"--disable-amp computes in float32, not in {given['dtype']}: leave one of them out")
    recipe = words.get("recipe") or "default"
    if recipe not in RECIPES:
        raise BadOption(f"--recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
    values = {**RECIPES[recipe], **given}
    algorithm = values.get("algorithm", "signround")
    parts = {"data": DataOptions, "compute": ComputeOptions, **OPTIONS}
    names = {part: {f.name for f in fields(kind)} for part, kind in parts.items()}
    own = {k: v for k, v in values.items() if k in {"algorithm", "dtype", "enable_quanted_input", "enable_act_quant"}}
    if unknown := given.keys() - own.keys() - {n for of in names.values() for n in of}:
        raise BadOption(f"{', '.join(sorted(unknown))}: no option of tuning")
    for part in OPTIONS:
        if part not in algorithm.split(",") and (idle := sorted(given.keys() & names[part])):
            raise BadOption(f"--{idle[0]} has a meaning for --algorithm {part}, not for {algorithm}: leave it out")
    of_parts = {part: kind(**{k: v for k, v in values.items() if k in names[part]}) for part, kind in parts.items()}
    return TuneOptions(**own, **of_parts)
