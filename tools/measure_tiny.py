#!/usr/bin/env python3
"""Measure what the trained tiny model reaches on scenes held out from training, and draw sheets of its pictures.

    python3 tools/measure_tiny.py [--scenes 128] [--only edges,words] [--output build/tiny_report]

Prints a table of what was asked and reached, and writes it with more detail as report.json beside the sheets. Exit
status: 0 where every limit asked for is kept (or --no-check is given), 1 where one is missed, 2 where nothing could be
measured. The same arguments give the same pictures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, TypeVar

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, Python's path begins with tools/
    sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from environment import ensure_environment

    ensure_environment(["torch", "numpy", "cv2", "yaml", "transformers", "tqdm"])

import numpy as np  # noqa: E402

from cldm.machine import available_cores  # noqa: E402
from scoring.metrics import error_stats, psnr, ssim  # noqa: E402
from tools.tiny.measures import (  # noqa: E402
    EDGE_RADIUS,
    EdgeMatch,
    derangement,
    dominant_hue,
    find_edges,
    match_edges,
    mean_difference,
    nearest_colour,
    others_of_kind,
    sharpness,
    variety,
)
from tools.tiny.report import Report, confusion_table, edges_table, write_sheet  # noqa: E402
from tools.tiny.scenes import COLOURS, Scene, make_scene  # noqa: E402

# What the model must reach, in percent, dB and levels of 255.
EDGE_RECALL, EDGE_PRECISION = 70.0, 60.0
# "What other scenes give": at strength 0 at most this many times as much as others of the same kind.
CHANCE_RATIO = 1.25
WORD_SHARE = 85.0
# The measure itself on the scenes as drawn: a share below this would say that the hue is no good measure.
DRAWN_SHARE = 95.0
# Mean difference at which two pictures are plainly not the same.
VARIETY_LEVELS = 8.0
AUTOENCODER_PSNR = 26.0
# An object smaller than this share of the picture is left out of the colour test.
SMALLEST_OBJECT = 0.01
# Edges do not tell which patches of a pattern have its first colour.
WITHOUT_OBJECT = ("pattern",)

FIRST_SEED = 7000
SEEDS_A_SCENE = 4
GUIDANCE_SCALES = (1.0, 3.0, 5.0, 7.0, 9.0, 12.0)
PHOTO_PROMPTS = ("a bird", "a red bird", "a blue bird", "a yellow flower", "a green tree")
LEGEND = f"""\
recall: share of the control's edge pixels with one of the picture within {EDGE_RADIUS:g} pixels; precision: the reverse
all pixels: pooled over the edge pixels of all pictures; mean of images: each picture counts the same
std. error: of the mean; levels: of 255, in gradients levels a pixel"""
EDGE_DETAILS = {"edges at strength 1, all pixels": "edges_by_kind", "photographs, all pixels": "photographs"}
SHEET_ROWS = 12
CELL_WIDTH = 192
# Under this many scenes a pool of processes takes longer to start than the scenes take to draw.
POOL_FROM = 24
OUTPUT_BYTES = 64 << 20

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Recoloured:
    """A scene with its main object in another colour.

    Attributes
    ----------
    caption : str
        The scene's fullest wording that names the colour.
    drawn : str or None
        The colour word that the object's own pixels are nearest to.
    """

    caption: str
    drawn: Optional[str]


@dataclass(frozen=True)
class Photo:
    """A photograph by name: (H, W, 3) uint8 RGB image at the size that is painted, and its (H, W) uint8 edges."""

    name: str
    image: np.ndarray
    edges: np.ndarray


@dataclass
class Bench:
    """What the sections measure on and with.

    Attributes
    ----------
    sampler : tools.tiny.sampling.Sampler
        The model in FP32.
    half : torch.dtype
        The half precision to compare with.
    load_full : callable or None
        Gives the sampler of the weights before rounding, where these were named.
    scenes : list of Scene
        Held out from training.
    recoloured : dict
        For the index of each scene with a large enough main object, that scene in each of `COLOURS`.
    guidance : float
    steps : int
    folder : Path
        Where sheets are written.
    edges : (N, 256, 384) uint8 array
        Of the scenes.
    """

    sampler: Any
    half: Any
    load_full: Optional[Callable[[], Any]]
    scenes: List[Scene]
    recoloured: Dict[int, List[Recoloured]]
    photos: List[Photo]
    guidance: float
    steps: int
    folder: Path
    edges: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.edges = np.stack(in_threads(find_edges, [scene.image for scene in self.scenes]))

    @property
    def captions(self) -> List[str]:
        return [scene.caption for scene in self.scenes]

    @property
    def coloured(self) -> List[int]:
        """Scenes with a main object large enough for the colour test."""
        return sorted(self.recoloured)

    def some(self, share: int, of: Optional[Sequence[int]] = None) -> List[int]:
        """The first N / `share` scenes of `of` (default: all), at least two where there are two."""
        return list(range(len(self.scenes)) if of is None else of)[: max(2, len(self.scenes) // share)]

    def paint(self, indices: Sequence[int], prompts: Sequence[str], title: str, **options: Any) -> np.ndarray:
        """(K, 256, 384, 3) uint8 images of K prompts on the edges of K scenes, at each scene's own seed by default."""
        return self.paint_both(indices, prompts, title, **options)[0]

    def paint_both(
        self, indices: Sequence[int], prompts: Sequence[str], title: str, **options: Any
    ) -> Tuple[np.ndarray, np.ndarray]:
        """`paint` with the latents.

        Besides the sampler's options `sampler`, `negative`, `seeds` and `edges_of`, K other scenes whose edges are
        painted on, may be given.
        """
        from tools.tiny.sampling import NEGATIVE_PROMPT

        sampler = options.pop("sampler", self.sampler)
        negative = options.pop("negative", NEGATIVE_PROMPT)
        seeds = options.pop("seeds", [FIRST_SEED + i for i in indices])
        edges = self.edges[list(options.pop("edges_of", indices))]
        options = {"guidance": self.guidance, "steps": self.steps, "progress": title, **options}
        return sampler.generate(edges, prompts, negative, seeds, **options)

    def follow(self, indices: Sequence[int], images: Sequence[np.ndarray]) -> List[EdgeMatch]:
        """How images follow the edges of scenes."""
        return in_threads(
            lambda pair: match_edges(self.edges[pair[0]], find_edges(pair[1])), list(zip(indices, images))
        )

    def reached(self, indices: Sequence[int], images: Sequence[np.ndarray]) -> List[Optional[str]]:
        """The colour word of each image's main object; None for grey."""
        return in_threads(
            lambda pair: nearest_colour(dominant_hue(pair[1], self.scenes[pair[0]].mask)), list(zip(indices, images))
        )

    def sheet(
        self, name: str, titles: Sequence[str], captions: Sequence[str], rows: Sequence[Sequence[np.ndarray]]
    ) -> None:
        """Write a sheet of the first rows."""
        captions, rows = captions[:SHEET_ROWS], rows[:SHEET_ROWS]
        write_sheet(self.folder / f"{name}.png", titles, captions, rows, CELL_WIDTH)


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> List[R]:
    """`map` over all cores; NumPy and OpenCV let other threads run."""
    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(function, items))


def short_prompt(colour: str, kind: str) -> str:
    """ "a red bird", "an orange tree"; without a colour "a bird"."""
    words = f"{colour} {kind}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def share(asked: Sequence[str], reached: Sequence[Optional[str]]) -> float:
    """Percent of words that were reached."""
    return 100.0 * float(np.mean([a == r for a, r in zip(asked, reached)]))


def measure_edges(bench: Bench, report: Report) -> None:
    """Edges at strengths 1, 0.5 and 0, and what chance gives."""
    every = range(len(bench.scenes))
    images, latents, matches = {}, {}, {}
    for strength in (1.0, 0.5, 0.0):
        title = f"edges, strength {strength:g}"
        images[strength], latents[strength] = bench.paint_both(every, bench.captions, title, strength=strength)
        matches[strength] = bench.follow(every, images[strength])
    report.add_edges("edges", "strength 1", matches[1.0], EDGE_RECALL, EDGE_PRECISION)
    report.add_edges("edges", "strength 0.5", matches[0.5])
    report.add_edges("edges", "strength 0", matches[0.0])
    others = derangement(len(bench.scenes), FIRST_SEED)
    add_unused_edges(bench, report, latents[0.0], others)
    add_same_kind(bench, report, images[0.0], matches[0.0])
    add_random_others(bench, report, images, matches[0.0], others)
    report.details["edges_by_kind"] = edges_by_kind(bench, matches[1.0])
    rows = [[s.image, e, *(images[k][i] for k in images)] for i, (s, e) in enumerate(zip(bench.scenes, bench.edges))]
    bench.sheet("edges", ["scene", "edges", *(f"strength {k:g}" for k in images)], bench.captions, rows)


def add_unused_edges(bench: Bench, report: Report, latents: np.ndarray, others: np.ndarray) -> None:
    """How many pictures at strength 0, given their (N, 4, h, w) latents, differ in any bit with another scene's edges.

    None may: then what follows the edges at strength 0 follows them by chance, or because the caption fits them.
    """
    every = range(len(bench.scenes))
    title = "edges, strength 0, other edges"
    _, again = bench.paint_both(every, bench.captions, title, strength=0.0, edges_of=others)
    changed = int((again != latents).any(axis=(1, 2, 3)).sum())
    note = f"of {len(latents)}, with their captions and seeds"
    report.add("edges", "pictures that another scene's edges change, strength 0", changed, at_most=0, note=note)


def add_same_kind(bench: Bench, report: Report, images: np.ndarray, without: Sequence[EdgeMatch]) -> None:
    """How much better a scene's own picture at strength 0 matches its edges than those of other scenes of its kind do.

    The caption still says what the scene shows, and two pictures of dense patterns or of birds in the middle share more
    edges by chance than two of anything. So chance is, for each scene, the mean over the pictures at strength 0 of all
    others of its kind. It is compared as the mean over the same scenes, for pooled over pixels a few dense patterns
    would outweigh all else. Scenes alone of their kind are left out.

    Parameters
    ----------
    images : (N, 256, 384, 3) uint8 array
        Pictures at strength 0.
    without : N matches
        Of these pictures with their own scenes' edges.
    """
    others = others_of_kind([scene.kind for scene in bench.scenes])
    left_out = len(bench.scenes) - len(others)
    name, note = "scenes that have others of their kind", f"{left_out} alone of their kind, left out of the next six"
    # With fewer the comparison would have nothing to compare, and must not pass unseen.
    report.add("edges", name, len(others), at_least=2, note=note)
    if not others:
        return
    pairs = [(i, j) for i, group in others.items() for j in group]
    edges = in_threads(find_edges, images)
    found = dict(zip(pairs, in_threads(lambda pair: match_edges(bench.edges[pair[0]], edges[pair[1]]), pairs)))
    for measure in ("recall", "precision"):
        own = [100 * getattr(without[i], measure) for i in others]
        chance = [100 * np.mean([getattr(found[i, j], measure) for j in group]) for i, group in others.items()]
        add_chance(report, measure, own, chance)


def add_chance(report: Report, measure: str, own: Sequence[float], chance: Sequence[float]) -> None:
    """The chance level of scenes, their own shares less it, and their ratio, which has a limit; all in percent."""
    title = f"{measure}, others of the kind, strength 0: mean of images"
    report.add_mean("edges", title, chance, unit="%", note=f"{len(chance)} scenes")
    excess = np.subtract(own, chance)
    report.add_mean("edges", f"{measure}, strength 0 less others of the kind", excess, unit="%", note="same scenes")
    ratio = float(np.mean(own) / np.mean(chance)) if np.any(chance) else float("inf")
    report.add("edges", f"{measure}, strength 0 / others of the kind", ratio, at_most=CHANCE_RATIO, note="same scenes")


def add_random_others(
    bench: Bench,
    report: Report,
    images: Dict[float, np.ndarray],
    without: Sequence[EdgeMatch],
    others: np.ndarray,
) -> None:
    """What one random other scene a scene gives, whatever it shows: for information.

    Parameters
    ----------
    images : dict of (N, 256, 384, 3) uint8 arrays
        Pictures by strength.
    without : N matches
        Of the pictures at strength 0 with their own scenes' edges.
    others : (N,) int array
        The other scene of each scene.
    """
    every = range(len(bench.scenes))
    same = bench.follow(every, images[0.0][others])
    report.add_edges("edges", "random others, strength 1", bench.follow(every, images[1.0][others]))
    report.add_edges("edges", "random others as drawn", bench.follow(every, [bench.scenes[j].image for j in others]))
    report.add_edges("edges", "random others, strength 0", same)
    own, other = sum(without, EdgeMatch()), sum(same, EdgeMatch())
    for measure in ("recall", "precision"):
        a, b = getattr(own, measure), getattr(other, measure)
        title = f"{measure}, strength 0 / random others, strength 0: all pixels"
        report.add("edges", title, a / b if b else float("inf"), note="no limit: others seldom show the same things")


def edges_by_kind(bench: Bench, matches: Sequence[EdgeMatch]) -> Dict[str, Dict[str, float]]:
    """Recall and precision in percent, pooled over the pixels of all scenes of a kind, and how many there are."""
    result = {}
    for kind in sorted({scene.kind for scene in bench.scenes}):
        own = [match for scene, match in zip(bench.scenes, matches) if scene.kind == kind]
        pooled = sum(own, EdgeMatch())
        result[kind] = {"pictures": len(own), "recall": 100 * pooled.recall, "precision": 100 * pooled.precision}
    return result


def measure_words(bench: Bench, report: Report) -> None:
    """Eight colours for the main object over the same edges and noise: whether its hue is the one asked for."""
    indices = [i for i in bench.coloured for _ in COLOURS]
    asked = list(COLOURS) * len(bench.coloured)
    prompts = {
        "caption": [scene.caption for i in bench.coloured for scene in bench.recoloured[i]],
        "short prompt": [short_prompt(word, bench.scenes[i].kind) for i, word in zip(indices, asked)],
    }
    drawn = [scene.drawn for i in bench.coloured for scene in bench.recoloured[i]]
    add_words(report, "scenes as drawn", asked, drawn, DRAWN_SHARE)
    for name, texts in prompts.items():
        images = bench.paint(indices, texts, f"words, {name}")
        add_words(report, name, asked, bench.reached(indices, images), WORD_SHARE if name == "caption" else None)
        columns = len(COLOURS)
        rows = [[bench.edges[i], *images[k * columns : (k + 1) * columns]] for k, i in enumerate(bench.coloured)]
        captions = [f"{bench.scenes[i].kind}: {texts[k * columns]}" for k, i in enumerate(bench.coloured)]
        bench.sheet(f"words_{name.replace(' ', '_')}", ["edges", *COLOURS], captions, rows)


def add_words(
    report: Report, name: str, asked: Sequence[str], reached: Sequence[Optional[str]], limit: Optional[float]
) -> None:
    """The share of words reached, its error over scenes, and the confusion matrix."""
    step = len(COLOURS)
    per_scene = [share(asked[k : k + step], reached[k : k + step]) for k in range(0, len(asked), step)]
    note = f"{len(per_scene)} scenes x {len(COLOURS)} colours"
    report.add_mean("words", f"asked colour reached: {name}", per_scene, unit="%", at_least=limit, note=note)
    counts = np.zeros((len(COLOURS), len(COLOURS) + 1), dtype=np.int64)
    for a, r in zip(asked, reached):
        counts[COLOURS.index(a), len(COLOURS) if r is None else COLOURS.index(r)] += 1
    report.details[f"confusion, {name}"] = {"words": list(COLOURS), "counts": counts.tolist()}


def measure_variety(bench: Bench, report: Report) -> None:
    """Several seeds on the same edges, with a caption that names no colour and with the whole one."""
    chosen = bench.some(8, bench.coloured)
    indices = [i for i in chosen for _ in range(SEEDS_A_SCENE)]
    seeds = [FIRST_SEED + 1000 * k + i for i in chosen for k in range(SEEDS_A_SCENE)]
    prompts = {
        "short prompt": [short_prompt("", bench.scenes[i].kind) for i in indices],
        "caption": [bench.scenes[i].caption for i in indices],
    }
    for name, texts in prompts.items():
        images = bench.paint(indices, texts, f"variety, {name}", seeds=seeds)
        groups = images.reshape(len(chosen), SEEDS_A_SCENE, *images.shape[1:])
        masks = [bench.scenes[i].mask for i in chosen]
        places = {"whole picture": [None] * len(masks), "object": masks, "background": [~mask for mask in masks]}
        for place, regions in places.items():
            values = [variety(group, region) for group, region in zip(groups, regions)]
            limit = VARIETY_LEVELS if (name, place) == ("short prompt", "whole picture") else None
            title = f"difference between seeds, {name}: {place}"
            note = f"{len(values)} scenes x {SEEDS_A_SCENE} seeds"
            report.add_mean("variety", title, values, unit="levels", at_least=limit, note=note)
        followed = bench.follow(indices, images)
        scenes = [sum(followed[k : k + SEEDS_A_SCENE], EdgeMatch()) for k in range(0, len(followed), SEEDS_A_SCENE)]
        report.add_edges("variety", name, scenes, EDGE_RECALL, note=note)
        rows = [[bench.edges[i], *group] for i, group in zip(chosen, groups)]
        titles = ["edges", *(f"seed {k + 1}" for k in range(SEEDS_A_SCENE))]
        bench.sheet(
            f"variety_{name.replace(' ', '_')}", titles, [texts[k * SEEDS_A_SCENE] for k in range(len(chosen))], rows
        )


def measure_autoencoder(bench: Bench, report: Report) -> None:
    """What encoding to the mean and decoding leaves of a picture."""
    scenes = np.stack([scene.image for scene in bench.scenes])
    again = bench.sampler.reconstruct(scenes)
    add_reconstructions(report, "scenes", scenes, again, AUTOENCODER_PSNR)
    report.add_edges("autoencoder", "scenes", bench.follow(range(len(scenes)), again))
    if bench.photos:
        photos = [photo.image for photo in bench.photos]
        copies = [bench.sampler.reconstruct(image[None])[0] for image in photos]
        add_reconstructions(report, "photographs", photos, copies, None)
        followed = [match_edges(photo.edges, find_edges(copy)) for photo, copy in zip(bench.photos, copies)]
        report.add_edges("autoencoder", "photographs", followed)
        bench.sheet(
            "autoencoder_photographs", ["photo", "again"], [p.name for p in bench.photos], list(zip(photos, copies))
        )
    bench.sheet("autoencoder", ["scene", "again"], bench.captions, list(zip(scenes, again)))


def add_reconstructions(
    report: Report, name: str, images: Sequence[np.ndarray], again: Sequence[np.ndarray], limit: Optional[float]
) -> None:
    ratios = in_threads(lambda pair: psnr(*pair), list(zip(again, images)))
    spread = f"from {min(ratios):.2f} to {max(ratios):.2f}"
    report.add_mean("autoencoder", f"PSNR, {name}", ratios, unit="dB", at_least=limit, note=spread)
    alike = in_threads(lambda pair: ssim(*pair), list(zip(again, images)))
    report.add_mean("autoencoder", f"SSIM, {name}", alike, note=f"from {min(alike):.3f} to {max(alike):.3f}")


def measure_half(bench: Bench, report: Report) -> None:
    """Half precision against FP32, and the shipped weights against those before rounding where these are given."""
    from tools.tiny.sampling import Sampler

    chosen = bench.some(8)
    captions = [bench.scenes[i].caption for i in chosen]
    exact = bench.paint_both(chosen, captions, "half, FP32")
    half = Sampler(bench.sampler.model, bench.sampler.tokenizer, bench.sampler.device, bench.half, bench.sampler.batch)
    name = str(bench.half).replace("torch.", "")
    note = "" if name == "float16" else "FP16 is too slow on this device"
    run = bench.paint_both(chosen, captions, f"half, {name}", sampler=half)
    compare_runs(report, f"{name} run against FP32", run, exact, note)
    if bench.load_full is not None:
        full = bench.paint_both(chosen, captions, "half, full weights", sampler=bench.load_full())
        compare_runs(report, "shipped weights against full ones", exact, full, "both run in FP32")


def compare_runs(
    report: Report, name: str, run: Tuple[np.ndarray, np.ndarray], reference: Tuple[np.ndarray, np.ndarray], note: str
) -> None:
    """Relative error of the final latents and PSNR of the images."""
    errors = [error_stats(a, b).relative for a, b in zip(run[1], reference[1])]
    notes = [f"{len(errors)} scenes", f"largest {max(errors):.2g}", note]
    report.add_mean("half", f"{name}: latent relative error", errors, note=", ".join(filter(None, notes)))
    ratios = [min(psnr(a, b), 100.0) for a, b in zip(run[0], reference[0])]  # equal images would be infinite
    spread = f"from {min(ratios):.2f} to {max(ratios):.2f}"
    report.add_mean("half", f"{name}: image PSNR", ratios, unit="dB", note=spread)


def measure_guidance(bench: Bench, report: Report) -> None:
    """Guidance scales, guess mode and the negative prompt."""
    chosen = bench.some(4, bench.coloured)
    asked = [COLOURS[k % len(COLOURS)] for k in range(len(chosen))]
    prompts = [bench.recoloured[i][COLOURS.index(word)].caption for i, word in zip(chosen, asked)]
    runs: Dict[str, Dict[str, Any]] = {f"scale {g:g}": {"guidance": g} for g in GUIDANCE_SCALES}
    runs["guess mode"] = {"guess_mode": True}
    images = {}
    for name, options in runs.items():
        images[name] = bench.paint(chosen, prompts, f"guidance, {name}", **options)
        report.add_edges("guidance", name, bench.follow(chosen, images[name]), pooled_only=True)
        reached = bench.reached(chosen, images[name])
        hits = [100.0 * (a == r) for a, r in zip(asked, reached)]
        report.add_mean("guidance", f"asked colour reached, {name}", hits, unit="%", note=f"{len(hits)} pictures")
    rows = [[bench.edges[i], *(images[name][k] for name in runs)] for k, i in enumerate(chosen)]
    bench.sheet("guidance", ["edges", *runs], prompts, rows)
    measure_negative(bench, report)


def measure_negative(bench: Bench, report: Report) -> None:
    """What the contest's negative prompt changes, and what its words make as the prompt."""
    from tools.tiny.sampling import NEGATIVE_PROMPT

    chosen = bench.some(4)
    captions = [bench.scenes[i].caption for i in chosen]
    images = {
        "contest's negative prompt": bench.paint(chosen, captions, "negative, contest's"),
        "no negative prompt": bench.paint(chosen, captions, "negative, none", negative=""),
        "its words as the prompt": bench.paint(
            chosen, [NEGATIVE_PROMPT] * len(chosen), "negative, as prompt", negative="", added_prompt=""
        ),
    }
    with_it, without = list(images.values())[:2]
    changed = [mean_difference(a, b) for a, b in zip(with_it, without)]
    note = f"{len(chosen)} scenes"
    report.add_mean("negative", "difference that the negative prompt makes", changed, unit="levels", note=note)
    for name, pictures in images.items():
        report.add_mean("negative", f"gradient: {name}", [sharpness(p) for p in pictures], unit="levels")
    drawn = [sharpness(bench.scenes[i].image) for i in chosen]
    report.add_mean("negative", "gradient: scenes as drawn", drawn, unit="levels")
    rows = [[bench.edges[i], *(images[name][k] for name in images)] for k, i in enumerate(chosen)]
    bench.sheet("negative", ["edges", *images], captions, rows)


def measure_photographs(bench: Bench, report: Report) -> None:
    """Edges of real photographs."""
    from tools.tiny.sampling import NEGATIVE_PROMPT

    photos: List[EdgeMatch] = []
    rows = []
    for photo in bench.photos:
        edges = np.repeat(photo.edges[None], len(PHOTO_PROMPTS), axis=0)
        images, _ = bench.sampler.generate(
            edges,
            PHOTO_PROMPTS,
            NEGATIVE_PROMPT,
            FIRST_SEED,
            guidance=bench.guidance,
            steps=bench.steps,
            progress=f"photographs, {photo.name}",
        )
        matches = [match_edges(photo.edges, find_edges(image)) for image in images]
        pooled = sum(matches, EdgeMatch())
        report.details.setdefault("photographs", {})[photo.name] = {
            "pictures": len(matches),
            "recall": 100 * pooled.recall,
            "precision": 100 * pooled.precision,
        }
        photos.append(pooled)  # the prompts of one photograph are no independent samples
        rows.append([photo.image, photo.edges, *images])
    note = f"{len(photos)} photographs x {len(PHOTO_PROMPTS)} prompts"
    report.add_edges("photographs", "photographs", photos, note=note)
    names = [photo.name for photo in bench.photos]
    bench.sheet("photographs", ["photo", "edges", *PHOTO_PROMPTS], names, rows)


SECTIONS: Dict[str, Callable[[Bench, Report], None]] = {
    "edges": measure_edges,
    "words": measure_words,
    "variety": measure_variety,
    "autoencoder": measure_autoencoder,
    "half": measure_half,
    "guidance": measure_guidance,
    "photographs": measure_photographs,
}
NEED_COLOURS = {"words", "variety", "guidance"}
NEED_PHOTOS = {"autoencoder", "photographs"}


def draw(index: int) -> Scene:
    return make_scene(index, "test")


def recolour(index: int) -> List[Recoloured]:
    """A scene in each of the colours; nothing where it has no main object, or one that is too small."""
    scene = draw(index)
    if scene.kind in WITHOUT_OBJECT or scene.mask.mean() < SMALLEST_OBJECT:
        return []
    scenes = [make_scene(index, "test", colour=word) for word in COLOURS]
    captions = [short_prompt(word, scene.kind) for word in COLOURS]
    for wordings in zip(*(s.captions for s in scenes)):  # from the fullest; not every wording names the colour
        if all(word in wording.split() for word, wording in zip(COLOURS, wordings)):
            captions = list(wordings)
            break
    drawn = [nearest_colour(dominant_hue(s.image, s.mask)) for s in scenes]
    return [Recoloured(caption, word) for caption, word in zip(captions, drawn)]


def draw_scenes(number: int, coloured: bool) -> Tuple[List[Scene], Dict[int, List[Recoloured]]]:
    """The first scenes of the test split, and where asked those with a large enough main object in each colour."""
    from tqdm import tqdm

    def collect(run: Callable[..., Any]) -> Tuple[List[Scene], Dict[int, List[Recoloured]]]:
        scenes = list(tqdm(run(draw, range(number)), total=number, desc="scenes", disable=None, leave=False))
        if not coloured:
            return scenes, {}
        title = "scenes in each colour"
        drawn = tqdm(run(recolour, range(number)), total=number, desc=title, disable=None, leave=False)
        return scenes, {i: colours for i, colours in enumerate(drawn) if colours}

    if number < POOL_FROM or available_cores() == 1:
        return collect(map)
    with multiprocessing.get_context("spawn").Pool(available_cores()) as pool:
        return collect(pool.imap)


def read_photos(folder: Path) -> List[Photo]:
    """The photographs of a folder: its pictures without the generated scenes.

    Raises
    ------
    OSError, ValueError
        There is none, or one cannot be read.
    """
    from cldm.image import canny_map, resize_image, to_three_channels
    from scoring.pictures import find_pictures
    from tools.tiny.measures import HIGH_THRESHOLD, LOW_THRESHOLD
    from tools.tiny.scenes import HEIGHT

    photos = []
    for picture in find_pictures(folder):
        if not picture.name.startswith("scene_"):
            image = picture.read()
            edges = canny_map(image, HEIGHT, LOW_THRESHOLD, HIGH_THRESHOLD)
            resized = resize_image(to_three_channels(image), HEIGHT)
            photos.append(Photo(picture.name, np.ascontiguousarray(resized[:, :, ::-1]), edges))
    if not photos:
        raise ValueError(f"{folder} has no photographs: generated scenes alone do not count")
    return photos


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scenes", type=int, default=128, metavar="N", help="held-out scenes (default 128)")
    add("--only", default=",".join(SECTIONS), metavar="LIST", help=f"some of {','.join(SECTIONS)}")
    add("--model", default="tiny", help="tiny, or a YAML file (default tiny)")
    add("--weights", metavar="FILE", help="default: the model's own under models/")
    add("--full-weights", metavar="FILE", help="the same weights before they were rounded to FP16, to compare with")
    add("--pictures", type=Path, default=ROOT / "pictures", metavar="DIR", help="photographs (default pictures/)")
    add("--device", help="cuda or cpu; default: cuda where there is one")
    add("--batch", type=int, metavar="N", help="images at a time (default 64, on a CPU 4)")
    add("--guidance", type=float, default=9.0, metavar="SCALE", help="guidance scale (default 9)")
    add("--steps", type=int, default=20, metavar="N", help="DDIM steps (default 20)")
    add("--output", type=Path, default=ROOT / "build" / "tiny_report", metavar="DIR", help="default build/tiny_report")
    add("--no-check", action="store_true", help="exit with 0 where a limit is missed, too")
    args = parser.parse_args(argv)
    args.only = [name.strip() for name in args.only.split(",") if name.strip()]
    unknown = [name for name in args.only if name not in SECTIONS]
    if unknown or not args.only:
        parser.error(f"--only: {', '.join(unknown) or 'nothing'}; known are {', '.join(SECTIONS)}")
    if args.scenes < 2:
        parser.error(f"--scenes must be at least 2, as scenes are compared with others; got {args.scenes}")
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    check_request(parser, args)
    return args


def check_request(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    from cldm.request import Request

    try:
        Request("", ddim_steps=args.steps, guidance_scale=args.guidance)
    except ValueError as error:
        parser.error(str(error))


def make_bench(args: argparse.Namespace) -> Tuple[Bench, Report]:
    """Everything that the sections need, read and drawn; what is wrong is said before the long work."""
    import torch

    from cldm.checkpoint import load_model
    from cldm.config import load_config
    from cldm.files import require_room
    from cldm.tokenizer import Tokenizer
    from cldm.weights import find_weights
    from tools.tiny.sampling import Sampler

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no CUDA device here")
    on_cpu = device.type == "cpu"
    batch = args.batch or (4 if on_cpu else 64)
    config = load_config(args.model)
    weights = find_weights(config, args.weights)
    full = None if args.full_weights is None else find_weights(config, args.full_weights)
    tokenizer = Tokenizer(config)
    require_room(args.output, OUTPUT_BYTES)
    photos = read_photos(args.pictures) if NEED_PHOTOS & set(args.only) else []

    def load(which: Any) -> Sampler:
        return Sampler(load_model(config, which), tokenizer, device, batch=batch)

    sampler = load(weights)
    coloured = bool(NEED_COLOURS & set(args.only))
    scenes, recoloured = draw_scenes(args.scenes, coloured)
    if coloured and not recoloured:
        raise ValueError(f"none of the first {args.scenes} scenes has a large coloured object: raise --scenes")
    bench = Bench(
        sampler=sampler,
        # A CPU's FP16 convolutions are many times slower than its FP32 ones.
        half=torch.bfloat16 if on_cpu else torch.float16,
        load_full=None if full is None else lambda: load(full),
        scenes=scenes,
        recoloured=recoloured,
        photos=photos,
        guidance=args.guidance,
        steps=args.steps,
        folder=args.output,
    )
    settings = {
        "model": config.name,
        "weights": str(weights),
        "weights_digest": weights.digest,
        "device": "CPU" if on_cpu else torch.cuda.get_device_name(device),
        "precision": "fp32",
        "torch": torch.__version__,
        "scenes": args.scenes,
        "coloured_scenes": len(recoloured),
        "guidance_scale": args.guidance,
        "ddim_steps": args.steps,
        "batch": batch,
    }
    return bench, Report(settings)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_arguments(argv)
    start = time.perf_counter()
    try:
        bench, report = make_bench(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"measure_tiny: {error}", file=sys.stderr)
        return 2
    seconds = {"preparation": time.perf_counter() - start}
    print(", ".join(f"{key} {value}" for key, value in report.settings.items()), flush=True)
    for name in args.only:
        start = time.perf_counter()
        SECTIONS[name](bench, report)
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    report.settings["seconds"] = seconds
    report.write(args.output)
    print_report(report, args.output)
    return 1 if report.missed and not args.no_check else 0


def print_report(report: Report, folder: Path) -> None:
    print(f"{report.table()}\n{LEGEND}")
    for title, name in EDGE_DETAILS.items():
        shares = report.details.get(name, {})
        if shares:
            print(f"{title}\n{edges_table(shares)}")
    for name, values in report.details.items():
        if name.startswith("confusion, "):
            print(f"cases by colour asked (rows) and reached (columns), {name[len('confusion, ') :]}")
            print(confusion_table(np.array(values["counts"]), values["words"]))
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in report.settings["seconds"].items()))
    for row in report.missed:
        print(f"missed: {row.section}: {row.name}: {row.asked} asked, {row.reached} reached")
    verdict = f"{len(report.missed)} of {report.limits} limits missed" if report.missed else "every limit kept"
    print(f"{verdict}; report.json and sheets are in {folder}")


if __name__ == "__main__":
    raise SystemExit(main())
