"""Claims as data: what is said, which row of which table it is about, and in which region of effects it is true."""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from interp_vlm.errors import StudyError

__all__ = ["TABLES", "Alternative", "Claim", "Part", "fingerprint", "load_claims", "parse_claim"]

TABLES = (
    *("accuracy", "signals", "reliability", "heads", "margin", "masking", "neurons", "bypass", "knockout"),
    "patching",
)
"""The tables that a claim may speak of: one for each experiment."""

Region = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """One effect that a claim speaks of, and the region in which the claim is true.

    A claim of "no relation" or "no cost" has a region around 0: that its 95 % interval lies inside is the test of
    equivalence (two one-sided tests, each at 2.5 %).

    Attributes:
        table: the experiment whose table holds the effect.
        pick: column = value pairs that name one row. A list of values is an order of preference.
        region: low and high end of the effects for which the statement is true, in `unit`; fixed beforehand.
        unit: as the table writes it.
        reason: why the region is that.
        name: what it is called where a claim has several parts.
        published: the published figure in words, by family, or under "pooled" where it stands for all of them.
        each: a column in which the rows may differ: the part holds if it does in every one of them.
        depth: with `each = "layer"`, the relative depths that count, 0 for the first layer and 1 for the last.
        families: the families of which the part speaks; all of them if empty.
    """

    table: str
    pick: Mapping[str, Any]
    region: Region
    unit: str
    reason: str
    name: str = ""
    published: Mapping[str, str] | None = None
    each: str = ""
    depth: Region = (0.0, 1.0)
    families: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alternative:
    """Another value of something that the published text leaves open: other rows, judged by the same rule.

    Attributes:
        parameter: what is left open.
        setting: its value here, in words.
        pick: what to pick in place of, or besides, the part's own pairs.
        table, region, unit, reason, depth: in place of the parts' own.
        parts: names of the parts that change; all of them if empty.
    """

    parameter: str
    setting: str
    pick: Mapping[str, Any]
    table: str = ""
    region: Region | None = None
    unit: str | None = None
    reason: str = ""
    depth: Region | None = None
    parts: tuple[str, ...] = ()

    def of(self, part: Part) -> Part:
        """The part with this alternative in place."""
        if self.parts and part.name not in self.parts:
            return part
        return replace(
            part,
            table=self.table or part.table,
            pick={**part.pick, **self.pick},
            region=self.region or part.region,
            unit=part.unit if self.unit is None else self.unit,
            reason=self.reason or part.reason,
            depth=self.depth or part.depth,
        )


@dataclass(frozen=True)
class Claim:
    """A published sentence with everything needed to judge it; the words of DESIGN: a pre-registered question.

    Attributes:
        id: short name.
        statement: one sentence that is true or false.
        question: what is asked of a model.
        source: where it was published.
        data, models, parameters: as published.
        parts: the effects it speaks of; all must hold.
        chosen: the value taken for each parameter that the published text leaves open, in words.
        alternatives: other values of those parameters.
        families: the families of which it speaks; all of them if empty.
        fusion: the kind of fusion of which it speaks, "late" or "early"; both if empty.
        note: what must be known to read it, faults of the published analysis above all.

    Example:
        >>> load_claims("A12")[0].parts[0].region
        (0.1, inf)
    """

    id: str
    statement: str
    question: str
    source: str
    data: str
    models: str
    parameters: str
    parts: tuple[Part, ...]
    chosen: Mapping[str, str]
    alternatives: tuple[Alternative, ...] = ()
    families: tuple[str, ...] = ()
    fusion: str = ""
    note: str = ""

    @property
    def tables(self) -> set[str]:
        """The experiments that it needs."""
        return {part.table for _, _, parts in self.variants() for part in parts}

    def variants(self) -> Iterator[tuple[str, str, tuple[Part, ...]]]:
        """Parameter, its setting and the parts: first as chosen ("", ""), then every alternative."""
        yield "", "", self.parts
        for other in self.alternatives:
            yield other.parameter, other.setting, tuple(map(other.of, self.parts))


def load_claims(names: str | Sequence[str] = "all") -> tuple[Claim, ...]:
    """Claims by name.

    Args:
        names: "all" (the 22 claims of arXiv 2605.08200 and 2606.17389), "none", ids as in "A1,A9", paths of TOML files
            that hold a claim of your own each, or a list of these.

    Returns:
        The claims in the order named.

    Raises:
        StudyError: an unknown id, a claim named twice, a file that cannot be read or does not hold a claim.

    Example:
        >>> [claim.id for claim in load_claims("A1,A9")]
        ['A1', 'A9']
        >>> len(load_claims("all"))
        22
    """
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    if wanted in (["all"], ["none"]):
        return _published() if wanted == ["all"] else ()
    claims = tuple(_named(name) for name in wanted)
    ids = [claim.id for claim in claims]
    if doubled := sorted({name for name in ids if ids.count(name) > 1}):
        raise StudyError(
            f"claim {doubled[0]!r} is named twice", expected="each once", remedy="give your own another id"
        )
    return claims


def fingerprint(claims: Sequence[Claim]) -> str:
    """A hash of all that the claims say: what must be the same when a study is resumed."""
    return hashlib.sha256(repr(tuple(claims)).encode()).hexdigest()[:16]


def _published() -> tuple[Claim, ...]:
    files = sorted(_folder().glob("A*.toml"), key=lambda file: int(file.stem[1:]))
    return tuple(map(_read, files))


def _folder() -> Path:
    return Path(__file__).parent / "claims"


def _named(name: str) -> Claim:
    if name.endswith(".toml"):
        return _read(Path(name))
    file = _folder() / f"{name}.toml"
    if not re.fullmatch(r"A\d+", name) or not file.is_file():
        raise StudyError(
            f"there is no claim {name!r}",
            expected="all, none, A1 to A22, or the path of a .toml file",
            remedy="see the published claims in experiments/claims",
        )
    return _read(file)


def _read(file: Path) -> Claim:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise StudyError(f"{file} cannot be read ({why})", remedy="name a file that holds a claim") from error
    return parse_claim(text, file.name)


def parse_claim(text: str, file: str) -> Claim:
    """A claim from its TOML.

    Args:
        text: the content of the file.
        file: its name, for messages.

    Raises:
        StudyError: TOML that is none, keys that are missing, unknown or of the wrong type, a region upside down.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{file} is no TOML ({error})", remedy="compare experiments/claims/A1.toml") from error
    made = _checked(raw, file, _CLAIM, ("families", "fusion", "note", "chosen", "alternatives"))
    table = _table(made.pop("table"), file)
    parts = tuple(_part(part, f"{file}: parts[{n}]", table) for n, part in enumerate(made.pop("parts"), 1))
    names = [part.name for part in parts]
    if not parts or len(set(names)) < len(names):
        raise StudyError(f"{file}: parts are {names}", expected="at least one, with different names")
    chosen = _words(made.pop("chosen", {}), f"{file}: chosen")
    listed = enumerate(made.pop("alternatives", []), 1)
    others = tuple(_alternative(other, f"{file}: alternatives[{n}]", names, chosen) for n, other in listed)
    if made.get("fusion", "late") not in ("late", "early"):
        raise StudyError(f"{file}: fusion is {made['fusion']!r}", expected='"late" or "early"')
    families = _strings(made.pop("families", []), f"{file}: families")
    return Claim(**made, parts=parts, chosen=chosen, alternatives=others, families=families)


_CLAIM: Mapping[str, type] = {
    **dict.fromkeys(("id", "statement", "question", "source", "data", "models", "parameters", "table"), str),
    **{"parts": list, "families": list, "fusion": str, "note": str, "chosen": dict, "alternatives": list},
}
_PART: Mapping[str, type] = {
    **{"pick": dict, "region": list, "unit": str, "reason": str, "name": str, "published": dict, "table": str},
    **{"each": str, "depth": list, "families": list},
}
_ALTERNATIVE: Mapping[str, type] = {
    **{"parameter": str, "setting": str, "pick": dict, "table": str, "region": list, "unit": str, "reason": str},
    **{"depth": list, "parts": list},
}


def _part(raw: Any, where: str, table: str) -> Part:
    made = _checked(raw, where, _PART, ("name", "published", "table", "each", "depth", "families"))
    made["table"] = _table(made.get("table", table), where)
    made["pick"] = _pick(made["pick"], where)
    made["region"] = _region(made["region"], f"{where}: region")
    made["published"] = _words(made.get("published", {}), f"{where}: published")
    made["families"] = _strings(made.get("families", []), f"{where}: families")
    made["depth"] = _region(made.get("depth", [0.0, 1.0]), f"{where}: depth")
    return Part(**made)


def _alternative(raw: Any, where: str, parts: Sequence[str], chosen: Mapping[str, str]) -> Alternative:
    made = _checked(raw, where, _ALTERNATIVE, ("pick", "table", "region", "unit", "reason", "depth", "parts"))
    if made["parameter"] not in chosen:
        raise StudyError(
            f"{where}: parameter {made['parameter']!r} is not among those chosen",
            expected=f"one of {', '.join(map(repr, chosen)) or 'none'}",
            remedy="say under [chosen] what the claim itself takes for it",
        )
    made["pick"] = _pick(made.get("pick", {}), where)
    made["parts"] = _strings(made.get("parts", []), f"{where}: parts")
    if unknown := sorted(set(made["parts"]) - set(parts)):
        raise StudyError(f"{where}: there is no part {unknown[0]!r}", expected=f"some of {', '.join(parts)}")
    for key in ("region", "depth"):
        if key in made:
            made[key] = _region(made[key], f"{where}: {key}")
    if "table" in made:
        made["table"] = _table(made["table"], where)
    return Alternative(**made)


def _checked(raw: Any, where: str, known: Mapping[str, type], optional: Sequence[str]) -> dict[str, Any]:
    """The keys of a TOML table, each known, of its type and not empty, none missing."""
    if not isinstance(raw, dict):
        raise StudyError(f"{where} is {raw!r}", expected="a table of keys and values")
    for key, value in raw.items():
        if key not in known:
            raise StudyError(
                f"{where}: unknown key {key!r}", expected=f"some of {', '.join(known)}", remedy="correct it"
            )
        if not isinstance(value, known[key]):
            raise StudyError(f"{where}: {key} is {value!r}", expected=_TYPES[known[key]])
        if value in ("", []) and key != "unit":
            raise StudyError(f"{where}: {key} is empty", expected=_TYPES[known[key]], remedy="leave it out")
    if missing := [key for key in known if key not in raw and key not in optional]:
        raise StudyError(f"{where} lacks {missing[0]!r}", expected=_TYPES[known[missing[0]]], remedy="add it")
    return dict(raw)


_TYPES = {str: "text", list: "a list", dict: "a table of keys and values"}


def _table(name: str, where: str) -> str:
    if name not in TABLES:
        raise StudyError(f"{where}: there is no table {name!r}", expected=f"one of {', '.join(TABLES)}")
    return name


def _pick(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    for column, value in raw.items():
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(one, str | int | float | bool) for one in values):
            raise StudyError(f"{where}: pick.{column} is {value!r}", expected="a value, or a list of values to try")
    return dict(raw)


def _region(raw: Sequence[Any], where: str) -> Region:
    numbers = [value for value in raw if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(raw) != 2 or len(numbers) != 2 or any(map(math.isnan, numbers)):
        raise StudyError(f"{where} is {list(raw)}", expected="[low, high]; inf and -inf for open ends")
    low, high = map(float, numbers)
    if not low < high or (math.isinf(low) and math.isinf(high)):
        raise StudyError(
            f"{where} is {list(raw)}", expected="a low end below the high end, one of them finite", remedy="correct it"
        )
    return low, high


def _words(raw: Mapping[str, Any], where: str) -> dict[str, str]:
    for key, value in raw.items():
        if not isinstance(value, str):
            raise StudyError(f"{where}.{key} is {value!r}", expected="text")
    return dict(raw)


def _strings(raw: Sequence[Any], where: str) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in raw):
        raise StudyError(f"{where} is {list(raw)}", expected="a list of texts")
    return tuple(raw)
