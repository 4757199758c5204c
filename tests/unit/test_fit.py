"""Recipes whose weights fit, and what a plan costs, from recorded headers."""

import json
import math
from pathlib import Path

import pytest

import shardq
from shardq import api
from shardq.errors import BadOption, LayoutRefuses, SourceUnreadable
from shardq.fit import parse_space, recipe_words
from shardq.reports import describe_cost
from shardq.sizes import parse_rate, parse_time
from shardq.speed import COPY, HASH, Speed, count_work, estimate, read_speed, speed_path, write_speed
from shardq.traffic import REQUEST_LIMITS, WINDOW_S, requests_s

MISTRAL = Path(__file__).parents[1] / "data" / "hub_index" / "mistral-7b"


def test_spaces() -> None:
    four = parse_space("4x80G", 0.25)
    assert (four.devices, four.each_bytes, four.usable_bytes) == (4, 80 * 10**9, 240 * 10**9)
    assert parse_space("512GiB", 0.0).usable_bytes == 512 << 30
    for text, reserve in (("0x80G", 0.2), ("4x", 0.2), ("80", -0.1), ("80G", 1.0), ("x80G", 0.2)):
        with pytest.raises(BadOption):
            parse_space(text, reserve)


def test_the_most_bits_that_fit_are_the_best() -> None:
    recipes = ["W8A16", "W4A16", "W4A16G64", "W2A16G64"]
    found = api.propose(MISTRAL, recipes, "6G", reserve=0.0, recorded=True)
    sizes = {r: shardq.plan_headers(MISTRAL, r).output_bytes for r in recipes}
    plain = [p for p in found.proposals if p.target_bits is None]
    assert {p.recipe.preset: p.weights_bytes for p in plain} == sizes
    assert [p.fits for p in plain] == [sizes[p.recipe.preset] <= 6e9 for p in plain]
    order = [p.weights_bytes for p in found.proposals]
    assert order == sorted(order, reverse=True)
    best = found.best
    assert best is not None
    assert best.options == "W4A16,W8A16"
    assert 0 <= 6e9 - best.weights_bytes < 0.01 / 8 * 7.3e9  # what a hundredth of a bit is
    assert recipe_words(best) == {
        "scheme": "W4A16", "format": "auto_round", "target_bits": best.target_bits, "options": "W4A16,W8A16",
    }  # fmt: skip
    assert not found.source_fits
    assert api.propose(MISTRAL, recipes, "1G", recorded=True).best is None


def test_a_mixture_of_so_many_bits_has_the_size_that_is_told() -> None:
    """Of a model of which half is W8A16 the size is what the plan says."""
    rules = {f"re:model.layers.{n}\\.": "W8A16" for n in range(0, 32, 2)}
    mixed = shardq.plan_headers(MISTRAL, shardq.make_recipe("W4A16", layer_config=rules))
    found = api.propose(MISTRAL, ["W8A16", "W4A16"], str(mixed.output_bytes), reserve=0.0, recorded=True)
    best = found.best
    assert best is not None
    assert best.target_bits is not None
    stored_bits = [bits + (16 + bits) / 128 for bits in (4, 8)]  # with a scale and a zero point for a group
    assert best.target_bits == math.floor(100 * sum(stored_bits) / 2) / 100


def test_what_cannot_be_had_is_told_and_keeps_nothing_else_back() -> None:
    found = api.propose(MISTRAL, [shardq.make_recipe("W4A16@gptq", group_size=48), "W4A16"], "80G", recorded=True)
    assert [(name, type(error).__name__) for name, error in found.refused] == [("W4A16G48", "BadGroupSize")]
    with pytest.raises(LayoutRefuses):
        api.propose(MISTRAL, ["MXFP4@fp8"], "80G", recorded=True)


def test_requests_wait_for_windows() -> None:
    assert requests_s(3000, REQUEST_LIMITS["anonymous"]) == 0
    assert requests_s(3001, REQUEST_LIMITS["anonymous"]) == WINDOW_S
    assert requests_s(9001, REQUEST_LIMITS["anonymous"]) == 3 * WINDOW_S
    assert requests_s(9001, REQUEST_LIMITS["pro"]) == 0


def test_rates_and_times() -> None:
    rates = {"1Gbit": 125 * 10**6, "100Mbit/s": 12_500_000, "50M": 5 * 10**7, "8": 8}
    assert {t: parse_rate(t, "--x") for t in rates} == rates
    assert [parse_time(t, "x") for t in ("90s", "1.5m", "2h", "1d", None)] == [90.0, 90.0, 7200.0, 86400.0, None]
    for text in ("90", "h", "-1s", "1w", ""):
        with pytest.raises(BadOption):
            parse_time(text, "x")
    for text in ("bit", "1Xbit", "0bit", "fast"):
        with pytest.raises(BadOption):
            parse_rate(text, "--x")


def test_cost_is_what_was_measured_times_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = shardq.plan_headers(MISTRAL, "W4A16")
    assert read_speed() is None
    assert describe_cost([plan], 10**9)["cpu"] is None
    work = count_work(plan)
    assert work.keys() == {"int4", COPY}
    assert work["int4"] == sum(d.tensor.numel for d in plan.decisions if d.scheme)
    speed = Speed("cpu", "avx2", "0.0", "2026-01-01T00:00:00+00:00", {"int4": 2.0, COPY: 0.5, HASH: 1.0})
    assert write_speed(speed) == tmp_path / "shardq" / "speed.json" == speed_path()
    assert read_speed() == speed
    expected_s = (2.0 * work["int4"] + 0.5 * work[COPY] + plan.output_bytes) / 1e9  # no commit: nothing is downloaded
    assert math.isclose(estimate(plan, speed).cpu_s, expected_s)
    cost = describe_cost([plan], 10**9)
    assert math.isclose(cost["cpu"]["seconds"], expected_s)
    assert not cost["cpu"]["same_machine"]
    assert cost["link"]["download_s"] == plan.source_bytes / 1e9
    other = estimate(shardq.plan_headers(MISTRAL, "W8A16"), speed)
    assert other.unknown_weights == other.weights == work["int4"]
    words = dict.fromkeys(("cpu", "kernels", "version", "measured"), "")
    speed_path().write_text(json.dumps({"format": 0, **words, "ns": {}}))
    with pytest.raises(SourceUnreadable, match="another version"):
        read_speed()
    speed_path().write_text("{}")
    with pytest.raises(SourceUnreadable, match="kernels --bench"):
        read_speed()
