"""GPUs that are not there: tensors lie in main memory, and behave as if some of them were on `cuda:0` or another. What
CUDA would refuse is refused: arithmetic across devices, and arrays of what lies on a device."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

HERE: Final = torch.device("cpu")
THERE: Final = torch.device("cuda", 0)
ACROSS: Final = frozenset(
    {"copy_", "__setitem__", "__getitem__", "_has_compatible_shallow_copy_type"}
)  # may have tensors of both


def place_of(t: torch.Tensor) -> torch.device:
    """Where a tensor pretends to be."""
    return getattr(t, "pretended", HERE)


class PretendedDevice(TorchFunctionMode):
    """While it is on, `cuda` is a device."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[torch.device, tuple[int, ...]]] = []  # where to, and shapes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return place_of(args[0])
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].pretended = place_of(args[1])
            return func(*args)
        if name in ("to", "cpu", "cuda") and isinstance(args[0], torch.Tensor):
            return self._to(name, *args, **named)
        tensors = list(_tensors([*args, *named.values()]))
        places = {place_of(t) for t in tensors if t.ndim or place_of(t) != HERE}
        if name in ("numpy", "__array__") and places - {HERE}:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if len(places) > 1 and name not in ACROSS:
            raise RuntimeError(f"{name}: expected all tensors on the same device")
        asked = named.get("device")
        if asked is not None and torch.device(asked).type == "cuda":
            named["device"] = HERE
        place = _device(asked) if asked is not None else place_of(tensors[0]) if tensors else HERE
        if name == "histc":  # CUDA counts integers
            args = [args[0].float(), *args[1:]]
        made = func(*args, **named)
        for t in _tensors([made]):
            t.pretended = place  # type: ignore[attr-defined]
        return made

    def _to(self, name: str, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        words = [*args, *kwargs.values()]
        wanted = next((_device(w) for w in words if isinstance(w, str | torch.device)), None)
        wanted = next((place_of(w) for w in words if isinstance(w, torch.Tensor)), wanted)
        place = {"cpu": HERE, "cuda": THERE}.get(name, wanted or place_of(t))
        if place.type == "meta":
            return torch.Tensor.to(t, "meta")
        kinds = [w for w in words if isinstance(w, torch.dtype)]
        made = torch.Tensor.to(t, *kinds) if kinds else t
        if place != place_of(t):
            self.moved.append((place, tuple(t.shape)))
            made = made.clone()
        made.pretended = place  # type: ignore[attr-defined]
        return made


def _device(word: Any) -> torch.device:
    device = torch.device(word)
    return THERE if device.type == "cuda" and device.index is None else device


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
