"""The model card: what this is, how it was made, how far it is from its source."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from shardq.html_report.grid import Grid
from shardq.html_report.picture import PICTURE
from shardq.html_report.rows import Row, total_roles
from shardq.ledger import Errors
from shardq.plans import Plan
from shardq.recipe import Recipe, rule_values
from shardq.sources.base import Source

if TYPE_CHECKING:
    from shardq.gguf.options import GgufOptions
    from shardq.gguf.planned import PlannedGguf

README: Final = "README.md"
CARRIED: Final = (
    "license",
    "license_name",
    "license_link",
    "pipeline_tag",
    "language",
    "library_name",
)
WORST: Final = 5  # modules listed with the largest relative error


def make_card(
    plan: Plan,
    errors: Mapping[str, Errors],
    total: Errors,
    source_card: str | None,
    rows: Sequence[Row],
    pictured: Grid | None,
) -> str:
    """README.md with the front matter that the Hub reads (JSON values, which YAML contains); the same text for the same
    plan and output. `pictured`: what PICTURE beside it shows."""
    c = plan.checkpoint
    counts = {a: sum(d.action == a for d in plan.decisions) for a in ("quantize", "copy", "drop")}
    front = "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in _front_matter(plan, source_card).items())
    at = f" at commit `{c.commit}`" if c.commit else ""
    done = {"quantize": "Quantized", "convert": "Converted", "dequantize": "Dequantized"}[plan.recipe.purpose]
    data = "with" if plan.recipe.tuned else "without"
    left_out = "without a place in GGUF left out" if plan.gguf else "tensors of prediction layers left out"
    lines = [
        "---", front, "---", "",
        f"# {c.label.rpartition('/')[2]}, {plan.recipe.title}", "",
        f"{done} from `{c.label}`{at} with shardq, {data} calibration data:", "",
        "```", make_command(plan), "```", "",
        f"- {counts['quantize']} weight matrices quantized, layout `{plan.layout.name}`; {counts['copy']} kept"
        + (f", {counts['drop']} {left_out}." if counts["drop"] else "."),
        *(_type_lines(plan.gguf) if plan.gguf else ()),
        f"- {plan.source_bytes / 1e9:.2f} GB became {plan.output_bytes / 1e9:.2f} GB.",
        f"- Loads in: {plan.layout.loaders}.",
        *(_error_lines(errors, total) if counts["quantize"] else ()), "",
        *_size_lines(rows),
        *(_picture_lines(pictured) if pictured else ()),
        "Every source tensor is accounted for in `shardq-ledger.json.zst`; `shardq verify` checks it.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _size_lines(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"| {t.role} | {t.scheme or 'kept'} | {t.tensors} | {t.output_bytes / 1e9:.3f} | {t.bits_per_weight:.2f} |"
        for t in total_roles(rows)
    ]
    return ["| role | scheme | tensors | GB | bits per weight |", "| --- | --- | --- | --- | --- |", *lines, ""]


def _picture_lines(grid: Grid) -> list[str]:
    names = ", ".join(f"`{m}`" for m in grid.measured)
    return [
        f"![relative errors by layer and module]({PICTURE})", "",
        f"Relative errors, the darker the larger. Columns are layers of `{grid.stack}`, rows from the top {names}.", "",
    ]  # fmt: skip


def _type_lines(gguf: "PlannedGguf") -> list[str]:
    counts = Counter(t.type for t in gguf.tensors)
    return [f"- Types of tensors: {', '.join(f'{n} {kind}' for kind, n in counts.most_common())}."]


def _error_lines(errors: Mapping[str, Errors], total: Errors) -> list[str]:
    worst = sorted(errors.items(), key=lambda kv: (-kv[1].relative, kv[0]))[:WORST]
    return [
        f"- Relative error of all quantized weights (root of squared error over square): {total.relative:.5f}.", "",
        "Largest relative errors:", "", "| tensor | relative error | largest error |", "| --- | --- | --- |",
        *(f"| `{name}` | {e.relative:.5f} | {e.max_error:.3g} |" for name, e in worst),
    ]  # fmt: skip


def read_source_card(plan: Plan, source: Source) -> str | None:
    """README.md of the source, None without one."""
    for f in plan.checkpoint.side_files:
        if f.name == README:
            return source.read(f.name, 0, f.size_bytes).decode(errors="replace")
    return None


def make_command(plan: Plan) -> str:
    """The command that gives these bytes, with the options that decide them and no others."""
    r = plan.recipe
    if r.purpose == "convert":
        return shlex.join(["shardq", "convert", _source_words(plan), "--to", r.layout, *_conversion(r)])
    if r.purpose == "dequantize":
        return shlex.join(["shardq", "dequantize", _source_words(plan), *(["--dtype", r.dtype] if r.dtype else [])])
    return shlex.join(["shardq", "quantize", _source_words(plan), *_options(r)])


def _conversion(r: Recipe) -> list[str]:
    words = [x for p in r.ignore for x in ("--ignore", p.text)]
    if r.symmetric is not None:
        words.append("--sym" if r.symmetric else "--asym")
    return [*words, *(["--requantize"] if r.requantize else [])]


def _source_words(plan: Plan) -> str:
    c = plan.checkpoint
    return f"{c.label}@{c.commit}" if c.commit else c.label


def _options(r: Recipe) -> list[str]:
    if r.gguf:
        return _gguf_options(r, r.gguf)
    words = ["--scheme", r.preset, "--format", r.layout]
    if r.scheme.is_adjustable:
        words += ["--bits", str(r.scheme.bits), "--group-size", str(r.scheme.group_size)]
        words += ["--sym" if r.scheme.symmetric else "--asym"]
    for p in r.ignore:
        words += ["--ignore", p.text]
    if any(p.kind in ("search", "substring") for p in (*r.ignore, *(x.pattern for x in r.layer_rules))):
        words += ["--ignore-dialect", "auto-round"]
    for p in r.include:
        words += ["--include", p.text]
    if r.layer_rules:
        words += ["--layer-config", _layer_config(r)]
    if r.quant_lm_head:
        words.append("--quant-lm-head")
    if r.ragged != "refuse":
        words += ["--ragged", r.ragged]
    if r.policy != "all":
        words += ["--policy", r.policy]
    if r.mtp != "keep":
        words += ["--mtp", r.mtp]
    if r.quant_nontext:
        words.append("--quant-nontext")
    if r.requantize:
        words.append("--requantize")
    if r.decode != "exact":
        words += ["--decode", r.decode]
    if r.importance:
        words += ["--importance", r.importance.label]
    if r.fold:
        from shardq.fold import FOLD

        words += ["--fold", FOLD]
    if r.tuned:
        words += ["--tuned", r.tuned.label]
    return [*words, "--search", r.search]


def _gguf_options(r: Recipe, own: "GgufOptions") -> list[str]:
    words = ["--scheme", f"gguf:{r.preset.lower()}"]
    for pattern, kind in own.overrides:
        words += ["--tensor-type", f"{pattern}={kind}"]
    for option, value in (
        ("--output-tensor-type", own.output_type),
        ("--token-embedding-type", own.embedding_type),
        ("--split-max-size", own.max_part_bytes),
        ("--tokenizer-pre", own.tokenizer_pre),
        ("--imatrix", r.importance and r.importance.label),
        ("--decode", r.decode if r.decode != "exact" else None),
    ):
        words += [option, str(value)] if value else []
    return [*words, *(["--pure"] if own.pure else []), *(["--requantize"] if r.requantize else [])]


def _layer_config(r: Recipe) -> str:
    return json.dumps({rule.pattern.text: rule_values(rule) for rule in r.layer_rules})


def _front_matter(plan: Plan, source_card: str | None) -> dict[str, Any]:
    source = _read_front_matter(source_card or "")
    front: dict[str, Any] = {}
    if plan.checkpoint.commit:  # only a Hub repo has a name that others can follow
        front |= {"base_model": plan.checkpoint.label, "base_model_relation": "quantized"}
    front |= {k: source[k] for k in CARRIED if k in source}
    front["library_name"] = plan.layout.library or front.get("library_name", "transformers")
    front["tags"] = ["shardq", plan.layout.name.replace("_", "-"), plan.recipe.title.lower()]
    return front


def _read_front_matter(card: str) -> dict[str, Any]:
    """The YAML block at the head of a card; empty when there is none or it is malformed."""
    if not card.startswith("---"):
        return {}
    import yaml

    try:
        text = card[3:].partition("\n---")[0] + "\n"
        front = yaml.safe_load(text.replace("- no\n", '- "no"\n'))  # the language, which YAML takes for False
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}
