"""The tiny model's vocabulary, the tool that makes it, and the tokenizer around both."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
import pytest

from cldm.config import MODELS_DIR, ModelConfig, load_config
from cldm.tokenizer import Tokenizer, TokenizerNotFound, find_tokenizer
from cldm.weights import Weights
from tools.build_vocabulary import CONTEST_PROMPTS, SMALLEST, built_in_captions, main, parse_arguments, train
from tools.tiny.palette import WORDS
from tools.tiny.plan import KIND_WEIGHTS
from tools.tiny.scenes import all_captions

FOLDER = MODELS_DIR / "tiny_tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"
CONTEST = " ".join(CONTEST_PROMPTS)


@pytest.fixture(scope="module")
def tokenizer(tiny_config: ModelConfig) -> Tokenizer:
    return Tokenizer(tiny_config)


@pytest.fixture(scope="module")
def vocab() -> Dict[str, int]:
    return json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))


# --- An independent byte-pair encoder ---


def byte_characters() -> List[str]:
    """GPT-2's table: visible Latin-1 characters stand for themselves, the other bytes take 256, 257, ... in turn."""
    table, spare = [], 256
    for byte in range(256):
        visible = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        table.append(chr(byte) if visible else chr(spare))
        spare += not visible
    return table


def kind(character: str) -> str:
    return " " if character.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(character)[0], "other")


def split_words(text: str) -> List[str]:
    """CLIP's pattern, read from left to right: contractions, runs of letters, single digits, runs of the rest."""
    words, i = [], 0
    while i < len(text):
        suffix = next((s for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(s, i)), None)
        what, j = kind(text[i]), i + 1
        if suffix:
            j = i + len(suffix)
        elif what != "N":
            while j < len(text) and kind(text[j]) == what:
                j += 1
        if what != " ":
            words.append(text[i:j])
        i = j
    return words


def encode_by_hand(text: str, vocab: Dict[str, int], ranks: Dict[Tuple[str, str], int]) -> List[int]:
    table = byte_characters()
    ids = []
    for word in split_words(unicodedata.normalize("NFC", text).lower()):
        parts = [table[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while True:
            found = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
            if not found:
                break
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [vocab[part] for part in parts]
    return ids


TEXTS = [
    *CONTEST_PROMPTS,
    "a photo of a red bird on a branch",
    "two birds flying over the sea at sunset",
    "A BIRD",
    "A Photograph Of An EAGLE",
    "  spaces   in \t between\nand lines ",
    "bird",
    "birds",
    "birdbird",
    "blackbird",
    "thebird",
    "unbelievable chiaroscuro",
    "supercalifragilisticexpialidocious",
    "zzzzzzzzzz",
    "q",
    "it's the bird's nest, isn't it",
    "they're, we've, i'm, you'll, he'd",
    "rock'n'roll",
    "''''",
    "'s",
    "x's's",
    "1234567890",
    "4k 8k uhd",
    "3 birds, 12 ducks and 100% water",
    "(masterpiece:1.2), [cat|dog], {red}",
    "hello!!! what???",
    "a_b_c __init__",
    "email@example.com",
    "https://example.com/a?b=c&d=e#f",
    "a-b–c—d",
    "<lora:thing:0.8>",
    "</w>",
    "$5.00 + 3,50 €",
    "½ of ² things",
    "一只红色的鸟",
    "鳥, 森の中",
    "새 한 마리",
    "птица на ветке",
    "ΕΝΑ ΠΟΥΛΙ",
    "طائر على غصن",
    "पक्षी",
    "une mésange à tête noire",
    "cafe\u0301",
    "Straße",
    "ÉCOLE",
    "🐦",
    "a 🐦 on a 🌳",
    "👨‍👩‍👧‍👦",
    "e\u0301\u0302\u0303",
    "\u00a0non-breaking\u2003wide",
]


def test_transformers_agrees_with_an_independent_encoder(tokenizer: Tokenizer, vocab: Dict[str, int]) -> None:
    lines = (FOLDER / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}
    assert len(ranks) == len(lines) > 400
    assert len(TEXTS) >= 50
    for text in TEXTS:
        expected = encode_by_hand(text, vocab, ranks)
        assert 0 < len(expected) <= 75, text
        ids, warnings = tokenizer([text])
        row = [vocab[START], *expected] + [vocab[END]] * (76 - len(expected))
        assert ids[0].tolist() == row, text
        assert warnings == []


# --- The vocabulary ---


def test_layout_of_the_vocabulary(vocab: Dict[str, int], tiny_config: ModelConfig) -> None:
    size = tiny_config.text.vocab_size
    assert parse_arguments([]).size == size, "the tool's default is not the model's size"
    assert SMALLEST == 2 * 256 + 2
    # Rows of the embedding that no token uses are weights that nothing trains.
    assert 0.9 * size < len(vocab) <= size
    tokens = sorted(vocab, key=vocab.get)
    assert [vocab[token] for token in tokens] == list(range(len(vocab)))
    # CLIP's own first ids: "!" is 0, "a</w>" is 320.
    assert tokens[0] == "!" and tokens[256] == "!</w>" and vocab["a</w>"] == 320
    assert sorted(tokens[:256]) == sorted(byte_characters())
    assert [token + "</w>" for token in tokens[:256]] == tokens[256:512]
    assert tokens[-2:] == [START, END]
    lines = (FOLDER / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#version") and [line.replace(" ", "") for line in lines[1:]] == tokens[512:-2]


def test_known_words_are_single_tokens(tokenizer: Tokenizer, vocab: Dict[str, int]) -> None:
    counts = Counter(word for text in built_in_captions() for word in split_words(text))
    held_out = {word for text in all_captions(500, "test") for word in split_words(text)}
    assert len(counts) > 150 and held_out <= set(counts)
    # A full vocabulary leaves the rarest words in pieces; nothing that the model has to know is among them.
    broken = {word: count for word, count in counts.items() if f"{word}</w>" not in vocab}
    assert all(count <= 5 for count in broken.values()) and len(broken) <= 5, broken
    kinds = {word for kind in KIND_WEIGHTS for word in split_words(kind)}
    assert not (kinds | set(WORDS) | set(split_words(CONTEST))) & set(broken)
    ids, _ = tokenizer(["bird"])
    assert ids[0, :3].tolist() == [vocab[START], vocab["bird</w>"], vocab[END]]


@pytest.mark.parametrize("prompt", CONTEST_PROMPTS)
def test_contest_prompts_come_back(prompt: str, tokenizer: Tokenizer) -> None:
    ids, _ = tokenizer([prompt])
    decoded = tokenizer._tokenizer.decode(ids[0], skip_special_tokens=True)
    assert decoded.replace(" ,", ",") == prompt


def test_upper_case_is_lower_case(tokenizer: Tokenizer) -> None:
    ids, _ = tokenizer(["A Red BIRD", "a red bird"])
    assert np.array_equal(ids[0], ids[1])


@pytest.mark.parametrize("text", ["一只鸟", "🐦🌳", "птица", "طائر", "\u0000\u0001 \ufffd"])
def test_any_text_is_bytes(text: str, tokenizer: Tokenizer, vocab: Dict[str, int]) -> None:
    ids, warnings = tokenizer([text])
    inner = ids[0, 1:].tolist()
    inner = inner[: inner.index(vocab[END])]
    names = {index: token for token, index in vocab.items()}
    spelt = "".join(names[index] for index in inner).replace("</w>", "")
    table = {character: byte for byte, character in enumerate(byte_characters())}
    assert bytes(table[character] for character in spelt).decode("utf-8") == text.replace(" ", "")
    assert warnings == []


# --- The tokenizer ---


def test_empty_text(tokenizer: Tokenizer, vocab: Dict[str, int]) -> None:
    ids, warnings = tokenizer(["", "   "])
    assert ids.shape == (2, 77) and ids.dtype == np.int32
    assert ids.tolist() == [[vocab[START]] + [vocab[END]] * 76] * 2
    assert warnings == []


def test_long_text_is_cut_and_named(
    tokenizer: Tokenizer, vocab: Dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    text = "bird " * 75 + "purple owl"
    with caplog.at_level(logging.WARNING):
        ids, warnings = tokenizer(["a bird", text])
    assert ids.shape == (2, 77)
    assert ids[1].tolist() == [vocab[START]] + [vocab["bird</w>"]] * 75 + [vocab[END]]
    assert warnings == ["the text is 77 tokens long, CLIP takes 75: 2 were cut: 'purple owl'"]
    assert [record.getMessage() for record in caplog.records] == warnings


def test_longest_text_that_fits(tokenizer: Tokenizer, vocab: Dict[str, int]) -> None:
    ids, warnings = tokenizer(["bird " * 75])
    assert warnings == []
    assert ids[0].tolist() == [vocab[START]] + [vocab["bird</w>"]] * 75 + [vocab[END]]


def test_enormous_text_is_named_in_short(tokenizer: Tokenizer, vocab: Dict[str, int]) -> None:
    ids, (warning,) = tokenizer(["red " * 5000])
    assert ids[0, -1] == vocab[END]
    assert "5000 tokens long" in warning and "4925 were cut" in warning and len(warning) < 300


def test_several_long_texts(tokenizer: Tokenizer) -> None:
    _, warnings = tokenizer(["bird " * 76, "a bird", "owl " * 80])
    assert len(warnings) == 2 and "1 were cut: 'bird'" in warnings[0] and "5 were cut: 'owl owl" in warnings[1]


def test_rows_are_transformers_own(tokenizer: Tokenizer) -> None:
    """Its padding and truncation, with special tokens inside a text, and the second time as the first."""
    texts = ["", "a red bird", f"a {END} bird {START}", "bird " * 90, START * 80, "a red bird"]
    wanted = tokenizer._tokenizer(texts, truncation=True, max_length=77, padding="max_length")["input_ids"]
    for _ in range(2):
        np.testing.assert_array_equal(tokenizer(texts)[0], wanted)


def test_tokenizer_without_padding(tiny_config: ModelConfig, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny_tokenizer"
    shutil.copytree(FOLDER, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json .* pad_token"):
        Tokenizer(dataclasses.replace(tiny_config, folder=str(folder.parent)))


def test_missing_vocabulary(tiny_config: ModelConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, folder=str(tmp_path))
    with pytest.raises(TokenizerNotFound) as error:
        Tokenizer(config)
    for said in ("tiny", "vocab.json", "merges.txt", str(tmp_path / "tiny_tokenizer")):
        assert said in str(error.value)


def test_missing_vocabulary_that_has_a_hub_name(tmp_path: Path) -> None:
    config = dataclasses.replace(load_config("sd15"), folder=str(tmp_path), tokenizer_hub="nobody/no-such-tokenizer")
    with pytest.raises(TokenizerNotFound) as error:
        Tokenizer(config)
    for said in ("sd15", "vocab.json", "merges.txt", str(tmp_path / "tokenizer"), "nobody/no-such-tokenizer"):
        assert said in str(error.value)


@pytest.mark.parametrize("cached", [True, False])
def test_cache_is_read_without_a_network(cached: bool, tmp_path: Path) -> None:
    """In a process that nobody told to stay offline, and in which every look-up of a host fails loudly."""
    snapshot = tmp_path / "hub" / "models--some--clip" / "snapshots" / "0123abc"
    if cached:
        shutil.copytree(FOLDER, snapshot)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text("0123abc")
    program = (
        "import sys, socket, dataclasses; sys.path.insert(0, sys.argv[1])\n"
        "calls = []\n"
        "def refuse(*a, **k): calls.append(a); raise OSError('no network')\n"
        "socket.getaddrinfo = refuse; socket.socket.connect = refuse\n"
        "from cldm.config import load_config\n"
        "from cldm.tokenizer import Tokenizer, TokenizerNotFound\n"
        "c = dataclasses.replace(load_config('sd15'), folder=sys.argv[2], tokenizer_hub='some/clip')\n"
        "try: print(Tokenizer(c)(['a bird'])[0].shape, calls)\n"
        "except TokenizerNotFound: print('not found', calls)\n"
    )
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(FOLDER.parent.parent), str(tmp_path)],
        env={**environment, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == ("(1, 77) []" if cached else "not found []"), done.stderr


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_a_vocabulary_is_missing(name: str, tiny_config: ModelConfig, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "tiny_tokenizer")
    (tmp_path / "tiny_tokenizer" / name).unlink()
    with pytest.raises(TokenizerNotFound, match="vocab.json and merges.txt"):
        Tokenizer(dataclasses.replace(tiny_config, folder=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b'{"!": 0, "'),
        ("vocab.json", b"{}"),
        ("vocab.json", b"\xff\xfe\x00"),
        ("merges.txt", b"#version: 0.2\na b c\n"),
        ("merges.txt", b"#version: 0.2\nqqq zzz\n"),
    ],
)
def test_damaged_vocabulary(name: str, content: bytes, tiny_config: ModelConfig, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "tiny_tokenizer")
    (tmp_path / "tiny_tokenizer" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"vocab.json or merges.txt in {tmp_path}.* is damaged"):
        Tokenizer(dataclasses.replace(tiny_config, folder=str(tmp_path)))


def test_vocabulary_without_the_bytes(tiny_config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "tiny_tokenizer").mkdir()
    (tmp_path / "tiny_tokenizer" / "vocab.json").write_text('{"a</w>": 0}', encoding="utf-8")
    (tmp_path / "tiny_tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"fewer than the 514 .*{tmp_path}.* is not one"):
        Tokenizer(dataclasses.replace(tiny_config, folder=str(tmp_path)))


def test_vocabulary_of_a_larger_model(tiny_config: ModelConfig) -> None:
    small = dataclasses.replace(tiny_config, text=dataclasses.replace(tiny_config.text, vocab_size=600))
    with pytest.raises(ValueError, match="text encoder only 600: models/tiny_tokenizer belongs to another model"):
        Tokenizer(small)


# --- The tool ---


def test_tool_makes_the_shipped_files(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path / "made")]) == 0
    for path in (tmp_path / "made").iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), f"{path.name}: run tools/build_vocabulary.py"
    assert {path.name for path in FOLDER.iterdir()} == {path.name for path in (tmp_path / "made").iterdir()}


def test_tool_reads_captions(tmp_path: Path, tiny_config: ModelConfig) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(["a Zebra, über alles"] * 3 + ["only once here"]), encoding="utf-8")
    assert main(["--captions", str(captions), "--size", "540", "--output", str(tmp_path / "tiny_tokenizer")]) == 0
    vocab = json.loads((tmp_path / "tiny_tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocab) <= 540 and {"zebra</w>", "alles</w>"} <= set(vocab) and "only</w>" not in vocab
    made = Tokenizer(dataclasses.replace(tiny_config, folder=str(tmp_path)))
    ids, _ = made(["ZEBRA über"])
    names = made._tokenizer.convert_ids_to_tokens(ids[0, :4].tolist())
    assert names == [START, "zebra</w>", "Ã¼ber</w>", END]


def test_merges_by_hand() -> None:
    # "ab</w>" occurs three times, then "aab</w>" twice; the last pair occurs once and is left.
    assert train(["ab aab", "AAB", "xy"], 10) == [("a", "b</w>"), ("a", "ab</w>")]
    assert train(["ab aab", "aab"], 1) == [("a", "b</w>")]
    assert train([], 10) == []
    assert train(["ba cd ba cd"], 10) == [("b", "a</w>"), ("c", "d</w>")], "equal counts go by the pair's order"


def test_tool_refuses_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--size", "513", "--output", str(tmp_path)])
    assert "--size must be at least 514" in capsys.readouterr().err
    missing = tmp_path / "none.txt"
    assert main(["--captions", str(missing), "--output", str(tmp_path)]) == 1
    assert f"cannot read the captions {missing}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_to_random_weights_the_tiny_model_s_vocabulary_will_do(
    tiny_config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, name="other", folder=str(tmp_path), tokenizer="none", tokenizer_hub=None)
    told: List[str] = []
    found = find_tokenizer(config, Weights(None, 7, ""), told.append)
    assert np.array_equal(found(["a red bird"])[0], tokenizer(["a red bird"])[0])
    assert told == ["other's vocabulary is not here; for random weights the tiny model's stands in"]
    with pytest.raises(TokenizerNotFound, match="other needs its CLIP vocabulary"):
        find_tokenizer(config, Weights(tmp_path / "other.pth", None, ""), told.append)
    find_tokenizer(tiny_config, Weights(None, 7, ""), told.append)
    assert len(told) == 1
