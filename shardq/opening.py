"""Sources and destinations, opened as the words of a run and its limits say."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardq.destinations.base import Destination
from shardq.errors import BadOption
from shardq.limits import XET_BUFFER_BYTES, Limits
from shardq.pace import Pace
from shardq.recipe import Recipe
from shardq.sources import Source, open_source

if TYPE_CHECKING:
    from shardq.sources.hub_xet import XetOptions


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
