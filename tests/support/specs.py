"""Images that tests ask for."""

from typing import Any

from promptdrop.nouns import ImageSpec


def spec(**changes: Any) -> ImageSpec:
    """The first image of a job, small and quick to render, with these fields changed."""
    fields: dict[str, Any] = {
        "image": 1,
        "prompt": "a red fox in the snow",
        "negative_prompt": None,
        "width": 64,
        "height": 64,
        "steps": 2,
        "guidance_scale": 0.0,
        "seed": 7,
        "scheduler": "euler",
        "format": "png",
        "timeout_seconds": 60.0,
    }
    return ImageSpec(**{**fields, **changes})
