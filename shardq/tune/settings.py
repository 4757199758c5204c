"""What single algorithms and the machine are told: plain values, as the process that asks for a tuning has no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from shardq.errors import BadOption
from shardq.limits import SpoolAs

if TYPE_CHECKING:
    import torch

Order = Literal["static", "none"]  # columns by their diagonal of H, the largest first; from left to right
Scales = Literal["search", "rtn"]
Duo = Literal["true", "false", "both"]
DUO: Final[tuple[Duo, ...]] = ("true", "false", "both")
Loss = Literal["output", "inputs"]
LOSSES: Final[tuple[Loss, ...]] = ("output", "inputs")
AwqCodes = Literal["nearest", "searched"]
AWQ_CODES: Final[tuple[AwqCodes, ...]] = ("nearest", "searched")
LONG_RUN: Final = 1000  # iterations from which codes of 3 bits and fewer take steps twice as large
FEW_BITS: Final = 3
AUTO: Final = "auto"
CPU: Final = "cpu"
CUDA: Final = "cuda"


@dataclass(frozen=True, slots=True)
class SignRoundOptions:
    """Under auto-round's names."""

    iters: int = 200
    nblocks: int = 1  # blocks that are learned together, by what the last of them gives
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    lr: float | None = None  # None: 1 / iters
    minmax_lr: float | None = None  # None: lr
    enable_minmax_tuning: bool = True
    not_use_best_mse: bool = False
    dynamic_max_gap: int = -1  # steps without a better one, after which a block is done; -1: never
    momentum: float = 0.0  # of the gradients whose signs are taken
    enable_adam: bool = False  # AdamW instead of signs
    enable_norm_bias_tuning: bool = False  # learn weights of norms, and biases, too
    enable_torch_compile: bool = False  # compile what is computed of rounding in each step

    def __post_init__(self) -> None:
        """Raises BadOption."""
        if self.momentum < 0 or (self.momentum and self.enable_adam):
            raise BadOption(f"--momentum {self.momentum}: expected 0 or more, and none with Adam, which has its own")
        if min(self.iters, self.batch_size, self.gradient_accumulate_steps, self.nblocks) < 1:
            raise BadOption("SignRound needs at least one of iters, batch_size, gradient_accumulate_steps and nblocks")

    def rates(self, bits: int) -> tuple[float, float]:
        """First steps of V and of factors."""
        lr = self.lr or (2.0 if self.iters >= LONG_RUN and bits <= FEW_BITS else 1.0) / self.iters
        return lr, self.minmax_lr or lr


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """As of `quantize_gptq`."""

    damping: float = 0.01
    shrinkage: float = 0.4
    order: Order = "static"
    block: int = 128
    scales: Scales = "search"

    def __post_init__(self) -> None:
        """Raises BadOption."""
        if not 0 <= self.damping <= 1 or not 0 <= self.shrinkage <= 1:
            raise BadOption(f"--damping {self.damping}, --shrinkage {self.shrinkage}: expected 0 to 1 of each")


@dataclass(frozen=True, slots=True)
class AwqOptions:
    """Under auto-round's names; what it does itself are "true" and "output"."""

    awq_n_grid: int = 20
    awq_duo_scaling: Duo = "false"
    awq_loss: Loss = "inputs"  # of weights, as squares of inputs weigh them; output: of the module that has them
    awq_codes: AwqCodes | None = None  # under which scales are judged; searched: opt-rtn's. None: those that follow
    awq_seqlen: int = 512  # tokens of a sample that the search sees; 0: all
    awq_apply_clip: bool = False
    awq_clip_as_init: bool = False  # SignRound begins with the clipped ranges, and weights stay as they are

    def __post_init__(self) -> None:
        """Raises BadOption."""
        if self.awq_n_grid < 1:
            raise BadOption(f"--awq-n-grid {self.awq_n_grid}: expected at least 1")
        if self.awq_duo_scaling not in DUO:
            raise BadOption(f"--awq-duo-scaling {self.awq_duo_scaling!r}: expected one of {', '.join(DUO)}")
        if self.awq_loss not in LOSSES:
            raise BadOption(f"--awq-loss {self.awq_loss!r}: expected one of {', '.join(LOSSES)}")
        if self.awq_codes not in (None, *AWQ_CODES):
            raise BadOption(f"--awq-codes {self.awq_codes!r}: expected one of {', '.join(AWQ_CODES)}")
        if self.awq_clip_as_init and not self.awq_apply_clip:
            raise BadOption("--awq-clip-as-init says what is done with clipped ranges: give --awq-apply-clip, too")

    @property
    def candidates(self) -> tuple[tuple[float, bool], ...]:
        """Powers of the inputs, and whether weights count; (0, False) scales nothing."""
        if self.awq_duo_scaling == "both":
            n = max(self.awq_n_grid // 2, 2)
            return tuple((i / (n - 1), duo) for i in range(n) for duo in (False, True))
        if self.awq_duo_scaling == "false":
            n = max(self.awq_n_grid, 2)
            return tuple((i / (n - 1), False) for i in range(n))
        n = max(self.awq_n_grid, 3)
        return ((0.0, False), *((i / (n - 2), True) for i in range(n - 1)))


@dataclass(frozen=True, slots=True)
class ComputeOptions:
    """Under auto-round's names."""

    device: str = "cpu"  # auto, cpu, cuda, cuda:N or N, or several with commas between them
    low_gpu_mem_usage: bool = False  # hidden states stay in main memory, and go to the device batch by batch
    enable_deterministic_algorithms: bool = False  # torch refuses what it cannot compute twice alike
    spool: SpoolAs = "auto"

    def __post_init__(self) -> None:
        """Raises BadOption."""
        check_spool(self.spool)

    @property
    def is_auto(self) -> bool:
        """True if a block takes as many devices as it needs, and not all that are named."""
        return self.device.strip().lower() == AUTO

    def place(self) -> "torch.device":
        """The first of `places`."""
        return self.places()[0]

    def places(self) -> "tuple[torch.device, ...]":
        """All devices. Raises BadOption for one that is not there, that is named twice, or that is no GPU beside
        others."""
        import torch

        words = [f"{CUDA}:{w}" if w.isdecimal() else w for w in self.device.lower().replace(" ", "").split(",")]
        if words == [AUTO]:
            words = [f"{CUDA}:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [CPU]
        if words == [CPU]:
            return (torch.device(CPU),)
        kinds, numbers = zip(*(w.partition(":")[::2] for w in words), strict=True)
        if set(kinds) != {CUDA} or not all(n.isdecimal() or w == CUDA for n, w in zip(numbers, words, strict=True)):
            raise BadOption(f"--device {self.device}: expected auto, cpu, cuda, cuda:N or N, or several GPUs, as 0,1")
        found = tuple(torch.device(CUDA, int(n or 0)) for n in numbers)
        if len(set(found)) < len(found):
            raise BadOption(f"--device {self.device}: names a device twice")
        if max(d.index for d in found) >= torch.cuda.device_count():
            raise BadOption(
                f"--device {self.device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
                "take --device cpu, or a torch that is built for CUDA"
            )
        return found


def check_spool(how: str) -> None:
    """Raises BadOption."""
    if how not in get_args(SpoolAs):
        raise BadOption(f"--spool {how!r}: expected one of {', '.join(get_args(SpoolAs))}")
