"""The images of a report: what the dense, the uniform and the best model answer to each.

pictures(spec, uniform, best)    # [{"image": "data:image/png;base64,...", "best": "cat", ...}]
"""

import base64
import io
from typing import Any

from infra.errors import UserError
from infra.records import TrialResult
from infra.specs import Spec

_SIDE = 160  # pixels of a thumbnail, at most


def pictures(spec: Spec, uniform: TrialResult, best: TrialResult) -> list[dict[str, Any]]:
    """The first images of the report split with all answers; [] where there are none to show."""
    if not best.answers:
        return []
    from infra.images import evaluated, usable

    try:
        found = evaluated(spec.data, "report")
        shown = usable(found, len(best.answers), spec.data, "data.report")
    except UserError:  # the images are elsewhere: the numbers are here all the same
        return []
    dense = uniform.dense_answers or best.dense_answers or [""] * len(best.answers)
    answers = zip(best.expected, dense, uniform.answers, best.answers, strict=True)
    return [
        {
            "image": _thumbnail(image) if image else "",
            "question": example.question,
            **dict(zip(("expected", "dense", "uniform", "best"), each, strict=True)),
        }
        for (example, image), each in zip(shown, answers, strict=True)
    ]


def _thumbnail(image: Any) -> str:
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
