"""What every spec and record is: frozen, and without keys that nobody knows.

class Place(Frozen):
    host: str
"""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A spec or record that does not change after it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
