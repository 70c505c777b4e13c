"""Tile sizes of the fused kernels: what fits a card, the tables that keep them, and the table that ships."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Counter, Dict, FrozenSet, List, Tuple

import pytest
import torch

from cldm.checkpoint import load_model
from cldm.config import ModelConfig, load_config
from cldm.model import ControlLDM
from cldm.weights import Weights
from deploy.spec import Build, graph_specs
from runtime.fused import build, networks
from runtime.fused.build import SHIPPED, _meta
from runtime.fused.ops import Fused
from runtime.fused.tuning import (
    FEEDER_REGISTERS,
    AttentionConfig,
    AttentionProblem,
    Card,
    Config,
    Problem,
    Tuning,
    attention_candidates,
    attention_fits,
    box,
    candidates,
    card_slug,
    estimate,
    fed_registers,
    fits,
    flash_bytes,
    flash_programs,
    read_table,
    row_tiles,
    shared_bytes,
    tiles,
    write_table,
)
from tests.fused_cases import RAGGED, boxed
from tests.interpreted import needs_triton

A10 = Card("NVIDIA A10", 86, 72, 101376)
RTX_4090 = Card("NVIDIA GeForce RTX 4090", 89, 128, 101376)
A100 = Card("NVIDIA A100-SXM4-80GB", 80, 108, 166912)
H200 = Card("NVIDIA H200", 90, 132, 232448, boxes=True)
H200_OLD_TRITON = H200._replace(boxes=False)
CARDS = (A10, RTX_4090, A100, H200, H200_OLD_TRITON)


@functools.lru_cache(maxsize=None)
def asked(height: int, width: int, samples: int = 1) -> Tuple[FrozenSet[Problem], FrozenSet[AttentionProblem]]:
    """All that sd15's networks ask for; nothing is computed."""
    config = load_config("sd15")
    with torch.device("meta"):
        model = ControlLDM(config)
    run = Fused(Tuning(A100))
    specs = graph_specs(Build(config, height, width, samples, "fp16"))
    for name, network in (
        ("text", networks.FusedText),
        ("hint", networks.FusedHint),
        ("step", networks.FusedStep),
        ("decode", networks.FusedDecode),
    ):
        network(model, run, "meta")(_meta(specs[name].inputs), _meta(specs[name].outputs))
    return frozenset(run.asked), frozenset(run.asked_attention)


def sizes() -> List[Problem]:
    """Of sd15 at the contest's size and at another, and of models that nobody tuned."""
    odd = [Problem(1, m, n, cin) for m, n, cin in ((1, 4, 16), (7, 40, 24), (100_000, 8, 8), (5, 70_000, 3000))]
    odd += [Problem(1, 9, 16, 20, 12, 9, 1, False, 3, 3), Problem(2, 6, 8, 16, gated=True, height=1, width=6)]
    return [*asked(256, 384)[0], *asked(512, 768, 2)[0], *odd]


# -- the table that ships ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Dict[str, List[int]]:
    return read_table(SHIPPED / f"{card_slug(H200)}.json")


@needs_triton
def test_shipped_table_has_all_of_sd15(shipped: Dict[str, List[int]]) -> None:
    problems, attentions = asked(256, 384)
    assert len(problems) > 80 and len(attentions) == 15
    assert {problem.key() for problem in (*problems, *attentions)} <= set(shipped)


@needs_triton
def test_shipped_table_is_what_runs(shipped: Dict[str, List[int]]) -> None:
    """An entry that did not fit would be passed over in silence for an estimate."""
    problems, attentions = asked(256, 384)
    tuning = Tuning(H200, shipped)
    for problem in problems:
        config = Config(*shipped[problem.key()])
        assert tuning.config(problem) == config and fits(problem, config, H200), problem
        assert config in candidates(problem, H200), problem
    for attention in attentions:
        config = AttentionConfig(*shipped[attention.key()])
        assert tuning.attention(attention) == config and attention_fits(attention, config, H200), attention
    used = [Config(*shipped[problem.key()]) for problem in problems]
    assert sum(config.bx > 0 for config in used) > 60, "the kernel of compute capability 9.0 is hardly used"


def test_shipped_card_is_the_one_it_is_named_for() -> None:
    stored = json.loads((SHIPPED / f"{card_slug(H200)}.json").read_text(encoding="utf-8"))
    assert Card(**stored["card"]) == H200
    assert set(stored["versions"]) == {"torch", "triton"}


@needs_triton
def test_keys_tell_problems_apart() -> None:
    """Two problems of one key would share a measurement of one of them."""
    problems, attentions = asked(256, 384)
    linear = {problem._replace(height=1, width=problem.m) if problem.taps == 1 else problem for problem in problems}
    assert len({problem.key() for problem in problems}) == len(linear)
    assert len({attention.key() for attention in attentions}) == len(attentions)


# -- what fits ---------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card.name}, boxes {card.boxes}")
def test_all_that_is_offered_fits(card: Card) -> None:
    tuning = Tuning(card)
    for problem in sizes():
        offered = candidates(problem, card)
        assert offered and len(offered) == len(set(offered))
        for config in (*offered, tuning.config(problem)):
            assert fits(problem, config, card), (problem, config)
            assert shared_bytes(problem, config) <= card.shared_memory
            assert card.boxes or not config.bx
            assert min(config.bm, config.bn, config.bk) >= 16, "less than a tensor core takes"
            if config.bx:
                assert (problem.stride == 1 or problem.taps == 9) and config.bm % (config.by * config.bx) == 0
                assert config.bm >= 64 and max(config.by, config.bx) <= 256
            assert not (problem.gated and config.splits > 1), "the parts of two sums cannot be added"


@needs_triton
@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card.name}, boxes {card.boxes}")
def test_all_that_is_offered_for_attention_fits(card: Card) -> None:
    tuning = Tuning(card)
    dims = [AttentionProblem(24, 77, dim, 8, 2) for dim in (8, 16, 24, 40, 64, 80, 160, 256)]
    for problem in (*asked(256, 384)[1], *asked(512, 768, 2)[1], *dims):
        offered = attention_candidates(problem, card)
        assert offered
        for config in (*offered, tuning.attention(problem)):
            assert attention_fits(problem, config, card), (problem, config)


@needs_triton
def test_a_table_of_a_larger_card_is_not_used_where_it_does_not_fit(shipped: Dict[str, List[int]]) -> None:
    problems, attentions = asked(256, 384)
    for card in (A10, RTX_4090, H200_OLD_TRITON):
        tuning = Tuning(card, shipped)
        assert all(fits(problem, tuning.config(problem), card) for problem in problems)
        assert not any(tuning.config(problem).bx for problem in problems)
        assert all(attention_fits(problem, tuning.attention(problem), card) for problem in attentions)


def test_attention_of_teams_by_hand() -> None:
    """Of two nets: three teams fill the registers; programs of one share a processor."""
    problem = AttentionProblem(1536, 1536, 40, 8, 4)
    offered = [config for config in attention_candidates(problem, H200) if config.teams]
    large, small = AttentionConfig(192, 128, 4, 4, 3), AttentionConfig(64, 64, 4, 4, 1)
    assert large in offered and len(offered) <= 8 and {config.teams for config in offered} == {2, 3}
    assert not any(config.teams for config in attention_candidates(problem._replace(keys=77), H200)), "a text's"
    # 128 bytes a row: queries, keys and values in flight, and 2 KB a team.
    assert flash_bytes(problem, large) == 128 * (192 + 2 * 128 * 4) + 3 * 2048 + 512
    assert flash_programs(problem, large, H200) == 132 and flash_programs(problem, small, H200) == 3 * 132
    assert flash_programs(problem, small._replace(stages=6), H200) == 2 * 132
    for other in (large._replace(bm=128), large._replace(stages=2), large._replace(warps=8), large._replace(stages=7)):
        assert not attention_fits(problem, other, H200)
    for keys in (8, 96):
        assert not attention_fits(problem, large._replace(bn=keys), H200), "no block that products take"
    for other in (
        problem._replace(dim=36),
        problem._replace(dim=160),
        problem._replace(causal=True),
        problem._replace(dim=80),
    ):
        assert not attention_fits(other, large, H200) and other.key() != problem.key()
    assert not any(attention_fits(problem, large, card) for card in (A10, A100, H200_OLD_TRITON))
    found = Tuning(A100, {problem.key(): list(large)}).attention(problem)
    assert not found.teams and attention_fits(problem, found, A100)


def test_limits_by_hand() -> None:
    problem = Problem(1, 1024, 640, 640)
    fitting = Config(128, 64, 64, 4, 4)
    assert shared_bytes(problem, fitting) == (128 + 64) * 64 * 2 * 4 == 98304
    assert fits(problem, fitting, A10)
    assert not fits(problem, fitting._replace(stages=5), A10) and fits(problem, fitting._replace(stages=5), A100)
    gated = problem._replace(gated=True)
    assert shared_bytes(gated, fitting) == (128 + 2 * 64) * 64 * 2 * 4
    assert not fits(gated, fitting._replace(splits=2, stages=2), A100) and fits(gated, fitting._replace(stages=2), A100)
    # 128 numbers of the sum a thread, and no more.
    assert fits(problem, Config(128, 256, 64, 8, 3), H200) and not fits(problem, Config(128, 256, 64, 4, 3), H200)
    # 10 blocks of the sum: each of 5 parts has two.
    assert fits(problem, fitting._replace(splits=5), A10) and not fits(problem, fitting._replace(splits=6), A10)
    assert attention_fits(AttentionProblem(64, 64, 40, 8, 2), AttentionConfig(64, 64, 4, 3), A10)
    assert not attention_fits(AttentionProblem(64, 64, 160, 8, 2), AttentionConfig(64, 64, 4, 3), A10)
    for card in (A10, H200):
        assert not attention_fits(AttentionProblem(64, 64, 40, 8, 2), AttentionConfig(64, 64, 4, 1), card)


def test_walks_fill_the_card_and_end_where_the_tiles_do() -> None:
    """GEGLU of two nets: rows that stay beside a ring, and as many programs as run at once, or that twice."""
    problem = Problem(2, 3072, 1280, 320, gated=True, height=1, width=3072)
    offered = [config for config in candidates(problem, H200) if config.walk]
    assert 10 < len(offered) <= 24 and {config.teams for config in offered} == {1, 2}
    assert {config.bm for config in offered} == {64, 128, 256}
    for config in offered:
        columns = -(-problem.n // config.bn)
        assert config.teams <= config.walk <= columns and config.stages > 1
        groups = -(-columns // config.walk)
        assert (groups - 1) * config.walk < columns, "a program without a tile"
        assert 96 <= problem.nets * row_tiles(problem, config) * groups <= 6 * H200.processors
    one = Config(128, 64, 64, 4, 3, by=1, bx=128, walk=4)
    assert one in [config._replace(stages=3) for config in offered]
    assert shared_bytes(problem, one) == 2 * 128 * 320 + 2 * 128 * 64 * 3 + 512 * 4 + 256
    assert shared_bytes(problem, one._replace(teams=2)) == 2 * 128 * 320 + 2 * (2 * 128 * 64 * 3 + 512 * 4 + 256)


def test_rows_stay_only_of_what_the_kernel_can_run() -> None:
    problem = Problem(2, 768, 1920, 640, height=1, width=768)
    config = Config(64, 64, 64, 4, 3, by=1, bx=64, teams=2, walk=3)
    assert fits(problem, config, H200)
    for other in (
        *(problem._replace(cin=1280), problem._replace(tail=64), problem._replace(fp8=True)),
        *(problem._replace(taps=9, height=24, width=32), problem._replace(gated=True, n=960, cin=4 * 640)),
    ):
        assert not fits(other, config, H200) and not any(c.walk for c in candidates(other, H200)), other
    for change in ({"splits": 2}, {"bx": 32}, {"by": 2}, {"stages": 1}, {"teams": 3}, {"bn": 16}, {"warps": 8}):
        assert not fits(problem, config._replace(**change), H200), change
    assert not fits(problem._replace(gated=True), config._replace(bn=256), H200), "512 channels a product"


def test_a_warp_feeds_only_what_the_kernel_can_run() -> None:
    problem = Problem(2, 48, 1280, 1280, 0, 9, 1, False, 4, 6)
    config = Config(64, 64, 64, 4, 8, 3, 4, 8, feeder=1)
    assert fits(problem, config, H200) and config in [
        candidate._replace(stages=8) for candidate in candidates(problem, H200) if candidate.feeder
    ]
    # Two matrices of 64 x 64 numbers a slot, two barriers, and the operands of the warp that feeds.
    assert shared_bytes(problem, config) == 8 * (2 * 2 * 64 * 64 + 16) + 384
    for change in (
        {"feeder": 2},
        {"bn": 256, "stages": 4},
        {"stages": 1},
        {"columns": 1},
        {"walk": 1},
        {"bx": 0, "by": 0},
        {"warps": 2},
        {"warps": 8},
        {"bn": 4},
        {"bk": 8},
    ):
        assert not fits(problem, config._replace(**change), H200), change
    of_points = Config(256, 32, 64, 8, 2, 1, 1, 1, feeder=1)
    assert fits(problem, of_points, H200) and not fits(problem, of_points._replace(bm=512), H200), "512 images a box"
    columns = Config(64, 64, 64, 4, 6, 2, 4, 8, 3, feeder=1)
    assert fits(problem, columns, H200) and not fits(problem, columns._replace(columns=1), H200)
    assert columns._replace(splits=1) in {candidate._replace(splits=1) for candidate in candidates(problem, H200)}
    assert shared_bytes(problem, columns) - shared_bytes(problem, columns._replace(feeder=0)) == 16 * 9 + 384
    other = problem._replace(fp8=True)
    linear = Problem(2, 768, 2560, 640, height=1, width=768)
    assert any(candidate.feeder for candidate in candidates(linear, H200))
    for not_offered in (other, linear._replace(gated=True), linear._replace(cin=320)):
        assert not any(candidate.feeder for candidate in candidates(not_offered, H200)), not_offered
    assert Tuning(H200, {problem.key(): list(config)}).config(other) == config._replace(feeder=0)


@needs_triton
def test_a_feeding_warp_leaves_the_next_kernel_registers() -> None:
    """As many as the others need; what all warps have together is what the launch takes, and a processor has."""
    fed = [(problem, config) for problem in sizes() for config in candidates(problem, H200) if config.feeder]
    assert len(fed) > 1000
    for problem, config in fed:
        threads = 32 * (config.warps + 4)
        launched = fed_registers(problem, config)
        assert launched % 8 == 0 and launched * threads <= 65536
        others = (launched * threads - 128 * FEEDER_REGISTERS) // (32 * config.warps)
        numbers = config.bm * config.bn * (2 if problem.gated else 1) // (32 * config.warps)
        assert numbers + 72 <= others <= 256, (problem, config)
        assert numbers > 32 or 3 * launched * threads <= 65536
        assert config.stages * config.bk <= max(problem.depth, 2 * config.bk), "a ring longer than the sum"


def test_an_fp8_problem_takes_the_tile_of_fp16_without_its_walk_or_shared_boxes() -> None:
    conv = Problem(2, 3072, 320, 320, taps=9, height=32, width=48)
    tuning = Tuning(H200, {conv.key(): [128, 64, 64, 4, 4, 1, 16, 8, 3]})
    assert tuning.config(conv) == Config(128, 64, 64, 4, 4, 1, 16, 8, 3)
    assert tuning.config(conv._replace(fp8=True)) == Config(128, 64, 64, 4, 4, 1, 16, 8)
    problem = Problem(2, 768, 1920, 640, height=1, width=768)
    table = {problem.key(): [64, 64, 64, 4, 3, 1, 1, 64, 0, 2, 3]}
    tuning = Tuning(H200, table)
    assert tuning.config(problem) == Config(64, 64, 64, 4, 3, by=1, bx=64, teams=2, walk=3)
    assert tuning.config(problem._replace(fp8=True)) == Config(64, 64, 64, 4, 3, by=1, bx=64)
    assert not Tuning(A100, table).config(problem).walk


CONV = Problem(2, 768, 640, 640, taps=9, height=16, width=24)
STRIDED = Problem(2, 768, 320, 320, taps=9, stride=2, height=16, width=24)
LINEAR = Problem(2, 768, 640, 640, height=1, width=768)


@pytest.mark.parametrize(
    ("problem", "row"),
    [
        (CONV, [64, 64, 64, 4, 4, 1, 0, 0, 3]),  # shared boxes without a box
        (CONV, [128, 64, 64, 4, 1, 1, 16, 8]),  # nothing under way when the first block is waited for
        (CONV, [128, 64, 64, 4, 1, 1, 16, 8, 3]),
        (CONV, [128, 64, 64, 4, 4, 1, 16, 8, 1]),  # the next box would take the place of the one in use
        (CONV, [128, 64, 64, 4, 4, 1, 16, 8, -1]),
        (CONV, [128, 64, 64, 4, 4, 1, 16, 4, 3]),  # neither side is of eight pixels
        (CONV, [96, 64, 64, 4, 4, 1, 12, 8]),
        (CONV, [128, 96, 64, 4, 4, 1, 16, 8]),
        (CONV, [128, 64, 48, 4, 4, 1, 16, 8]),
        (CONV, [128, 64, 64, 3, 4, 1, 16, 8]),
        (CONV, [64, 64, 64, 8, 4, 1, 8, 8]),
        (CONV, [64, 4, 64, 4, 4, 1, 8, 8]),  # less than a product takes
        (CONV, [64, 64, 8, 4, 4, 1, 8, 8]),
        (CONV, [512, 16, 16, 8, 2, 1, 1, 1]),  # more images than a box has
        (STRIDED, [64, 64, 128, 4, 4, 1, 8, 8]),  # the second half of a block would be another pixel's
        (LINEAR, [64, 64, 64, 4, 4, 1, 8, 8]),  # fewer programs than boxes
        (LINEAR, [64, 64, 64, 4, 3, 1, 1, 64, 0, 1, -1]),
        (LINEAR, [64, 64, 64, 4, 3, 1, 1, 64, 0, 3, 2]),
    ],
)
def test_a_row_that_no_kernel_can_run_is_passed_over(problem: Problem, row: List[int]) -> None:
    """It would not be compiled, or wait for ever, or leave a part out."""
    assert not fits(problem, Config(*row), H200)
    assert Tuning(H200, {problem.key(): row}).config(problem) == estimate(problem, H200)


@pytest.mark.parametrize("name", RAGGED)
def test_the_cases_for_a_gpu_have_boxes(name: str) -> None:
    """Or what is said to be tested there is not."""
    for splits in (1, 3):
        configs = boxed(RAGGED[name], splits, H200)
        assert len(configs) > 1 and all(config.bx for config in configs)
        assert name == "stride 2" or any(config.columns for config in configs)
    if name == "upright":
        assert any(config.columns and config.bx < 8 for config in configs)


def test_estimates_fill_the_card() -> None:
    """Small maps: enough programs for all processors, by smaller tiles and by cut sums."""
    small = Problem(2, 48, 1280, 1280, 0, 9, 1, False, 4, 6)
    config = estimate(small, A10)
    assert tiles(small, config) * config.splits >= A10.processors
    large = Problem(1, 98304, 128, 128, 0, 9, 1, False, 256, 384)
    assert estimate(large, A10)[:2] == (128, 128) and estimate(large, A10).splits == 1


# -- boxes of pixels ---------------------------------------------------------------------------------------------------


def covered(problem: Problem, bm: int, by: int, bx: int) -> int:
    """Tiles by walking through all pixels: every one lies in just one box."""
    images = bm // (by * bx)
    places = {
        (image // images, y // by, x // bx)
        for image in range(problem.images)
        for y in range(problem.height)
        for x in range(problem.width)
    }
    return len(places)


@pytest.mark.parametrize("bm", [64, 128, 256])
def test_boxes_cover_the_map_with_the_fewest_tiles(bm: int) -> None:
    for images, height, width in ((1, 1, 1), (1, 4, 6), (2, 4, 6), (2, 8, 12), (3, 5, 7), (1, 16, 24), (4, 1, 2)):
        problem = Problem(1, images * height * width, 64, 64, 0, 9, 1, False, height, width)
        by, bx = box(problem, bm)
        config = Config(bm, 64, 64, 4, 3, 1, by, bx)
        assert bm % (by * bx) == 0
        count = row_tiles(problem, config)
        assert count == covered(problem, bm, by, bx)
        sides = (1, 2, 4, 8, 16, 32, 64)
        others = [
            covered(problem, bm, y, x)
            for y in sides
            for x in sides
            if bm % (y * x) == 0 and bm // (y * x) <= max(1, 2 * images - 1)
        ]
        assert count == min(others), (problem, by, bx)
    assert box(Problem(1, 500, 64, 64, height=20, width=25), bm) == (1, bm)


def test_square_boxes_where_tiles_are_as_many() -> None:
    """Neighbours of a square box share the least pixels."""
    problem = Problem(1, 64 * 64, 64, 64, 0, 9, 1, False, 64, 64)
    assert box(problem, 64) == (8, 8) and sorted(box(problem, 128)) == [8, 16]


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    problem, attention = Problem(1, 24, 32, 256), AttentionProblem(24, 77, 40, 8, 2)
    table = {problem.key(): list(Config(64, 32, 64, 4, 3, 2)), attention.key(): [64, 32, 4, 2]}
    path = tmp_path / "tuning" / f"{card_slug(RTX_4090)}.json"
    write_table(path, RTX_4090, {"torch": "2"}, table)
    assert path.name == "NVIDIA_GeForce_RTX_4090.json"
    # Fields that have their defaults, and no others behind them, are left out.
    assert read_table(path) == {**table, problem.key(): [64, 32, 64, 4, 3, 2]}
    tuning = Tuning(RTX_4090, read_table(path))
    assert tuning.config(problem) == Config(64, 32, 64, 4, 3, 2)
    assert tuning.attention(attention) == AttentionConfig(64, 32, 4, 2)
    fed = Config(64, 32, 64, 4, 3, by=1, bx=64, feeder=1)
    for row, config in ((list(fed), fed), ([64, 32, 64, 4, 3, 1, 1, 64], fed._replace(feeder=0))):
        write_table(path, H200, {}, {problem.key(): row})
        assert Tuning(H200, read_table(path)).config(problem) == config, "a row of before there were more fields"
    assert tuning.config(problem._replace(m=25)) == estimate(problem._replace(m=25), RTX_4090)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[]", '{"configs": 3}', '{"configs": {"linear": 3}}', '{"configs": {"linear": "64 x"}}'),
        *('{"configs": {"linear": "64 64 64 4"}}', '{"configs": {"attention 1x1": "64 64 64 4 4 1 0 0"}}'),
        *('{"configs": {"conv": "64 64 64 4 4 0 0 0"}}', '{"configs": {"conv": "64 64 64 4 4 1 0 8"}}'),
        *('{"configs": {"attention 1x1": "64 64 4 0"}}', '{"configs": {"attention 1x1": "128 64 4 4 3 0"}}'),
        *('{"configs": {"attention 1x1": "0 64 4 4"}}', '{"configs": {"conv": "64 64 64 4 4 1 16 8"}}'),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="table.json is not a table of tile sizes: .*; delete it, it is made again"):
        read_table(path)


# -- in place ----------------------------------------------------------------------------------------------------------


@needs_triton
def test_refine_goes_by_the_time_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest problem first; a gain below a thousandth is none, nor is a lucky measurement; a failure is passed.

    While the card gets slower, by more than the gain in question between two measurements.
    """
    tune = pytest.importorskip("runtime.fused.tune")
    run = Fused(Tuning(H200))
    table = run.tuning.table
    cost = {"large": {(1,): 2.0, (2,): 1.99, (3,): 1.999}, "small": {(1,): 1.0, (2,): 0.9985, (3,): 0.9, (4,): 0.1}}
    asked: List[Dict[str, Tuple[int, ...]]] = []
    replays: Counter[str] = Counter()

    def captured(enqueue: Any) -> Dict[str, Tuple[int, ...]]:
        asked.append({key: tuple(row) for key, row in table.items()})
        if asked[-1]["small"] == (4,):
            raise RuntimeError("out of resources")
        return asked[-1]

    def replay_times(graph: Dict[str, Tuple[int, ...]], count: int) -> List[float]:
        replays[str(graph)] += count
        if graph["small"] == (3,) and replays[str(graph)] > tune.NETWORK_REPLAYS:
            return [9.0] * count  # the first times were luck
        slower = 1 + 2e-4 * sum(replays.values())
        return [slower * sum(cost[key][graph[key]] for key in cost)] * count

    monkeypatch.setattr(tune, "_captured", captured)
    monkeypatch.setattr(tune, "_replay_times", replay_times)
    monkeypatch.setattr(tune, "_compile_all", lambda *arguments: None)
    lines: List[str] = []
    ranked = {"small": [(1,), (2,), (3,), (4,)], "large": [(1,), (2,), (3,)]}
    best = tune.refine([run], lambda: None, ranked, {"large": 2.0, "small": 1.0}, "cuda", lines.append)
    assert table == {"large": [2], "small": [1]} and best == pytest.approx(2.99, rel=0.1)
    assert [now["large"] for now in asked] == [(1,), (2,), (3,), (2,), (2,), (2,)], "the largest first"
    assert "tuned in place" in lines[-1]
    table.clear()
    late = tune.refine([run], lambda: None, ranked, {}, "cuda", lines.append, seconds=-1.0)
    assert late == pytest.approx(3.0, rel=0.2)
    assert table == {"large": [1], "small": [1]} and "out of time, 2 problems" in lines[-2]


@needs_triton
def test_retune_measures_all_that_a_build_asks_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: ModelConfig, tiny_weights: Weights
) -> None:
    """Alone and then in each network; rows of other shapes stay, and the best of both is what is written."""
    tune = pytest.importorskip("runtime.fused.tune")
    refined: List[Dict[str, Any]] = []

    def timed(run: Fused, problems: Any, attentions: Any, device: str, report: Any, seconds: float) -> Dict[str, Any]:
        configs = {p.key(): [(64, 64, 32, 4, 3, n, 0, 0) for n in (2, 1)] for p in problems}
        configs.update({p.key(): [(64, 32, 4, 2), (32, 32, 4, 2)] for p in attentions})
        return {key: {config: 1.0 + n for n, config in enumerate(two)} for key, two in configs.items()}

    def refine(runs: Any, enqueue: Any, ranked: Dict[str, Any], weights: Dict[str, float], *rest: Any) -> float:
        refined.append(ranked)
        assert all(weights[key] >= 1 for key in ranked), "each problem counts as often as it is launched"
        runs[0].tuning.table.update({key: list(configs[1]) for key, configs in ranked.items()})
        return 1.0

    monkeypatch.setattr(tune, "card_of", lambda device: H200)
    monkeypatch.setattr(tune, "tune", timed)
    monkeypatch.setattr(tune, "refine", refine)
    monkeypatch.setattr(build, "_cuda_version", lambda: (13, 0))
    path = tmp_path / "table.json"
    write_table(path, H200, {}, {"linear of another size": [64, 64, 32, 4, 3]})
    made = build.FusedNetworks(load_model(tiny_config, tiny_weights), "cpu", "fp16", tmp_path, print)
    made.retune(Build(tiny_config, 256, 384, 1, "fp16"), path)
    table = read_table(path)
    keys = {key for ranked in refined for key in ranked}
    assert len(refined) == 4 and len(keys) > 50, "text, hint, step and decode"
    assert set(table) == {*keys, "linear of another size"}
    assert all(len(configs) == 2 for ranked in refined for configs in ranked.values())
    assert {Config(*table[key])[5:8] for key in keys if "attention" not in key} == {(1, 0, 0)}
