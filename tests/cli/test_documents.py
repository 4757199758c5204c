"""Every command that README.md and docs/ show is run: in the order of each document, as a shell would, in one folder,
against a Hub on loopback that has the repos which they name."""

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import gguf_files_made as made
import pytest
from gguf_checkpoints_made import Case, side_files
from gguf_models_made import SPM, config
from gguf_shapes_made import PIECES, dense

import shardq
from shardq.gguf.metadata import find_tensors
from shardq.gguf.model_files import ModelFiles
from shardq.gguf.tensors import SourceTensor

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")

ROOT: Final = Path(__file__).parents[2]
DOCUMENTS: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
OURS: Final = "shardq "
# What a shell runs that is not shardq, and why it is not run here.
OTHERS: Final = {
    "pip install": "an environment of its own is the business of .ci/run",
    "python3 -m venv": "likewise",
    "pytest": "these are the tests",
    "sbatch": "needs a cluster", "kubectl": "needs a cluster", "hf": "needs an account", "ssh": "needs other machines",
    "crontab": "changes the machine", "systemctl": "changes the machine", "ray": "needs a cluster",
}  # fmt: skip
TUNED: Final = ("shardq stats", "shardq eval", "shardq tune", "--calibrate")  # need shardq[tune]


def blocks_of(text: str) -> list[list[str]]:
    """The commands of each block, indented or fenced: lines of a shell, those that end in a backslash joined."""
    found: list[list[str]] = []
    fence: str | None = None
    lines: list[str] = []
    for line in [*text.replace("\\\n", " ").splitlines(), ""]:
        is_fence = line.startswith("```")
        if is_fence:
            fence = None if fence is not None else line[3:].strip()
        indented = line.startswith("    ") and fence is None
        if not is_fence and (indented or (fence in {"", "sh"} and line)):
            lines.append(line.strip())
        elif lines:
            commands = [x for x in lines if x.startswith(OURS) or any(x.startswith(o) for o in OTHERS)]
            found += [commands] if commands else []
            lines = []
    return found


def parameters() -> list[Any]:
    """A document with commands, as a whole: later ones use what earlier ones made."""
    return [pytest.param(path, id=path.name) for path in DOCUMENTS if any(_ours(path))]


def _ours(path: Path) -> list[str]:
    return [c for block in blocks_of(path.read_text(encoding="utf-8")) for c in block if c.startswith(OURS)]


def plain_llama() -> Case:
    """A llama whose vocabulary needs no fingerprint, with columns for every scheme."""
    own = config("LlamaForCausalLM", "llama", vocab_size=PIECES)
    return made.widened(Case(own, dense(PIECES), SPM, folder="name"))


@pytest.fixture(scope="session")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What the documents call org/name, and what was made of it."""
    base = tmp_path_factory.mktemp("repos")
    folders = {"org/name": made.write(made.FileCase(plain_llama(), 2), base)}
    for name, scheme in {"org/name-GPTQ": "W4A16@gptq", "org/name-FP8": "FP8_BLOCK@fp8"}.items():
        word, layout = scheme.split("@")
        folders[name] = base / name.partition("/")[2]
        recipe = shardq.make_recipe(word, layout=layout)
        shardq.quantize(folders["org/name"], recipe, output_dir=folders[name], limits=shardq.Limits(parallel=1))
    return {name: {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} for name, folder in folders.items()}


@pytest.fixture
def environment(hub: Any, fake_hub: Any, repos: dict[str, dict[str, bytes]], tmp_path: Path) -> dict[str, str]:
    """Of a newcomer's shell: a token, an empty cache, the Hub; the folder has what the documents take for granted."""
    for name, files in repos.items():
        hub.repos[name] = fake_hub.Repo()
        hub.repos[name].commit(files)
    (tmp_path / "wiki.txt").write_text("a b c d e f g h " * 2000)
    case = plain_llama()
    tensors = find_tensors(
        ModelFiles(case.folder, side_files(case)), [[SourceTensor(name, shape) for name, shape in case.shapes.items()]]
    )
    counted = made.importance({t.name: t.shape for t in tensors})
    (tmp_path / "name.imatrix.gguf").write_bytes(made.imatrix_bytes(counted, "gguf"))
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": fake_hub.TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    return env


@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", parameters())
def test_every_command_runs(document: Path, environment: dict[str, str], tmp_path: Path) -> None:
    skipped = []
    for command in (c for block in blocks_of(document.read_text(encoding="utf-8")) for c in block):
        if not command.startswith(OURS):
            continue
        if any(word in command for word in TUNED) and find_spec("transformers") is None:
            skipped.append(command)
            continue
        words = [sys.executable, "-P", "-m", "shardq.cli", *shlex.split(command, comments=True)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    if skipped:
        pytest.skip(f"block mode needs transformers: {len(skipped)} commands of {document.name} were left out")
