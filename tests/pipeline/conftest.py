"""Small checkpoints on disk, and what a folder holds, for the tests of whole runs."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_hub
import fake_hub_write
import measures as measures_of_runs
import numpy as np
import pytest

import shardq
from shardq import Limits, make_recipe
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.progress import Report
from shardq.run import quantize_to_folder
from shardq.sources.base import Source
from shardq.sources.hub import open_hub
from shardq.sources.hub_errors import RetryPolicy

INDEX = "model.safetensors.index.json"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 64,
}

HERE = Path(__file__).parent
LIMIT_S = 60.0  # for anything that takes a second on an idle machine

MakeCheckpoint = Callable[..., Path]


def write_checkpoint(
    folder: Path,
    hidden: int = 128,
    layers: int = 3,
    dtypes: Sequence[str] = ("BF16",),
    mlp: bool = True,
    attention: str = "qkvo",
) -> Path:
    """A Llama of random weights with a shard for each layer, the dtypes taking turns; the same bytes each time."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    shards: list[list[TensorSpec]] = []
    for layer in range(layers):
        dtype = dtypes[layer % len(dtypes)]
        prefix = f"model.layers.{layer}"
        parts = [(f"self_attn.{p}_proj", (hidden, hidden)) for p in attention]
        if mlp:
            parts += [("mlp.gate_proj", (3 * hidden, hidden)), ("mlp.up_proj", (3 * hidden, hidden))]
            parts += [("mlp.down_proj", (hidden, 3 * hidden))]
        specs = [TensorSpec(f"{prefix}.{name}.weight", dtype, shape) for name, shape in parts]
        shards.append([*specs, TensorSpec(f"{prefix}.input_layernorm.weight", dtype, (hidden,))])
    shards[0] += [TensorSpec("model.embed_tokens.weight", "BF16", (64, hidden))]
    shards[-1] += [TensorSpec("lm_head.weight", "BF16", (64, hidden))]
    shards[-1] += [TensorSpec("model.norm.weight", "F32", (hidden,))]
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{layers:05d}.safetensors"
        weight_map |= {s.name: name for s in specs}
        (folder / name).write_bytes(_shard(specs, rng))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {**CONFIG, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _shard(specs: Sequence[TensorSpec], rng: np.random.Generator, uneven: bool = False) -> bytes:
    plan = plan_file(specs)
    data = bytearray(plan.size_bytes)
    data[: len(plan.header)] = plan.header
    for s in specs:
        begin, end = plan.offsets[s.name]
        data[begin:end] = _values(s, rng, 1 + zlib.crc32(s.name.encode()) % 61 / 61 if uneven else 1)
    return bytes(data)


def _values(spec: TensorSpec, rng: np.random.Generator, factor: float) -> bytes:
    single = rng.standard_normal(spec.shape, np.float32) * np.float32(0.02 * factor)
    if spec.dtype == "F32":
        return single.tobytes()
    if spec.dtype == "F16":
        return single.astype(np.float16).tobytes()
    return (single.view(np.uint32) >> 16).astype(np.uint16).tobytes()


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """make_checkpoint(hidden=, layers=, mlp=, attention=): a new checkpoint folder, free to be damaged."""
    made: list[Path] = []

    def make(hidden: int = 128, layers: int = 3, mlp: bool = True, attention: str = "qkvo") -> Path:
        folder = tmp_path / f"source{len(made)}" / "model"
        made.append(write_checkpoint(folder, hidden, layers, mlp=mlp, attention=attention))
        return made[-1]

    return make


def moe_tensors(hidden: int = 128) -> list[TensorSpec]:
    """A Qwen3-MoE: a dense layer with matrices of several short slabs, and a layer of four experts."""
    matrices = {"model.embed_tokens": (64, hidden), "lm_head": (64, hidden)}
    for layer in (0, 1):
        rows = {"q": hidden, "k": hidden // 2, "v": hidden // 2}
        matrices |= {f"model.layers.{layer}.self_attn.{p}_proj": (n, hidden) for p, n in rows.items()}
        matrices[f"model.layers.{layer}.self_attn.o_proj"] = (hidden, hidden)
    parts = {"model.layers.0.mlp": 8 * hidden} | {f"model.layers.1.mlp.experts.{e}": hidden for e in range(4)}
    for parent, inner in parts.items():
        matrices |= {f"{parent}.{p}_proj": (inner, hidden) for p in ("gate", "up")}
        matrices[f"{parent}.down_proj"] = (hidden, inner)
    matrices["model.layers.1.mlp.gate"] = (4, hidden)
    norms = ["model.norm", *(f"model.layers.{n}.input_layernorm" for n in (0, 1))]
    named = [*matrices.items(), *((n, (hidden,)) for n in norms)]
    return [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in named]


MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False,
    "mlp_only_layers": [0],
}  # fmt: skip


@pytest.fixture(scope="session")
def write_moe() -> Callable[..., Path]:
    """write_moe(folder, shard_of, hidden=): the Qwen3-MoE, each tensor in the shard of the number that
    `shard_of(place, name)` gives, from 1."""

    def write(folder: Path, shard_of: Callable[[int, str], int], hidden: int = 128) -> Path:
        folder.mkdir(parents=True)
        rng = np.random.default_rng(3)
        shards: dict[int, list[TensorSpec]] = {}
        for place, spec in enumerate(moe_tensors(hidden)):
            shards.setdefault(shard_of(place, spec.name), []).append(spec)
        weight_map: dict[str, str] = {}
        for number, specs in sorted(shards.items()):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {s.name: name for s in specs}
            (folder / name).write_bytes(_shard(specs, rng, uneven=True))
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        config = {**MOE, "hidden_size": hidden, "intermediate_size": 8 * hidden, "moe_intermediate_size": hidden}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        return folder

    return write


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of BF16, FP16 and FP32; read only."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", dtypes=("BF16", "F16", "F32"))


@pytest.fixture
def one() -> Limits:
    """One worker, in this process."""
    return Limits(parallel=1)


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """contents(folder): every file below it, with its hash."""

    def read(folder: Path) -> dict[str, str]:
        return {
            p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*")
            if p.is_file()
        }

    return read


@pytest.fixture(scope="session")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, contents: Any) -> dict[str, str]:
    """The contents of what `checkpoint` becomes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    read: dict[str, str] = contents(out)
    return read


class Run(subprocess.Popen[str]):
    """`shardq quantize` in a process group of its own."""

    def kill_group(self) -> None:
        """kill -9 for the run, its fork server and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """True once it holds, False if the process ends before."""
        deadline_s = time.monotonic() + LIMIT_S
        while not condition():
            if self.poll() is not None:
                return False
            assert time.monotonic() < deadline_s, "nothing happens"
            time.sleep(0.002)
        return True


@pytest.fixture
def begin() -> Iterator[Callable[..., Run]]:
    """begin(source, out, slow_s, *options, before=()): a Run whose tasks take `slow_s` longer.

    `before` are words before the command."""
    begun: list[Run] = []

    def run(source: Path, out: Path, slow_s: float, *options: str, before: Sequence[str] = ()) -> Run:
        words = ["quantize", str(source), "-o", str(out), "--parallel", "2", *options]
        begun.append(
            Run(
                [*before, sys.executable, "-P", str(HERE / "slow_cli.py"), *words],
                env={**os.environ, "SLOW_S": str(slow_s)},
                start_new_session=True,
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
        return begun[-1]

    yield run
    for process in begun:
        with process:
            process.kill_group()


@pytest.fixture
def journal_lines() -> Callable[[Path, str], int]:
    """journal_lines(out, event): how often an event is in the journal of a run."""

    def count(out: Path, event: str) -> int:
        try:
            return (out / ".shardq" / "journal.jsonl").read_text().count(f'"event":"{event}"')
        except FileNotFoundError:
            return 0

    return count


@pytest.fixture(scope="session")
def fake_hub_module() -> ModuleType:
    """tests/sources/fake_hub.py."""
    return fake_hub


@pytest.fixture
def hub(fake_hub_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub on loopback, and an empty cache, no token and no proxy for its client."""
    from huggingface_hub import constants

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub = fake_hub_module.FakeHub()
    yield hub
    hub.close()


class HubModel:
    """A Hub with one repo; its clients have a token and little patience."""

    repo = "org/model"

    def __init__(self, hub: Any, fake: ModuleType, files: Mapping[str, bytes]) -> None:
        self.hub, self._fake, self.files = hub, fake, dict(files)
        self.names = {hashlib.sha256(data).hexdigest(): name for name, data in files.items()}
        self.shards = sorted(name for name in files if name.endswith(".safetensors"))
        hub.repos[self.repo] = fake.Repo()
        hub.repos[self.repo].commit(files)

    def open(self, revision: str | None = None, timeout_s: float = 0.4) -> Source:
        """The repo as a source."""
        quick = RetryPolicy(failures=4, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=timeout_s)
        return open_hub(self.repo, revision, endpoint=self.hub.url, retry=quick)

    def run(self, source: Source, out: Path, mode: str, report: Report = lambda _: None, parallel: int = 1) -> None:
        """Quantize; `mode` is file or stream."""
        limits = Limits(parallel=parallel, stream=mode == "stream")
        quantize_to_folder(source, make_recipe("W4A16"), out, limits, False, report)

    def environment(self, home: Path, name: str, value: int) -> dict[str, str]:
        """Of a command line that knows this Hub."""
        library = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(home / "home"), "NO_PROXY": "127.0.0.1"}
        return {**os.environ, **library, name: str(value)}

    def kill_when(self, condition: Callable[[], bool], words: Sequence[str], home: Path, span_bytes: int) -> None:
        """Run `shardq` with `words` and spans of so many bytes, and kill -9 it once the condition holds."""
        process = Run(
            [sys.executable, "-P", str(HERE / "short_span_cli.py"), *words],
            env=self.environment(home, "SPAN_BYTES", span_bytes),
            cwd=home,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert process.wait_for(condition)
        finally:
            process.kill()
            process.wait()

    def add_fault(self, kind: str, path: str, **settings: Any) -> Any:
        """As the fake Hub's Fault."""
        self.hub.faults.append(self._fake.Fault(kind, path, **settings))
        return self.hub.faults[-1]

    def store(self, shard: str) -> str:
        """Where the storage has a shard."""
        return f"/store/{next(sha256 for sha256, name in self.names.items() if name == shard)}"

    def forget(self) -> None:
        """Begin to count anew, after a look at who got the token: the Hub, and never the storage."""
        log, self.hub.log = self.hub.log, []
        assert {s.authorization for s in log if "/resolve/" in s.path} <= {f"Bearer {self._fake.TOKEN}"}
        assert {s.authorization for s in log if s.origin == "storage"} <= {None}

    def asked(self, shard: str) -> list[Any]:
        """What the storage was asked for of a shard, after the first request, which is for the header."""
        found: list[Any] = self.hub.seen(self.store(shard))
        return found[1:]

    def sent(self) -> dict[str, int]:
        """Bytes of each shard that the storage has sent."""
        return {
            shard: sum(s.sent_bytes for s in self.hub.seen(self.store(shard)) if s.status in {200, 206})
            for shard in self.shards
        }


@pytest.fixture
def make_model(
    hub: Any, fake_hub_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Path], HubModel]]:
    """make_model(folder): a HubModel of a checkpoint folder."""
    made: list[HubModel] = []

    def make(folder: Path) -> HubModel:
        made.append(HubModel(hub, fake_hub_module, {p.name: p.read_bytes() for p in folder.iterdir()}))
        return made[-1]

    monkeypatch.setenv("HF_TOKEN", fake_hub_module.TOKEN)
    yield make
    for model in made:
        model.forget()


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a span and of a slab, so few that small shards have many."""
    span_bytes = 96 << 10
    for name in ("shardq.spans.SPAN_BYTES", "shardq.cut.SPAN_BYTES", "shardq.cut.SLAB_BYTES"):
        monkeypatch.setattr(name, span_bytes)
    for name in ("shardq.spans.BOND_BYTES", "shardq.onepass.BOND_BYTES"):
        monkeypatch.setattr(name, 2 * span_bytes)
    return span_bytes


@dataclass(frozen=True)
class Usual:
    """Undisturbed runs."""

    contents: dict[str, str]
    sent: dict[str, dict[str, int]]  # mode -> shard -> bytes that the storage sent


@pytest.fixture
def model(make_model: Callable[[Path], HubModel], checkpoint: Path, short_spans: int) -> HubModel:
    """`checkpoint` on a Hub, in many spans."""
    return make_model(checkpoint)


@pytest.fixture
def source(model: HubModel) -> Source:
    """Its main branch."""
    return model.open()


@pytest.fixture
def usual(model: HubModel, known: list[Usual], tmp_path: Path, contents: Any) -> Usual:
    """Taken once, by the first test that asks."""
    if not known:
        sent = {}
        for mode in ("file", "stream"):
            model.forget()
            model.run(model.open(), tmp_path / mode, mode)
            sent[mode] = model.sent()
        assert contents(tmp_path / "file") == contents(tmp_path / "stream")
        known.append(Usual(contents(tmp_path / "file"), sent))
        model.forget()
    return known[0]


@pytest.fixture(scope="session")
def known() -> list[Usual]:
    """For `usual`: what it has taken."""
    return []


@pytest.fixture(scope="session")
def measures() -> ModuleType:
    """measures.py."""
    return measures_of_runs


@pytest.fixture(scope="session")
def writable_hub_module() -> ModuleType:
    """tests/sources/fake_hub_write.py."""
    return fake_hub_write


@pytest.fixture
def push_hub(writable_hub_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub on loopback that takes uploads; this process and those that it starts have a token for it, no proxy, an
    empty cache."""
    from huggingface_hub import constants

    hub = writable_hub_module.WritableHub()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    home = tmp_path / "hub_home"
    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": writable_hub_module.TOKEN,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # the library read its settings when it was imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
    hub.close()


@pytest.fixture
def host_model(push_hub: Any, writable_hub_module: ModuleType) -> Callable[[Path], str]:
    """host_model(folder): the folder as a repo on `push_hub`; returns its name."""

    def host(folder: Path) -> str:
        repo = writable_hub_module.Repo()
        repo.commit({p.name: p.read_bytes() for p in folder.iterdir()})
        push_hub.repos["org/model"] = repo
        return "org/model"

    return host


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """written(case): its checkpoint, not to be changed."""
    import encoded_sources  # many tests have no use for it

    folder = tmp_path_factory.mktemp("encoded")

    def get(case: str) -> Path:
        if not (folder / case).exists():
            encoded_sources.write_source(encoded_sources.CASES[case], folder / case)
        return folder / case

    return get
