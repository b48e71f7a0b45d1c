"""Lay out the newest images of an outbox, with what was asked for, as one picture.

usage: python contact_sheet.py OUTBOX SHEET.png [--images 12]

Shows how to read an outbox: a sidecar appears only after its image is whole, so look for sidecars.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

CELL, CAPTION, GAP, COLUMNS = 192, 46, 12, 4  # px, px, px, pictures in a row
LINES = 3  # of a caption
PAPER, INK = (226, 226, 230), (30, 30, 34)
CJK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
)


def newest(outbox: Path, count: int) -> list[tuple[Path, dict[str, Any]]]:
    """The last published images and their sidecars, job by job."""
    found = []
    for path in outbox.rglob("*.json"):
        sidecar = json.loads(path.read_text())
        if "image" in sidecar:  # job.json has none
            found.append((path.parent / sidecar["image"]["file"], sidecar))
    found.sort(key=lambda pair: (pair[1]["time"]["published"], pair[0]))
    return sorted(found[-count:], key=lambda pair: pair[0])


def find_font(names: tuple[str, ...], size: int) -> ImageFont.FreeTypeFont | None:
    """The first of these fonts that the machine has."""
    for name in names:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


def caption(prompt: str, file: str) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The prompt, wrapped; the file's name where no font has its characters."""
    latin = find_font(("DejaVuSans.ttf",), 11) or ImageFont.load_default(11)
    cjk = find_font(CJK_FONTS, 12)
    if prompt.isascii():
        return wrap(prompt, latin), latin
    return (wrap(prompt, cjk), cjk) if cjk else (wrap(file, latin), latin)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """LINES lines at most, none wider than a cell, broken at spaces and between Chinese characters.

    No line starts with a comma; what does not fit ends in dots."""
    lines = [""]
    for piece in re.findall(r"\s*(?:[!-~]+|\S)[，。、：]*", text):
        if lines[-1] and font.getlength(lines[-1] + piece) > CELL:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    if len(lines) > LINES:
        lines[LINES - 1 :] = [lines[LINES - 1][:-1] + "..."]
    return "\n".join(lines)


def lay_out(pictures: list[tuple[Path, dict[str, Any]]]) -> Image.Image:
    """A grid of pictures, each with its caption below."""
    rows = -(-len(pictures) // COLUMNS)
    size = (COLUMNS * (CELL + GAP) + GAP, rows * (CELL + CAPTION + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (path, sidecar) in enumerate(pictures):
        x, y = GAP + i % COLUMNS * (CELL + GAP), GAP + i // COLUMNS * (CELL + CAPTION + GAP)
        with Image.open(path) as image:
            image.thumbnail((CELL, CELL))
            sheet.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))
        text, font = caption(sidecar["request"]["prompt"], path.name)
        pen.multiline_text((x, y + CELL + 3), text, INK, font, spacing=2)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("outbox", type=Path)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--images", type=int, default=12)
    arguments = parser.parse_args()
    pictures = newest(arguments.outbox, arguments.images)
    if not pictures:
        parser.exit(1, f"{arguments.outbox}: no sidecars, so no images yet\n")
    lay_out(pictures).save(arguments.sheet)
    print(f"{arguments.sheet}: {len(pictures)} pictures")
    if not find_font(CJK_FONTS, 12):
        print("(Chinese prompts are shown by file name: no font here has them; see fonts-noto-cjk)")


if __name__ == "__main__":
    main()
