"""What the words of a call stand for, besides the source and the recipe: destinations, and checks of a plan."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardq.destinations.base import Destination
from shardq.errors import BadOption
from shardq.limits import XET_BUFFER_BYTES, Limits
from shardq.plans import Plan
from shardq.recipe import Recipe

if TYPE_CHECKING:
    from shardq.sources.hub_xet import XetOptions


def open_destinations(
    push_to: str | None, recipes: Sequence[Recipe], private: bool, branch: str | None, limits: Limits
) -> list[Destination | None]:
    """Raises BadOption."""
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
    return [_destination(repo, private, branch, limits) for repo in repos]


def xet_options(limits: Limits) -> "XetOptions | None":
    if not limits.xet:
        return None
    from shardq.sources.hub_xet import XetOptions

    return XetOptions(XET_BUFFER_BYTES)


def check_targets_of(plan: Plan, targets: Sequence[str]) -> Plan:
    """`plan`, if every target loads what it makes. Raises BadOption and TargetRefuses."""
    if targets:
        from shardq.serving.served import served_of_plan
        from shardq.serving.targets import check_targets, parse_target

        if not plan.files:
            raise BadOption("--target needs headers: of this checkpoint only an index is known")
        check_targets(served_of_plan(plan), [parse_target(t) for t in targets])
    return plan


def _destination(push_to: str, private: bool, branch: str | None, limits: Limits) -> Destination:
    """Raises BadOption."""
    if limits.delete_source and not limits.keep_local:
        raise BadOption(
            "--delete-source with --push-to would leave uploads that no commit names as the only copy of the weights: "
            "add --keep-local, or delete the source afterwards"
        )
    from shardq.destinations.hub import HubDestination  # brings an HTTP client

    return HubDestination(push_to, branch=branch, private=private)
