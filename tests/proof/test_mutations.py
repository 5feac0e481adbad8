"""Mistakes planted in `sluice.algorithms`, one at a time: the tests of that room must catch every one.

Signs, clip sides, masks, denominators, degrees of freedom, stop-gradients … A mistake is caught when the tests run to
their end and one of them fails; that they cannot even start does not count.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

LOSSES, ADVANTAGES, RATIOS = "losses.py", "advantages.py", "ratios.py"
AGGREGATION, KL, DIAGNOSTICS, SPEC = "aggregation.py", "kl.py", "diagnostics.py", "spec.py"

MUTATIONS: list[tuple[str, str, str, str]] = [
    # the losses
    ("sign of the weight's loss", LOSSES, "return -torch.where(advantages == 0", "return torch.where(advantages == 0"),
    ("sign of the surrogate", LOSSES, "return -torch.where(constant, bounded", "return torch.where(constant, bounded"),
    ("sign of the soft gate", LOSSES, "return -4 / tau", "return 4 / tau"),
    ("factor of the soft gate", LOSSES, "return -4 / tau", "return -2 / tau"),
    ("soft gate's centre", LOSSES, "(current - 1)", "current"),
    ("temperatures of the soft gate swapped", LOSSES, ".masked_fill(advantages > 0, spec.gate_positive)", ".masked_fill(advantages < 0, spec.gate_positive)"),
    ("stop-gradient of the weight removed", LOSSES, "ratio = torch.exp(log_ratio.detach())", "ratio = torch.exp(log_ratio)"),
    ("surrogate's gradient stopped", LOSSES, "torch.where(constant, 0.0, log_ratio)) * advantages", "torch.where(constant, 0.0, log_ratio.detach())) * advantages"),
    ("upper clip side without advantage's sign", LOSSES, "((advantages > 0) & (ratio > 1 + spec.clip_high))", "(ratio > 1 + spec.clip_high)"),
    ("clip sides swapped", LOSSES, "((advantages > 0) & (ratio > 1 + spec.clip_high))", "((advantages < 0) & (ratio > 1 + spec.clip_high))"),
    ("lower clip side forgotten", LOSSES, " | ((advantages < 0) & (ratio < 1 - spec.clip_low))", ""),
    ("clip_low for clip_high", LOSSES, "(ratio > 1 + spec.clip_high)", "(ratio > 1 + spec.clip_low)"),
    ("bound of the clipped surrogate", LOSSES, "ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)", "ratio.clamp(1 - spec.clip_low, 1 + spec.clip_low)"),
    ("dual clip for positive advantages", LOSSES, "beyond = (advantages < 0) &", "beyond = (advantages > 0) &"),
    ("dual clip not forwarded", LOSSES, "if spec.dual_clip is not None:", "if False:"),
    ("upper bound of the weight", LOSSES, "weight.clamp(spec.ratio_min or 0.0, spec.ratio_max)", "weight.clamp(spec.ratio_min or 0.0)"),
    ("bound as a distance from 1", LOSSES, "spec.ratio_min or 0.0, spec.ratio_max)", "spec.ratio_min or 0.0, 1 + spec.ratio_max)"),
    ("lower bound by default", LOSSES, "spec.ratio_min or 0.0", "spec.ratio_min or 0.8"),
    ("clipped weights lose their gradient", LOSSES, "    return bounded, bounded != weight", "    return torch.where(bounded == weight, weight, 0.0), bounded != weight"),
    ("mask inverted", LOSSES, "torch.where(masked | (weights == 0), 0.0, advantages)", "torch.where(masked & (weights != 0), advantages, 0.0)"),
    ("mask not applied", LOSSES, "torch.where(masked | (weights == 0), 0.0, advantages)", "torch.where(weights == 0, 0.0, advantages)"),
    ("masked losses times 0", LOSSES, "    advantages = torch.where(masked | (weights == 0), 0.0, advantages)\n", "    weights = torch.where(masked, 0.0, weights)\n"),
    ("masked tokens are not on record", LOSSES, "(clipped & (advantages != 0)) | masked", "clipped & (advantages != 0)"),
    ("direction of the TV mask", LOSSES, "(moved > spec.tv_high)", "(-moved > spec.tv_high)"),
    ("TV of log-probs", LOSSES, "moved = logprobs.exp() - old_logprobs.exp()", "moved = logprobs - old_logprobs"),
    ("tv_high for tv_low", LOSSES, "(-moved > spec.tv_low)", "(-moved > spec.tv_high)"),
    ("loss masked by a product", LOSSES, "    logprobs = torch.where(own, logprobs, 0.0)\n    old", "    logprobs = logprobs * own\n    old"),
    ("advantages of masked tokens", LOSSES, "    advantages = torch.where(own, advantages, 0.0)\n", ""),
    ("correction not applied", LOSSES, "    per_token = weights * per_token\n", ""),
    ("KL coefficient ignored", LOSSES, "loss + spec.kl_coef * kl_loss", "loss + kl_loss"),
    ("sign of the KL term", LOSSES, "loss + spec.kl_coef * kl_loss", "loss - spec.kl_coef * kl_loss"),
    ("sign of the entropy bonus", LOSSES, "loss - spec.entropy_coef * entropy", "loss + spec.entropy_coef * entropy"),
    ("coefficients given are ignored", LOSSES, "    if coefficients is None:\n        coefficients", "    if True:\n        coefficients"),
    ("ppo_kl of a detached copy", LOSSES, "Mean(-log_ratio.sum(), count)", "Mean(-(log_ratio - log_ratio.detach()).sum(), count)"),
    ("clip fraction over all tokens", LOSSES, "Mean(clipped.sum(), count)", "Mean(clipped.sum(), len(own))"),
    ("value loss without its half", LOSSES, "per_token = error / 2", "per_token = error"),
    ("value clip takes the smaller error", LOSSES, "error = torch.maximum(error, bounded)", "error = torch.minimum(error, bounded)"),
    ("value clipped around the return", LOSSES, "values.clamp(old_values - clip, old_values + clip)", "values.clamp(returns - clip, returns + clip)"),
    # the advantages
    ("ddof of the z-score", ADVANTAGES, "(count - spec.std_ddof).clamp(min=1)\n    return centred", "count\n    return centred"),
    ("eps inside the root", ADVANTAGES, "return centred / (variance.sqrt() + (spec.std_eps or 0.0))[group]", "return centred / (variance + (spec.std_eps or 0.0)).sqrt()[group]"),
    ("eps forgotten", ADVANTAGES, "return centred / (variance.sqrt() + (spec.std_eps or 0.0))[group]", "return centred / variance.sqrt()[group]"),
    ("one baseline for the whole batch", ADVANTAGES, "_, group = torch.unique(group_ids, return_inverse=True)", "group = torch.zeros_like(group_ids)"),
    ("groups by position", ADVANTAGES, "_, group = torch.unique(group_ids, return_inverse=True)", "group = torch.arange(len(group_ids)) // 4"),
    ("equal rewards subtracted", ADVANTAGES, "torch.where((lowest == highest)[group], 0.0, rewards - mean[group])", "rewards - mean[group]"),
    ("leave-one-out without its factor", ADVANTAGES, "return centred * (count / (count - 1).clamp(min=1))[group]", "return centred"),
    ("whitening keeps the mean", ADVANTAGES, "return (values - mean) * torch.rsqrt", "return values * torch.rsqrt"),
    ("whitening counts sequences", ADVANTAGES, "torch.ones_like(rewards) if counts is None else counts", "torch.ones_like(rewards)"),
    ("whitening's ddof", ADVANTAGES, "/ (count - ddof).clamp(min=1)", "/ count"),
    ("whitening's eps outside the root", ADVANTAGES, "torch.rsqrt(variance + WHITEN_EPS)", "1 / (variance.sqrt() + WHITEN_EPS)"),
    ("statistics of one rank", ADVANTAGES, "return mean, reduce((weights", "return mean, ((weights"),
    ("λ forgotten", ADVANTAGES, "_accumulate(errors, gamma * gae_lambda)", "_accumulate(errors, gamma)"),
    ("γ forgotten in the TD error", ADVANTAGES, "padded_rewards + gamma * following - padded_values", "padded_rewards + following - padded_values"),
    ("value added to the TD error", ADVANTAGES, "gamma * following - padded_values", "gamma * following + padded_values"),
    ("returns are the advantages", ADVANTAGES, "return advantages, advantages + values", "return advantages, advantages"),
    ("sums run on into the next sequence", ADVANTAGES, "    place = _places(sequence_ids)\n    return", "    place = _places(torch.zeros_like(sequence_ids))\n    return"),
    ("the value of the next sequence follows", ADVANTAGES, "    place = _places(sequence_ids)\n    padded", "    place = _places(torch.zeros_like(sequence_ids))\n    padded"),
    ("sums stop where a trajectory was cut", ADVANTAGES, "names.setdefault((sample.group, sample.index), len(names)) for sample in samples", "i for i, _ in enumerate(samples)"),
    ("KL to-go becomes KL so far", ADVANTAGES, "reward[unit] - penalties", "reward[unit] - penalties.flip(0)"),
    ("sign of KL in the reward", ADVANTAGES, "_token_rewards(samples, own) - penalties", "_token_rewards(samples, own) + penalties"),
    ("discount of later turns", ADVANTAGES, "spec.gamma**k * reward", "reward"),
    ("earlier turns' rewards too", ADVANTAGES, "enumerate(_turn_rewards(sample)[turn:])", "enumerate(_turn_rewards(sample))"),
    ("errors count as scores", ADVANTAGES, "rewards = [t.reward for t in group.scored]", "rewards = [t.reward or 0.0 for t in group.trajectories]"),
    ("one sample is a group", ADVANTAGES, "needed = 2 if spec.compares_group else 1", "needed = 1"),
    # the ratios
    ("ratio upside down", RATIOS, "torch.where(own, logprobs, 0.0) - torch.where(own, old_logprobs, 0.0)", "torch.where(own, old_logprobs, 0.0) - torch.where(own, logprobs, 0.0)"),
    ("sequence ratio is the product", RATIOS, "return _over_sequence(difference, own, sequence_ids, mean=True)", "return _over_sequence(difference, own, sequence_ids, mean=False)"),
    ("masked tokens count in the mean", RATIOS, "sums_by(sequence_ids, own.to(difference.dtype)).clamp(min=1)", "sums_by(sequence_ids, torch.ones_like(difference)).clamp(min=1)"),
    ("truncation from below", RATIOS, "weights.clamp(max=spec.correction_max)", "weights.clamp(min=spec.correction_max)"),
    ("masking truncates", RATIOS, "torch.where(_between(weights, spec.correction_min, spec.correction_max), weights, 0.0)", "weights.clamp(spec.correction_min or 0.0, spec.correction_max)"),
    ("lower bound of the correction", RATIOS, "(values >= (low or 0.0)) &", "(values >= 0.0) &"),
    ("correction upside down", RATIOS, 'log_ratios("token", old_logprobs, engine_logprobs,', 'log_ratios("token", engine_logprobs, old_logprobs,'),
    ("geometric is the product", RATIOS, 'mean=level == "geometric"', "mean=False"),
    ("rejection keeps what it should drop", RATIOS, "weights = torch.where(kept, weights, 0.0)", "weights = torch.where(kept, 0.0, weights)"),
    # who divides by what
    ("token mean over sequences", AGGREGATION, "return _mean(loss_weights, reduce)", "return loss_weights / reduce(torch.unique(sequence_ids[loss_weights != 0]).numel() * loss_weights.new_ones(()))"),
    ("token mean without weights", AGGREGATION, "total = reduce(loss_weights.sum())", "total = reduce((loss_weights != 0).sum().to(loss_weights.dtype))"),
    ("fully masked sequences count", AGGREGATION, "own = torch.unique(sequence_ids[loss_weights != 0])", "own = torch.unique(sequence_ids)"),
    ("fully masked groups count", AGGREGATION, "num = reduce((totals != 0).sum().to(loss_weights.dtype))", "num = reduce(loss_weights.new_tensor(float(len(totals))))"),
    ("prompt mean by sequence", AGGREGATION, "return _mean_of_means(loss_weights, group_ids, reduce)", "return _mean_of_means(loss_weights, sequence_ids, reduce)"),
    ("the constant forgotten", AGGREGATION, "(num.clamp(min=1) * spec.loss_constant)", "num.clamp(min=1)"),
    ("shares of the blend swapped", AGGREGATION, "spec.token_share * per_token + (1 - spec.token_share) * per_sequence", "(1 - spec.token_share) * per_token + spec.token_share * per_sequence"),
    ("denominator of one rank", AGGREGATION, "total = reduce(loss_weights.sum())", "total = loss_weights.sum()"),
    # KL, diagnostics, the table
    ("k2 without its half", KL, "k2 = d.square() / 2", "k2 = d.square()"),
    ("k3 of the other direction", KL, "torch.expm1(-d) + d", "torch.expm1(d) - d"),
    ("straight-through removed", KL, "return k2 + (value - k2).detach()", "return value"),
    ("straight-through's value", KL, "return k2 + (value - k2).detach()", "return k2"),
    ("KL upside down", KL, "d = logprobs - ref_logprobs", "d = ref_logprobs - logprobs"),
    ("explained variance upside down", DIAGNOSTICS, "1 - (returns - values).var() / returns.var()", "1 - returns.var() / (returns - values).var()"),
    ("DAPO's upper bound", SPEC, "clip_low=0.2, clip_high=0.28", "clip_low=0.2, clip_high=0.2"),
    ("CISPO's bound", SPEC, '"weight", "token_mean", ratio_max=5.0)', '"weight", "token_mean", ratio_max=4.0)'),
    ("GSPO by token", SPEC, 'Algorithm("gspo", "z_score", "sequence"', 'Algorithm("gspo", "z_score", "token"'),
]  # fmt: skip


LIKELIEST = {
    LOSSES: ["losses_oracle", "terms_oracle", "values", "loss_properties"],
    ADVANTAGES: ["advantages", "assign_advantages", "values"],
    RATIOS: ["terms_oracle", "losses_oracle"],
    AGGREGATION: ["loss_properties", "losses_oracle"],
    KL: ["terms_oracle"],
    DIAGNOSTICS: ["values"],
    SPEC: ["spec"],
}
"""The tests to run first; if they find nothing, all of them follow."""


def run_tests(source: Path, *files: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "NO_SHRINKING": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"tests/algorithms/test_{name}.py" for name in files] or ["tests/algorithms"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src" / "sluice", tmp_path / "src" / "sluice")
    return tmp_path / "src"


@pytest.mark.proof
def test_without_a_mistake_the_tests_pass(source: Path):
    """And it is the copy that they test."""
    (source / "sluice" / "algorithms" / "kl.py").write_text("raise RuntimeError('the copy')")
    assert "the copy" in run_tests(source).stdout
    shutil.copy(ROOT / "src/sluice/algorithms/kl.py", source / "sluice/algorithms/kl.py")
    done = run_tests(source)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.proof
@pytest.mark.parametrize(("file", "right", "wrong"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_planted_mistake_is_caught(source: Path, file: str, right: str, wrong: str):
    path = source / "sluice" / "algorithms" / file
    text = path.read_text()
    assert text.count(right) == 1, f"{file} has {text.count(right)} places that read {right!r}"
    path.write_text(text.replace(right, wrong))
    done = run_tests(source, *LIKELIEST[file])
    if done.returncode == 0:
        done = run_tests(source)
    assert done.returncode == 1, f"exit code {done.returncode}: {done.stdout[-3000:]}"


def test_the_mistakes_are_enough_and_each_has_its_place():
    assert len({m[0] for m in MUTATIONS}) == len(MUTATIONS) >= 40
    for _, file, right, wrong in MUTATIONS:
        assert (ROOT / "src/sluice/algorithms" / file).read_text().count(right) == 1, right
        assert right != wrong
