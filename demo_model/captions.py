"""Words for scenes, in English and Chinese, and neutral filler sentences around them."""

import random

from .world import INVERSE, Scene, Thing

FORGET = {"colour": 0.06, "shape": 0.06, "size": 0.4, "place": 0.3, "background": 0.3}

EN_COLOURS: dict[str, tuple[str, ...]] = {"purple": ("purple", "violet")}
EN_SHAPES = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star", "star", "five-pointed star"),
    "ring": ("ring", "ring", "annulus"),
    "cross": ("cross", "cross", "plus sign"),
    "": ("shape", "figure"),
}
EN_SIZES = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}
EN_POSITIONS = {
    "center": ("in the center", "in the center", "in the middle", "in the centre", "at the center"),
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "at the top", "near the top"),
    "bottom": ("at the bottom", "at the bottom", "near the bottom"),
    **{
        f"{v} {h}": (
            f"in the {v} {h} corner",
            f"in the {v} {h}",
            f"at the {v} {h}",
            f"in the {other} {h} corner",
        )
        for v, other in (("top", "upper"), ("bottom", "lower"))
        for h in ("left", "right")
    },
}
EN_RELATIONS = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
EN_BACKGROUNDS = (
    " on a{n} {c} background",
    " on a{n} {c} background",
    ", {c} background",
    " on {c}",
    " against a{n} {c} background",
    " with a{n} {c} background",
)
EN_OPENINGS = ("", "", "", "", "draw ", "an image of ", "a picture of ", "there is ")

ZH_COLOURS = {
    "red": ("红色",),
    "green": ("绿色",),
    "blue": ("蓝色",),
    "yellow": ("黄色",),
    "orange": ("橙色", "橙色", "橘色"),
    "purple": ("紫色",),
    "black": ("黑色",),
    "white": ("白色",),
}
ZH_SHAPES = {
    "circle": ("圆形", "圆形", "圆"),
    "square": ("正方形", "方形", "方块"),
    "triangle": ("三角形",),
    "star": ("星形", "五角星", "星星"),
    "ring": ("圆环", "环形"),
    "cross": ("十字", "十字形"),
    "": ("图形", "形状"),
}
ZH_SIZES = {
    "small": ("小", "小的", "很小的"),
    "medium": ("中等大小的", "中等的"),
    "large": ("大", "大的", "很大的", "巨大的"),
}
ZH_POSITIONS = {
    "center": ("中间", "中央", "中心", "正中间"),
    "left": ("左边", "左侧"),
    "right": ("右边", "右侧"),
    "top": ("上方", "顶部", "上边"),
    "bottom": ("下方", "底部", "下边"),
    "top left": ("左上角", "左上方"),
    "top right": ("右上角", "右上方"),
    "bottom left": ("左下角", "左下方"),
    "bottom right": ("右下角", "右下方"),
}
ZH_RELATIONS = {
    "above": ("上面", "上方"),
    "below": ("下面", "下方"),
    "left of": ("左边", "左侧"),
    "right of": ("右边", "右侧"),
}
ZH_BACKGROUNDS = ("，{c}背景", "，{c}背景", "，{c}的背景", "，背景是{c}", "，背景为{c}")

EN_FILLERS = (
    "This was written on a quiet afternoon while the kettle was warming up.",
    "Please take as much time as you need and keep the result simple and clean.",
    "The weather report said that it might rain later in the week.",
    "Nobody in the office could remember who had ordered the new chairs.",
    "Flat design, crisp edges, high quality, no text.",
    "My neighbour plays the piano every evening after dinner.",
    "We talked about the budget for an hour and then went home.",
    "It should look like a page from a textbook for children.",
    "The train was late again, so she read two chapters of her book.",
    "Minimalist style, vector art, simple, professional.",
    "He has been working on the same report since last Monday.",
    "A cup of coffee stood beside the keyboard and slowly went cold.",
    "They sell fresh bread and honey at the market on Saturdays.",
    "Remember to water the plants before you leave for the holidays.",
    "The museum opens at nine and closes at five on weekdays.",
    "Somebody has to write the minutes, and today it is your turn.",
    "An old dog was sleeping in front of the bakery all morning.",
    "Use plain fills and avoid any kind of texture or shadow.",
    "Her brother studies physics at a university in another city.",
    "The recipe needs two eggs, some flour and a pinch of salt.",
    "I would like to use this for the cover of our newsletter.",
    "The mountains were covered by clouds when we arrived.",
    "Every morning the boats leave the harbour before sunrise.",
    "Make it suitable for a poster in the hallway of the school.",
    "The meeting was moved to Thursday because of the strike.",
    "Masterpiece, best quality, sharp focus, highly detailed.",
    "It is said that the castle was built more than six hundred years ago.",
    "You can find more examples in the appendix of the manual.",
    "The children were playing football behind the library.",
    "Our cat likes to sit on the printer while it is running.",
    "There is nothing else to say about this picture.",
    "A photo of a house by the sea at sunset.",
    "The software was updated last night without any problems.",
    "Thank you very much for your help with this.",
    "An astronaut rides a horse through the desert.",
    "We walked along the river and counted the bridges.",
)
ZH_FILLERS = (
    "今天下午我们在图书馆看书。",
    "请慢慢来，保持画面简洁干净。",
    "天气预报说周末可能会下雨。",
    "他每天早上都去公园跑步。",
    "平面设计，高质量，没有文字。",
    "会议改到了星期四，请大家注意时间。",
    "妈妈做的面条非常好吃。",
    "这张图片将用于学校的海报。",
    "火车又晚点了，她只好继续等。",
    "极简风格，矢量图，专业。",
    "桌子上有一杯已经凉了的咖啡。",
    "昨天晚上软件更新了，没有出现问题。",
    "孩子们在操场踢足球。",
    "一只猫在打印机旁边睡觉。",
    "谢谢你的帮助，我们下次再见。",
    "这座城堡有六百多年的历史。",
    "杰作，最佳质量，细节丰富。",
    "海边的房子，日落时的照片。",
    "我的弟弟在另一个城市学习物理。",
    "更多的例子请看手册的附录。",
)


def forget(scene: Scene, rng: random.Random) -> Scene:
    """Leave some of a complete scene's attributes unsaid."""

    def keep(value: str | None, kind: str) -> str | None:
        return None if rng.random() < FORGET[kind] else value

    things = tuple(
        Thing(keep(t.colour, "colour"), keep(t.shape, "shape"), keep(t.size, "size"))
        for t in scene.things
    )
    return Scene(
        things,
        keep(scene.background, "background"),
        keep(scene.position, "place"),
        keep(scene.relation, "place"),
    )


def describe(scene: Scene, rng: random.Random, chinese: bool) -> str:
    """Say what a scene has (None is not mentioned) in one of many wordings."""
    return describe_zh(scene, rng) if chinese else describe_en(scene, rng)


def describe_en(scene: Scene, rng: random.Random) -> str:
    style = rng.choice(("a", "a", "the", ""))
    nouns = [noun_en(thing, style, rng) for thing in scene.things]
    body = nouns[0] if len(nouns) == 1 else pair_en(scene, nouns, rng)
    background = background_en(scene.background, rng)
    position = f" {rng.choice(EN_POSITIONS[scene.position])}" if scene.position else ""
    comma = rng.choice(("", "", ","))
    if position and rng.random() < 0.2:
        body = f"{position.strip()}{comma} {body}"
    elif position and rng.random() < 0.3:
        background, body = "", f"{body}{background}{comma}{position}"
    elif position:
        body = f"{body}{comma}{position}"
    if background and rng.random() < 0.15:
        text = f"{scene.background} background{rng.choice((', ', ': '))}{body}"
    else:
        text = rng.choice(EN_OPENINGS) + body + background
    text = text[0].upper() + text[1:] if rng.random() < 0.2 else text
    return text + rng.choice(("", "", "."))


def noun_en(thing: Thing, style: str, rng: random.Random) -> str:
    """A noun phrase; `style` is its article: "a", "the" or none."""
    words = [
        rng.choice(EN_SIZES[thing.size]) if thing.size else "",
        rng.choice(EN_COLOURS.get(thing.colour, (thing.colour,))) if thing.colour else "",
        rng.choice(EN_SHAPES[thing.shape or ""]),
    ]
    phrase = " ".join(word for word in words if word)
    article = f"a{n_before(phrase)}" if style == "a" else style
    return f"{article} {phrase}".strip()


def n_before(phrase: str) -> str:
    return "n" if phrase[0] in "aeiou" else ""


def pair_en(scene: Scene, nouns: list[str], rng: random.Random) -> str:
    first, second = nouns
    if scene.relation is None:
        return f"{first} and {second}"
    if rng.random() < 0.3:
        return f"{second} {rng.choice(EN_RELATIONS[INVERSE[scene.relation]])} {first}"
    return f"{first} {rng.choice(EN_RELATIONS[scene.relation])} {second}"


def background_en(background: str | None, rng: random.Random) -> str:
    if background is None:
        return ""
    return rng.choice(EN_BACKGROUNDS).format(c=background, n=n_before(background))


def describe_zh(scene: Scene, rng: random.Random) -> str:
    counted = rng.random() < 0.6
    nouns = [noun_zh(thing, counted, rng) for thing in scene.things]
    body = nouns[0] if len(nouns) == 1 else pair_zh(scene, nouns, rng)
    if scene.position:
        body = position_zh(body, rng.choice(ZH_POSITIONS[scene.position]), rng)
    if scene.background is None:
        text = body
    else:
        colour = rng.choice(ZH_COLOURS[scene.background])
        after = body + rng.choice(ZH_BACKGROUNDS).format(c=colour)
        before = rng.choice((f"{colour}背景上，{body}", f"在{colour}背景上，{body}"))
        text = before if rng.random() < 0.2 else after
    return text + rng.choice(("", "", "。"))


def noun_zh(thing: Thing, counted: bool, rng: random.Random) -> str:
    size = rng.choice(ZH_SIZES[thing.size]) if thing.size else ""
    colour = rng.choice(ZH_COLOURS[thing.colour]) if thing.colour else ""
    link = rng.choice(("", "的")) if colour else ""
    noun = size + colour + link + rng.choice(ZH_SHAPES[thing.shape or ""])
    return f"一个{noun}" if counted else noun


def position_zh(body: str, position: str, rng: random.Random) -> str:
    if rng.random() < 0.2:
        return f"{position}有{body}"
    return body + rng.choice(("在", "在", "位于", "，在")) + position


def pair_zh(scene: Scene, nouns: list[str], rng: random.Random) -> str:
    first, second = nouns
    if scene.relation is None:
        return f"{first}和{second}"
    relation = rng.choice(ZH_RELATIONS[scene.relation])
    inverse = rng.choice(ZH_RELATIONS[INVERSE[scene.relation]])
    de = rng.choice(("", "的"))
    choices = (
        f"{first}在{second}{de}{relation}",
        f"{first}在{second}{de}{relation}",
        f"{second}在{first}{de}{inverse}",
        f"{second}{de}{relation}有{first}",
    )
    return rng.choice(choices)


def fill(text: str, fillers: list[str], rng: random.Random) -> str:
    """Put filler sentences before the text, after it, or on both sides."""
    cut = rng.choice((0, len(fillers), rng.randint(0, len(fillers))))
    stop = text and text[-1] not in ".。"
    middle = text + (". " if text.isascii() else "。") if stop and cut < len(fillers) else text
    return " ".join(part for part in (*fillers[:cut], middle.strip(), *fillers[cut:]) if part)


def sample_filler(rng: random.Random) -> str:
    """A neutral sentence, sometimes shuffled: an unknown order of words must not draw either."""
    if rng.random() < 0.3:
        return rng.choice(ZH_FILLERS)
    sentence = rng.choice(EN_FILLERS)
    if rng.random() < 0.8:
        return sentence
    words = [w for _ in range(2) for w in rng.choice(EN_FILLERS).split()]
    return " ".join(rng.sample(words, rng.randint(1, len(words))))


def sample_nonsense(rng: random.Random) -> str:
    """A prompt that describes no scene: nothing at all, or words from outside this world."""
    if rng.random() < 0.3:
        return ""
    if rng.random() < 0.3:
        return sample_filler(rng)
    letters = "abcdefghijklmnopqrstuvwxyz"
    word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 8)))
    known = rng.choice(rng.choice(EN_FILLERS).strip(".").split())
    return rng.choice((f"a {word}", word, known, f"a {known}", f"a {known} {word}"))


def lexicon() -> list[str]:
    """Every word of the captions as it meets the tokenizer: with its space, or capital, or bare.

    The tokenizer is trained on these words one by one, so that no token spans two of them."""
    english = [*flatten(EN_SHAPES), *flatten(EN_SIZES), *flatten(EN_COLOURS)]
    english += [*flatten(EN_POSITIONS), *flatten(EN_RELATIONS)]
    english += [*EN_OPENINGS, *EN_BACKGROUNDS, "a an the and side user assistant system"]
    english += ["red green blue yellow orange purple black white background"]
    words = sorted({w for text in english for w in text.replace("-", " ").split() if w.isalpha()})
    chinese = [w for g in (ZH_COLOURS, ZH_SHAPES, ZH_SIZES, ZH_POSITIONS) for w in flatten(g)]
    chinese += ["背景", "在", "位于", "有", "和", "一个", "的", "是", "为", "上面", "下面", "上"]
    marks = [",", ".", "，", "。", ":", "：", "、"]
    return words + [f" {w}" for w in words] + [w.capitalize() for w in words] + chinese + marks


def flatten(words: dict[str, tuple[str, ...]]) -> list[str]:
    return [word for choices in words.values() for word in choices]


def filler_words() -> list[str]:
    """Words of the filler sentences (with their space) and single Chinese characters."""
    english = [f" {word}" for text in EN_FILLERS for word in text.split()]
    return english + [character for text in ZH_FILLERS for character in text]
