"""Hub collections that a manifest asks for: made if need be, and each repo in them once it is published."""

from functools import partial
from typing import TYPE_CHECKING

from shardq.batch.manifest import Entry
from shardq.destinations.hub import ask_library
from shardq.version import VERSION

if TYPE_CHECKING:
    from shardq.destinations.hub_client import HubClient


class Collector:
    """Puts repos into collections; asks for each collection once."""

    def __init__(self, client: "HubClient") -> None:
        """`client` knows the endpoint."""
        from huggingface_hub import HfApi

        self._client = client
        self._api = HfApi(endpoint=client.endpoint, library_name="shardq", library_version=VERSION)
        self._slugs: dict[str, str] = {}

    def add(self, entry: Entry) -> None:
        """Make the entry's collection if there is none, and put its repo there unless it is in it.

        A new collection is private if the repo is. Raises HubAccess, HubTransfer.
        """
        assert entry.collection
        assert entry.repo
        if entry.collection not in self._slugs:
            self._make(entry.collection, entry.private)
        repo, what = entry.repo.partition("@")[0], f"collection {entry.collection}"
        add = partial(self._api.add_collection_item, self._slugs[entry.collection], repo, "model", exists_ok=True)
        ask_library(self._client.of(repo, "main"), add, what)

    def _make(self, name: str, private: bool) -> None:
        owner, _, title = name.partition("/")

        def make() -> None:
            made = self._api.create_collection(title, namespace=owner, private=private, exists_ok=True)
            self._slugs[name] = made.slug

        ask_library(self._client.of(name, "main"), make, f"collection {name}")
