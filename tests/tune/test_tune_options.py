"""Words of AutoRound, and the options that they stand for."""

import pytest

from shardq.errors import BadOption

pytest.importorskip("torch")

from shardq.tune.options import build_options


def test_recipes_have_auto_rounds_numbers() -> None:
    default, light, best = (build_options({"recipe": name}) for name in ("default", "light", "best"))
    assert (default.signround.iters, default.data.nsamples, default.data.seqlen) == (200, 128, 2048)
    assert (light.signround.iters, light.signround.lr, light.data.nsamples) == (50, 5e-3, 128)
    assert (best.signround.iters, best.data.nsamples) == (1000, 512)
    assert default.signround.rates(4) == (1 / 200, 1 / 200)
    assert best.signround.rates(2) == (2 / 1000, 2 / 1000)
    assert light.signround.rates(4) == (5e-3, 5e-3)


def test_recipes_without_learning_name_their_algorithm() -> None:
    searched, nearest = (build_options({"recipe": name}) for name in ("opt-rtn", "rtn"))
    assert (searched.algorithm, searched.data.nsamples) == ("opt-rtn", 128)
    assert (nearest.algorithm, nearest.data.nsamples) == ("rtn", 1)
    assert build_options({"recipe": "rtn", "algorithm": "gptq", "nsamples": 8}).algorithm == "gptq"
    with pytest.raises(BadOption, match="--iters has a meaning for --algorithm signround, not for rtn"):
        build_options({"recipe": "rtn", "iters": 3})


def test_words_replace_a_recipes() -> None:
    found = build_options({"recipe": "light", "iters": 10, "seed": 0, "enable_minmax_tuning": False, "nsamples": 3})
    assert (found.signround.iters, found.signround.lr, found.data.nsamples) == (10, 5e-3, 3)
    assert found.data.seed == 0
    assert not found.signround.enable_minmax_tuning
    assert build_options({"algorithm": "gptq", "damping": 0.1}).gptq.damping == 0.1
    plain = build_options({"algorithm": "gptq", "shrinkage": 0.0})
    assert (plain.gptq.shrinkage, plain.as_dict()["gptq"]["shrinkage"]) == (0.0, 0.0)
    steps = build_options({"momentum": 0.5, "enable_act_quant": False})
    assert (steps.signround.momentum, steps.signround.enable_adam, steps.enable_act_quant) == (0.5, False, False)
    assert build_options({"enable_adam": True}).signround.enable_adam


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"algorithm": "gptq", "iters": 3}, "--iters has a meaning for --algorithm signround"),
        ({"algorithm": "gptq", "shrinkage": 1.5}, "--shrinkage 1.5: expected 0 to 1"),
        ({"algorithm": "gptq", "damping": -1.0}, "--damping -1.0"),
        ({"damping": 0.1}, "--damping has a meaning for --algorithm gptq"),
        ({"recipe": "worst"}, "--recipe 'worst'"),
        ({"dtype": "int8"}, "--dtype"),
        ({"nsamples": 0}, "a sample of a token"),
        ({"iters": 0}, "at least one of iters"),
        ({"sorcery": 1}, "no option of tuning"),
        ({"momentum": -0.1}, "--momentum -0.1"),
        ({"momentum": 0.9, "enable_adam": True}, "none with Adam"),
    ],
)
def test_words_without_a_meaning_are_refused(words: dict[str, object], told: str) -> None:
    with pytest.raises(BadOption, match=told):
        build_options(words)
