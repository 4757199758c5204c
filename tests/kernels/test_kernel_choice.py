"""Which set runs: binding names, three causes of refusal, the table, and a missing native module."""

import subprocess
import sys

import pytest

from shardq.kernels import NAMES, KernelChoiceError, load, sets
from shardq.kernels.choice import ENVIRONMENT_NAME


def test_a_name_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelChoiceError, match=r"no kernel set 'sse9'; choose one of reference, baseline") as caught:
        load("sse9")
    assert caught.value.cause == "no such set"
    monkeypatch.setenv(ENVIRONMENT_NAME, "AVX2")
    with pytest.raises(KernelChoiceError) as caught:
        load()
    assert caught.value.cause == "no such set"


def test_every_set_runs_or_says_why_not() -> None:
    for row in sets():
        if row.usable:
            assert load(row.name).name == row.name
            assert row.built
            assert row.why == ""
        else:
            with pytest.raises(KernelChoiceError) as caught:
                load(row.name)
            assert caught.value.cause == ("not on this CPU" if row.built else "not built")
            assert row.name in str(caught.value)
            assert row.why != ""


def test_the_table_has_every_name_once_and_one_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_NAME, raising=False)
    assert tuple(row.name for row in sets()) == NAMES
    assert [row.name for row in sets() if row.chosen] == [load().name]
    assert load().name == [row.name for row in sets() if row.usable and row.name != "reference"][-1]
    monkeypatch.setenv(ENVIRONMENT_NAME, "baseline")
    assert [row.name for row in sets() if row.chosen] == ["baseline"]
    assert load().name == "baseline"
    assert load("reference").name == "reference"


def test_a_built_set_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardq.kernels import _native

    found = _native.native_sets()
    crippled = [(kernels, kernels.name == "baseline", "it lacks everything") for kernels, _, _ in found]
    monkeypatch.setattr(_native, "native_sets", lambda: crippled)
    name = found[-1][0].name
    with pytest.raises(KernelChoiceError, match=f"cannot run kernel set {name}: it lacks everything") as caught:
        load(name)
    assert caught.value.cause == "not on this CPU"
    monkeypatch.delenv(ENVIRONMENT_NAME, raising=False)
    assert load().name == "baseline"


def test_without_the_native_module_only_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shardq.kernels._native", None)
    monkeypatch.delattr("shardq.kernels._native", raising=False)
    monkeypatch.delenv(ENVIRONMENT_NAME, raising=False)
    for name in (None, "baseline"):
        with pytest.raises(KernelChoiceError, match="pip install") as caught:
            load(name)
        assert caught.value.cause == "not built"
    assert [row.name for row in sets() if row.usable] == ["reference"]
    assert not any(row.chosen for row in sets())
    assert load("reference").name == "reference"


def test_loading_native_kernels_imports_no_torch() -> None:
    code = (
        "import sys, shardq.kernels as k; k.load('baseline'); k.sets()\n"
        "print(sorted({'torch', 'click', 'rich', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
