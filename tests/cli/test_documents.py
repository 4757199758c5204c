"""Every command and every script that README.md and docs/ show is run: in the order of each document, as a shell would,
in one folder, against a Hub on loopback that has the repos which they name. README's section Start alone leads a
newcomer to a pushed model."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

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
README: Final = ROOT / "README.md"
DOCUMENTS: Final = (README, *sorted((ROOT / "docs").rglob("*.md")))
OURS: Final = "shardq "
# What a shell runs that is not shardq, and why it is not run here.
OTHERS: Final = {
    "pip install": "an environment of its own is the business of .ci/run",
    "python3 -m venv": "likewise", ". .venv/bin/activate": "likewise",
    "pytest": "these are the tests",
    "vllm": "needs an engine: the sessions of nox run them",
    "sbatch": "needs a cluster", "kubectl": "needs a cluster", "hf": "needs an account", "ssh": "needs other machines",
    "crontab": "changes the machine", "systemctl": "changes the machine", "ray": "needs a cluster",
}  # fmt: skip
# What needs shardq[tune], or a file that such a command makes.
TUNED: Final = (
    "shardq stats", "shardq eval", "shardq tune", "--calibrate", "--importance name.importance.safetensors",
    "shardq.evaluate(",
)  # fmt: skip
PACKAGES: Final = ("transformers", "sentencepiece", "google.protobuf")  # of these: org/name has only a tokenizer.model
ENGINES: Final = ("llmcompressor",)  # a script with one of these is run by the tests of that engine
SHELL: Final = ("", "sh")
PLACEHOLDER: Final = re.compile(r"\{[a-z_]+\}|<[^>]*>|\.\.\.")
FILE: Final = re.compile(r"# ([\w.-]+\.\w+)\n")  # the first line of a block that is a file


@dataclass(frozen=True, slots=True)
class Step:
    """What a reader does with a block of a document."""

    kind: Literal["command", "script", "file"]
    text: str
    name: str = ""  # of a file


def blocks_of(text: str) -> Iterator[tuple[str | None, list[str]]]:
    """The language and the lines of each fenced block, and of each indented one, which has none; those that end in a
    backslash are joined."""
    fence: str | None = None
    lines: list[str] = []
    for line in [*text.replace("\\\n", " ").splitlines(), ""]:
        if line.lstrip().startswith("```"):
            if fence is None:
                fence = line.lstrip()[3:].strip()
            else:
                yield fence, lines
                fence = None
            lines = []
        elif fence is not None or line.startswith("    "):
            lines.append(line)
        elif lines:
            yield None, lines
            lines = []


def steps_of(text: str) -> list[Step]:
    """What a reader does, in order."""
    steps = []
    for fence, lines in blocks_of(text):
        stripped = [x.strip() for x in lines if x.strip() and not x.strip().startswith("#")]
        if fence in SHELL or (fence is None and stripped and is_known(stripped[0])):
            steps += [Step("command", x) for x in stripped]
        elif fence == "python" and not any(engine in line for engine in ENGINES for line in lines):
            steps.append(Step("script", "\n".join(lines) + "\n"))
        elif fence and (found := FILE.match("\n".join(lines))):
            steps.append(Step("file", "\n".join(lines) + "\n", found[1]))
    return steps


def is_known(command: str) -> bool:
    """True for ours, and for what has a reason not to be run."""
    return command.startswith(OURS) or any(command == o or command.startswith(f"{o} ") for o in OTHERS)


def is_here(package: str) -> bool:
    """True if it can be imported."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # what it is a part of is not there
        return False


def read(document: Path) -> str:
    """Its text."""
    return document.read_text(encoding="utf-8")


def name_of(document: Path) -> str:
    """Of a test."""
    return str(document.relative_to(ROOT))


def documents_to_run() -> list[Path]:
    """Those with something to run but README, which has a test of its own below; each as a whole: later commands use
    what earlier ones made."""
    found = ((p, steps_of(read(p))) for p in DOCUMENTS if p != README)
    return [p for p, steps in found if any(s.kind == "script" or s.text.startswith(OURS) for s in steps)]


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
    folders["org/name-GGUF"] = base / "files"
    folders["org/name-GGUF"].mkdir()
    for kind in ("Q4_K_M", "Q8_0"):
        shardq.quantize(folders["org/name"], f"gguf:{kind}", output_dir=base / kind, limits=shardq.Limits(parallel=1))
        for path in (base / kind).glob("*.gguf"):
            path.rename(folders["org/name-GGUF"] / path.name)
    folders |= dict.fromkeys(("org/first", "org/second"), folders["org/name"])
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
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    return env


def take(steps: Sequence[Step], environment: dict[str, str], folder: Path) -> list[str]:
    """Do all of them; returns what was left out because a package of block mode is not there."""
    left, whole = [], all(map(is_here, PACKAGES))
    for step in steps:
        if step.kind == "file":
            (folder / step.name).write_text(step.text)
        elif step.kind == "command" and not step.text.startswith(OURS):
            continue
        elif any(word in step.text for word in TUNED) and not whole:
            left.append(step.text)
        else:
            words, target = words_of(step, folder)
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{step.text}\n{done.stdout}\n{done.stderr}"
            if target:
                (folder / target).write_text(done.stdout)
    return left


def words_of(step: Step, folder: Path) -> tuple[list[str], str]:
    """The command line of a step, and the file that its output goes to, if any."""
    if step.kind == "script":
        script = folder / "script.py"
        script.write_text(step.text)
        return [sys.executable, "-P", str(script)], ""
    words = shlex.split(step.text, comments=True)[1:]
    target = ""
    if len(words) > 2 and words[-2] == ">":
        target = words[-1]
        words = words[:-2]
    return [sys.executable, "-P", "-m", "shardq.cli", *words], target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_line_of_a_command_block_can_be_run_or_has_a_reason(document: Path) -> None:
    commands = [s.text for s in steps_of(read(document)) if s.kind == "command"]
    assert [c for c in commands if not is_known(c)] == []
    own = [re.sub(r"--push-to '[^']*'", "", c) for c in commands if c.startswith(OURS)]
    assert [c for c in own if PLACEHOLDER.search(c)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        path, _, section = link.partition("#")
        if "://" in path:
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if section:
            heads = re.findall(r"^#+ (.+)$", read(target), re.MULTILINE)
            assert section in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}, link


@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", documents_to_run(), ids=name_of)
def test_every_command_runs(document: Path, environment: dict[str, str], tmp_path: Path) -> None:
    if left := take(steps_of(read(document)), environment, tmp_path):
        pytest.skip(f"block mode needs {', '.join(PACKAGES)}: {len(left)} commands of {document.name} were left out")


@pytest.mark.timeout(300)
def test_the_start_of_the_readme_leads_a_newcomer_to_a_pushed_model(
    hub: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    start = re.search(r"^## Start\n(.*?)^## ", read(README), re.MULTILINE | re.DOTALL)
    assert start
    steps = steps_of(start[1])
    assert take(steps, environment, tmp_path) == []
    assert not shardq.verify(tmp_path / "demo-W4A16", deep=True, source="demo").problems
    assert [c.repo for c in hub.commits] == ["me/name-W4A16"]
    files = hub.files("me/name-W4A16")
    weights = {name for name in hub.files("org/name") if name.endswith(".safetensors")}
    assert weights | {"config.json", "README.md", "shardq.json", "shardq-ledger.json.zst"} <= files.keys()
    check = Step("command", "shardq verify me/name-W4A16 --deep --source org/name")
    page = tmp_path / "name-W4A16.html"
    assert take([check], environment, tmp_path) == []
    assert "W4A16" in page.read_text(encoding="utf-8")
    assert steps == steps_of(read(README)), "no command of README stands elsewhere: it would not be run"
