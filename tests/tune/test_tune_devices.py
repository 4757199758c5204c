"""Where blocks are computed. There is no GPU here: a pretended one refuses what CUDA would refuse, and the codes are
those of the CPU."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="block mode needs transformers")

import pretended_device as pretended
import tuned_models as models

from shardq.errors import BadOption
from shardq.recipe import make_recipe
from shardq.sources import open_source
from shardq.tune.activations import Batch, Call, Own, call_block
from shardq.tune.devices import deterministic
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import DataOptions, TuneOptions, build_options
from shardq.tune.settings import AwqOptions, ComputeOptions, SignRoundOptions

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, TOKENS, WIDTH = 4, 12, 64
META = torch.device("meta")
FEW, SCALES = SignRoundOptions(iters=3, batch_size=2), AwqOptions()
EXPERTS = {"qwen3_moe": 8, "gpt_oss": 4}
CUT = {"qwen3_moe": (64, 32), "gpt_oss": (96, 64)}  # their second matrices


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: models.make_model(name, base / name) for name in ("llama", "qwen3_moe", "gpt_oss", "llama4")}


def _tune(
    folder: Path,
    out: Path,
    algorithm: Any,
    most: int | None = None,
    scheme: str = "W3A16G32",
    signround: SignRoundOptions = FEW,
    awq: AwqOptions = SCALES,
    **compute: Any,
) -> None:
    options = TuneOptions(
        algorithm=algorithm,
        data=DataOptions("random", nsamples=SAMPLES, seqlen=TOKENS, seed=1),
        compute=ComputeOptions(**compute),
        signround=signround,
        awq=awq,
    )
    layout = "compressed-tensors" if "STATIC" in scheme else "fake"
    recipe = make_recipe(scheme, layout=layout, quant_lm_head=layout == "fake")
    tune_blocks(open_source(str(folder)), recipe, options, Place(out, most))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))  # transformers asks, for its experts


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("llama", "signround"),
        ("llama", "gptq"),
        ("qwen3_moe", "gptq"),
        ("gpt_oss", "opt-rtn"),
        ("gpt_oss", "signround"),
    ],
)
def test_a_block_its_inputs_and_its_loss_are_on_the_device(
    name: str, algorithm: str, low: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    _tune(folders[name], tmp_path / "here", algorithm)
    with pretended.PretendedDevice() as device:
        _tune(folders[name], tmp_path / "there", algorithm, device="cuda:0", low_gpu_mem_usage=low)
    for path in (tmp_path / "here").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name
    to_device = [shape for place, shape in device.moved if place == pretended.THERE]
    assert (96, WIDTH) in to_device  # the head's weight
    assert ((SAMPLES, TOKENS, WIDTH) in to_device) is not low  # all hidden states at once


@pytest.fixture
def gpus(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Two of them, of so many bytes each."""

    def have(size_bytes: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=size_bytes))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    have(1 << 30)
    return have


def _same(one: Path, other: Path) -> bool:
    return all(p.read_bytes() == (other / p.name).read_bytes() for p in one.glob("*.safetensors"))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("name", "algorithm", "scheme"),
    [
        ("llama", "signround", "W3A16G32"),
        ("llama", "gptq", "W3A16G32"),
        ("llama", "awq,rtn", "W3A16G32"),
        ("qwen3_moe", "signround", "FP8_STATIC"),
        ("qwen3_moe", "gptq", "W3A16G32"),
        ("qwen3_moe", "opt-rtn", "W3A16G32"),
        ("gpt_oss", "signround", "W3A16G32"),
        ("llama4", "opt-rtn", "W3A16G32"),
    ],
)
def test_a_block_on_two_devices_gets_the_codes_of_one(
    name: str, algorithm: str, scheme: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    _tune(folders[name], tmp_path / "here", algorithm, scheme=scheme)
    with pretended.PretendedDevice() as device:
        _tune(folders[name], tmp_path / "there", algorithm, scheme=scheme, device="cuda:1,0")
    assert _same(tmp_path / "here", tmp_path / "there")
    far = {shape for place, shape in device.moved if place == pretended.THERE}
    near = {shape for place, shape in device.moved if place == torch.device("cuda", 1)}
    assert (WIDTH, 96) in far or name != "llama"  # down_proj, the last matrix
    assert (WIDTH, WIDTH) in near  # q_proj, the first one
    parts = {shape[0] for shape in near if shape[1:] == CUT.get(name)}, {s[0] for s in far if s[1:] == CUT.get(name)}
    assert sum(map(sum, parts)) == EXPERTS.get(name, 0)
    assert all(parts) == (name in CUT)


@pytest.mark.usefixtures("gpus")
def test_what_else_tuning_does_works_on_two_devices(folders: dict[str, Path], tmp_path: Path) -> None:
    """Blocks that are learned together, norms, scales and clipped ranges, and a run that goes on."""
    whole = SignRoundOptions(iters=3, batch_size=2, nblocks=2, enable_norm_bias_tuning=True)
    clipped = AwqOptions(awq_apply_clip=True, awq_clip_as_init=True, awq_loss="output", awq_n_grid=3)
    for name, algorithm, signround in (("qwen3_moe", "signround", whole), ("llama", "awq,signround", FEW)):
        here, there = tmp_path / name / "here", tmp_path / name / "there"
        _tune(folders[name], here, algorithm, signround=signround, awq=clipped)
        with pretended.PretendedDevice() as device:
            _tune(folders[name], there, algorithm, signround=signround, awq=clipped, device="0,1")
            for path in (there / "model.layers.2.safetensors", there / "tuned.json"):
                path.unlink()
            _tune(folders[name], there, algorithm, signround=signround, awq=clipped, device="0,1")
        assert _same(here, there)
        assert len({place for place, _ in device.moved}) == 3


def test_a_block_takes_as_many_devices_as_it_needs(
    gpus: Callable[[int], None], folders: dict[str, Path], tmp_path: Path
) -> None:
    for size_bytes, count in ((1 << 30, 1), (1 << 17, 2)):
        gpus(size_bytes)
        with pretended.PretendedDevice() as device:
            _tune(folders["llama"], tmp_path / str(count), "rtn", device="auto")
        assert len({place for place, _ in device.moved if place.type == "cuda"}) == count


@pytest.mark.usefixtures("gpu")
def test_hidden_states_in_files_stay_there(folders: dict[str, Path], tmp_path: Path) -> None:
    with pretended.PretendedDevice() as device:
        _tune(folders["llama"], tmp_path / "out", "gptq", TOKENS * WIDTH * 4, device="auto")
    assert (pretended.THERE, (SAMPLES, TOKENS, WIDTH)) not in device.moved
    assert (pretended.THERE, (1, TOKENS, WIDTH)) in device.moved


def test_the_pretended_device_refuses_what_cuda_does() -> None:
    with pretended.PretendedDevice():
        here, there = torch.ones(2), torch.ones(2).to("cuda")
        assert there.device.type == "cuda"
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there + 1).cpu().numpy().tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.Linear(2, 2).to("cuda")(here)


def test_a_call_goes_where_the_batch_is_computed() -> None:
    own = Own(tuple(torch.ones(1, 3) for _ in range(4)))
    batch = Batch(torch.ones(4, 3, 8), (Call((torch.ones(2),), {"mask": own, "more": [torch.ones(1), None, 7]}),))
    low, whole = batch.on(META, whole=False), batch.on(META, whole=True)
    assert (low.hidden.device.type, whole.hidden.device.type) == ("cpu", "meta")
    assert {v.device.type for v in low.calls[0].kwargs["mask"].values} == {"cpu"}
    assert {v.device.type for v in whole.calls[0].kwargs["mask"].values} == {"meta"}
    met: list[Any] = []

    def block(*args: Any, **kwargs: Any) -> torch.Tensor:
        met.extend([*args, kwargs["mask"], kwargs["more"][0]])
        return torch.zeros(2, 3, 8, device=META)

    for tried in (low.pick([3, 1]), whole.part(0, 2), low.moved(low.hidden).part(1, 3)):
        met.clear()
        assert tried.device == META
        call_block(block, tried, 0)
        assert [tuple(t.shape) for t in met] == [(2, 3, 8), (2,), (2, 3), (1,)]
        assert all(t.is_meta for t in met)
    assert batch.device.type == "cpu"


def test_words_for_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(word: str) -> str:
        return " ".join(map(str, ComputeOptions(device=word).places()))

    assert [place(w) for w in ("cpu", "auto")] == ["cpu", "cpu"]
    with pytest.raises(BadOption, match="sees 0 CUDA devices"):
        place("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [place(w) for w in ("cuda", "1", "cuda:1", "cpu")] == ["cuda:0", "cuda:1", "cuda:1", "cpu"]
    assert place("auto") == "cuda:0 cuda:1 cuda:2"
    assert [place(w) for w in ("0,2", "cuda:2, 0", "cuda:1,cuda:0")] == [
        "cuda:0 cuda:2",
        "cuda:2 cuda:0",
        "cuda:1 cuda:0",
    ]
    for word, told in (
        ("0,0", "twice"),
        ("cuda:3", "sees 3"),
        ("0,3", "sees 3"),
        ("tpu", "expected auto"),
        ("cpu:1", "expected"),
        ("cpu,0", "several GPUs"),
        ("0,auto", "several GPUs"),
        ("0,", "several GPUs"),
        ("self_attn.q_proj:0", "several GPUs"),
        ("cuda:", "expected"),
    ):
        with pytest.raises(BadOption, match=told):
            place(word)


@pytest.mark.usefixtures("gpu")
def test_a_folder_is_of_one_kind_of_device() -> None:
    here, there, low = (
        TuneOptions(compute=ComputeOptions(**words)).as_dict()
        for words in ({}, {"device": "cuda"}, {"device": "0", "low_gpu_mem_usage": True})
    )
    assert there == low == {**here, "device": "cuda"}


def test_deterministic_algorithms_are_asked_for_and_given_back() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_amp_everything_is_computed_in_float32() -> None:
    assert build_options({"disable_amp": True}).precision == "float32"
    assert build_options({}).precision == "auto"
    with pytest.raises(BadOption, match="--disable-amp"):
        build_options({"disable_amp": True, "dtype": "bfloat16"})
