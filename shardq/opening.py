"""What a run is given, as words and limits say: source, folders and destinations, and engines that are to load it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardq.destinations.base import Destination
from shardq.errors import BadOption
from shardq.limits import XET_BUFFER_BYTES, Limits
from shardq.pace import Pace
from shardq.plans import Plan
from shardq.recipe import Recipe
from shardq.run import Order
from shardq.sources import Source, open_source

if TYPE_CHECKING:
    from shardq.sources.hub_xet import XetOptions


def check_together(recipes: Sequence[Recipe]) -> None:
    """Raises BadOption for recipes that one read of a source cannot serve: outputs are of the same tensors, read and
    decoded alike."""
    if len({r.mtp == "drop" for r in recipes}) > 1:
        raise BadOption("--mtp drop for some outputs only: make those in a run of their own")
    if len({r.quant_lm_head for r in recipes}) > 1:  # a tied one would be a tensor more in some
        raise BadOption("--quant-lm-head for some outputs only: make those in a run of their own")
    if len({(r.purpose, r.decode, r.dtype) for r in recipes}) > 1:
        raise BadOption("outputs of one run read their source alike: give --decode for all of them, or make two runs")
    if len({r.fold and r.fold.sha256 for r in recipes}) > 1:
        raise BadOption("outputs of one run are of the same weights: give one --fold for all of them, or make two runs")


def make_orders(recipes: Sequence[Recipe], label: str, output_dir: str | Path | None) -> list[Order]:
    """Where each output goes. Raises BadOption for none, for two with one name, and as check_together."""
    if not recipes:
        raise BadOption("no scheme is given: expected at least one")
    check_together(recipes)
    name = label.rpartition("/")[2]
    if len(recipes) == 1:
        return [Order(recipes[0], Path(output_dir or f"{name}-{_short(recipes[0])}"))]
    prefix = "" if output_dir else f"{name}-"
    names = [f"{prefix}{r.scheme_name}-{r.layout}" for r in recipes]
    if twice := sorted(n for n, count in Counter(names).items() if count > 1):
        raise BadOption(f"{', '.join(twice)} would be made twice: give each scheme and layout once")
    return [Order(r, Path(output_dir or ".") / n) for r, n in zip(recipes, names, strict=True)]


def _short(recipe: Recipe) -> str:
    return recipe.layout if recipe.purpose == "convert" else recipe.scheme_name


def open_destinations(
    push_to: str | None, recipes: Sequence[Recipe], private: bool, branch: str | None, limits: Limits
) -> list[Destination | None]:
    """Where each output goes beside its folder: `push_to` with scheme and layout filled in. Raises BadOption."""
    if push_to is None:
        if private or branch or limits.keep_local:
            raise BadOption("--private, --branch and --keep-local have a meaning only with --push-to")
        return [None] * len(recipes)
    repos = [push_to.replace("{scheme}", r.scheme_name).replace("{layout}", r.layout) for r in recipes]
    if len(set(repos)) < len(repos):
        raise BadOption(
            f"--push-to {push_to} names one repo for {len(repos)} outputs: put {{scheme}} and {{layout}} into it, as "
            f"in {push_to}-{{scheme}}-{{layout}}"
        )
    pace = Pace(limits.max_rate_bytes_s)
    return [_destination(repo, private, branch, limits, pace) for repo in repos]


def _destination(push_to: str, private: bool, branch: str | None, limits: Limits, pace: Pace) -> Destination:
    """Raises BadOption."""
    if limits.delete_source and not limits.keep_local:
        raise BadOption(
            "--delete-source with --push-to would leave uploads that no commit names as the only copy of the weights: "
            "add --keep-local, or delete the source afterwards"
        )
    from shardq.destinations.hub import HubDestination  # brings an HTTP client

    return HubDestination(push_to, branch=branch, private=private, pace=pace)


def open_within(source: str, subfolder: str | None, limits: Limits) -> Source:
    """The source that `source` names, to be read as `limits` say. Raises what open_source does."""
    return open_source(source, subfolder, xet=_xet(limits), pace=Pace(limits.max_rate_bytes_s))


def _xet(limits: Limits) -> "XetOptions | None":
    if not limits.xet:
        return None
    from shardq.sources.hub_xet import XetOptions

    return XetOptions(XET_BUFFER_BYTES)


def check_engines(plan: Plan, targets: Sequence[str]) -> Plan:
    """`plan`, if every target loads what it makes. Raises BadOption and TargetRefuses."""
    if targets:
        from shardq.serving.served import served_of_plan
        from shardq.serving.targets import check_targets, parse_target

        if not plan.files:
            raise BadOption("--target needs headers: of this checkpoint only an index is known")
        check_targets(served_of_plan(plan), [parse_target(t) for t in targets])
    return plan
