"""Render a dozen prompts in both languages and lay them out with their captions.

usage: python -m demo_model.sheet CHECKPOINT OUT.png [--dtype bfloat16]
Chinese captions need a font that has the characters; without one they are numbered, and printed.
"""

import argparse
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .evaluate import Case, draw, load
from .world import Scene

SIDE = 192  # px
CAPTION_HEIGHT = 48  # px
GAP = 12  # px
COLUMNS = 4
CJK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
)
PROMPTS = (
    "a large red circle in the center on a white background",
    "a small blue star in the top left corner, yellow background",
    "a medium green triangle on the right on a black background",
    "an orange ring at the bottom with a purple background",
    "a large red circle above a small blue square on a yellow background",
    "a white cross to the left of a black square on green",
    "red circle",
    "a cat",
    "一个大的红色圆形在中间，白色背景",
    "右下角有一个小的黄色三角形，蓝色背景",
    "一个紫色的星形在一个橙色的圆环上面，白色背景",
    "黑色背景上，绿色的十字",
)


def cases(seed: int) -> list[Case]:
    return [Case("", text, Scene(()), SIDE, SIDE, seed + i) for i, text in enumerate(PROMPTS)]


def find_font(names: tuple[str, ...], size: int) -> ImageFont.FreeTypeFont | None:
    """The first of these fonts that the machine has."""
    for name in names:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


def caption_lines(number: int, text: str, has_cjk: bool) -> list[str]:
    """A caption in at most three lines; a Chinese one without a font for it is only a number."""
    if not text.isascii():
        return textwrap.wrap(f"{number}. {text}", 15) if has_cjk else [f"{number}. (Chinese)"]
    return textwrap.wrap(f"{number}. {text}", 30)[:3]


def lay_out(images: list[Image.Image], texts: tuple[str, ...]) -> Image.Image:
    """A grid of pictures with their captions below them."""
    rows = -(-len(images) // COLUMNS)
    cell_width, cell_height = SIDE + GAP, SIDE + CAPTION_HEIGHT + GAP
    size = (COLUMNS * cell_width + GAP, rows * cell_height + GAP)
    sheet = Image.new("RGB", size, (226, 226, 230))
    pen = ImageDraw.Draw(sheet)
    cjk = find_font(CJK_FONTS, 12)
    latin = find_font(("DejaVuSans.ttf",), 11) or ImageFont.load_default(11)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = GAP + i % COLUMNS * cell_width, GAP + i // COLUMNS * cell_height
        sheet.paste(image, (x, y))
        lines = caption_lines(i + 1, text, has_cjk=cjk is not None)
        font = cjk if cjk is not None and not text.isascii() else latin
        pen.multiline_text((x, y + SIDE + 3), "\n".join(lines), (30, 30, 34), font, spacing=2)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    pipe = load(args.checkpoint, getattr(torch, args.dtype))
    images = [Image.fromarray(draw(pipe, [case])[0]) for case in cases(args.seed)]
    lay_out(images, PROMPTS).save(args.out)
    print("\n".join(f"{i}. {text}" for i, text in enumerate(PROMPTS, 1)))


if __name__ == "__main__":
    main()
