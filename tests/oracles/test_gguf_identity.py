"""GGUF files of a real model, and of tiny ones with experts, against llama.cpp's converter and quantizer as they run
here: whole files, byte for byte; and llama.cpp loads them and predicts text with them."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf_files_made as made
import pytest

import shardq
from shardq import Limits, make_recipe
from shardq.files.gguf_read import read_gguf
from shardq.gguf.options import GgufOptions
from shardq.recipe import Decode

pytestmark = pytest.mark.oracle

GOLDEN = Path(__file__).parents[1] / "pipeline" / "golden_gguf_files"
TEXT = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
LOST = 1.5  # of the bf16 model's perplexity, in the smallest file that is tried: a file that is wrong is far above
WEIGHED = [("Q2_K", "gguf"), ("Q3_K_M", "legacy"), ("Q4_0", "gguf"), ("Q4_K_M", "legacy"), ("IQ4_XS", "gguf")]
QUANTIZED = (  # sources that the converter reads and rounds to bf16
    "FP8_BLOCK@fp8", "FP8_DYNAMIC@compressed-tensors", "W4A16G32@compressed-tensors", "W4A16G32@gptq",
    "W8A8@compressed-tensors",
)  # fmt: skip
OPTIONS = [
    made.Wanted("Q4_K_M", pure=True),
    made.Wanted("Q3_K_S", output_type="Q8_0"),
    made.Wanted("Q5_K_M", embedding_type="Q4_0"),
    made.Wanted("Q4_K_M", overrides=(("ffn_(gate|up)", "Q3_K"), (r"blk\.[0-3]\.attn_v", "Q8_0"))),
    made.Wanted("Q5_0", "legacy", output_type="BF16", overrides=((r"\.2[0-9]\..*_norm|ffn_down", "F16"),)),
]


@pytest.fixture(scope="module")
def whole(gguf_peer: Any, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as the converter's BF16 file."""
    return Path(gguf_peer.convert(smollm2, tmp_path_factory.mktemp("whole") / "whole.gguf"))


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder whose large files do not outlive the test."""
    yield tmp_path
    for path in tmp_path.rglob("*.gguf"):
        path.unlink()


def differences(
    gguf_peer: Any,
    source: Path,
    whole: Path,
    row: made.Wanted,
    room: Path,
    pre: str | None = None,
    decode: Decode = "exact",
) -> list[str]:
    """Between what shardq makes of a checkpoint and what llama.cpp makes of its converter's file of it."""
    names = ("pure", "output_type", "embedding_type", "overrides", "requantize")
    words: dict[str, Any] = {key: getattr(row, key) for key in names}
    file = None
    if row.imatrix:
        stats = made.importance({t.name: t.shape[::-1] for t in read_gguf(whole).tensors})
        file = room / f"imatrix.{row.imatrix}"
        file.write_bytes(made.imatrix_bytes(stats, row.imatrix))
        words["imatrix"] = made.divided(stats, row.imatrix)
    theirs = gguf_peer.quantize(whole, room / "theirs.gguf", gguf_peer.FILE_TYPES[row.file_type], **words)
    options = GgufOptions(row.pure, row.output_type, row.embedding_type, row.overrides, tokenizer_pre=pre)
    recipe = make_recipe(
        f"gguf:{row.file_type}", importance=file, gguf=options, requantize=row.requantize, decode=decode
    )
    done = shardq.quantize(source, recipe, output_dir=room / "ours", limits=Limits(parallel=2))
    (ours,) = done.output.glob("*.gguf")
    found: list[str] = gguf_peer.differences(ours, theirs)
    return found


@pytest.mark.parametrize("kind", made.FILE_TYPES)
def test_every_file_type_is_llama_cpps(kind: str, gguf_peer: Any, smollm2: Path, whole: Path, room: Path) -> None:
    assert not differences(gguf_peer, smollm2, whole, made.Wanted(kind), room)


@pytest.mark.parametrize(("kind", "form"), WEIGHED)
def test_an_imatrix_weighs_as_there(
    kind: str, form: str, gguf_peer: Any, smollm2: Path, whole: Path, room: Path
) -> None:
    assert not differences(gguf_peer, smollm2, whole, made.Wanted(kind, form), room)


@pytest.mark.parametrize("row", OPTIONS, ids=[row.name for row in OPTIONS])
def test_options_mean_what_they_mean_there(
    row: made.Wanted, gguf_peer: Any, smollm2: Path, whole: Path, room: Path
) -> None:
    assert not differences(gguf_peer, smollm2, whole, row, room)


@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ4_XS", "Q2_K", "MXFP4_MOE"])
@pytest.mark.parametrize("name", ["qwen3moe", "qwen2moe", "mixtral", "gpt_oss_bf16", "qwen35moe"])
def test_experts_have_slices_of_an_imatrix(name: str, kind: str, gguf_peer: Any, room: Path) -> None:
    case = made.FILES[name]
    source = made.write(case, room)
    whole = gguf_peer.convert(source, room / "whole.gguf", case.case.pre)
    assert not differences(gguf_peer, source, whole, made.Wanted(kind, "gguf"), room, case.case.pre)


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("name", ["llama", "deepseek3", "qwen3moe", "qwen2moe", "qwen35"])
def test_quantized_sources_are_decoded_as_there(name: str, scheme: str, gguf_peer: Any, room: Path) -> None:
    case = made.FILES[name].case
    source = room / "quantized" / case.folder
    shardq.quantize(made.write(made.FILES[name], room), scheme, output_dir=source, limits=Limits(parallel=1))
    whole = gguf_peer.convert(source, room / "whole.gguf", case.pre)
    for kind in ("Q8_0", "Q4_K_M"):
        (room / kind).mkdir()
        assert not differences(gguf_peer, source, whole, made.Wanted(kind), room / kind, case.pre, "rounded")


@pytest.mark.parametrize("name", made.FILES)
def test_golden_files_are_what_llama_cpp_makes_here(name: str, gguf_peer: Any, room: Path) -> None:
    stored = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["files"]
    whole = gguf_peer.convert(made.write(made.FILES[name], room), room / "whole.gguf", made.FILES[name].case.pre)
    for kind in ("MXFP4_MOE", "Q4_K_M"):
        if "refused" in stored[kind]:
            with pytest.raises(RuntimeError, match=r".+"):
                gguf_peer.quantize(whole, room / "theirs.gguf", gguf_peer.FILE_TYPES[kind])
        else:
            theirs = gguf_peer.quantize(whole, room / "theirs.gguf", gguf_peer.FILE_TYPES[kind])
            assert sha256(theirs.read_bytes()).hexdigest() == stored[kind]["file"], kind


def test_llama_cpp_predicts_text_with_our_files_as_with_its_own(
    gguf_peer: Any, smollm2: Path, whole: Path, room: Path
) -> None:
    plain = gguf_peer.perplexity(whole, TEXT)
    kinds = ("Q8_0", "Q4_K_M", "Q3_K_M")
    results = shardq.quantize_many(smollm2, [f"gguf:{kind}" for kind in kinds], output_dir=room / "out")
    for kind, result in zip(kinds, results, strict=True):
        (ours,) = result.output.glob("*.gguf")
        theirs = gguf_peer.quantize(whole, room / "theirs.gguf", gguf_peer.FILE_TYPES[kind])
        found = gguf_peer.perplexity(ours, TEXT), gguf_peer.perplexity(theirs, TEXT)
        print(f"\n{kind}: perplexity {found[0]:.4f}, llama.cpp's own {found[1]:.4f}, BF16 {plain:.4f}")
        assert found[0] == found[1]
        assert found[0] < LOST * plain
