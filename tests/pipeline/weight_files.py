"""What the files of weights in a folder hold, and how to damage them."""

from collections.abc import Iterator
from pathlib import Path

from shardq.files.safetensors import HeaderTensor, read_header


def tensors_of(folder: Path) -> Iterator[tuple[Path, HeaderTensor]]:
    """Each tensor and the file that has it, in the order of names and of places."""
    for path in sorted(folder.glob("*.safetensors")):
        yield from ((path, t) for t in read_header(path).tensors)


def flip(path: Path, at: int, bit: int) -> None:
    """Flip one bit of a file; twice is as before."""
    with path.open("r+b") as f:
        f.seek(at)
        (byte,) = f.read(1)
        f.seek(at)
        f.write(bytes([byte ^ 1 << bit]))
