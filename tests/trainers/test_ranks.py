"""Ranks with shards of a model do together what the local trainer does: one loss, one gradient, one state."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from ranked import STATELESS, Setup, local_trainer, ranks, row, updated, weights_of
from test_local_trainer import some_samples
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM

from disks import fill, small
from sluice.connection import Answer
from sluice.data.batch import Layout, make_minibatch
from sluice.errors import ConfigError, NonFiniteError, TrainingError
from sluice.processes import Died, Process
from sluice.trainers.optim import OptimizerSettings
from sluice.trainers.rank import Meet, WriteSnapshot, _Server
from sluice.trainers.ranks import RankedTrainer
from sluice.trainers.sharded_state import check_whole
from sluice.types import Sample
from sluice.update import loss_of

each_layout = pytest.mark.parametrize("layout", ["rows", "packed"])
each_algorithm = pytest.mark.parametrize("algorithm", ["cispo", "gspo"])
ADAMW = OptimizerSettings(1e-3, 0, "constant", 0.0, (0.9, 0.95), 1e-15, 0.0, 0.1)
"""With moments, and gradients that are clipped."""


@dataclass
class Two:
    """Two ranks that go on from test to test."""

    trainer: RankedTrainer
    setup: Setup
    runner: asyncio.Runner

    def run(self, work: Any) -> Any:
        return self.runner.run(work)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    setup = Setup(reference=True)
    with asyncio.Runner() as runner:
        opened = ranks(setup, 2, folder=tmp_path_factory.mktemp("logs"))
        trainer = runner.run(opened.__aenter__())
        runner.run(trainer.fingerprint())  # starts them
        yield Two(trainer, setup, runner)
        runner.run(opened.__aexit__(None, None, None))


async def assert_same_update(
    trainer: RankedTrainer, setup: Setup, samples: list[Sample], layout: Layout, name: str, tolerance: float = 1e-6
) -> None:
    """Gradient (the weights move by g / (|g| + 1)), metrics, and what each token saw."""
    algorithm = row(name)
    before = await weights_of(trainer, setup)
    local, own = local_trainer(setup, before), [replace(sample) for sample in samples]
    local.couples_tokens = algorithm.couples_tokens
    assert await trainer.fingerprint() == await local.fingerprint()
    told = await updated(trainer, samples, setup, layout, algorithm)
    expected = await updated(local, own, setup, layout, algorithm)
    assert told == {
        name: pytest.approx(value, rel=1e-5, abs=tolerance, nan_ok=True) for name, value in expected.items()
    }
    after = dict(await weights_of(trainer, setup))
    for name, weight in local.model.named_weights():
        torch.testing.assert_close(after[name], weight.detach(), rtol=0, atol=tolerance)
    assert any(not torch.equal(after[name], weight) for name, weight in before), "nothing was learned"
    for one, other in zip(samples, own, strict=True):
        assert (one.update, one.clipped) == (other.update, other.clipped)
        assert one.current_logprobs == pytest.approx(other.current_logprobs, abs=100 * tolerance)
        assert one.ratios == pytest.approx(other.ratios, rel=1e3 * tolerance)


@each_layout
@each_algorithm
def test_two_ranks_have_one_gradient(two: Two, algorithm: str, layout: Layout):
    """Of losses that couple the tokens of a sequence and of those that do not."""
    two.run(assert_same_update(two.trainer, two.setup, some_samples(), layout, algorithm))


@each_layout
def test_a_rank_that_has_no_sample_adds_nothing(two: Two, layout: Layout):
    two.run(assert_same_update(two.trainer, two.setup, some_samples((9,)), layout, "cispo"))


@each_layout
@pytest.mark.parametrize("output", ["old_logprobs", "ref_logprobs"])
def test_outputs_are_the_local_trainers(two: Two, output: Any, layout: Layout):
    async def both() -> tuple[list[Sample], list[Sample]]:
        samples, own = some_samples(), some_samples()
        local = local_trainer(two.setup, await weights_of(two.trainer, two.setup))
        await two.trainer.forward(samples, output, layout)
        await local.forward(own, output, layout)
        return samples, own

    for one, other in zip(*two.run(both()), strict=True):
        assert getattr(one, output) == pytest.approx(getattr(other, output), abs=1e-5)


def test_the_policy_becomes_the_reference(two: Two):
    async def told() -> list[Sample]:
        samples = some_samples()
        await two.trainer.update_reference()
        await two.trainer.forward(samples, "old_logprobs")
        await two.trainer.forward(samples, "ref_logprobs")
        return samples

    assert all(sample.ref_logprobs == sample.old_logprobs for sample in two.run(told()))


def test_a_loss_that_is_not_finite_is_refused_on_all_ranks(two: Two):
    """Only one of them sees it; none keeps a gradient, and the next update is as if there had been none before."""

    async def refused() -> None:
        samples = some_samples()
        samples[1].advantages = [float("nan") if w else 0.0 for w in samples[1].loss_weights]
        before = await two.trainer.fingerprint()
        minibatch = make_minibatch(samples, two.trainer.packing, two.setup.algorithm, 3)
        with pytest.raises(NonFiniteError, match=r"loss is nan at update 3 .*\(.*p#0.1.*; the update was refused"):
            await two.trainer.forward_backward(minibatch, partial(loss_of, two.setup.algorithm, "engine"))
        assert await two.trainer.fingerprint() == before
        await assert_same_update(two.trainer, two.setup, some_samples(), "packed", "cispo")

    two.run(refused())


def test_weights_are_saved_for_transformers(two: Two, tmp_path: Path):
    two.run(two.trainer.weights().save(str(tmp_path)))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = local_trainer(two.setup, two.run(weights_of(two.trainer, two.setup))).model
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = ours.logits(ours.hidden_states(ids, torch.arange(17)[None])[0])
        torch.testing.assert_close(saved(input_ids=ids).logits[0], expected, rtol=0, atol=1e-5)
    assert two.trainer.weights().model is None


def test_a_full_disk_is_told_and_what_had_no_room_can_be_written_later(two: Two, tmp_path: Path):
    """Full for the shards, and full for rank 0's weights only; torch's first error is not the one that it raises."""

    async def told() -> None:
        write = two.trainer.snapshot()
        with small(tmp_path / "disk", "4m") as disk:
            for left in (0, 4096, 2**16):
                ballast = fill(disk)
                os.truncate(ballast, ballast.stat().st_size - left)
                with pytest.raises(TrainingError, match=r"rank \d could not write its part: .*No space left on device"):
                    await asyncio.to_thread(write, str(disk / "full"))
                ballast.unlink()
                shutil.rmtree(disk / "full", ignore_errors=True)
            await asyncio.to_thread(write, str(disk / "whole"))
            AutoModelForCausalLM.from_pretrained(disk / "whole")

    two.run(told())


def test_whatever_ends_the_writing_is_told():
    """An exception that is no Exception too, such as torch has for checkpoints."""

    async def told() -> Answer:
        writer = Mock()
        server = _Server("127.0.0.1", writer)
        server.rank = Mock()
        server.rank.write_snapshot.side_effect = CheckpointException("write", {})
        server.take(WriteSnapshot(7, "folder"))
        async with asyncio.timeout(10):
            while not writer.write.called:  # noqa: ASYNC110 - a thread calls it
                await asyncio.sleep(0.01)
        return pickle.loads(writer.write.call_args.args[0][8:])

    answer = asyncio.run(told())
    assert answer.number == 7
    assert isinstance(answer.error, TrainingError)
    assert "CheckpointException" in str(answer.error)


def test_a_rank_that_is_killed_ends_all(two: Two):
    """Last of those that share the ranks."""
    pids = [connection.process.pid for connection in two.trainer._connections]

    async def killed() -> None:
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(
            TrainingError, match=r"trainer rank 1 of 2: its process was killed \(SIGKILL.*trainer-1.log"
        ):
            await updated(two.trainer, some_samples(), two.setup, "packed", two.setup.algorithm)
        with pytest.raises(TrainingError, match="trainer rank 1 of 2"):
            await two.trainer.update_reference()

    two.run(killed())
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


class Stillborn(Process):
    def connect(self) -> socket.socket:
        raise Died("its machine was lost")


def test_a_rank_that_dies_before_it_is_there_is_named_to_all_who_wait():
    async def answers() -> list[Any]:
        async with ranks(Setup(), 2) as trainer:
            trainer._launch = lambda rank: Stillborn
            return await asyncio.gather(trainer.fingerprint(), trainer.update_reference(), return_exceptions=True)

    for answer in asyncio.run(answers()):
        assert isinstance(answer, TrainingError)
        assert str(answer) == "trainer rank 0 could not be started: its machine was lost"


def test_a_rank_that_does_not_see_the_run_folder_is_named_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its machine has a folder of that name, and it is another one."""
    python, run = tmp_path / "python", tmp_path / "run"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no other disk can be put in the place of a folder here")
    run.mkdir()
    python.write_text(
        f'#!/bin/sh\nexec unshare -m sh -c \'mount -t tmpfs none {run} && exec {sys.executable} "$@"\' - "$@"\n'
    )
    python.chmod(0o755)

    def elsewhere(*args: Any, **words: Any) -> Process:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(python))
            return Process(*args, **words)

    async def told() -> None:
        async with ranks(Setup(), 2, folder=run) as trainer:
            trainer._launch = lambda rank: elsewhere if rank == 1 else Process
            message = rf"{socket.gethostname()}, the machine of trainer rank 1 \(process \d+\), does not see the run folder {run}"
            with pytest.raises(ConfigError, match=message):
                await trainer.fingerprint()

    asyncio.run(told())
    assert sorted(file.name for file in run.iterdir()) == ["trainer-0.log", "trainer-1.log"]


def test_ranks_have_the_configured_time_to_start():
    async def told() -> None:
        async with ranks(Setup(), 1) as trainer:
            trainer._answer_limit_s = 0.01
            with pytest.raises(
                TrainingError, match=r"rank 0 of 1: it gave no answer to Meet within 0.01 s \(trainer.answer_limit_s\)"
            ):
                await trainer.fingerprint()

    asyncio.run(told())


def test_ranks_meet_at_the_address_at_which_the_driver_has_them():
    def over_ipv6(*args: Any, **words: Any) -> Process:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listening:
            ours = socket.create_connection(listening.getsockname()[:2])
            theirs, _ = listening.accept()
        with patch.object(socket, "socketpair", lambda: (ours, theirs)):
            return Process(*args, **words)

    async def where() -> tuple[str, int]:
        async with ranks(Setup(), 1) as trainer:
            trainer._launch = lambda rank: over_ipv6
            await trainer.fingerprint()
            return await trainer._connections[0].ask(Meet(), 60)

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert asyncio.run(where())[0] == "::1"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is enough here
@pytest.mark.parametrize("lacking", ["shards", "shards/.metadata", "shards/__0_0.distcp", "model.safetensors"])
def test_a_checkpoint_that_lacks_what_ranks_have_written_is_none(tmp_path: Path, lacking: str):
    save({"weight": torch.arange(100)}, storage_writer=FileSystemWriter(tmp_path / "shards"), no_dist=True)
    (tmp_path / "model.safetensors").touch()
    check_whole(str(tmp_path))
    gone = tmp_path / lacking
    if gone.suffix == ".distcp":
        os.truncate(gone, gone.stat().st_size - 1)
    elif gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    with pytest.raises(TrainingError, match=rf"{lacking}.* was written by a rank, .* set run.folder"):
        check_whole(str(tmp_path))


def with_returns(samples: list[Sample]) -> list[Sample]:
    for sample in samples:
        sample.returns = [a + 0.5 for a in sample.advantages]
        sample.values = [0.1] * len(sample)
    return samples


async def continued(
    setup: Setup, numbers: tuple[int, int], folder: Path, tensor: int = 1
) -> list[tuple[str, list[Sample]]]:
    """Updates, a checkpoint, and another update: by ranks that go on, and by as many or others from the checkpoint. What each has in
    the end: the weights' fingerprint, and samples with what policy, reference and critic say."""
    state: dict[str, Any] = {}
    ends: list[tuple[str, list[Sample]]] = []

    async def update(trainer: RankedTrainer, seed: int) -> None:
        await updated(trainer, with_returns(some_samples(seed=seed)), setup, "packed", setup.algorithm)

    for number in numbers:
        async with ranks(setup, number, tensor) as trainer:
            if not state:
                await update(trainer, 0)
                if setup.reference:
                    await trainer.update_reference()
                await update(trainer, 1)
                write = trainer.snapshot()
                await update(trainer, 2)  # before it is written
                state = await asyncio.to_thread(write, str(folder))
            else:
                trainer.restore(str(folder), state)
                await update(trainer, 2)
            samples = some_samples()
            for output in ("old_logprobs", *(["ref_logprobs"] * setup.reference), *(["values"] * bool(setup.critic))):
                await trainer.forward(samples, output)
            ends.append((await trainer.fingerprint(), samples))
    return ends


@pytest.mark.proof
def test_a_checkpoint_goes_on_to_the_last_bit(tmp_path: Path):
    before, after = asyncio.run(continued(Setup(optimizer=ADAMW), (2, 2), tmp_path))
    assert before == after
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.proof
@pytest.mark.parametrize(("numbers", "tensor"), [((4, 2), 1), ((2, 4), 1), ((4, 2), 2)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path: Path, numbers: tuple[int, int], tensor: int):
    """With a critic's state and a reference that has moved."""
    setup = Setup(optimizer=ADAMW, algorithm=row("ppo"), critic="own", reference=True)
    (_, before), (_, after) = asyncio.run(continued(setup, numbers, tmp_path, tensor))
    for one, other in zip(before, after, strict=True):
        for field in ("old_logprobs", "ref_logprobs", "values"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), abs=2e-5), field
            assert any(getattr(one, field))


@pytest.mark.proof
@pytest.mark.parametrize(
    ("architecture", "num", "tensor", "context"),
    [
        ("qwen3", 1, 1, 1),
        ("qwen3", 4, 1, 1),
        ("qwen3", 2, 2, 1),
        ("qwen3", 4, 2, 1),
        ("qwen3", 2, 1, 2),
        ("qwen3", 4, 1, 2),
        ("qwen2", 2, 2, 1),
        ("llama", 4, 2, 1),
        ("mistral_window", 2, 2, 1),
        ("mistral_window", 2, 1, 2),
        ("qwen3_all_heads", 4, 2, 2),
        ("gemma3", 4, 1, 2),
        ("gemma2", 2, 1, 1),
        ("gpt2", 2, 1, 2),
    ],
)
def test_any_division_has_one_gradient(architecture: str, num: int, tensor: int, context: int):
    """Of models with tied and untied heads, biases, windows, soft caps, and norms of single heads."""

    async def whole() -> None:
        setup = Setup(architecture)
        async with ranks(setup, num, tensor, context) as trainer:
            for algorithm in ("cispo", "gspo"):
                for layout in ("packed", "rows"):
                    await assert_same_update(trainer, setup, some_samples(), layout, algorithm)

    asyncio.run(whole())


@pytest.mark.proof
def test_recomputed_activations_have_one_gradient():
    async def whole() -> None:
        setup = Setup(recompute=True)
        async with ranks(setup, 2) as trainer:
            await assert_same_update(trainer, setup, some_samples(), "packed", "cispo")

    asyncio.run(whole())


@pytest.mark.proof
@pytest.mark.timeout(900)  # of compiling
@pytest.mark.parametrize(("context", "recompute"), [(1, False), (1, True), (2, False)])
def test_compiled_layers_have_one_gradient(context: int, recompute: bool):
    async def whole() -> None:
        setup = Setup(compile=True, recompute=recompute)
        async with ranks(setup, 2, 1, context) as trainer:
            await assert_same_update(trainer, setup, some_samples(), "packed", "cispo", tolerance=1e-5)

    asyncio.run(whole())


@pytest.mark.proof
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_bf16_has_fp32_masters_and_sums(architecture: str):
    """To the rounding of BF16, in which each rank's gradients are computed; the fingerprints are of BF16 weights."""

    async def whole() -> None:
        setup = Setup(architecture, dtype=torch.bfloat16)
        async with ranks(setup, 2) as trainer:
            await assert_same_update(trainer, setup, some_samples(), "rows", "cispo", tolerance=2e-2)

    asyncio.run(whole())


@pytest.mark.proof
@pytest.mark.parametrize("critic", ["own", "head"])
@pytest.mark.parametrize(("num", "context"), [(2, 1), (2, 2)])
def test_a_critic_learns_as_the_local_one(critic: str, num: int, context: int, tmp_path: Path):
    """Values, both gradients, and a policy that waits while the critic learns alone."""
    ppo = row("ppo")
    setup = Setup(algorithm=ppo, critic=critic, optimizer=replace(STATELESS, learning_rate=0.1))

    def prepared() -> list[Sample]:
        samples = some_samples()
        for sample in samples:
            sample.returns = [a + 0.5 for a in sample.advantages]
        return samples

    async def step(trainer: Any, loss: Any) -> tuple[dict[str, float], list[list[float]]]:
        samples = prepared()
        await trainer.forward(samples, "values")
        minibatch = make_minibatch(samples, trainer.packing, ppo, 0)
        metrics = await trainer.forward_backward(minibatch, loss) + await trainer.optim_step()
        await trainer.forward(samples, "values")
        return metrics.values_by_name(), [sample.values for sample in samples]

    async def whole() -> None:
        async with ranks(setup, num, 1, context) as trainer:
            local = local_trainer(setup)
            for loss in (None, partial(loss_of, ppo, "engine")):
                (told, values), (expected, right) = await step(trainer, loss), await step(local, loss)
                assert told == {name: pytest.approx(v, rel=1e-4, abs=1e-5, nan_ok=True) for name, v in expected.items()}
                for mine, theirs in zip(values, right, strict=True):
                    assert mine == pytest.approx(theirs, abs=1e-4)
            write = trainer.snapshot()
            state = await asyncio.to_thread(write, str(tmp_path))
            again = await step(trainer, None)
        async with ranks(setup, num, 1, context) as trainer:
            trainer.restore(str(tmp_path), state)
            assert await step(trainer, None) == again

    asyncio.run(whole())
