"""Short regular expressions for long lists of module names."""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def module_regexes(modules: Sequence[str], everything: Sequence[str]) -> tuple[str, ...]:
    """Anchored regular expressions that match exactly `modules` among `everything`.

    Names that differ only in whole numeric segments become one expression when all of `everything` with that
    form is in `modules`, and stay single names otherwise. Order follows `modules`.
    """
    total: dict[str, int] = {}
    for name in everything:
        form = _form(name)
        total[form] = total.get(form, 0) + 1
    members: dict[str, list[str]] = {}
    for name in modules:
        members.setdefault(_form(name), []).append(name)
    out: list[str] = []
    for form, names in members.items():
        if len(names) == total.get(form) and len(names) > 1:
            out.append("^" + re.escape(form).replace(re.escape("#"), r"\d+") + "$")
        else:
            out.extend(f"^{re.escape(name)}$" for name in names)
    return tuple(out)


def _form(name: str) -> str:
    return _NUMBER.sub("#", name)
