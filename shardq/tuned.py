"""Codes that were tuned block by block, in a folder beside the output, and the way of a module's rows out of it.

    tuned.json            identity of the tuning, and sha256 of each file; written last
    <block>.safetensors   codes.MODULE U8 [rows, columns], scales.MODULE F32 [rows, G], perhaps zeros.MODULE U8 and
                          biases.MODULE F32 alike; `modules` of its metadata says of each its scheme and global scale,
                          and where activations are calibrated their scale.
                          columns.MODULE F32 [columns] and rows.MODULE F32 [rows]: what the weight was multiplied by
                          before it got its codes. plain.TENSOR: what replaces a tensor of the checkpoint, in its type
                          and shape; `plain` of the metadata has the sha256 of each

The main job packs such codes into any layout, in place of making its own. Nothing here needs torch.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardq.errors import BadOption, BadTuned, CorruptShard, RecipeChanged, UnknownDtype
from shardq.files.atomic import pread_exact, reading, remove_unfinished, sync_way, write_atomic, writing
from shardq.files.safetensors import HeaderTensor, TensorSpec, plan_file, read_header
from shardq.importance_vectors import Stamp, take_stamp
from shardq.layouts.input_scales import wants_input_scale
from shardq.replaced import Replaced, ReplacedRef

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.decide import Decision
    from shardq.layouts.base import Layout
    from shardq.quantizers.quantized import Quantized
    from shardq.schemes import Scheme

MANIFEST: Final = "tuned.json"
IDENTITY: Final = "identity.json"  # while blocks are still missing
SUFFIX: Final = ".safetensors"
SHOWN: Final = 4  # names told in a message before "and N more"
PARTS: Final = ("codes", "scales", "zeros", "biases")
FACTORS: Final = ("rows", "columns")
DTYPES: Final[Mapping[str, str]] = {
    "codes": "U8", "scales": "F32", "zeros": "U8", "biases": "F32", "rows": "F32", "columns": "F32",
}  # fmt: skip
PLAIN: Final = "plain"


@dataclass(frozen=True, slots=True)
class InputScale:
    """What a server scales the activations of a matrix by; see quantizers/input_scales.py."""

    value: float  # finite and above 0
    borrowed: bool = False  # of an expert that no token went to: the largest of its siblings decided


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was found for one module: canonical codes of its whole weight, under the scheme of its plan."""

    scheme: "Scheme"
    quantized: "Quantized"
    input_scale: "InputScale | None" = None  # of a scheme whose activations are calibrated
    factors: "Factors | None" = None  # what the weight was multiplied by before


@dataclass(frozen=True, slots=True)
class Factors:
    """What the rows and the columns of a weight were multiplied by, F32; None: by 1."""

    rows: "NDArray[np.float32] | None" = None
    columns: "NDArray[np.float32] | None" = None

    def apply(self, rows: "NDArray[np.float32]", row: int) -> None:
        """Multiply some rows of the weight, of which the first is `row`, in place."""
        if self.columns is not None:
            rows *= self.columns
        if self.rows is not None:
            rows *= self.rows[row : row + len(rows), None]


@dataclass(frozen=True, slots=True)
class TunedRef:
    """Where a worker finds the codes of one module: it travels with a task."""

    stamp: Stamp
    columns: int
    groups: int
    begins: tuple[int, ...]  # offsets of the arrays of PARTS, -1 for none
    global_scale: float | None
    input_scale: InputScale | None = None
    rows: int = 0
    factors: tuple[int, ...] = (-1, -1)  # offsets of the arrays of FACTORS, -1 for none

    @property
    def is_scaled(self) -> bool:
        """True if the codes are of a weight whose rows or columns were multiplied before."""
        return any(begin >= 0 for begin in self.factors)


@dataclass(frozen=True, slots=True)
class TunedCodes:
    """A finished folder."""

    label: str  # the folder's name
    sha256: str  # of its manifest
    algorithm: str
    schemes: Mapping[str, Mapping[str, Any]]  # module -> what decides its codes
    shapes: Mapping[str, tuple[int, int]]
    refs: Mapping[str, TunedRef]
    replaced: Mapping[str, ReplacedRef] = field(default_factory=dict)  # by tensor
    layout: str = ""  # of the plan that they were tuned for; empty where the manifest does not say


@dataclass(frozen=True, slots=True)
class TunedBlocks:
    """What the files of blocks hold, by module, and what replaces tensors, by their names."""

    schemes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    refs: dict[str, TunedRef] = field(default_factory=dict)
    replaced: dict[str, ReplacedRef] = field(default_factory=dict)


class TunedWriter:
    """A folder while it is made. A block that is there is whole and durable."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """`identity`: all that decides the codes, `algorithm` among it. Files that a killed run had not finished go, so
        one run at a time works here. Raises RecipeChanged for a folder of another identity, NotWritable."""
        self._folder, self._identity = folder, dict(identity)
        text = json.dumps(self._identity, sort_keys=True).encode()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            found = next((folder / n for n in (MANIFEST, IDENTITY) if (folder / n).exists()), None)
        if found:
            with reading(found):
                stored = json.loads(found.read_bytes())
            if (stored["identity"] if found.name == MANIFEST else stored) != json.loads(text):
                raise RecipeChanged(
                    f"{folder} holds codes that were tuned otherwise: delete it, or choose another output"
                )
        remove_unfinished(folder)
        if found is None:
            write_atomic(folder / IDENTITY, text)

    def has(self, block: str) -> bool:
        """True if an earlier run has finished it."""
        return (self._folder / f"{block}{SUFFIX}").exists()

    def write(self, block: str, modules: Mapping[str, Tuned], replaced: Mapping[str, Replaced] | None = None) -> None:
        """All modules of one block, and what replaces tensors of it. Raises DiskFull, NotWritable."""
        import numpy as np

        arrays: dict[str, Any] = {}
        said = {}
        plain = replaced or {}
        for module, t in modules.items():
            q = t.quantized
            for part, array in zip(PARTS, (q.codes, q.scales, q.zeros, q.biases), strict=True):
                if array is not None:
                    arrays[f"{part}.{module}"] = np.ascontiguousarray(array)
            for kind in FACTORS if t.factors else ():
                if (vector := getattr(t.factors, kind)) is not None:
                    arrays[f"{kind}.{module}"] = np.ascontiguousarray(vector, np.float32)
            said[module] = {"scheme": asdict(t.scheme), "global_scale": q.global_scale}
            if t.input_scale:
                said[module]["input_scale"] = asdict(t.input_scale)
        content: dict[str, Any] = {name: a.reshape(-1).view(np.uint8).data for name, a in arrays.items()}
        content |= {f"{PLAIN}.{name}": r.data for name, r in plain.items()}
        specs = [TensorSpec(name, DTYPES[name.partition(".")[0]], a.shape) for name, a in arrays.items()]
        specs += [TensorSpec(f"{PLAIN}.{name}", r.dtype, r.shape) for name, r in plain.items()]
        metadata = {"modules": json.dumps(said, sort_keys=True)}
        if plain:
            hashes = {name: hashlib.sha256(r.data).hexdigest() for name, r in plain.items()}
            metadata[PLAIN] = json.dumps(hashes, sort_keys=True)
        plan = plan_file(specs, metadata)
        write_atomic(self._folder / f"{block}{SUFFIX}", plan.header, *(content[name] for name in plan.offsets))

    def finish(self) -> None:
        """All blocks are there. Raises DiskFull, NotWritable."""
        blocks = {path.name: _sha256(path) for path in sorted(self._folder.glob(f"*{SUFFIX}"))}
        manifest = {"format": 1, "identity": self._identity, "blocks": blocks}
        write_atomic(self._folder / MANIFEST, json.dumps(manifest, sort_keys=True, indent=1).encode())
        with writing(self._folder):
            (self._folder / IDENTITY).unlink(missing_ok=True)
            sync_way(self._folder)


def load_tuned(folder: str | os.PathLike[str]) -> TunedCodes:
    """A finished folder; every file is hashed. Raises BadTuned for one that is damaged or not finished,
    SourceUnreadable."""
    root = Path(folder)
    if not (root / MANIFEST).exists():
        raise BadTuned(f"{root.name} has no {MANIFEST}: it is no folder of tuned codes, or its tuning is not finished")
    with reading(root / MANIFEST):
        raw = (root / MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        blocks, identity = dict(manifest["blocks"]), dict(manifest["identity"])
        algorithm, layout = str(identity["algorithm"]), str(identity.get("recipe.layout", ""))
    except (ValueError, LookupError, TypeError) as error:
        raise BadTuned(f"{root.name}/{MANIFEST} is damaged ({error}): tune again") from error
    found = TunedBlocks()
    for name, expected in blocks.items():
        if "/" in name or _sha256(root / name) != expected:
            raise BadTuned(f"{root.name}/{name} is not what {MANIFEST} says: tune again")
        read_block(root / name, found)
    sha256 = hashlib.sha256(raw).hexdigest()
    return TunedCodes(root.name, sha256, algorithm, found.schemes, found.shapes, found.refs, found.replaced, layout)


def match_tuned(decisions: Sequence["Decision"], tuned: TunedCodes) -> dict[str, TunedRef]:
    """The codes of every weight that is quantized and was tuned. Raises BadTuned for a folder of another model or
    another recipe, and where none of it is of use."""
    found: dict[str, TunedRef] = {}
    wrong = []
    for d in decisions:
        ref = tuned.refs.get(d.tensor.module)
        if d.scheme is None or ref is None:
            continue
        if tuned.schemes[d.tensor.module] != asdict(d.scheme) or tuned.shapes[d.tensor.module] != d.tensor.shape:
            wrong.append(d.tensor.module)
        found[d.tensor.name] = ref
    left = sorted(tuned.refs.keys() - {d.tensor.module for d in decisions if d.scheme})
    if wrong or left or not found:
        told = (wrong or left)[:SHOWN]
        raise BadTuned(
            f"{tuned.label} does not fit {len(wrong) + len(left)} modules: {', '.join(told) or 'all'}; tune with the "
            "scheme, format and options of the output"
        )
    return found


def check_input_scales(
    decisions: Sequence["Decision"], layout: "Layout", found: Mapping[str, TunedRef], tuned: TunedCodes | None
) -> None:
    """Whether all weights have the scales of activations that the layout writes. Raises BadOption where nothing was
    tuned, BadTuned for a folder without them."""
    wanted = [d for d in decisions if d.scheme and wants_input_scale(layout, d.scheme)]
    lacking = [d for d in wanted if (ref := found.get(d.tensor.name)) is None or ref.input_scale is None]
    if not lacking:
        return
    scheme = lacking[0].scheme
    assert scheme
    if tuned is None:
        raise BadOption(
            f"{scheme.name} has scales of activations that only data give: `shardq tune SOURCE --scheme "
            f"{scheme.name.replace('-', '_')} --algorithm rtn` finds them and makes the output; or take a scheme whose "
            "activations get their scales while serving"
        )
    told = ", ".join(d.tensor.module for d in lacking[:SHOWN])
    raise BadTuned(
        f"{tuned.label} has no scales of activations for {len(lacking)} modules of {scheme.name}: {told}; keep them "
        "with --ignore, and tune with the same options"
    )


def read_tuned(ref: TunedRef, row: int, end_row: int) -> "Quantized":
    """Canonical codes of some rows. Raises BadTuned when the file has changed since it was checked."""
    import numpy as np

    from shardq.quantizers.quantized import Quantized

    path = ref.stamp.path
    with reading(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            _check_stamp(fd, ref)
            arrays: list[Any] = []
            for part, begin in zip(PARTS, ref.begins, strict=True):
                width = ref.columns if part == "codes" else ref.groups
                made = np.empty((end_row - row, width), np.uint8 if DTYPES[part] == "U8" else np.float32)
                if begin >= 0:
                    pread_exact(fd, made.data, begin + row * width * made.itemsize, path)
                arrays.append(made if begin >= 0 else None)
        finally:
            os.close(fd)
    codes, scales, zeros, biases = arrays
    value = ref.input_scale.value if ref.input_scale else None
    return Quantized(codes, scales, zeros, biases, ref.global_scale, value)


def read_factors(ref: TunedRef) -> Factors:
    """What the weight was multiplied by before it got these codes. Raises as `read_tuned`."""
    import numpy as np

    found: list[Any] = []
    with reading(ref.stamp.path):
        fd = os.open(ref.stamp.path, os.O_RDONLY)
        try:
            _check_stamp(fd, ref)
            for size, begin in zip((ref.rows, ref.columns), ref.factors, strict=True):
                made = np.empty(size, np.float32)
                if begin >= 0:
                    pread_exact(fd, made.data, begin, ref.stamp.path)
                found.append(made if begin >= 0 else None)
        finally:
            os.close(fd)
    return Factors(*found)


def _check_stamp(fd: int, ref: TunedRef) -> None:
    if take_stamp(fd, ref.stamp.path) != ref.stamp:
        raise BadTuned(f"{os.path.basename(ref.stamp.path)} has changed since the plan was made; start again")


def read_block(path: Path, found: TunedBlocks) -> None:
    """Add what a block's file holds. Raises BadTuned."""
    try:
        header = read_header(path, path.name)
        said, hashes = json.loads(header.metadata["modules"]), json.loads(header.metadata.get(PLAIN, "{}"))
        with reading(path):
            fd = os.open(path, os.O_RDONLY)
        try:
            stamp = take_stamp(fd, os.path.abspath(path))
        finally:
            os.close(fd)
        tensors = {t.name: t for t in header.tensors}
        for module, own in said.items():
            parts = [tensors.get(f"{part}.{module}") for part in PARTS]
            codes, scales = parts[0], parts[1]
            factors = [tensors.get(f"{kind}.{module}") for kind in FACTORS]
            if codes is None or scales is None or not _fit(parts) or not _fit_factors(factors, codes):
                raise BadTuned(f"{path.name}: the arrays of {module} do not go together: tune again")
            found.schemes[module] = own["scheme"]
            rows, columns = found.shapes[module] = codes.shape[0], codes.shape[1]
            of_inputs = InputScale(**own["input_scale"]) if "input_scale" in own else None
            found.refs[module] = TunedRef(
                stamp, columns, scales.shape[1], _begins(parts), own["global_scale"], of_inputs, rows, _begins(factors)
            )
        for name, sha256 in hashes.items():
            t = tensors[f"{PLAIN}.{name}"]
            found.replaced[name] = ReplacedRef(stamp, t.begin, t.dtype, tuple(t.shape), str(sha256))
    except (CorruptShard, UnknownDtype, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadTuned(f"{path.name} is damaged ({error}): tune again") from error


def _begins(parts: Sequence[HeaderTensor | None]) -> tuple[int, ...]:
    return tuple(-1 if t is None else t.begin for t in parts)


def _fit_factors(factors: Sequence[HeaderTensor | None], codes: HeaderTensor) -> bool:
    """Vectors of the rows and columns of the codes."""
    return all(
        t is None or (t.dtype == DTYPES[kind] and tuple(t.shape) == (size,))
        for kind, t, size in zip(FACTORS, factors, codes.shape, strict=True)
    )


def _fit(parts: Sequence[HeaderTensor | None]) -> bool:
    """Matrices of the same rows, in the types that they are written in, and scales and what goes with them alike."""
    there = [(name, t) for name, t in zip(PARTS, parts, strict=True) if t]
    alike = {t.shape for name, t in there if name != "codes"}
    return (
        all(len(t.shape) == 2 and t.dtype == DTYPES[name] for name, t in there)
        and len({t.shape[0] for _, t in there}) == 1
        and len(alike) == 1
    )


def _sha256(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
