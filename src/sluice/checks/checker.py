"""Calls the checks of a run where its loop passes by, and says what they found: nothing, an event, or the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sluice.checks import collapse, groups, updates
from sluice.checks.collapse import Trend
from sluice.configsafety import Severity
from sluice.data.batch import Minibatch
from sluice.errors import CheckError
from sluice.interfaces import Trainer
from sluice.run import Run
from sluice.types import Group, Sample

CHECKS: dict[str, Callable[..., str]] = {
    check.__name__: check
    for check in (
        updates.weights_match,
        groups.staleness,
        groups.trained_once,
        groups.data_unchanged,
        groups.groups_whole,
        groups.loss_mask,
        groups.outcome_budget,
        updates.finite,
        updates.advantages,
        updates.loss_scale,
        updates.first_update_ratio,
        updates.padded_packed,
        *collapse.CHECKS,
    )
}
"""Every check by its name. Each says what is wrong, or ""."""

STEPS_BETWEEN_PROBES = 100
"""Of padded_packed, which needs forward passes of its own."""
PROBE_SIZE = 4


class Checker:
    """Holds how severe each check is, and the little that some must remember from step to step."""

    def __init__(self, severities: Mapping[str, Severity], *, logprob_tolerance: float, max_error_share: float) -> None:
        """`severities` has every name in CHECKS; `logprob_tolerance` is in nats."""
        self.severities = severities
        self.logprob_tolerance = logprob_tolerance
        self.max_error_share = max_error_share
        self.last_ticket = -1
        """The newest group that was trained."""
        self.trends: dict[str, Trend] = {}
        self.failing: set[str] = set()
        """Checks that have warned and have not passed since."""
        self._probed_at: int | None = None

    async def published(self, run: Run) -> None:
        """After the engine was given the weights whose fingerprint is `run.fingerprint`."""
        if self._is_on("weights_match"):
            self._judge(run, run.step, "weights_match", await run.engine.fingerprint(), run.fingerprint)

    def taken(self, run: Run, step_groups: Sequence[Group], samples: Sequence[Sample]) -> None:
        """Before anything is done with the groups of a step; `step_groups` are those that were rejected, too."""
        step = run.step + 1
        self._judge(run, step, "staleness", step_groups, run.step, run.max_staleness)
        self._judge(run, step, "trained_once", step_groups, self.last_ticket)
        self.last_ticket = max([self.last_ticket, *(group.id for group in step_groups if not group.rejected)])
        self._judge(run, step, "data_unchanged", run.prompts)
        self._judge(run, step, "outcome_budget", step_groups, self.max_error_share)
        self._judge(run, step, "groups_whole", step_groups, samples, run.group_size)
        self._judge(run, step, "loss_mask", samples)

    async def assigned(self, run: Run, samples: Sequence[Sample], minibatches: Sequence[Minibatch]) -> None:
        """Before the first update, when all that it needs is there."""
        step = run.step + 1
        self._judge(run, step, "finite", samples)
        self._judge(run, step, "advantages", run.algorithm, samples)
        self._judge(run, step, "loss_scale", run.algorithm, samples, minibatches)
        due = self._probed_at is None or step >= self._probed_at + STEPS_BETWEEN_PROBES
        if due and self._is_on("padded_packed"):
            self._probed_at = step
            probe = probe_of(samples)
            answers = await answers_by_layout(run.trainer, probe)
            self._judge(run, step, "padded_packed", probe, answers, self.logprob_tolerance)

    def first_update(self, run: Run, samples: Sequence[Sample]) -> None:
        """After the gradients of a step's first update were computed, before the weights move."""
        self._judge(run, run.step + 1, "first_update_ratio", samples, run.step, self.logprob_tolerance)

    def after_step(self, run: Run, metrics: Mapping[str, float]) -> None:
        """When the step is on record."""
        collapse.follow(self.trends, metrics)
        for check, names in collapse.CHECKS.items():
            trends = [self.trends[name] for name in names if name in self.trends and self.trends[name].is_known]
            if len(trends) == len(names):
                self._judge(run, run.step, check.__name__, *trends)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run must know to judge as one that was never interrupted; JSON can say it."""
        return {
            "last_ticket": self.last_ticket,
            "failing": sorted(self.failing),
            "trends": {name: asdict(trend) for name, trend in self.trends.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last_ticket = state["last_ticket"]
        self.failing = set(state["failing"])
        self.trends = {name: Trend(**trend) for name, trend in state["trends"].items()}

    def _is_on(self, name: str) -> bool:
        return self.severities[name] != "off"

    def _judge(self, run: Run, step: int, name: str, *evidence: Any) -> None:
        """Make the check; what it finds is an event, and with `stop` the end of the run. Raises CheckError."""
        if not self._is_on(name):
            return
        found = CHECKS[name](*evidence)
        if not found:
            self.failing.discard(name)
            return
        severity = self.severities[name]
        message = f"{name}, step {step}: {found}; see docs/checks.md#{name}"
        if name not in self.failing:  # once, until it passes again
            run.tracker.event("check", message, check=name, step=step, severity=severity)
        self.failing.add(name)
        if severity == "stop":
            raise CheckError(f"check {message}, or go on with checks.{name}=warn")


def probe_of(samples: Sequence[Sample]) -> list[Sample]:
    """Copies of some short samples, of different lengths where there are, of which none is padded to more than twice its own."""
    ordered = sorted(samples, key=len)
    by_length = {len(sample): sample for sample in ordered if len(sample) <= 2 * len(ordered[0])}
    chosen = [*by_length.values()][:PROBE_SIZE]
    chosen += [s for s in ordered if all(s is not c for c in chosen)][: PROBE_SIZE - len(chosen)]
    return [replace(sample) for sample in chosen]


async def answers_by_layout(trainer: Trainer, probe: Sequence[Sample]) -> dict[str, list[list[float]]]:
    """The trainer's log-probs of each sample, [T]: alone, side by side in rows, and packed into one."""
    for sample in probe:
        await trainer.forward([sample], "old_logprobs", "rows")
    answers = {"alone": [sample.old_logprobs for sample in probe]}
    for layout in ("rows", "packed"):
        await trainer.forward(probe, "old_logprobs", layout)
        answers[layout] = [sample.old_logprobs for sample in probe]
    return answers
