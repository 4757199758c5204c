"""The manifest of a batch, in TOML: which sources become what, where that goes, and what it may take.

    folder = "nightly.batch"                    # status, lock and unfinished work; default: the manifest's name
    [recipes.small]                             # words of `quantize`: see recipe_file.py
    scheme = "W4A16@gptq"
    [defaults]                                  # for all models
    recipes = ["small", "MXFP4"]
    push_to = "me/{name}-{scheme}-{layout}"
    [budget]
    max_disk = "200G"
    [[model]]
    source = "org/name"

Every key is known or refused with its place. Relative paths start at the manifest's folder, where cron starts does not
matter.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any, Final

from shardq.batch.schedule import Patience
from shardq.errors import BadOption
from shardq.limits import Limits
from shardq.opening import check_together
from shardq.recipe import Recipe
from shardq.recipe_file import LAYERS, MixtureWords, Written, recipe_of, with_layers
from shardq.sizes import parse_rate, parse_size, parse_time
from shardq.sources import names_a_repo
from shardq.tables import Kinds, check_table, read_toml

LATEST: Final = "latest"
SUFFIX: Final = ".batch"  # of the folder beside the manifest
_TEXT, _FLAG = (str,), (bool,)
_OF_MODELS: Final[Mapping[str, Kinds]] = {
    "recipes": (list, dict), "push_to": _TEXT, "output_dir": _TEXT, "private": _FLAG, "keep_local": _FLAG,
    "collection": _TEXT, "subfolder": _TEXT, "revision": _TEXT,
}  # fmt: skip
_MODEL: Final[Mapping[str, Kinds]] = {"source": _TEXT, **_OF_MODELS}
_BUDGET: Final[Mapping[str, Kinds]] = {
    "parallel": (int,), "max_ram": _TEXT, "max_disk": _TEXT, "max_rate": _TEXT, "stream": _FLAG, "xet": _FLAG,
}  # fmt: skip
_RETRY: Final[Mapping[str, Kinds]] = {"attempts": (int,), "first_wait": _TEXT, "longest_wait": _TEXT}
_TOP: Final[Mapping[str, Kinds]] = {
    "folder": _TEXT, "recipes": (dict,), "defaults": (dict,), "budget": (dict,), "retry": (dict,), "model": (list,),
}  # fmt: skip
_FIELDS: Final = ("name", "owner", "scheme", "layout", "recipe")


@dataclass(frozen=True, slots=True)
class Entry:
    """One output."""

    label: str  # what messages and the status file call it: the repo, or the folder as it is written
    title: str  # of its recipe
    recipe: Recipe
    targets: tuple[str, ...]
    out: Path  # the output folder; without `keep_local` and with a repo where it is worked on
    repo: str | None  # org/name[@branch]
    private: bool
    keep_local: bool
    collection: str | None  # owner/title
    mixture: MixtureWords | None = None  # that is still to be chosen for the recipe

    @property
    def layers(self) -> Path:
        """Where the choice of a mixture is: beside the folder, as `quantize` has it."""
        return self.out.with_name(self.out.name + LAYERS)

    @property
    def stays(self) -> bool:
        """True if the finished output is in its folder."""
        return self.repo is None or self.keep_local


@dataclass(frozen=True, slots=True)
class Model:
    """A source, and all that is made of one read of it."""

    source: str  # org/name, or the path of a folder, or demo
    revision: str | None  # None: the newest commit of the main branch
    subfolder: str | None
    entries: tuple[Entry, ...]

    @property
    def is_repo(self) -> bool:
        """True if the source is on the Hub."""
        return names_a_repo(self.source)


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a batch."""

    path: Path
    folder: Path  # status, lock, unfinished work
    models: tuple[Model, ...]
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)


def read_manifest(path: Path) -> Manifest:
    """Raises BadOption with the place of what is wrong, and what make_recipe raises for a recipe."""
    table = check_table(read_toml(path), str(path), _TOP)
    home = path.absolute().parent
    folder = home / table.get("folder", path.stem + SUFFIX)
    known = {name: recipe_of(t, f"{path}: recipes.{name}", home) for name, t in table.get("recipes", {}).items()}
    defaults = check_table(table.get("defaults", {}), f"{path}: defaults", _OF_MODELS)
    if not table.get("model"):
        raise BadOption(f"{path}: expected at least one [[model]]")
    reader = _Reader(str(path), home, folder, known, defaults)
    models = tuple(reader.model(m, number) for number, m in enumerate(table["model"], start=1))
    for what in ("label", "out"):
        counts = Counter(str(getattr(e, what)) for m in models for e in m.entries)
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise BadOption(
                f"{path}: {', '.join(twice)} would be made more than once: name a model or recipe once, or put more of "
                f"{{{'}, {'.join(_FIELDS)}}} into push_to and output_dir"
            )
    limits, patience = _limits(table.get("budget", {}), f"{path}: budget"), _patience(table.get("retry", {}), path)
    return Manifest(path, folder, models, limits, patience)


@dataclass(frozen=True, slots=True)
class _Reader:
    """What the models of a manifest share."""

    path: str
    home: Path
    folder: Path
    known: Mapping[str, Written]
    defaults: Mapping[str, Any]

    def model(self, table: object, number: int) -> Model:
        where = f"{self.path}: model {number}"
        words = {**self.defaults, **check_table(table, where, _MODEL)}
        if "source" not in words:
            raise BadOption(f"{where}: expected a source, as org/name")
        where = f"{where} ({words['source']})"
        source, revision = self._source(words["source"], words.get("revision"), where)
        titled = list(self._recipes(words.get("recipes", ["W4A16"]), where))
        try:
            check_together([written.recipe for _, written in titled])
        except BadOption as error:
            raise BadOption(f"{where}: {error}") from error
        entries = tuple(self._entry(source, words, title, written, where) for title, written in titled)
        return Model(source, revision, words.get("subfolder"), entries)

    def _source(self, text: str, revision: str | None, where: str) -> tuple[str, str | None]:
        """The source without its revision; a folder with its whole path."""
        inside = self.home / Path(text).expanduser()
        if text.startswith((".", "/", "~")) or inside.is_dir():
            if revision:
                raise BadOption(f"{where}: a folder has no revisions: leave {revision!r} out")
            return str(inside), None
        repo, at, pinned = text.removeprefix("hf://").partition("@")
        if at and revision:
            raise BadOption(f"{where}: two revisions, {pinned!r} and {revision!r}: give one")
        wanted = pinned or revision
        if not names_a_repo(repo) and repo != "demo":
            raise BadOption(f"{where}: the source is neither org/name[@revision] nor a folder at {inside}")
        return repo, None if wanted == LATEST else wanted

    def _recipes(self, wanted: Sequence[object] | Mapping[str, object], where: str) -> Iterator[tuple[str, Written]]:
        """Names of [recipes], schemes, and tables; or a table of named tables."""
        if isinstance(wanted, Mapping):
            for title, table in wanted.items():
                yield title, recipe_of(table, f"{where}: recipes.{title}", self.home)
            return
        if not wanted:
            raise BadOption(f"{where}: recipes is empty")
        for number, item in enumerate(wanted, start=1):
            if isinstance(item, str) and item in self.known:
                yield item, self.known[item]
                continue
            table = {"scheme": item} if isinstance(item, str) else item
            written = recipe_of(table, f"{where}: recipe {number}", self.home)
            yield written.recipe.scheme_name, written

    def _entry(self, source: str, words: Mapping[str, Any], title: str, written: Written, where: str) -> Entry:
        recipe = written.recipe
        owner, _, name = source.rstrip("/").rpartition("/")
        values = (name, owner.rpartition("/")[2], recipe.scheme_name, recipe.layout, title)
        named = dict(zip(_FIELDS, values, strict=True))
        repo, folder = (_fill(words.get(k), named, f"{where}: {k}") for k in ("push_to", "output_dir"))
        if repo is None and folder is None:
            raise BadOption(f"{where}: nowhere to go: give push_to or output_dir, here or under [defaults]")
        if repo is not None and not names_a_repo(repo.partition("@")[0]):
            raise BadOption(f"{where}: push_to gives {repo!r}: expected org/name or org/name@branch")
        for key in ("private", "keep_local", "collection"):
            if repo is None and words.get(key):
                raise BadOption(f"{where}: {key} has a meaning only with push_to")
        if words.get("keep_local") and folder is None:
            raise BadOption(f"{where}: keep_local needs output_dir, where it is kept")
        collection = words.get("collection")
        if collection and "/" not in collection:
            raise BadOption(f"{where}: collection {collection!r}: expected owner/title")
        out = self.home / Path(folder).expanduser() if folder else self.folder / "work" / str(repo).replace("/", "--")
        entry = Entry(
            label=repo or str(folder),
            title=title,
            recipe=recipe,
            targets=written.targets,
            out=out,
            repo=repo,
            private=words.get("private", False),
            keep_local=words.get("keep_local", False),
            collection=collection,
            mixture=written.mixture,
        )
        return take_layers(entry) if entry.mixture and entry.layers.exists() else entry


def take_layers(entry: Entry) -> Entry:
    """An entry whose mixture has been chosen. Raises BadOption for a file that cannot be read."""
    return replace(entry, recipe=with_layers(entry.recipe, entry.layers), mixture=None)


def _fill(template: str | None, values: Mapping[str, str], where: str) -> str | None:
    """A template with its fields filled in. Raises BadOption for other fields than ours."""
    if template is None:
        return None
    try:
        fields = [found for _, found, _, _ in Formatter().parse(template) if found is not None]
    except ValueError as error:
        raise BadOption(f"{where} {template!r}: {error}") from error
    if unknown := [f for f in fields if f not in values]:
        raise BadOption(
            f"{where} {template!r}: unknown field {{{unknown[0]}}}: expected some of {{{'}, {'.join(values)}}}"
        )
    return template.format_map(values)


def _limits(value: object, where: str) -> Limits:
    words = check_table(value, where, _BUDGET)
    return Limits(
        max_ram_bytes=parse_size(words.get("max_ram"), f"{where}: max_ram"),
        max_disk_bytes=parse_size(words.get("max_disk"), f"{where}: max_disk"),
        max_rate_bytes_s=parse_rate(words.get("max_rate"), f"{where}: max_rate"),
        parallel=words.get("parallel", Limits().parallel),
        stream=words.get("stream", False),
        xet=words.get("xet", False),
    )


def _patience(value: object, path: Path) -> Patience:
    where = f"{path}: retry"
    words, usual = check_table(value, where, _RETRY), Patience()
    if words.get("attempts", 1) < 1:
        raise BadOption(f"{where}: attempts = {words['attempts']}: expected at least 1")
    first = parse_time(words.get("first_wait"), f"{where}: first_wait")
    longest = parse_time(words.get("longest_wait"), f"{where}: longest_wait")
    return Patience(
        attempts=words.get("attempts", usual.attempts),
        first_wait_s=usual.first_wait_s if first is None else first,
        longest_wait_s=usual.longest_wait_s if longest is None else longest,
    )
