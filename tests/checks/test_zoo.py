"""Bugs that cost users of other systems weeks, each planted into a real run: the check with the right name stops it.

docs/checks.md has the whole list, with the tests that catch the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import sluice.data.batch as batch
import sluice.train as loop
import sluice.trainers.local as local
import sluice.update as learning
from dry_runs import GROUPS_PER_STEP, Notes, Timing, Workshop, finish
from sluice.algorithms import Algorithm, token_coefficients
from sluice.data.batch import Layout, MicroBatch, Minibatch, Packing
from sluice.data.packing import Piece
from sluice.data.samples import to_samples
from sluice.engines.embedded import EmbeddedEngine
from sluice.engines.packed import PackedDecoder
from sluice.errors import CheckError
from sluice.rewards.rubric import Rubric
from sluice.rollout.buffer import GroupBuffer, Limits
from sluice.rollout.policy import SamplingPolicy
from sluice.run import Run
from sluice.types import Group, Sample, Trajectory
from sluice.weights.in_process import InProcessWeights
from small_runs import events_of, ledger_of, make_model, set_up, sluice, workplace

REWARDS = """
import time


def small_letters(prompt, trajectory):
    return sum(c.islower() for c in trajectory.response) / max(1, trajectory.num_response_tokens)


def fails_for_some(prompt, trajectory):
    if ord(trajectory.response[:1] or "a") % 4 == 0:
        raise ConnectionError("no such host")
    return small_letters(prompt, trajectory)


def hangs_for_some(prompt, trajectory):
    if "9" in prompt.id:
        time.sleep(600)
    return small_letters(prompt, trajectory)


def always_the_same(prompt, trajectory):
    return 0.1
"""

FAILING = ["rewards=[{name: zoo_rewards:fails_for_some}]", "checks.max_error_share=0.75", "rollout.group_size=6"]
"""Groups come to be of uneven size."""
SMALL_MICRO_BATCHES = ["trainer.tokens_per_micro_batch=60", "algorithm.name=grpo"]
EQUAL = ["rewards=[{name: zoo_rewards:always_the_same}]", "rollout.group_size=3"]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    set_up(folder)
    make_model(folder / "gpt2", "gpt2")
    (folder / "zoo_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def here(furnished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with workplace(furnished, monkeypatch):
        yield furnished


numbers = count()


def run_of(*settings: str) -> tuple[int, Path]:
    name = f"run-{next(numbers)}"
    words = ["run.num_steps=2", "rewards=[{name: zoo_rewards:small_letters}]", *settings, f"run.name={name}"]
    return sluice("train", "config.yaml", *words), Path("runs") / name


def checks_of(run: Path) -> list[tuple[str, int]]:
    return [(e["details"]["check"], e["details"]["step"]) for e in events_of(run) if e["kind"] == "check"]


def stops(name: str, *settings: str, step: int = 1) -> None:
    """The run ends with that check at that step, and the batch is on record."""
    code, run = run_of(*settings)
    assert (code, checks_of(run)) == (1, [(name, step)])
    assert f"check {name}, step" in events_of(run)[-1]["message"]
    assert len(ledger_of(run, max(1, step))) >= 12


@pytest.mark.parametrize(
    "settings",
    [
        [],
        FAILING,
        SMALL_MICRO_BATCHES,
        EQUAL,
        ["rollout.temperature=0.7"],
        ["model.path=gpt2"],
        ["model.dtype=bfloat16"],
    ],
    ids=" ".join,
)
def test_a_sound_run_is_left_alone(here: Path, settings: list[str]):
    code, run = run_of(*settings)
    assert (code, checks_of(run)) == (0, [])


def assigned(compute: Callable[[list[Sample]], list[float]]) -> Callable[[Algorithm, list[Sample]], None]:
    """A way to assign advantages that gives every sample one."""

    def assign(spec: Algorithm, samples: list[Sample]) -> None:
        for sample, advantage in zip(samples, compute(samples), strict=True):
            sample.advantages = [advantage if weight else 0.0 for weight in sample.loss_weights]

    return assign


def centred(rewards: Sequence[float]) -> list[float]:
    return [reward - sum(rewards) / len(rewards) for reward in rewards]


def test_z1_one_baseline_for_groups_of_uneven_size(here: Path, monkeypatch: pytest.MonkeyPatch):
    def whole_batch(samples: list[Sample]) -> list[float]:
        assert len({sum(s.group == group for s in samples) for group in {s.group for s in samples}}) > 1
        return centred([s.reward for s in samples])

    monkeypatch.setattr(learning, "assign_advantages", assigned(whole_batch))
    stops("advantages", *FAILING)


def test_z2_groups_by_position_after_a_filter(here: Path, monkeypatch: pytest.MonkeyPatch):
    def by_position(samples: list[Sample]) -> list[float]:
        rewards = [s.reward for s in samples]
        return [a for start in range(0, len(rewards), 6) for a in centred(rewards[start : start + 6])]

    monkeypatch.setattr(learning, "assign_advantages", assigned(by_position))
    stops("advantages", *FAILING)


def test_z2_attempts_counted_after_a_filter(here: Path, monkeypatch: pytest.MonkeyPatch):
    def counted_anew(groups: Sequence[Group]) -> list[Sample]:
        places: dict[int, count[int]] = {}
        return [replace(s, index=next(places.setdefault(s.group, count()))) for s in to_samples(groups)]

    monkeypatch.setattr(loop, "to_samples", counted_anew)
    stops("groups_whole", *FAILING)


@pytest.mark.parametrize("what", ["mean of means", "sum of means"])
def test_z3_micro_batches_with_a_scale_of_their_own(here: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    make = batch.make_minibatch

    def each_for_itself(samples: Sequence[Sample], packing: Packing, spec: Algorithm, index: int) -> Minibatch:
        minibatch = make(samples, packing, spec, index)
        assert len(minibatch.micro_batches) > 1
        for part in minibatch.micro_batches:
            part.coefficients = token_coefficients(spec, part.loss_weights, part.sequence_ids)
            if what == "mean of means":
                part.coefficients /= len(minibatch.micro_batches)
        return minibatch

    monkeypatch.setattr(batch, "make_minibatch", each_for_itself)
    stops("loss_scale", *SMALL_MICRO_BATCHES)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("loss_mask", lambda s: replace(s, loss_weights=[0.0] + [1.0] * (len(s) - 1))),
        ("loss_mask", lambda s: replace(s, loss_weights=[float(int(0.5 * weight)) for weight in s.loss_weights])),
        ("finite", lambda s: replace(s, loss_weights=[w * float("nan") if w else w for w in s.loss_weights])),
    ],
    ids=["the prompt too", "cast to whole numbers", "nan"],
)
def test_z4_a_mask_that_leaks(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Sample], Sample]
):
    monkeypatch.setattr(loop, "to_samples", lambda groups: [change(sample) for sample in to_samples(groups)])
    stops(name)


def test_z4_a_log_prob_that_is_no_number(here: Path, monkeypatch: pytest.MonkeyPatch):
    """Behind the look that is taken at every attempt, after which only sluice could have made it."""
    make = loop.to_samples

    def infinite(groups: Sequence[Group]) -> list[Sample]:
        for group in groups:
            group.trajectories[0].turns[-1].completion.logprobs[-1] = float("-inf")
        return make(groups)

    monkeypatch.setattr(loop, "to_samples", infinite)
    stops("finite")


def one_document(micro_batch: MicroBatch) -> MicroBatch:
    """All samples of a pack see each other."""
    length = micro_batch.input_ids.shape[1]
    return replace(micro_batch, pieces=[Piece(0, length, None)], position_ids=torch.arange(length)[None])


def running_positions(micro_batch: MicroBatch) -> MicroBatch:
    """A sample's positions go on from those of the one before it in the pack."""
    return replace(micro_batch, position_ids=torch.arange(micro_batch.input_ids.shape[1])[None])


@pytest.mark.parametrize(("model", "bug"), [("model", one_document), ("gpt2", running_positions)])
@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_z5_packed_is_not_padded(
    here: Path, monkeypatch: pytest.MonkeyPatch, model: str, bug: Callable[[MicroBatch], MicroBatch], layout: Layout
):
    """Whichever of the two the run trains in."""
    collate = local.collate

    def faulty(samples: Sequence[Sample], layout: Layout) -> MicroBatch:
        micro_batch = collate(samples, layout)
        return bug(micro_batch) if layout == "packed" else micro_batch

    monkeypatch.setattr(local, "collate", faulty)
    stops("padded_packed", f"model.path={model}", f"trainer.layout={layout}", "trainer.tokens_per_micro_batch=250")


def keeps_a_copy(monkeypatch: pytest.MonkeyPatch, delivered: Callable[[int], bool]) -> None:
    """An engine with weights of its own, which new ones reach at some versions only."""
    init, publish = EmbeddedEngine.__init__, EmbeddedEngine.update_weights

    def with_a_copy(self: EmbeddedEngine, model: Any, *rest: Any, **more: Any) -> None:
        init(self, deepcopy(model), *rest, **more)

    async def update_weights(self: EmbeddedEngine, weights: Any, version: int) -> int:
        if delivered(version):
            self.model.model.load_state_dict(weights.model.model.state_dict())  # type: ignore[attr-defined]
        return await publish(self, InProcessWeights(self.model), version)

    monkeypatch.setattr(EmbeddedEngine, "__init__", with_a_copy)
    monkeypatch.setattr(EmbeddedEngine, "update_weights", update_weights)


@pytest.mark.parametrize("check", ["weights_match", "first_update_ratio"])
def test_z6_new_weights_that_reach_the_engine_only_at_the_start(
    here: Path, monkeypatch: pytest.MonkeyPatch, check: str
):
    """At once by the fingerprint; without it, by the next step's log-probs, before they are trained on."""
    keeps_a_copy(monkeypatch, lambda version: version == 0)
    settings = [] if check == "weights_match" else ["checks.weights_match=off"]
    stops(check, *settings, step=1 if check == "weights_match" else 2)


def test_z6_a_packed_copy_that_is_not_renewed(here: Path, monkeypatch: pytest.MonkeyPatch):
    """The model is the trainer's own, and yet what is decoded with is not."""
    refresh = PackedDecoder.refresh
    monkeypatch.setattr(PackedDecoder, "refresh", lambda self: None if self.angles.numel() else refresh(self))
    stops("weights_match", step=1)


def test_z6_weights_that_never_reached_the_engine(here: Path, monkeypatch: pytest.MonkeyPatch):
    keeps_a_copy(monkeypatch, lambda version: False)
    load = EmbeddedEngine.__init__

    def of_another_start(self: EmbeddedEngine, model: Any, *rest: Any, **more: Any) -> None:
        load(self, model, *rest, **more)
        with torch.no_grad():
            next(iter(self.model.named_weights()))[1].mul_(1.5)

    monkeypatch.setattr(EmbeddedEngine, "__init__", of_another_start)
    code, run = run_of()
    assert (code, checks_of(run)) == (1, [("weights_match", 0)])


def test_an_engine_with_a_copy_that_is_kept_up_to_date_is_left_alone(here: Path, monkeypatch: pytest.MonkeyPatch):
    """weights_match compares what the weights are, not whose."""
    keeps_a_copy(monkeypatch, lambda version: True)
    code, run = run_of()
    assert (code, checks_of(run)) == (0, [])


def test_z14_an_engine_that_only_repeats_the_fingerprint_it_was_given(here: Path, monkeypatch: pytest.MonkeyPatch):
    """Then weights_match is true by construction; what the engine decodes with shows in what it decoded."""
    keeps_a_copy(monkeypatch, lambda version: version == 0)
    told: dict[int, Any] = {}
    update_weights = EmbeddedEngine.update_weights

    async def noted(self: EmbeddedEngine, weights: Any, version: int) -> int:
        told[id(self)] = weights
        return await update_weights(self, weights, version)

    async def repeated(self: EmbeddedEngine) -> str:
        return local.fingerprint(told[id(self)].model.named_weights())

    monkeypatch.setattr(EmbeddedEngine, "update_weights", noted)
    monkeypatch.setattr(EmbeddedEngine, "fingerprint", repeated)
    stops("first_update_ratio", step=2)


def test_z7_a_verifier_that_crashes(here: Path):
    """Its samples are no zeros (tests/rewards), and when they are many the run ends and says what the verifier said."""
    code, run = run_of(FAILING[0], "checks.max_error_share=0.05")
    assert (code, checks_of(run)) == (1, [("outcome_budget", 1)])
    assert "ConnectionError: no such host" in events_of(run)[-1]["message"]
    assert {row["outcome"] for row in ledger_of(run, 1)} == {"scored", "error"}


def test_z8_a_verifier_that_hangs(here: Path):
    settings = [
        "rewards=[{name: zoo_rewards:hangs_for_some, timeout_s: 0.1}]",
        "rollout.group_size=2",
        "data.shuffle=false",
    ]
    code, run = run_of(*settings, "rollout.groups_per_step=10", "checks.max_error_share=0.05", "reward_workers=2")
    assert (code, checks_of(run)) == (1, [("outcome_budget", 1)])
    assert "2 of them ran out of time" in events_of(run)[-1]["message"]


def test_z9_responses_tokenised_again_after_sampling(here: Path, monkeypatch: pytest.MonkeyPatch):
    respond = SamplingPolicy.respond

    async def normalised(self: SamplingPolicy, messages: Any) -> Any:
        reply = await respond(self, messages)
        completion = self.turns[-1].completion
        ids = self._run.chat.tokenizer(completion.text.swapcase()).input_ids
        completion.token_ids = ids + completion.token_ids[len(ids) :]
        return reply

    monkeypatch.setattr(SamplingPolicy, "respond", normalised)
    stops("first_update_ratio")


def test_z9_samples_made_of_other_tokens_than_the_engine_gave(here: Path, monkeypatch: pytest.MonkeyPatch):
    """A single one."""

    def one_mixed_up(groups: Sequence[Group]) -> list[Sample]:
        *others, last = to_samples(groups)
        return [*others, replace(last, token_ids=[*last.token_ids[:-1], last.token_ids[-1] ^ 1])]

    monkeypatch.setattr(loop, "to_samples", one_mixed_up)
    stops("groups_whole")


def test_z15_an_exception_becomes_a_score(here: Path, monkeypatch: pytest.MonkeyPatch):
    score = Rubric.score

    async def errors_are_zeros(self: Rubric, prompt: Any, trajectory: Trajectory, wait: Any) -> None:
        await score(self, prompt, trajectory, wait)
        if trajectory.outcome == "error":
            trajectory.outcome, trajectory.reward = "scored", 0.0

    monkeypatch.setattr(Rubric, "score", errors_are_zeros)
    stops("groups_whole", *FAILING)


def test_z19_the_trainer_at_another_temperature(here: Path, monkeypatch: pytest.MonkeyPatch):
    collate = local.collate
    monkeypatch.setattr(batch, "collate", lambda samples, layout: at_1(collate(samples, layout)))
    stops("first_update_ratio", "rollout.temperature=0.7")


def at_1(micro_batch: MicroBatch) -> MicroBatch:
    return replace(micro_batch, temperatures=torch.ones_like(micro_batch.temperatures))


@pytest.mark.parametrize(("name", "exact"), [("finite", True), ("advantages", False)], ids=["0 / 0", "rounding"])
def test_z20_the_spread_of_equal_rewards(here: Path, monkeypatch: pytest.MonkeyPatch, name: str, exact: bool):
    """0 / 0; and where the mean is off by a rounding, a rounding divided by itself."""

    def by_the_book(samples: list[Sample]) -> list[float]:
        rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64).view(-1, 3)
        means = (
            rewards[:, 0] if exact else torch.tensor([sum(row) / 3 for row in rewards.tolist()], dtype=torch.float64)
        )
        off = rewards - means[:, None]
        return (off / (off.square().sum(1, keepdim=True) / 2).sqrt()).flatten().tolist()

    monkeypatch.setattr(learning, "assign_advantages", assigned(by_the_book))
    stops(name, *EQUAL)


# Without a model: what depends on timing

SLOW_ROLLOUT = Timing(engine_s=0.006, score_s=0.002, seed=6)
SLOW_TRAINER = Timing(engine_s=0.0005, train_s=0.008, seed=7)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


def ends_with(name: str, run: Run) -> None:
    with pytest.raises(CheckError, match=f"^check {name}, step "):
        finish(loop.train(run))
    notes: Notes = run.tracker  # type: ignore[assignment]
    assert [kind for kind, _ in notes.events] == ["check"]
    assert max(notes.groups) == run.step + 1


def test_z10_groups_taken_as_they_are_ready(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    """At staleness 0 the run then depends on timing."""

    async def newest_first(self: GroupBuffer, num: int) -> list[Group]:
        async with self._handed_in:
            await self._handed_in.wait_for(lambda: len(self.done) >= num)
            return [self.done.pop(max(self.done)) for _ in range(num)]

    monkeypatch.setattr(GroupBuffer, "take", newest_first)
    ends_with("trained_once", workshop.run(SLOW_ROLLOUT))


def test_z10_groups_that_start_before_the_new_weights_are_there(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    take = GroupBuffer.take

    async def slots_back_at_once(self: GroupBuffer, num: int) -> list[Group]:
        taken = await take(self, num)
        await self.release(num)
        return taken

    monkeypatch.setattr(GroupBuffer, "take", slots_back_at_once)
    ends_with("staleness", workshop.run(SLOW_TRAINER))


def test_z11_a_rejected_group_gives_its_slot_back_twice(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    put = GroupBuffer.put

    async def twice(self: GroupBuffer, group: Group) -> None:
        self._free += bool(group.rejected)
        await put(self, group)

    monkeypatch.setattr(GroupBuffer, "put", twice)
    ends_with("staleness", workshop.run(SLOW_TRAINER, max_staleness=1, group_filter=lambda group: group.id % 2 == 1))


@pytest.mark.parametrize("first_ticket", [3, 9])
def test_z12_a_resume_that_replays_or_skips(workshop: Workshop, first_ticket: int):
    """After two steps of three groups the next is 6."""
    ends_with("trained_once", resumed_at(workshop, first_ticket))


def test_a_resume_where_the_run_was_left_is_left_alone(workshop: Workshop):
    run = resumed_at(workshop, 6)
    finish(loop.train(run))
    assert run.checks.last_ticket == 8


def resumed_at(workshop: Workshop, first_ticket: int) -> Run:
    before = workshop.run(num_steps=2)
    finish(loop.train(before))
    state = replace(before.buffer.state(), head=first_ticket, next_ticket=first_ticket)
    buffer = GroupBuffer(GROUPS_PER_STEP, 0, Limits(rejected=30, failed=4), state)
    run = workshop.run(num_steps=3, step=2, buffer=buffer)
    run.checks.load_state_dict(before.checks.state_dict())
    return run
