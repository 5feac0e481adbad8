"""CISPO, all of it, in one file: torch, transformers, and nothing of sluice.

The algorithm is that of the MiniMax-M1 paper (arXiv 2506.13585, section 3.1). One step, in the order of the code below:

  1. sample     G responses o_1 … o_G to each prompt q from the policy as it is, π_old; log π_old of every token is kept
  2. reward     R_i for each response
  3. advantage  A_i = (R_i - mean(R)) / (std(R) + 1e-6), compared with the group of the same prompt; all tokens of o_i get it
  4. update     N times, each time on the next share of the batch, with π_old unchanged and π_θ moving on:
                  r_i,t  = π_θ(o_i,t | q, o_i,<t) / π_old(o_i,t | q, o_i,<t)
                  r̂_i,t  = clip(r_i,t, max = 1 + ε_high)                                          eq. 5
                  J      = 1 / Σ|o_i| · Σ_i Σ_t sg(r̂_i,t) · A_i · log π_θ(o_i,t | q, o_i,<t)      eq. 4

sg is the stop-gradient: the weight r̂ is a constant, and a token's gradient is r̂·A·∇log π. PPO and GRPO clip a surrogate
instead, and a token whose ratio has left their bounds then has no gradient at all. That hits rare tokens first, whose
ratios move most; CISPO bounds how much a token weighs, and keeps every token.

As a script it teaches a tiny Qwen3 with random weights to alternate between even and odd tokens, in half a minute on a CPU:

  python examples/cispo_minimal.py
  python examples/cispo_minimal.py --model MODEL_FOLDER --learning-rate 1e-5

For a task of your own, replace `random_prompt` and `reward`. tests/examples/test_cispo_minimal.py holds loss, gradient and
training curve equal to those of `algorithm.name: cispo` in sluice.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, fields
from statistics import mean, stdev

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config


@dataclass(frozen=True)
class Settings:
    num_steps: int = 30
    prompts_per_step: int = 8
    group_size: int = 8  # G
    max_new_tokens: int = 8
    temperature: float = 1.0  # of the policy: π is softmax(logits / temperature), in sampling and in training
    updates_per_batch: int = 4  # N
    learning_rate: float = 2e-3
    ratio_max: float = 5.0  # 1 + ε_high; below there is no bound, as in the paper
    seed: int = 0


@dataclass
class Rollout:
    prompt: list[int]  # q
    response: list[int]  # o_i; the token that ended it belongs to it
    logprobs: list[float]  # log π_old(o_i,t | q, o_i,<t) for each t
    reward: float = 0.0  # R_i
    advantage: float = 0.0  # A_i


# -- the task: what you would replace --


def random_prompt(rng: random.Random, vocab_size: int) -> list[int]:
    return [rng.randrange(2, vocab_size) for _ in range(rng.randint(1, 3))]


def reward(prompt: list[int], response: list[int]) -> float:
    """The share of tokens that are even after an odd one, or odd after an even one; about a half by chance."""
    before = prompt[-1:] + response[:-1]
    return mean((a + b) % 2 for a, b in zip(before, response, strict=True))


# -- the policy --


def logprobs_of(model: PreTrainedModel, hidden: Tensor, temperature: float) -> Tensor:
    """[…, H] hidden states → log π over the vocabulary, […, V].

    The head is applied in FP32 whatever the body's dtype: in lower precision the paper found the probabilities of sampling and
    of training so far apart that the reward did not grow (section 3.2).
    """
    logits = linear(hidden.float(), model.get_output_embeddings().weight.float())
    return torch.log_softmax(logits / temperature, dim=-1)


@torch.no_grad()
def sample_group(model: PreTrainedModel, prompt: list[int], settings: Settings, generator: Generator) -> list[Rollout]:
    """G responses to one prompt, token by token. `generate` is left alone because it may apply top-p and top-k from the
    model's folder, and the tokens would not be drawn from the π_old that the ratio divides by."""
    end = torch.tensor(model.generation_config.eos_token_id)  # one id or several
    ended = torch.zeros(settings.group_size, dtype=torch.bool)
    lengths = torch.zeros(settings.group_size, dtype=torch.int64)
    ids, cache = torch.tensor([prompt] * settings.group_size), None
    tokens, logprobs = [], []
    while len(tokens) < settings.max_new_tokens and not ended.all():
        output = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logp = logprobs_of(model, output.last_hidden_state[:, -1], settings.temperature)
        ids = torch.multinomial(logp.exp(), 1, generator=generator)
        tokens.append(ids)
        logprobs.append(logp.gather(1, ids))
        lengths += ~ended  # what a row draws after its end is not counted
        ended |= torch.isin(ids[:, 0], end)
    rows = zip(torch.cat(tokens, 1).tolist(), torch.cat(logprobs, 1).tolist(), lengths.tolist(), strict=True)
    return [Rollout(prompt, response[:n], old[:n]) for response, old, n in rows]


def response_logprobs(model: PreTrainedModel, rollouts: list[Rollout], temperature: float) -> Tensor:
    """log π_θ(o_i,t | q, o_i,<t) of every response token, [T], one rollout after the other."""
    ids = pad_sequence([torch.tensor(r.prompt + r.response) for r in rollouts], batch_first=True)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # padding comes last: no token sees it
    # the state at a position predicts the token after it
    ends = [len(r.prompt) + len(r.response) for r in rollouts]
    hidden = torch.cat([h[len(r.prompt) - 1 : end - 1] for h, r, end in zip(hidden, rollouts, ends, strict=True)])
    targets = torch.tensor([token for r in rollouts for token in r.response])
    return logprobs_of(model, hidden, temperature).gather(1, targets[:, None])[:, 0]


# -- the algorithm --


def set_advantages(group: list[Rollout]) -> None:
    """A_i = (R_i - mean(R)) / (std(R) + 1e-6) over one group; 0 for all where all rewards are equal."""
    rewards = [r.reward for r in group]
    for rollout in group:
        rollout.advantage = (rollout.reward - mean(rewards)) / (stdev(rewards) + 1e-6)  # stdev is over n - 1


def cispo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, ratio_max: float) -> Tensor:
    """-J, from [T] tokens of one update."""
    ratio = torch.exp(logprobs - old_logprobs)  # r_i,t
    weight = ratio.clamp(max=ratio_max).detach()  # sg(r̂_i,t), eq. 5
    # eq. 4; the paper writes 1 / Σ|o_i| for one group, here it is over all tokens of the update: each counts the same,
    # in a long response or a short one
    return -(weight * advantages * logprobs).mean()


def loss_of(model: PreTrainedModel, rollouts: list[Rollout], settings: Settings) -> Tensor:
    """-J of the rollouts of one update."""
    old_logprobs = torch.tensor([logprob for r in rollouts for logprob in r.logprobs])
    advantages = torch.tensor([r.advantage for r in rollouts for _ in r.response])
    logprobs = response_logprobs(model, rollouts, settings.temperature)
    return cispo_loss(logprobs, old_logprobs, advantages, settings.ratio_max)


def make_optimizer(model: PreTrainedModel, settings: Settings) -> Optimizer:
    """The paper's AdamW (section 3.2): gradients may be as small as 1e-18, which the usual eps of 1e-8 would drown, and those of
    successive updates resemble each other little, hence a short memory (β2 = 0.95)."""
    return AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)


def sample_batch(
    model: PreTrainedModel, prompts: list[list[int]], settings: Settings, generator: Generator
) -> list[Rollout]:
    """Steps 1 to 3: the rollouts of all prompts, group by group, with rewards and advantages."""
    batch = []
    for prompt in prompts:
        group = sample_group(model, prompt, settings, generator)
        for rollout in group:
            rollout.reward = reward(rollout.prompt, rollout.response)
        set_advantages(group)
        batch += group
    return batch


def train_on(model: PreTrainedModel, optimizer: Optimizer, batch: list[Rollout], settings: Settings) -> list[float]:
    """Step 4: N updates. In the first r is 1, and from the second on π_θ has left π_old. Gives the losses."""
    losses = []
    for i in range(settings.updates_per_batch):
        start, end = (k * len(batch) // settings.updates_per_batch for k in (i, i + 1))
        loss = loss_of(model, batch[start:end], settings)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def load_model(folder: str | None) -> PreTrainedModel:
    """The model in `folder`, in FP32; without one, a Qwen3 of 75,000 random weights and 16 tokens, of which 1 ends a response."""
    if folder:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen3Config(vocab_size=16, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes, **heads)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()  # dropout would make π_θ differ from π_old before the first update


def main(words: list[str] | None = None) -> list[float]:
    """Trains, and gives the mean reward of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Hugging Face causal language model")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    values = vars(parser.parse_args(words))
    folder, settings = values.pop("model"), Settings(**values)

    if not folder:
        torch.set_num_threads(1)  # a model so small only waits for further threads
    torch.manual_seed(settings.seed)
    rng, generator = random.Random(settings.seed), Generator().manual_seed(settings.seed)
    model = load_model(folder)
    optimizer = make_optimizer(model, settings)
    rewards = []
    for step in range(1, settings.num_steps + 1):
        prompts = [random_prompt(rng, model.config.vocab_size) for _ in range(settings.prompts_per_step)]
        batch = sample_batch(model, prompts, settings, generator)
        losses = train_on(model, optimizer, batch, settings)
        rewards.append(mean(r.reward for r in batch))
        print(f"step {step:3}   reward {rewards[-1]:.3f}   loss {mean(losses):+.4f}", flush=True)
    return rewards


if __name__ == "__main__":
    main()
