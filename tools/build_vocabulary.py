#!/usr/bin/env python3
"""Train the tiny model's CLIP-style vocabulary: vocab.json, merges.txt and tokenizer_config.json.

    python3 tools/build_vocabulary.py [--captions captions.txt] [--size 1344] [--output models/tiny_tokenizer]

The captions are a UTF-8 file with one to a line; without it those of the scenes that the model is trained on, and short
ones with common words that it is not, so that such a word is one token and not pieces of others. The same captions
always give the same files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Dict, Iterable, List, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
END_OF_WORD = "</w>"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
MAX_LENGTH = 77
# The bytes, the bytes that end a word, and the two special tokens.
SMALLEST = 256 + 256 + len(SPECIAL_TOKENS)

# Letters run together, digits stand alone, punctuation runs together: CLIP's pattern, as far as the standard library's
# regular expressions can say it.
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")

CONTEST_PROMPTS = (
    "a bird",
    "best quality, extremely detailed",
    "longbody, lowres, bad anatomy, bad hands, missing fingers",
)
QUALITIES = (
    "high resolution",
    "sharp focus",
    "natural light",
    "soft colors",
    "a colorful photo",
    "worst quality",
    "low quality",
    "blurry",
    "cropped",
    "extra digit",
)
COLOURS = "red orange yellow green blue purple pink brown black white grey gray golden silver dark bright"
BIRDS = (
    "bird eagle owl parrot robin sparrow duck swan heron crow finch gull hawk pigeon penguin chicken peacock"
    " flamingo hummingbird woodpecker kingfisher birds"
)
OBJECTS = (
    "cat dog horse cow sheep elephant bear fish butterfly flower flowers tree trees house building bridge car truck bus"
    " bicycle boat train plane chair table cup bottle bowl clock book apple fruit rose person people woman man girl boy"
    " child face hand eye wing feather beak head"
)
PLACES = (
    "sitting on a branch",
    "standing on the ground",
    "flying in the sky",
    "swimming in the water",
    "walking in a forest",
    "in a field",
    "on the green grass",
    "by a lake",
    "near the sea",
    "at the beach",
    "on a rock",
    "over mountains",
    "under clouds",
    "in the snow",
    "at sunset",
    "at night",
    "in front of a wall",
    "beside a river",
    "next to a window",
    "in a garden",
    "in a city street",
    "from above",
    "with open wings",
    "with a plain background",
)
STYLES = (
    "a photo of",
    "a photograph of",
    "a picture of",
    "an image of",
    "a painting of",
    "an oil painting of",
    "a watercolor of",
    "a drawing of",
    "a pencil sketch of",
    "a close up of",
    "a beautiful",
    "a realistic",
    "a small",
    "a large",
    "an old",
    "a young",
    "the",
    "two",
    "three",
)
# How often the contest's prompts stand beside the other captions, so that each of their words becomes one token.
CONTEST_WEIGHT = 100
CAPTIONED_SCENES = 2000

Symbols = Tuple[str, ...]
Pair = Tuple[str, str]


def built_in_captions() -> List[str]:
    """Captions of scenes, short ones of other things in all combinations of colour and place, the contest's prompts."""
    from tools.tiny.scenes import all_captions

    birds, colours = BIRDS.split(), COLOURS.split()
    subjects = birds + OBJECTS.split()
    captions = list(CONTEST_PROMPTS) * CONTEST_WEIGHT
    captions += all_captions(CAPTIONED_SCENES)
    captions += [f"{bird}, {quality}" for bird, quality in itertools.product(birds, QUALITIES)]
    captions += [f"a {colour} {subject}" for colour, subject in itertools.product(colours, subjects)]
    captions += [f"a {subject} {place}" for subject, place in itertools.product(subjects, PLACES)]
    captions += [f"{style} {subject}" for style, subject in itertools.product(STYLES, subjects)]
    return captions


def byte_alphabet() -> List[str]:
    """The printable character that stands for each token of one byte, in the order of CLIP's vocabulary.

    Bytes that are printable in Latin-1 stand for themselves and come first; the others take the characters from 256 on.
    """
    return [character for _, character in sorted(_byte_to_character().items(), key=lambda item: ord(item[1]))]


def _byte_to_character() -> Dict[int, str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + i) for i, byte in enumerate(rest)})
    return table


def count_words(captions: Iterable[str]) -> Dict[Symbols, int]:
    """How often each word occurs, lower-cased and split into the symbols that merging starts from."""
    table = _byte_to_character()
    counts: Counter = Counter()
    for caption in captions:
        counts.update(WORD.findall(unicodedata.normalize("NFC", caption).lower()))
    words = {}
    for word, count in counts.items():
        symbols = [table[byte] for byte in word.encode("utf-8")]
        words[(*symbols[:-1], symbols[-1] + END_OF_WORD)] = count
    return words


def merge(word: Symbols, pair: Pair) -> Symbols:
    """`word` with every occurrence of `pair`, from the left, joined into one symbol."""
    joined: List[str] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            joined.append(word[i] + word[i + 1])
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return tuple(joined)


def train(captions: Iterable[str], num_merges: int) -> List[Pair]:
    """Byte-pair encoding (arXiv:1508.07909): at most `num_merges` merges, the most frequent pair first.

    Equal counts are broken by the pair's own order, so that the result depends on the captions alone. Ends early where
    no pair occurs twice.
    """
    words = count_words(captions)
    merges: List[Pair] = []
    while len(merges) < num_merges:
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = {merge(word, best): count for word, count in words.items()}
    return merges


def vocabulary(merges: Sequence[Pair]) -> Dict[str, int]:
    """Token to id: bytes, bytes that end a word, merges, special tokens.

    Raises
    ------
    ValueError
        Two merges make the same token, or one makes a special token.
    """
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + END_OF_WORD for c in alphabet), *(a + b for a, b in merges), *SPECIAL_TOKENS]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        repeated = [token for token, count in Counter(tokens).items() if count > 1]
        raise ValueError(f"tokens that two merges make: {repeated[:10]}")
    return vocab


def write_tokenizer(folder: Path, merges: Sequence[Pair]) -> None:
    """Write the three files that transformers' `CLIPTokenizer` loads; each is whole or not there."""
    from cldm.files import atomic_path

    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "unk_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[1],
        "do_lower_case": True,
        "model_max_length": MAX_LENGTH,
    }
    texts = {
        "vocab.json": json.dumps(vocabulary(merges), ensure_ascii=False, indent=0) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
    for name, text in texts.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(text.encode("utf-8"))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the tiny model's vocabulary.")
    parser.add_argument(
        "--captions", type=Path, help="UTF-8 file, one caption a line; default: the scenes' and the built-in ones"
    )
    parser.add_argument("--size", type=int, default=1344, help="most tokens the vocabulary may have (default 1344)")
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "tiny_tokenizer", help="folder to write to")
    args = parser.parse_args(argv)
    if args.size < SMALLEST:
        parser.error(f"--size must be at least {SMALLEST}: all bytes and the special tokens, got {args.size}")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    from environment import ensure_environment

    ensure_environment(["numpy", "cv2"])
    try:
        captions = built_in_captions() if args.captions is None else args.captions.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        print(f"cannot read the captions {args.captions}: {error}", file=sys.stderr)
        return 1
    merges = train(captions, args.size - SMALLEST)
    write_tokenizer(args.output, merges)
    print(f"{len(captions)} captions: {SMALLEST + len(merges)} tokens, {len(merges)} of them merges, in {args.output}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main(sys.argv[1:]))
