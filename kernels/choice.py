"""Which kernel set runs: the fastest that this CPU has, or the one that was asked for, never another."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Final, Literal

from shardq.kernels.contract import KernelSet

NAMES: Final = ("reference", "baseline", "avx2", "avx512", "neon")
ENVIRONMENT_NAME: Final = "SHARDQ_KERNELS"

Cause = Literal["no such set", "not built", "not on this CPU"]


class KernelChoiceError(RuntimeError):
    """The kernel set that was asked for cannot run; `cause` says which of the three reasons it is."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause: Final = cause


@dataclass(frozen=True, slots=True)
class SetInfo:
    """One row of the table of kernel sets."""

    name: str
    built: bool  # present in this installation
    usable: bool  # and this CPU can run it
    chosen: bool  # and load() returns it
    why: str  # why it is not usable; empty when it is


@dataclass(frozen=True, slots=True)
class _Native:
    kernels: KernelSet
    usable: bool
    why: str


def _native_sets() -> tuple[_Native, ...]:
    """The sets of the native module, slowest first. Raises KernelChoiceError when there is no module."""
    try:
        from shardq.kernels import _native
    except ImportError as error:
        message = (
            "the native kernel module shardq.kernels._native cannot be imported"
            f" ({error}); install shardq with `pip install .` and a C++17 compiler,"
            f" or set {ENVIRONMENT_NAME}=reference to run the slow torch reference"
        )
        raise KernelChoiceError("not built", message) from error
    return tuple(_Native(kernels, usable, why) for kernels, usable, why in _native.native_sets())


def _reference() -> KernelSet:
    if importlib.util.find_spec("torch") is None:
        raise KernelChoiceError("not built", "kernel set reference needs torch; install it with `pip install torch`")
    from shardq.kernels.reference import ReferenceSet

    return ReferenceSet()


def load(name: str | None = None) -> KernelSet:
    """The kernel set called `name`, else the one that SHARDQ_KERNELS names, else the fastest native one that runs here.

    A name is binding. Raises KernelChoiceError: no such set, not built, or not on this CPU; also when no name is
    given and the native module is missing. An empty SHARDQ_KERNELS counts as none.
    """
    asked = name if name is not None else os.environ.get(ENVIRONMENT_NAME) or None
    if asked is not None and asked not in NAMES:
        raise KernelChoiceError("no such set", f"there is no kernel set {asked!r}; choose one of {', '.join(NAMES)}")
    if asked == "reference":
        return _reference()
    found = _native_sets()
    if asked is None:
        return [native.kernels for native in found if native.usable][-1]
    for native in found:
        if native.kernels.name != asked:
            continue
        if not native.usable:
            message = f"this CPU cannot run kernel set {asked}: {native.why}; unset {ENVIRONMENT_NAME} to take the best"
            raise KernelChoiceError("not on this CPU", message)
        return native.kernels
    built = ", ".join(native.kernels.name for native in found)
    raise KernelChoiceError("not built", f"kernel set {asked} is not in this build; choose one of {built}")


def sets() -> tuple[SetInfo, ...]:
    """All kernel sets that there are, in the order of NAMES.

    Raises what load() raises, except that without a native module and without SHARDQ_KERNELS nothing is chosen.
    """
    try:
        found = {native.kernels.name: native for native in _native_sets()}
        why_absent = "not in this build"
    except KernelChoiceError as error:
        found, why_absent = {}, str(error)
    chosen = load().name if found or os.environ.get(ENVIRONMENT_NAME) else ""
    has_torch = importlib.util.find_spec("torch") is not None
    why = "" if has_torch else "torch is not installed"
    rows = [SetInfo("reference", has_torch, has_torch, chosen == "reference", why)]
    for name in NAMES[1:]:
        native = found.get(name)
        if native is None:
            rows.append(SetInfo(name, False, False, False, why_absent))
        else:
            rows.append(SetInfo(name, True, native.usable, chosen == name, native.why))
    return tuple(rows)
