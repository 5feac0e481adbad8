"""A step's samples are cut into updates and micro-batches without losing, doubling or shifting a token."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.algorithms import Algorithm, resolve
from sluice.data.batch import Layout, MicroBatch, Packing, collate, deal, make_minibatch, pack, under_budget
from sluice.data.packing import Piece, pack_row, shared_length
from sluice.types import Sample

modest = settings(max_examples=60, deadline=None, derandomize=True)
TOKEN_MEAN, SEQUENCE_MEAN, PROMPT_MEAN, CONSTANT = (
    resolve("grpo", {"aggregation": aggregation}, max_new_tokens=16, group_size=4)
    for aggregation in ("token_mean", "sequence_mean", "prompt_mean", "constant")
)
each_layout = pytest.mark.parametrize("layout", ["rows", "packed"])


def a_sample(length: int, seed: int = 0, weights: list[float] | None = None, **fields: Any) -> Sample:
    """Every number tells where it stands, so that a shift by one shows."""
    rng = np.random.default_rng([seed, length])
    weights = weights or [0.0, *rng.choice([0.0, 1.0, 0.5], length - 1).tolist()]
    ids = rng.integers(100, 1000, length).tolist()
    columns = {k: rng.normal(size=length).astype(np.float32).tolist() for k in ("advantages", "old_logprobs")}
    logprobs = rng.normal(size=length).astype(np.float32).tolist()
    return Sample(ids, weights, logprobs, [0] * length, 0.5 + seed / 8, seed, length, **(columns | fields))


some_samples = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(
    lambda lengths: [a_sample(length, seed) for seed, length in enumerate(lengths)]
)


def own(sample: Sample) -> list[int]:
    return [t for t, weight in enumerate(sample.loss_weights) if weight]


def seen_from(batch: MicroBatch, index: int) -> list[int]:
    """Places that a place attends over, itself the last."""
    if batch.pieces is None:
        return list(range(index - index % batch.input_ids.shape[1], index + 1))
    (piece,) = (p for p in batch.pieces if p.start <= index < p.start + p.length)
    prefix = range(piece.prefix.start, piece.prefix.start + piece.prefix.length) if piece.prefix else range(0)
    return [*prefix, *range(piece.start, index + 1)]


# the tensors


@each_layout
@modest
@given(samples=some_samples)
def test_every_loss_token_keeps_its_columns_and_its_history(layout: Layout, samples: list[Sample]):
    batch = collate(samples, layout)
    expected = [(i, t, sample) for i, sample in enumerate(samples) for t in own(sample)]
    assert batch.input_ids.shape == batch.position_ids.shape
    assert batch.hidden_index.dtype == batch.target_ids.dtype == batch.sequence_ids.dtype == torch.int64
    assert batch.sequence_ids.tolist() == [i for i, _, _ in expected]
    assert batch.target_ids.tolist() == [sample.token_ids[t] for _, t, sample in expected]
    for name in ("loss_weights", "advantages", "logprobs", "old_logprobs"):
        assert getattr(batch, name).tolist() == [getattr(sample, name)[t] for _, t, sample in expected], name
    assert batch.temperatures.tolist() == [sample.temperature for _, _, sample in expected]
    # the hidden state that predicts a token stands at the token before it, and has seen all before that and nothing else
    for index, (i, t, sample) in zip(batch.hidden_index.tolist(), expected, strict=True):
        seen = seen_from(batch, index)
        assert batch.input_ids.flatten()[seen].tolist() == sample.token_ids[:t]
        assert batch.position_ids.flatten()[seen].tolist() == list(range(t))
        if layout == "rows":
            assert index // batch.input_ids.shape[1] == i


@each_layout
def test_shapes(layout: Layout):
    batch = collate([a_sample(3), a_sample(5, 1), a_sample(2, 2)], layout)
    assert tuple(batch.input_ids.shape) == ((3, 5) if layout == "rows" else (1, 10))
    if layout == "rows":
        assert batch.pieces is None
        assert batch.input_ids[0, 3:].tolist() == [0, 0]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    else:
        assert batch.pieces == [Piece(0, 3, None), Piece(3, 5, None), Piece(8, 2, None)]
        assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]


@each_layout
def test_columns_that_are_not_filled_yet_are_empty(layout: Layout):
    """Old log-probs are computed from a batch that has none."""
    batch = collate([a_sample(4, weights=[0.0, 1.0, 1.0, 1.0], advantages=[], old_logprobs=[])], layout)
    assert batch.advantages.tolist() == batch.old_logprobs.tolist() == []
    assert len(batch.logprobs) == len(batch.target_ids) == 3


@each_layout
def test_kept_ids_lie_flat_beside_their_counts(layout: Layout):
    """Of the loss tokens only, in their order; a sample that was drawn from whole counts 0; without any, both are empty."""
    ids = [[], [7, 8, 9], [5], []]
    truncated = a_sample(4, weights=[0.0, 1.0, 0.0, 1.0], kept_ids=ids)
    other = a_sample(3, 1, weights=[0.0, 0.0, 1.0], kept_ids=[[], [], [2, 3]])
    whole = a_sample(3, 2, weights=[0.0, 1.0, 1.0])
    batch = collate([truncated, whole, other], layout)
    assert batch.kept_ids.tolist() == [7, 8, 9, 2, 3]
    assert batch.kept_counts.tolist() == [3, 0, 0, 0, 2]
    assert batch.kept_ids.dtype == batch.kept_counts.dtype == torch.int64
    alone = collate([whole], layout)
    assert alone.kept_ids.tolist() == alone.kept_counts.tolist() == []


@each_layout
def test_experts_lie_where_their_tokens_lie(layout: Layout):
    """Little-endian numbers; -1 where nothing is known, and in padding. Without any there is nothing."""
    routed = [bytes([1, 1, 7, 0]), b"", bytes([2, 0, 3, 0]), b""]
    known, unknown = a_sample(4, routed_experts=routed), a_sample(2, 1)
    batch = collate([known, unknown], layout)
    rows = [[257, 7], [-1, -1], [2, 3], *[[-1, -1]] * (batch.input_ids.numel() - 3)]
    assert batch.routed_experts.tolist() == rows
    assert batch.routed_experts.dtype == torch.int16
    assert collate([unknown], layout).routed_experts.numel() == 0


def test_neighbours_share_what_took_the_same_experts_only():
    def row(*chosen: bytes) -> list[bytes]:
        return [*chosen, b""]

    samples = [replace(a_sample(4), token_ids=[5, 6, 7, 100 + i]) for i in range(3)]
    for sample, third in zip(samples, (b"cc", b"cc", b"dd"), strict=True):
        sample.routed_experts = row(b"aa", b"bb", third)
    assert shared_length(samples[:2]) == 3
    assert shared_length(samples) == 2
    samples[0].routed_experts = []
    assert shared_length(samples[:2]) == 0


@each_layout
def test_samples_without_a_loss_token(layout: Layout):
    batch = collate([a_sample(3, weights=[0.0, 0.0, 0.0]), a_sample(1)], layout)
    assert batch.hidden_index.tolist() == batch.loss_weights.tolist() == batch.sequence_ids.tolist() == []


@each_layout
@modest
@given(samples=some_samples, size=st.integers(1, 12))
def test_parts_are_the_tokens_one_after_the_other(layout: Layout, samples: list[Sample], size: int):
    """Each with its kept ids; columns that are not filled stay empty, and without a token there is one empty part."""
    for sample in samples[1::2]:
        sample.kept_ids = [[token] * (token % 3) for token in sample.token_ids]
    batch = collate(samples, layout)
    parts = batch.parts(size)
    lengths = [len(part.target_ids) for part in parts]
    num = len(batch.target_ids)
    assert lengths == [min(size, num - start) for start in range(0, max(1, num), size)]
    for name in vars(batch).keys() - {"samples", "input_ids", "position_ids", "pieces", "routed_experts"}:
        columns = [getattr(part, name) for part in parts]
        assert torch.equal(torch.cat(columns), getattr(batch, name)), name
        assert name == "kept_ids" or {len(c) for c in columns} == {0} or [len(c) for c in columns] == lengths, name
    if len(batch.kept_counts):
        assert [len(part.kept_ids) for part in parts] == [int(part.kept_counts.sum()) for part in parts]
    assert all(part.input_ids is batch.input_ids and part.samples is batch.samples for part in parts)


@modest
@given(samples=some_samples, seed=st.integers(0, 9))
def test_spread_puts_every_value_back_at_its_token(samples: list[Sample], seed: int):
    batch = collate(samples, "packed")
    values = torch.rand(len(batch.target_ids), generator=torch.Generator().manual_seed(seed))
    rows = batch.spread(values, -7.0)
    assert [len(row) for row in rows] == [len(sample) for sample in samples]
    assert [row[t] for row, sample in zip(rows, samples, strict=True) for t in own(sample)] == values.tolist()
    rest = [v for row, s in zip(rows, samples, strict=True) for v, w in zip(row, s.loss_weights, strict=True) if not w]
    assert rest == [-7.0] * len(rest)


def test_record_fills_the_samples_over_all_of_their_tokens():
    samples = [a_sample(3, weights=[0.0, 1.0, 0.0]), a_sample(2, 1, weights=[0.0, 0.5])]
    batch = collate(samples, "rows")
    batch.record(4, torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 1.5]), torch.tensor([True, False]))
    assert [s.update for s in samples] == [4, 4]
    assert [s.current_logprobs for s in samples] == [[0.0, -1.0, 0.0], [0.0, -2.0]]
    assert [s.ratios for s in samples] == [[1.0, 0.5, 1.0], [1.0, 1.5]]
    assert [s.clipped for s in samples] == [[False, True, False], [False, False]]


def test_a_move_to_a_device_takes_the_tensors_and_keeps_the_samples():
    samples = [a_sample(3), a_sample(5, 1)]
    batch = collate(samples, "packed")
    moved = batch.to(torch.device("meta"))
    tensors = [k for k, v in vars(batch).items() if isinstance(v, torch.Tensor)]
    assert all(getattr(moved, k).device.type == "meta" for k in tensors)
    assert len(tensors) == len(fields(MicroBatch)) - 2  # samples and pieces
    assert all(a is b for a, b in zip(moved.samples, samples, strict=True))


# the cut


@each_layout
@modest
@given(samples=some_samples, budget=st.integers(1, 40))
def test_micro_batches_keep_to_the_budget(layout: Layout, samples: list[Sample], budget: int):
    """Padding counts; a sample that is longer than the budget goes alone; every sample goes once."""
    parts = under_budget(samples, Packing(1, budget, layout))
    assert Counter(s.name for part in parts for s in part) == Counter(s.name for s in samples)
    for part in parts:
        size = collate(part, layout).input_ids.numel()
        assert size <= budget or len(part) == 1
        if layout == "rows":
            assert size < 2 * sum(map(len, part)) or len(part) == 1
    assert len(parts[0][0]) == max(map(len, samples))


@pytest.mark.parametrize(("layout", "expected"), [("rows", [[9], [3, 2]]), ("packed", [[9], [3, 2]])])
def test_the_longest_sample_comes_first(layout: Layout, expected: list[list[int]]):
    """Z17: a sample that does not fit the memory fails in the first step's first micro-batch."""
    parts = under_budget([a_sample(2), a_sample(9, 1), a_sample(3, 2)], Packing(1, 12, layout))
    assert [[len(s) for s in part] for part in parts] == expected


def test_packed_micro_batches_are_about_equally_full():
    """13 samples of 10 tokens under a budget of 60 make three micro-batches, none of which is a rest of one."""
    parts = under_budget([a_sample(10, seed) for seed in range(13)], Packing(1, 60, "packed"))
    assert [len(part) for part in parts] == [5, 5, 3]


# what samples share


def a_group(number: int, prompt: int, answers: list[list[int]]) -> list[Sample]:
    """Answers to one prompt, from few different tokens, so that they too may begin alike."""
    begin = [1000 * (number + 1) + t for t in range(prompt)]
    return [
        Sample(
            ids := begin + answer,
            [0.0] * prompt + [1.0] * len(answer),
            [0.0] * len(ids),
            [0] * len(ids),
            1.0,
            number,
            i,
        )
        for i, answer in enumerate(answers)
    ]


some_groups = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
).map(lambda groups: [s for number, (prompt, answers) in enumerate(groups) for s in a_group(number, prompt, answers)])


@modest
@given(samples=some_groups)
def test_a_packed_row_holds_what_a_group_begins_with_once(samples: list[Sample]):
    """Every token of every sample sees its own history, though the row may be shorter than the samples together."""
    batch = collate(samples, "packed")
    row = pack_row(samples)
    for sample, places in zip(samples, row.places, strict=True):
        assert batch.input_ids[0, places].tolist() == sample.token_ids
        assert batch.position_ids[0, places].tolist() == list(range(len(sample)))
        for t, place in enumerate(places.tolist()):
            assert seen_from(batch, place) == places[: t + 1].tolist()
    assert sum(piece.length for piece in row.pieces) == batch.input_ids.shape[1]
    for number in {sample.group for sample in samples}:
        group = [sample for sample in samples if sample.group == number]
        own = [row.places[i] for i, sample in enumerate(samples) if sample.group == number]
        prompt = int(sum(w == 0 for w in group[0].loss_weights))
        if len(group) > 1:
            assert len({place for places in own for place in places[:prompt].tolist()}) == prompt


@modest
@given(samples=some_groups, budget=st.integers(1, 60))
def test_packed_micro_batches_keep_to_the_budget_with_what_is_shared_counted_once(samples: list[Sample], budget: int):
    parts = under_budget(samples, Packing(1, budget, "packed"))
    assert Counter(s.name for part in parts for s in part) == Counter(s.name for s in samples)
    for part in parts:
        assert collate(part, "packed").input_ids.numel() <= budget or len(part) == 1


def test_rows_of_very_different_lengths_do_not_share_a_micro_batch():
    samples = [a_sample(8), a_sample(4, 1), a_sample(3, 2), a_sample(3, 3), a_sample(1, 4)]
    parts = under_budget(samples, Packing(1, 1000, "rows"))
    assert [[len(s) for s in part] for part in parts] == [[8, 4], [3, 3], [1]]
    assert len(under_budget(samples, Packing(1, 1000, "packed"))) == 1


@modest
@given(samples=some_samples, updates=st.integers(1, 14))
def test_updates_take_the_samples_in_order_in_even_shares(samples: list[Sample], updates: int):
    minibatches = pack(samples, Packing(updates, 1000, "packed"), TOKEN_MEAN)
    shares = [{s.group for m in minibatch.micro_batches for s in m.samples} for minibatch in minibatches]
    assert [minibatch.index for minibatch in minibatches] == list(range(min(updates, len(samples))))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [n for share in shares for n in sorted(share)] == list(range(len(samples)))  # groups are numbered in order


def test_no_samples_no_updates():
    assert pack([], Packing(4, 100, "rows"), TOKEN_MEAN) == []


@pytest.mark.parametrize("spec", [TOKEN_MEAN, SEQUENCE_MEAN, PROMPT_MEAN, CONSTANT], ids=lambda spec: spec.aggregation)
@modest
@given(samples=some_samples, budget=st.integers(1, 40))
def test_coefficients_are_the_updates_own_whatever_the_cut(spec: Algorithm, samples: list[Sample], budget: int):
    """Settled before the first backward, over the whole update, and then cut with the samples (Z3)."""
    for i, sample in enumerate(samples):
        sample.group = i // 2
    minibatch = make_minibatch(samples, Packing(1, budget, "rows"), spec, 0)
    (whole,) = make_minibatch(samples, Packing(1, 10**6, "packed"), spec, 0).micro_batches
    expected = dict(zip(map(id, whole.samples), whole.spread(whole.coefficients, 0.0), strict=True))
    for micro_batch in minibatch.micro_batches:
        rows = micro_batch.spread(micro_batch.coefficients, 0.0)
        assert rows == [expected[id(sample)] for sample in micro_batch.samples]
    assert minibatch.num_loss_tokens == sum(bool(w) for s in samples for w in s.loss_weights)
    total = sum(float(m.coefficients.sum()) for m in minibatch.micro_batches)
    if spec.aggregation != "constant" and minibatch.num_loss_tokens:
        assert total == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("num_samples", [1, 2, 5, 40])
def test_ranks_get_equally_many_parts_of_about_one_size(layout: Layout, num_ranks: int, num_samples: int):
    """Every sample once and under the budget; no rank is without work while there are samples enough."""
    rng = random.Random(num_samples)
    samples = [a_sample(rng.randint(4, 30), i // 4) for i in range(num_samples)]
    parts = under_budget(samples, Packing(1, 120, layout, num_ranks))
    assert sorted(id(s) for part in parts for s in part) == sorted(map(id, samples))
    assert len(parts) % num_ranks == 0 or len(parts) == num_samples
    assert all(len(part) * max(map(len, part)) <= 120 or layout == "packed" for part in parts)
    sizes = [sum(map(len, part)) for part in parts]
    hands = deal(parts, sizes, num_ranks)
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(id(part) for hand in hands for part in hand if part) == sorted(map(id, parts))
    totals = [sum(len(s) for part in hand if part for s in part) for hand in hands]
    if num_samples == 40:
        assert max(totals) - min(totals) <= 70  # of about 700, in parts of up to 120 with their padding
    elif num_samples >= num_ranks:
        assert all(totals)
