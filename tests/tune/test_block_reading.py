"""What is read of shards for a block: every byte once, in few ranges, also from the Hub."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_hub
import pytest
import torch

from shardq import Limits, verify
from shardq.errors import DiskFull
from shardq.headers import read_checkpoint
from shardq.kernels import load
from shardq.plans import make_plan
from shardq.recipe import make_recipe
from shardq.run import quantize_to_folder
from shardq.sources import open_source
from shardq.sources.base import FileReader, Source
from shardq.sources.hub import open_hub
from shardq.sources.hub_errors import RetryPolicy

pytest.importorskip("transformers", reason="transformers builds the models: pip install shardq[tune]")

import tuned_models as models

from shardq.tune import passes, reading, waiting
from shardq.tune.blocks import BlockModel
from shardq.tune.disk import ID_BYTES, OTHER_BYTES, codes_bytes
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import build_options
from shardq.tune.reading import BlockReader
from shardq.tune.subjects import find_subjects


@pytest.fixture
def fake() -> ModuleType:
    """The fake Hub of the tests of sources."""
    return fake_hub


@pytest.fixture
def hub(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for word in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(word, raising=False)
    hub = fake.FakeHub()
    yield hub
    hub.close()


@dataclass
class Counting:
    """A source that counts the bytes of each shard that readers are asked for."""

    inner: Source
    asked: Counter[tuple[str, int]] = field(default_factory=Counter)
    ranges: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def open_file(self, name: str, on_bytes: Callable[[int], None]) -> FileReader:
        counting, inner = self, self.inner.open_file(name, on_bytes)

        class Reader:
            def read_into(self, begin: int, out: memoryview) -> None:
                counting.asked.update((name, at) for at in range(begin, begin + out.nbytes))
                counting.ranges += 1
                inner.read_into(begin, out)

            def close(self) -> None:
                inner.close()

        return Reader()


def expected_bytes(model: BlockModel, parameters: tuple[str, ...]) -> set[tuple[str, int]]:
    conversions = model.matched.conversions.find(parameters)
    refs = [model.matched.tensors[n] for c in conversions for n, _ in c.sources]
    return {(t.shard, at) for t in refs for at in range(t.begin, t.end)}


@pytest.mark.parametrize("shards", [1, 20])
def test_each_byte_of_a_block_is_read_once(shards: int, tmp_path: Path) -> None:
    folder = models.scatter(models.make_model("qwen3_moe", tmp_path / "model"), tmp_path / "scattered", shards)
    source: Any = Counting(open_source(str(folder)))
    with BlockModel.open(source) as model:
        for index in range(3):
            source.asked.clear()
            source.ranges = 0
            with model.block(index):
                pass
            wanted = expected_bytes(model, model.matched.blocks[index])
            assert source.asked == dict.fromkeys(wanted, 1)
            assert source.ranges <= (1 if shards == 1 else 40)


def test_a_block_comes_by_ranges_from_the_hub(hub: Any, fake: ModuleType, tmp_path: Path) -> None:
    folder = models.scatter(models.make_model("llama", tmp_path / "model"), tmp_path / "scattered", 20)
    repo = fake.Repo()
    repo.commit({p.name: p.read_bytes() for p in folder.iterdir()})
    hub.repos["org/model"] = repo
    source = open_hub("org/model", endpoint=hub.url, retry=RetryPolicy(timeout_s=5.0))
    ids = models.some_ids()
    with BlockModel.open(source, dtype=torch.float32, attention="eager") as model:
        batch = model.embed(ids)
        hub.log.clear()
        for index in range(3):
            with model.block(index) as module:
                model.prefetch(index + 1)
                batch = batch.moved(model.run(module, batch, index))
        sent = [s for s in hub.log if s.origin == "storage"]
        wanted = sum(len(expected_bytes(model, of)) for of in model.matched.blocks)
        logits = model.logits(batch.hidden)
    assert all(s.range and s.status == 206 for s in sent)
    assert sum(s.sent_bytes or 0 for s in sent) == wanted
    assert torch.equal(logits, models.whole_logits(folder, ids))


def _sent(hub: Any, shards: dict[str, str]) -> Counter[tuple[str, int]]:
    """How often the storage has sent each byte of the shards, whose hashes these are, beside what was read first of
    each, for its header, which is more than all of such a small one; the log begins anew."""
    found: Counter[tuple[str, int]] = Counter()
    for sha256, shard in shards.items():
        header, *others = [s for s in hub.log if s.path.startswith(f"/store/{sha256}")]
        assert header.begin == 0
        found.update((shard, at) for s in others for at in range(s.begin, s.begin + s.sent_bytes))
    hub.log.clear()
    return found


@pytest.mark.parametrize("algorithm", ["signround", "gptq"])
def test_a_tuning_reads_each_byte_of_a_block_once(algorithm: str, hub: Any, fake: ModuleType, tmp_path: Path) -> None:
    """Every layer lies in 20 shards, of which ranges come from the Hub; packing reads each weight once more."""
    folder = models.scatter(models.make_model("qwen3_moe", tmp_path / "model"), tmp_path / "scattered", 20)
    repo = fake.Repo()
    repo.commit({p.name: p.read_bytes() for p in folder.iterdir()})
    hub.repos["org/model"] = repo
    shards = {hashlib.sha256(p.read_bytes()).hexdigest(): p.name for p in folder.glob("*.safetensors")}
    with BlockModel.open(open_source(str(folder))) as model:
        layers = [expected_bytes(model, of) for of in model.matched.blocks]
        table = expected_bytes(model, model.matched.front)
    assert all(len({shard for shard, _ in layer}) == 20 for layer in layers)
    source = open_hub("org/model", endpoint=hub.url, retry=RetryPolicy(timeout_s=5.0))
    words = {"iters": 2} if algorithm == "signround" else {}
    options = build_options({"algorithm": algorithm, "dataset": "random", "nsamples": 2, "seqlen": 8, **words})
    recipe = make_recipe("W4A16G32", layout="auto_round")
    assert tune_blocks(source, recipe, options, Place(tmp_path / "codes")).left == ()
    sent = _sent(hub, shards)
    assert {sent[at] for layer in layers for at in layer} == {1}
    assert max(sent[at] for at in table) == 1
    tuned = make_recipe("W4A16G32", layout="auto_round", tuned=tmp_path / "codes")
    quantize_to_folder(source, tuned, tmp_path / "out", Limits(parallel=1, stream=True), False, lambda _: None)
    sent = _sent(hub, shards)
    assert {sent[at] for layer in layers for at in layer} == {1}
    assert verify(tmp_path / "out", deep=True, source=folder).problems == ()


@pytest.mark.parametrize("lacking", [0, 1])
def test_the_next_block_waits_in_a_file_while_one_is_tuned_if_the_disk_has_room(
    lacking: int, hub: Any, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    repo = fake.Repo()
    repo.commit({p.name: p.read_bytes() for p in folder.iterdir()})
    hub.repos["org/model"] = repo
    options = build_options({"algorithm": "rtn", "dataset": "random", "nsamples": 2, "seqlen": 8})
    recipe = make_recipe("W4A16G32", layout="auto_round")
    opened: list[BlockModel] = []
    there: list[int] = []
    begin, tune = BlockModel.prefetch_beside, passes.tune_block

    def beginning(model: BlockModel, index: int) -> None:
        opened.append(model)
        begin(model, index)

    def tuning(work: Any, *more: Any) -> Any:
        fetched = opened[-1]._fetched.get(work.index + 1)
        pieces = list(fetched.pieces()) if fetched else []
        for p in pieces:
            assert p.waiting is not None
            p.waiting.there.result()  # comes though nobody takes it
            assert p.content is None
        there.append(sum(p.end - p.begin for p in pieces))
        return tune(work, *more)

    monkeypatch.setattr(BlockModel, "prefetch_beside", beginning)
    monkeypatch.setattr(passes, "tune_block", tuning)
    with BlockModel.open(open_source(str(folder))) as model:
        codes = codes_bytes(find_subjects(model, make_plan(model.checkpoint, recipe)))
        block_bytes = len(expected_bytes(model, model.matched.blocks[1]))
    most = codes + options.data.nsamples * options.data.seqlen * ID_BYTES + OTHER_BYTES + block_bytes - lacking
    source = open_hub("org/model", endpoint=hub.url, retry=RetryPolicy(timeout_s=5.0))
    tune_blocks(source, recipe, options, Place(tmp_path / "far", max_disk_bytes=most))
    assert there == ([0, 0, 0] if lacking else [block_bytes, block_bytes, 0])
    monkeypatch.setattr(passes, "tune_block", tune)
    tune_blocks(open_source(str(folder)), recipe, options, Place(tmp_path / "near"))
    far, near = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.safetensors")} for n in ("far", "near"))
    assert far == near


def test_a_full_disk_leaves_no_room_to_wait_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise DiskFull("no space left")

    source: Any = Counting(open_source(str(models.make_model("llama", tmp_path / "model"))))
    source.local_path = lambda _: None
    with BlockModel.open(source) as model:
        model.let_wait(tmp_path, None)
        monkeypatch.setattr(waiting, "preallocate", fill)
        model.prefetch_beside(1)
        assert not model._fetched
        with model.block(1) as block:
            assert all(not p.is_meta for p in block.parameters())


def test_tensors_may_span_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    source = open_source(str(folder))
    tensors = [t for n, t in read_checkpoint(source).tensors.items() if ".layers.0." in n]
    monkeypatch.setattr(reading, "LOCAL_PIECE_BYTES", 1000)
    reader = BlockReader(source, load())
    fetched = reader.fetch(tensors, whole=False)
    state = models.load_whole(folder, torch.bfloat16).state_dict()
    for t in tensors:
        assert torch.equal(fetched.take(t.name, torch.bfloat16), state[t.name])
    assert all(p.content is None for of in fetched._pieces.values() for p in of)
    reader.close()
