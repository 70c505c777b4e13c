"""Token ids for CLIP, by transformers' `CLIPTokenizer`. No torch here."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, Set, Tuple

import numpy as np

from cldm.config import ModelConfig, load_config

if TYPE_CHECKING:
    from cldm.weights import Weights

log = logging.getLogger(__name__)

# CLIP's vocabularies begin with the 256 bytes and the 256 bytes that end a word, and end with two special tokens.
SMALLEST_VOCABULARY = 514


class TokenizerNotFound(FileNotFoundError):
    """The vocabulary of the model is not on this machine."""


class Tokenizer:
    """Turns texts into (B, max_length) int32 ids: start, tokens, end, and end again as padding.

    Raises
    ------
    TokenizerNotFound
        The vocabulary is neither under models/ nor in transformers' cache; the message says what to put where.
    ValueError
        The vocabulary is damaged, or does not fit the model's text encoder.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.max_length = config.text.max_length
        self._told: Set[str] = set()
        self._tokenizer = _load(config)
        # A call of transformers' takes a tenth of a millisecond, and the negative prompt is the same each time.
        self._ids = functools.lru_cache(maxsize=256)(self._encode)
        if len(self._tokenizer) < SMALLEST_VOCABULARY:
            raise ValueError(
                f"the tokenizer has {len(self._tokenizer)} tokens, fewer than the {SMALLEST_VOCABULARY} of the smallest"
                f" CLIP vocabulary: vocab.json in {Path(config.folder) / config.tokenizer} is not one"
            )
        if len(self._tokenizer) > config.text.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self._tokenizer)} tokens, but {config.name}'s text encoder only"
                f" {config.text.vocab_size}: models/{config.tokenizer} belongs to another model"
            )
        self._special = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id)
        if None in self._special:
            raise ValueError(
                f"tokenizer_config.json in {Path(config.folder) / config.tokenizer} names no bos_token, eos_token or"
                " pad_token: copy CLIP's"
            )

    def __call__(self, texts: List[str]) -> Tuple[np.ndarray, List[str]]:
        """Ids of the texts, and a warning for each text that was too long, naming what was cut."""
        start, end, padding = self._special
        room = self.max_length - 2
        rows = np.full((len(texts), self.max_length), padding, dtype=np.int32)
        warnings: List[str] = []
        for row, text in zip(rows, texts):
            ids = self._ids(text)
            kept = (start, *ids[:room], end)
            row[: len(kept)] = kept
            if len(ids) > room:
                warnings.append(self._cut(ids, room))
        for warning in set(warnings) - self._told:  # once, however often the same text comes
            log.warning(warning)
        self._told.update(warnings)
        return rows, warnings

    def _encode(self, text: str) -> Tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])

    def _cut(self, ids: Sequence[int], room: int) -> str:
        """Names what there was no room for."""
        dropped = self._tokenizer.decode(list(ids[room:]))
        shown = dropped if len(dropped) <= 200 else dropped[:200] + " ..."
        return f"the text is {len(ids)} tokens long, CLIP takes {room}: {len(ids) - room} were cut: {shown!r}"


def find_tokenizer(config: ModelConfig, weights: Weights, report: Callable[[str], None] = log.warning) -> Tokenizer:
    """The model's tokenizer. To random weights all words are alike: there the tiny model's vocabulary will do.

    Parameters
    ----------
    report : callable
        Told where that vocabulary stands in.

    Raises
    ------
    TokenizerNotFound, ValueError
        As `Tokenizer`; the first only where the weights are those of a checkpoint.
    """
    try:
        return Tokenizer(config)
    except TokenizerNotFound:
        if weights.seed is None:
            raise
    report(f"{config.name}'s vocabulary is not here; for random weights the tiny model's stands in")
    tiny = load_config("tiny")
    return Tokenizer(dataclasses.replace(config, folder=tiny.folder, tokenizer=tiny.tokenizer))


def _load(config: ModelConfig) -> Any:
    folder = Path(config.folder) / config.tokenizer
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _load_folder(folder)
    cached = _cached_folder(config.tokenizer_hub) if config.tokenizer_hub else None
    if cached is not None:
        return _load_folder(cached)
    hub = f" of {config.tokenizer_hub}" if config.tokenizer_hub else ""
    raise TokenizerNotFound(
        f"{config.name} needs its CLIP vocabulary: put vocab.json and merges.txt{hub} into {folder}"
        + (f", or fetch {config.tokenizer_hub} into transformers' cache once" if config.tokenizer_hub else "")
    )


def _load_folder(folder: Path) -> Any:
    from transformers import CLIPTokenizer
    from transformers.utils import logging as transformers_logging

    # Texts beyond 77 tokens are cut and named by us; transformers' own advice would only repeat it.
    transformers_logging.get_logger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"vocab.json or merges.txt in {folder} is damaged, copy them again: {error}") from error


def _cached_folder(hub: str) -> Optional[Path]:
    """The folder of transformers' cache that has the vocabulary, found without a word over the network.

    `from_pretrained` with a hub's name would ask the hub even where it is told to use local files only.
    """
    from huggingface_hub import try_to_load_from_cache

    vocabulary, merges = (try_to_load_from_cache(hub, name) for name in ("vocab.json", "merges.txt"))
    if isinstance(vocabulary, str) and isinstance(merges, str) and Path(vocabulary).parent == Path(merges).parent:
        return Path(vocabulary).parent
    return None
