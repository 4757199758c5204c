"""Hidden states in files, as they are and compressed: the same codes, bit for bit, and no more disk than was said."""

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

from shardq.api import quantize
from shardq.cli import _statistics
from shardq.cli._console import Console
from shardq.cli.group import commands
from shardq.errors import BadOption, BudgetTooSmall, DiskFull
from shardq.files.direct import BLOCK_BYTES
from shardq.limits import Limits, SpoolAs
from shardq.logs import LogConfig
from shardq.plans import make_plan
from shardq.quality import collect_statistics, evaluate
from shardq.recipe import make_recipe
from shardq.sources import open_source
from shardq.tune import spool
from shardq.tune.blocks import BlockModel
from shardq.tune.disk import OTHER_BYTES, codes_bytes
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.settings import AwqOptions, ComputeOptions, SignRoundOptions
from shardq.tune.spool import Spool, Spooling, Taken, plan_spool
from shardq.tune.subjects import find_subjects

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, TOKENS, WIDTH = 6, 128, 64
ONE_SAMPLE = TOKENS * WIDTH * 4
FILES: tuple[SpoolAs, ...] = ("plain", "zstd")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = models.make_model("llama", tmp_path_factory.mktemp("models") / "llama")
    return made


def _allocated(hidden: Spool) -> int:
    return os.fstat(hidden._file.fileno()).st_blocks * 512


def _noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """All bits of it are random: nothing gives way, and some of it is NaN or infinite."""
    made = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)
    return torch.from_numpy(made).view(dtype)


def _normal(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_bits_come_back(packed: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    kept = torch.cat([_normal((3, 40, 64), dtype), _noise((3, 40, 64), dtype)])
    kept[0, 0, :4] = torch.tensor([-0.0, float("inf"), -float("inf"), float("nan")])
    made = Spool(tmp_path, tuple(kept.shape), dtype, packed=packed)
    made[0:4] = kept[0:4]
    made[4:6] = kept[4:6]
    assert _same_bits(made[:], kept)
    assert _same_bits(made[[5, 0, 3, 0]], kept[[5, 0, 3, 0]])
    assert _same_bits(made.clone()[1:5], kept[1:5])
    turned = kept.flip(0)  # what was small becomes large, and the other way round
    for sample in range(6):
        made[sample : sample + 1] = turned[sample : sample + 1]
    assert _same_bits(made[:], turned)
    assert (len(made), made.shape, made.nbytes) == (6, (6, 40, 64), kept.nbytes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.75), (torch.float32, 0.88), (torch.float16, 0.9)])
def test_compressed_ones_take_less_of_the_disk(dtype: torch.dtype, most: float, tmp_path: Path) -> None:
    kept, taken = _normal((4, 512, 128), dtype), Taken(None)
    made = Spool(tmp_path, tuple(kept.shape), dtype, packed=True, taken=taken)
    made[:] = kept
    os.fsync(made._file.fileno())
    assert _allocated(made) <= taken.bytes + BLOCK_BYTES <= most * kept.nbytes
    expected, packed = plan_spool(4, kept.nbytes // 4, dtype, "zstd", None)
    assert packed
    assert taken.bytes <= expected < kept.nbytes


def test_what_does_not_give_way_is_stored_as_it_is(tmp_path: Path) -> None:
    kept, taken = _noise((2, 512, 128), torch.bfloat16), Taken(None)
    made = Spool(tmp_path, tuple(kept.shape), torch.bfloat16, packed=True, taken=taken)
    made[:] = kept
    assert made._sizes == [kept.nbytes // 2] * 2
    assert taken.bytes == kept.nbytes
    assert _same_bits(made[:], kept)


def test_a_disk_that_is_full_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Spool(tmp_path, (1, 512, 128), torch.float32, packed=True)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFull, match="hidden states"):
        made[:] = _normal((1, 512, 128), torch.float32)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull, match="hidden states"):
        Spool(tmp_path, (1, 512, 128), torch.float32, packed=False)


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each file that was made, whether it is compressed."""
    found: list[bool] = []
    real = Spool.__init__

    def note(self: Spool, *args: Any, packed: bool, **more: Any) -> None:
        found.append(packed)
        real(self, *args, packed=packed, **more)

    monkeypatch.setattr(Spool, "__init__", note)
    return found


def test_auto_compresses_where_there_is_no_room_else(
    tmp_path: Path, kinds: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, dtype = (4, 512, 128), torch.bfloat16
    sample = 512 * 128 * 2
    whole = 2 * 4 * sample

    def make(most: int | None, how: SpoolAs = "auto", free: int = 1 << 40) -> list[bool]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, free))
        kinds.clear()
        made = Spooling(tmp_path, sample, most, how).make(shape, dtype, 2)
        made[0:4] = _normal(shape, dtype)
        made.clone()
        return kinds

    assert make(None) == make(whole) == [False] * 2
    assert make(whole - 1) == make(None, free=whole - 1) == make(None, "zstd") == [True] * 2
    too_small: dict[SpoolAs, int] = {"auto": whole // 2, "zstd": whole // 2, "plain": whole - 1}
    for how, most in too_small.items():
        with pytest.raises(BudgetTooSmall, match=f"--max-disk leaves {most} bytes"):
            make(most, how)
        with pytest.raises(DiskFull, match=f"has {most} free"):
            make(None, how, most)
    with pytest.raises(BudgetTooSmall, match="one sample's hidden states take"):
        Spooling(tmp_path, sample - 1).make(shape, dtype, 2)
    assert isinstance(Spooling(tmp_path, whole).make(shape, dtype, 2), torch.Tensor)
    made = Spooling(tmp_path, sample, whole - 1).make(shape, dtype, 2)
    made[0:4] = _noise(shape, dtype)
    with pytest.raises(BudgetTooSmall, match=f"of {whole - 1} that"):  # what was expected to give way does not
        made.clone()
    assert not list(tmp_path.iterdir())


def _options(algorithm: Any, how: SpoolAs = "auto", **more: Any) -> TuneOptions:
    return TuneOptions(
        algorithm=algorithm, data=DataOptions("random", nsamples=SAMPLES, seqlen=TOKENS), dtype="float32",
        compute=ComputeOptions(spool=how), signround=SignRoundOptions(iters=3, batch_size=2),
        awq=AwqOptions(awq_n_grid=3, awq_seqlen=32), **more,
    )  # fmt: skip


def _tune(folder: Path, out: Path, options: TuneOptions, *limits: int | None, head: bool = True) -> dict[str, bytes]:
    recipe = make_recipe("W3A16G32", layout="fake", quant_lm_head=head)
    tune_blocks(open_source(str(folder)), recipe, options, Place(out, *limits))
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.mark.parametrize(
    ("algorithm", "quanted", "chains"),
    [
        ("signround", True, 2), ("signround", False, 2), ("gptq", True, 1), ("gptq", False, 2), ("awq", True, 1),
        ("opt-rtn", True, 1),
    ],
)  # fmt: skip
def test_codes_are_the_same_wherever_hidden_states_lie(
    algorithm: str, quanted: bool, chains: int, folder: Path, tmp_path: Path, kinds: list[bool]
) -> None:
    in_memory = _tune(folder, tmp_path / "memory", _options(algorithm, enable_quanted_input=quanted))
    assert not kinds
    for how in FILES:
        kinds.clear()
        options = _options(algorithm, how, enable_quanted_input=quanted)
        assert _tune(folder, tmp_path / how, options, ONE_SAMPLE) == in_memory
        assert kinds == [how == "zstd"] * chains


def _read_once(kinds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Spool.__getitem__

    def note(self: Spool, samples: Any) -> torch.Tensor:
        found = real(self, samples)
        kinds.append(len(found))
        return found

    monkeypatch.setattr(Spool, "__getitem__", note)


@pytest.mark.parametrize("algorithm", ["signround", "gptq", "awq"])
def test_no_more_samples_are_in_memory_than_are_at_hand(
    algorithm: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    _read_once(read, monkeypatch)
    _tune(folder, tmp_path / "out", _options(algorithm, "zstd"), ONE_SAMPLE)
    assert max(read) == (2 if algorithm == "signround" else 1)  # its batch


def test_a_small_disk_has_them_compressed(folder: Path, tmp_path: Path, kinds: list[bool]) -> None:
    """Also after a run that could not go on."""
    options = _options("gptq")
    with BlockModel.open(open_source(str(folder)), dtype=torch.float32) as model:
        codes = codes_bytes(find_subjects(model, make_plan(model.checkpoint, make_recipe("W3A16G32", layout="fake"))))
    base, whole = codes + SAMPLES * TOKENS * 8 + OTHER_BYTES, SAMPLES * ONE_SAMPLE
    least, _ = plan_spool(SAMPLES, ONE_SAMPLE, torch.float32, "zstd", None)
    assert least < whole
    with pytest.raises(BudgetTooSmall, match=f"{least} of hidden states .* {whole} as they are"):
        _tune(folder, tmp_path / "out", options, ONE_SAMPLE, base + least - 1, head=False)
    assert not (tmp_path / "out").exists()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spool, "SHARE", 0.0)  # too much is hoped for
        with pytest.raises(BudgetTooSmall, match="hidden states of some samples take"):
            _tune(folder, tmp_path / "out", options, ONE_SAMPLE, base + whole * 3 // 4, head=False)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"ids.npy", "lock", "identity.json"}
    kinds.clear()
    made = _tune(folder, tmp_path / "out", options, ONE_SAMPLE, base + least, head=False)
    assert kinds == [True]
    assert made == _tune(folder, tmp_path / "memory", options, head=False)


def test_statistics_are_the_same(folder: Path, tmp_path: Path, kinds: list[bool]) -> None:
    def collect(how: SpoolAs, *limits: int | None) -> Any:
        ram, disk = limits
        return collect_statistics(
            folder, tokens=SAMPLES * TOKENS, seqlen=TOKENS, folder=tmp_path, max_ram_bytes=ram, max_disk_bytes=disk,
            spool=how,
        ).modules  # fmt: skip

    in_memory = collect("auto", None, None)
    cases: dict[SpoolAs, tuple[int | None, bool]]
    cases = {"plain": (None, False), "zstd": (None, True), "auto": (SAMPLES * ONE_SAMPLE - 1, True)}
    for how, (disk, packed) in cases.items():
        kinds.clear()
        found = collect(how, ONE_SAMPLE, disk)
        assert kinds == [packed]
        assert all(np.array_equal(found[n].squares, own.squares) for n, own in in_memory.items())
    with pytest.raises(BudgetTooSmall, match="--max-disk leaves 1000 bytes"):
        collect("auto", ONE_SAMPLE, 1000)
    with pytest.raises(BadOption, match="--spool 'best': expected one of auto, plain, zstd"):
        collect("best", None, None)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="--spool"):
        ComputeOptions(spool="best")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def result(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something to judge, made of the model."""
    out = tmp_path_factory.mktemp("results") / "out"
    quantize(folder, make_recipe("W3A16G32", layout="fake"), output_dir=out, limits=Limits(parallel=1))
    return out


TEXT = " ".join(str(i * i % 89) for i in range(SAMPLES * TOKENS))


def test_evaluations_are_the_same(
    folder: Path, result: Path, tmp_path: Path, kinds: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models share the limits, and a window of each is in memory."""
    whole = 2 * SAMPLES * ONE_SAMPLE

    def judge(how: SpoolAs, *limits: int | None, reference: Path | None = folder) -> Any:
        ram, disk = limits
        return evaluate(
            result, TEXT, reference=reference, windows=SAMPLES, seqlen=TOKENS, dtype="float32", folder=tmp_path,
            max_ram_bytes=ram, max_disk_bytes=disk, spool=how,
        )  # fmt: skip

    in_memory, alone = judge("auto", whole, None), judge("auto", None, None, reference=None)
    assert not kinds
    assert in_memory.distance.kl > 0
    read: list[int] = []
    _read_once(read, monkeypatch)
    cases: tuple[tuple[SpoolAs, int | None, bool], ...]
    cases = ("plain", whole, False), ("zstd", None, True), ("auto", whole, False), ("auto", whole - 1, True)
    for how, disk, packed in cases:
        kinds.clear()
        assert judge(how, whole - 1, disk) == in_memory
        assert kinds == [packed] * 2
    kinds.clear()
    assert judge("auto", ONE_SAMPLE, whole // 2, reference=None) == alone
    assert kinds == [False]
    assert max(read) == 1
    with pytest.raises(BudgetTooSmall, match=f"--max-disk leaves {whole - 1} bytes"):
        judge("plain", ONE_SAMPLE, whole - 1)
    with pytest.raises(BadOption, match="--spool 'best'"):
        judge("best", None, None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[CliRunner]:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        yield CliRunner()


def test_command_of_statistics(folder: Path, tmp_path: Path, runner: CliRunner, kinds: list[bool]) -> None:
    words = ["stats", str(folder), "--tokens", str(SAMPLES * TOKENS), "--seqlen", str(TOKENS), "-q", "-o"]
    limits = ["--max-ram", str(ONE_SAMPLE), "--max-disk", "1M", "--spool", "zstd"]
    for name, more in (("a", []), ("b", limits)):
        result = runner.invoke(commands, [*words, f"{name}.importance.safetensors", *more])
        assert result.exit_code == 0, result.output
    assert kinds == [True]
    a, b = ((tmp_path / f"{name}.importance.safetensors").read_bytes() for name in "ab")
    assert a == b
    result = runner.invoke(commands, [*words, "c.safetensors", *limits[:2], "--max-disk", "1000"])
    assert result.exit_code == BudgetTooSmall.exit_code
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.importance.safetensors" for name in "ab"}


def test_command_of_evaluation(
    folder: Path, result: Path, tmp_path: Path, runner: CliRunner, kinds: list[bool]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["eval", str(result), "--ref", str(folder), "--text", "text.txt", "--windows", str(SAMPLES), "--seqlen"]
    words += [str(TOKENS), "--dtype", "float32", "--json", "-q"]
    limits = ["--max-ram", str(ONE_SAMPLE), "--spool", "zstd", "--max-disk"]
    in_memory, filed = runner.invoke(commands, words), runner.invoke(commands, [*words, *limits, "1M"])
    assert (in_memory.exit_code, filed.exit_code) == (0, 0), filed.output
    assert kinds == [True] * 2
    assert in_memory.stdout == filed.stdout
    refused = runner.invoke(commands, [*words, *limits, "1000"])
    assert refused.exit_code == BudgetTooSmall.exit_code
    assert {p.name for p in tmp_path.iterdir()} == {"text.txt"}


def test_calibration_keeps_to_the_limits_of_the_run(
    folder: Path, tmp_path: Path, runner: CliRunner, kinds: list[bool]
) -> None:
    """16 samples of 512 tokens, with their statistics made here and by the command, which has a process for them."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "\n".join(json.dumps({"text": " ".join(str(i * j % 89) for i in range(512))}) for j in range(1, 17))
    )
    made = [tmp_path / name for name in ("a.importance.safetensors", "b.importance.safetensors")]
    console = Console(as_json=False, verbose=False, quiet=True, log=LogConfig("WARNING", None))
    for path, limits in zip(made, (Limits(), Limits(max_ram_bytes=512 * WIDTH * 4)), strict=True):
        told = _statistics._write(console, str(folder), None, str(texts), None, path, limits, "zstd")
        assert "from 8192 tokens" in told
    assert kinds == [True]
    assert made[0].read_bytes() == made[1].read_bytes()
    words = ["quantize", str(folder), "--group-size", "32", "-o", "c", "--max-ram", "150k", "--max-disk", "1000"]
    refused = runner.invoke(commands, [*words, "--calibrate", str(texts), "--spool", "zstd"])
    assert refused.exit_code == BudgetTooSmall.exit_code
    assert "--max-disk leaves 1000 bytes" in refused.stderr
    assert runner.invoke(commands, [*words, "--spool", "zstd"]).exit_code == BadOption.exit_code
    assert {p.name for p in tmp_path.iterdir()} == {"texts.jsonl", *(path.name for path in made)}
