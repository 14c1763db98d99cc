"""The forms that samples come in, a file each. A form knows its samples by their fields (`matches`) and reads them
(`read`); the first that matches does."""

from collections.abc import Collection
from types import ModuleType
from typing import Any

from ..samples import BadSample, Notes, Sample
from . import alpaca, chat, pairs, preference, text, verdict
from .fields import keys, kind, refuse_fields

FORMS: dict[str, tuple[ModuleType, ...]] = {  # by stage
    "sft": (chat, alpaca, pairs, text),
    "pt": (text,),
    "dpo": (preference,),
    "rm": (preference,),
    "kto": (verdict,),
}


def read_sample(row: Any, where: str, stage: str, notes: Notes, ignored: Collection[str] = ()) -> list[Sample]:
    """The samples of one row (several with tools, none where it says so).

    Raises:
        BadSample: what is wrong, and in which turn or field.
    """
    if chat.is_turns(row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise BadSample(f"a sample is {expected(stage)}, not {kind(row)}", "samples of an unknown form")
    row = {name: value for name, value in row.items() if name not in ignored}
    for form in FORMS[stage]:
        if form.matches(row):
            return form.read(row, where, notes)
    refuse_fields(row, ("label", "kto_tag") if stage == "kto" else ("chosen",) if stage in ("dpo", "rm") else ())
    for other, forms in FORMS.items():
        if any(form.matches(row) for form in forms):
            raise BadSample(f"a sample is {expected(stage)}; this is one for --stage {other} (it has {keys(row)})",
                            "samples of another stage")  # fmt: skip
    raise BadSample(f"a sample is {expected(stage)}; this has {keys(row)} (--columns gives columns their names)",
                    "samples of an unknown form")  # fmt: skip


def expected(stage: str) -> str:
    return " or ".join(form.EXAMPLE for form in FORMS[stage])
