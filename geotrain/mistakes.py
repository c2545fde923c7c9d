"""Mistakes in a job as sentences: which key of which region, and what to write instead."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

Model = Any
"""A pydantic model class; only its `model_fields` are looked at."""


def is_echo(mistake: Mapping[str, Any]) -> bool:
    """A list is called too short because its entries are wrong: those are told already."""
    return mistake["type"] == "too_short" and bool(mistake["input"])


def explain(mistake: Mapping[str, Any], tree: Mapping[str, Any], root: Model, unions: Sequence[Model]) -> str:
    """One pydantic mistake as a sentence. `root` is the job's model, `unions` are the members of its tagged unions."""
    where, place = _where(mistake["loc"], tree, root, unions)
    message = mistake["msg"].removeprefix("Value error, ")
    match mistake["type"]:
        case "extra_forbidden":
            key, known = str(mistake["loc"][-1]), list(place.model_fields)
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            return f"{where}: unknown key" + (f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(sorted(known))}")
        case "missing":
            return f"{where}: is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"{where}: {_tag(mistake['ctx'], unions)}"
        case "string_pattern_mismatch":
            return f"{where}: {mistake['input']!r} does not fit: {_shape_of(str(mistake['ctx']['pattern']))}"
        case _:
            given = mistake.get("input")
            shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
            return f"{where}: {message[0].lower() + message[1:]}{shown}" if where else message


def members_of(annotation: Any) -> list[Model]:
    """The models in an annotation, looked for through unions, tuples and Annotated."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in get_args(annotation) for model in members_of(part)]


def _tag(context: Mapping[str, Any], unions: Sequence[Model]) -> str:
    tag, given = context["discriminator"].strip("'"), context.get("tag")
    known = [name for member in unions for name in _tags(member, tag)]
    near = difflib.get_close_matches(str(given), known, n=1)
    says = f"no {tag} '{given}'" if given else f"needs a {tag}"
    return f"{says}; " + (f"did you mean '{near[0]}'?" if near else f"write one of {', '.join(known)}")


def _tags(member: Model, key: str) -> tuple[str, ...]:
    field = member.model_fields.get(key)
    return get_args(field.annotation) if field else ()


def _shape_of(pattern: str) -> str:
    names = {r"\d{1,5}": "write host:port", "[A-Za-z_][": "write module:Name", "[a-z0-9][": "use lower-case letters, digits and dashes"}
    return next((says for part, says in names.items() if part in pattern), f"it must match {pattern}")


def _where(loc: Iterable[str | int], tree: Any, root: Model, unions: Sequence[Model]) -> tuple[str, Model]:
    """A pydantic location as `regions[1] (osaka).data.trian`, and the model that the last key belongs to."""
    shown, model = "", root
    here: Any = tree
    steps = list(loc)
    in_union = False
    for position, step in enumerate(steps):
        if isinstance(step, int):
            here = here[step] if isinstance(here, list | tuple) and step < len(here) else None
            name = here.get("name") if isinstance(here, dict) else None
            shown += f"[{step}]" + (f" ({name})" if name else "")
            continue
        if not in_union and isinstance(here, dict) and step in (here.get("kind"), here.get("strategy")):
            model, in_union = next((m for m in unions if step in (*_tags(m, "kind"), *_tags(m, "strategy"))), model), True
            continue
        in_union = False
        shown += f".{step}" if shown else str(step)
        here = here.get(step) if isinstance(here, dict) else None
        if position < len(steps) - 1:
            field = model.model_fields.get(step)
            model = next(iter(members_of(field.annotation)), model) if field else model
    return shown, model
