"""What all sections of the config are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, le=1)]
FinitePositive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NumThreads = Annotated[int, Field(ge=1, le=1024)]
NumProcesses = Annotated[int, Field(ge=1, le=4096)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
DottedPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""`module:function`, importable from the current folder."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    def changed(self) -> list[str]:
        """The keys whose value is not the default; a dumped config sets them all."""
        return [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]
