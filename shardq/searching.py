"""Which weights get searched scales, by which search, and with whose importance: decided before a weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from shardq.errors import BadOption
from shardq.fold_weights import weigh
from shardq.importance import allows_both_signs, doubts, knows_means, match, stand_ins
from shardq.importance_vectors import BothRef, has_means
from shardq.roles import Role
from shardq.search import AUTO_ROUND, Kind, Search, Searches, default_search, kind_of

if TYPE_CHECKING:
    from shardq.decide import Decision
    from shardq.importance import Importance
    from shardq.importance_vectors import Ref, SizesRef
    from shardq.recipe import Recipe
    from shardq.schemes import Scheme

# Bits of a code at which a search without importance has never lost against round-to-nearest (bench/README.md): of
# powers of two and of 8-bit scales of four-bit floats all; of integers with zero points or biases 4 alone; of symmetric
# integers none: in decoders they lose, whatever weighs their errors.
WITHOUT_IMPORTANCE: Final[Mapping[Kind, range]] = MappingProxyType(
    {"powers": range(4, 9), "small_floats": range(4, 9), "asymmetric": range(4, 5), "symmetric": range(0)}
)
# Bits at which scales of both signs gain by few data once sizes of columns count as well: at 3 bits 0.54 of
# round-to-nearest's KL instead of 0.56, where few data alone have 0.67 instead of 0.64 (bench/README.md).
BOTH_SIGNS: Final = frozenset({3})
# Bits of a code at which scales, or biases of MLX, that follow means of inputs gain (bench/README.md).
FOLLOW_MEANS: Final[Mapping[Kind, range]] = MappingProxyType(
    {"symmetric": range(2, 5), "asymmetric": range(2, 5), "small_floats": range(4, 5)}
)
EVEN_STEPS: Final = frozenset({"e0m3"})  # symmetric integers by another name, which lose as these do


def find_searches(
    decisions: Sequence["Decision"], recipe: "Recipe", sizes: "Mapping[str, SizesRef]" = MappingProxyType({})
) -> Searches:
    """The searches of all weights that get new codes, for a recipe that searches. `sizes`: importance of some
    without data.

    Raises BadImportance with the modules that the file lacks, BadOption for a rule that a scheme does not have.
    """
    wanted = {d.tensor.name: d for d in decisions if d.scheme and not d.carried}
    given = recipe.importance
    vectors, notes = find_vectors(list(wanted.values()), given, sizes)
    searches = {}
    for name, d in wanted.items():
        assert d.scheme is not None
        search = choose_search(d.scheme, recipe, given if name in vectors else None, name in vectors)
        if search is not None:
            searches[name] = _center(_widen(search, d.scheme, ref := vectors.get(name)), d.scheme, ref, given)
    if given:
        bits = {d.scheme.bits for n, d in wanted.items() if n in searches and d.scheme}
        notes += tuple(note for b in sorted(bits) for note in doubts(given.provenance, b))
    return Searches(searches, {n: v for n, v in vectors.items() if n in searches}, notes)


def find_vectors(
    wanted: Sequence["Decision"], given: "Importance | None", sizes: "Mapping[str, SizesRef]"
) -> "tuple[dict[str, Ref], tuple[str, ...]]":
    """Importance of weights by name, and what is odd about it: from a file, from sizes, or from both. Raises
    BadImportance."""
    modules: dict[str, tuple[int, int]] = {}
    for d in wanted:
        shape = d.tensor.shape
        if d.role is Role.EMBEDDING or shape is None or d.scheme is None or kind_of(d.scheme) is None:
            continue  # an embedding has no input; elsewhere there is nothing to search
        modules[d.tensor.module] = shape[0], shape[1]
    found = match(given, modules) if given else {}
    refs = ((t.name, weigh(t, found.get(t.module), sizes.get(t.name))) for t in (d.tensor for d in wanted))
    return {name: ref for name, ref in refs if ref}, stand_ins(found)


def choose_search(
    scheme: "Scheme", recipe: "Recipe", given: "Importance | None", weighed: bool | None = None
) -> Search | None:
    """The search of a scheme: with importance from a file, or if it is `weighed` all the same, or without; None for
    round-to-nearest. Raises BadOption."""
    kind = kind_of(scheme)
    if recipe.search == "none":
        return None
    if recipe.search == "auto-round":
        if kind != "symmetric":
            raise BadOption(f"--search auto-round is for symmetric integers in groups, and {scheme.name} has none")
        return AUTO_ROUND
    weighed = given is not None if weighed is None else weighed
    if kind is None or not (weighed or _gains_alone(scheme, kind)):
        return None
    found = default_search(scheme, weighted=given is not None)
    if found and kind == "symmetric" and scheme.numbers == "compressed_tensors":
        return replace(found, signs="positive")  # its own library writes no others, so that loaders may count on it
    if found and given and kind == "symmetric" and allows_both_signs(given.provenance, scheme.bits):
        return replace(found, signs="both")
    return found


def _widen(search: Search, scheme: "Scheme", ref: "Ref | None") -> Search:
    """The search with both signs where sizes of columns steady what data say of them."""
    steadied = isinstance(ref, BothRef) and search.rule == "least_squares" and search.signs == "range"
    allowed = kind_of(scheme) == "symmetric" and scheme.bits in BOTH_SIGNS
    return replace(search, signs="both") if steadied and allowed else search


def _center(search: Search, scheme: "Scheme", ref: "Ref | None", given: "Importance | None") -> Search:
    """The search with scales or biases that follow the means of inputs, where a file has these of text."""
    known = given is not None and ref is not None and knows_means(given.provenance) and has_means(ref)
    plain = search.rule == "least_squares" and search.objective == "none"
    kind = kind_of(scheme)
    measured = kind is not None and scheme.bits in FOLLOW_MEANS.get(kind, range(0))
    return replace(search, centered=True) if known and plain and measured else search


def _gains_alone(scheme: "Scheme", kind: Kind) -> bool:
    """True if a search never lost without importance."""
    return scheme.bits in WITHOUT_IMPORTANCE[kind] and scheme.element not in EVEN_STEPS
