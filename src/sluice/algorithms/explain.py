"""What a row computes, in plain text: formula, bounds as ratio intervals, and what divides by what. Needs no torch."""

from __future__ import annotations

from textwrap import wrap

from sluice.algorithms.spec import SETTINGS, Algorithm, words

WIDTH = 128


def explain(row: Algorithm, old_logprobs: str) -> str:
    """`old_logprobs` is `engine` or `recomputed`: what the ratio divides by."""
    term, further = _term(row), _further_terms(row)
    lines = [("loss", f"J = {_divisor(row)} of {f'[{term}{further}]' if further else term}; the loss is -J")]
    lines += [("advantage", text) for text in _advantage(row)] + [("ratio", _ratio(row))]
    if row.ratio != "none" or row.corrects or row.kl_in_reward:
        lines.append(("π_old", _OLD[old_logprobs]))
    lines.append(("bounds", _bounds(row)))
    if row.corrects:
        lines.append(("w_t", _correction(row)))
    if row.needs_reference:
        lines.append(("KL", _kl(row)))
    if row.dynamic_sampling:
        lines.append(("sampling", "groups whose rewards are all equal are rejected and replaced"))
    return "\n".join([f"algorithm {row.name}: {words(row)}", *(_line(*line) for line in lines)])


def explain_unused(row: Algorithm) -> str:
    """The settings that no word of the row uses."""
    unused = [key for key, setting in SETTINGS.items() if not setting.used(row)]
    return _line("no effect", f"here, and so refused: {', '.join(unused)}")


def _line(title: str, text: str) -> str:
    first, *rest = wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join([f"  {title:10} {first}", *(f"{'':13}{line}" for line in rest)])


_OLD = {
    "engine": "the engine's log-probs",
    "recomputed": "the trainer's own log-probs before the step's first update",
}


def _divisor(row: Algorithm) -> str:
    per_token, per_sequence = (
        "mean over all loss tokens of the update",
        "mean over sequences of the mean over each one's loss tokens",
    )
    return {
        "token_mean": per_token,
        "sequence_mean": per_sequence,
        "prompt_mean": "mean over prompts of the mean over all loss tokens of each one's responses",
        "constant": f"1 / (sequences × {row.loss_constant or 0:g}) times the sum over all loss tokens",
        "blend": f"{row.token_share or 0:g} × the {per_token} + {1 - (row.token_share or 0):g} × the {per_sequence}",
    }[row.aggregation]


def _term(row: Algorithm) -> str:
    mask = "" if row.mask == "none" else "·M_t"
    weight = "w_t·" if row.corrects else ""
    if row.clip == "surrogate":
        inner = f"min(r·A, clip(r, {_interval(row)})·A)"
        if row.dual_clip is not None:
            inner = f"{inner}, and where A < 0 max(that, {row.dual_clip:g}·A)"
            inner = f"[{inner}]" if weight or mask else inner
        return f"{weight}{inner}{mask}"
    if row.clip == "weight":
        return f"{weight}stop_gradient(clip(r, {row.ratio_min or 0:g}, {row.ratio_max:g}))·A·logπ_t{mask}"
    if row.clip == "soft_gate":
        return f"{weight}4/τ·σ(τ·(r - 1))·A{mask}"
    return f"{weight}A·logπ_t{mask}" if row.ratio == "none" else f"{weight}stop_gradient(r)·A·logπ_t{mask}"


def _further_terms(row: Algorithm) -> str:
    kl = f" - {row.kl_coef:g}·KL_t" if row.kl_in_loss else ""
    return kl + (f" + {row.entropy_coef:g}·entropy_t" if row.entropy_coef else "")


def _interval(row: Algorithm) -> str:
    return f"{1 - (row.clip_low or 0):.6g}, {1 + (row.clip_high or 0):.6g}"


def _advantage(row: Algorithm) -> list[str]:
    group = "the group" if row.credit == "trajectory" else "the same turn in the group"
    reward = "R" if row.credit == "trajectory" else "R_k"
    std = f"ddof {row.std_ddof}, + {row.std_eps or 0:g}"
    found = [
        {
            "z_score": f"A = ({reward} - mean of {group}) / (std of {group}, {std})",
            "centred": f"A = {reward} - mean of {group}",
            "leave_one_out": f"A = {reward} - mean of the others of {group}",
            "raw": f"A = {reward}",
            "gae": f"A_t = Σ_k (γλ)^k·(r_t+k + γ·V_t+k+1 - V_t+k), γ = {row.gamma or 0:g}, λ = {row.gae_lambda or 0:g}",
        }[row.advantage]
    ]
    if row.credit == "turn":
        found.append(f"R_k = Σ_j≥k γ^(j-k)·(reward of turn j), γ = {row.gamma or 0:g}")
    if row.normalise == "batch_std":
        found.append(f"then divided by the std of all A of the batch ({std})")
    if row.normalise == "whiten":
        found.append(f"then (A - μ) / sqrt(σ² + 1e-8), over all loss tokens of the batch, ddof {row.std_ddof}")
    return found


def _ratio(row: Algorithm) -> str:
    return {
        "token": "r_t = exp(logπ_t - logπ_old_t), one per token",
        "sequence": "r = exp(mean over the response of logπ_t - logπ_old_t), one per sequence, shared by its tokens",
        "none": "none: the samples are taken to be on-policy",
    }[row.ratio]


def _bounds(row: Algorithm) -> str:
    trust = f"[{_interval(row)}]"
    parts: list[str] = []
    if row.clip == "surrogate":
        parts.append(f"no gradient above {trust} when A > 0, none below it when A < 0")
        if row.dual_clip is not None:
            parts.append(f"none above {row.dual_clip:g} when A < 0")
    if row.clip == "weight":
        parts.append(
            f"ratio in [{row.ratio_min or 0:g}, {row.ratio_max:g}]; a clipped token keeps its gradient, with the bound as weight"
        )
    if row.clip == "soft_gate":
        parts.append(
            f"no hard one: the gradient fades as the ratio leaves 1, τ = {row.gate_positive:g} when A > 0, else {row.gate_negative:g}"
        )
    if row.mask == "trust_region":
        parts.append(f"M_t = 0 above {trust} when A > 0 and below it when A < 0, else 1")
    if row.mask == "tv":
        parts.append(
            f"M_t = 0 when A > 0 and π_t - π_old_t > {row.tv_high:g}, or A < 0 and π_old_t - π_t > {row.tv_low:g}, else 1"
        )
    return "; ".join(parts) or "none"


def _correction(row: Algorithm) -> str:
    parts: list[str] = []
    if row.correction != "none":
        level = {
            "token": "of the token",
            "sequence": "multiplied over the response",
            "geometric": "geometric mean over the response",
        }
        low, high = row.correction_min, row.correction_max
        rule = f"at most {high:g}" if row.correction == "tis" else f"0 outside of [{low or 0:g}, {high:g}]"
        parts.append(f"ρ = exp(logπ_old - logπ_engine), {level[str(row.correction_level)]}, {rule} ({row.correction})")
    if row.rejection != "none":
        what = "product" if row.rejection == "sequence" else "geometric mean"
        parts.append(
            f"0 for a response whose {what} of ρ lies outside of [{row.rejection_min:g}, {row.rejection_max:g}]; it still counts in the divisor"
        )
    return "; ".join(parts)


def _kl(row: Algorithm) -> str:
    d = "logπ_t - logπ_ref_t" if row.kl_in_loss else "logπ_old_t - logπ_ref_t"
    formula = {"k1": "d", "k2": "d²/2", "k3": "exp(-d) - 1 + d"}[str(row.kl_estimator)[:2]]
    through = ", with the gradient of d²/2" if str(row.kl_estimator).endswith("_st") else ""
    text = f"{row.kl_estimator}: {formula}{through}, d = {d}"
    if row.kl_in_reward:
        cost = {"gae": "r_t loses KL_t", "raw": "A_t loses the sum of KL_t from the token on"}
        start = "its own start" if row.credit == "turn" else "the response's start"
        taken = cost.get(row.advantage, f"R loses the sum of KL_t from {start} on, before it is compared")
        return f"{text}; {taken}, times {row.kl_coef:g} and undiscounted"
    if row.kl_estimator == "k1":
        text += ". Its gradient is 0 on average over fresh samples, so it pulls nowhere: k2, k3 or a straight-through form do"
    return text
