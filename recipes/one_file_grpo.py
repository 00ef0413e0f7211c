"""GRPO in one file: the whole idea, with no library of ours between you and the mathematics.

Run ``python recipes/one_file_grpo.py``: under a minute on one CPU thread. A model of 0.6 million
weights that multiplies two digits rightly one time in ten (it likes to add them instead) learns
to do so nearly every time, from nothing but the score of its own answers:

    prompts ──sample G answers each──▶ score ──▶ advantage = (score - group mean) / group std
                     ▲                                           │
                     └── new weights ◀── AdamW ◀── clipped policy gradient

``posttrain`` does the same with packing, shared prompts and a key/value cache; a test holds this
file and the library to the same completions, losses and weights.

Shapes: P prompts of a draw, G answers per prompt, R = P*G rows, L padded length, V vocabulary,
C most tokens of an answer. ``logp_RL`` is a tensor of shape [R, L].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.core.task import Task, TaskSet
from posttrain.lab.settings import PRODUCTS
from posttrain.tasks.reasoning_gym import ReasoningGymTaskSet

BASE = Path(__file__).parents[1] / "src/posttrain/lab/base"


@dataclass(frozen=True)
class Settings:
    """Every number that decides the result."""

    steps: int = 50  # of the optimiser
    prompts_per_draw: int = 32  # P
    group_size: int = 16  # G: the answers to one prompt are each other's baseline
    max_new_tokens: int = 8  # C
    updates_per_draw: int = 2  # steps taken on one draw; the second one is slightly off-policy
    lr: float = 3e-4
    clip: float = 0.2  # how far a token's probability may move on one draw, as a ratio
    aggregate: str = "token_mean"  # or "sequence_mean": see loss_of
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Rollout:
    """One sampled answer, and everything that training needs to remember about it."""

    prompt: list[int]
    answer: list[int]  # the end-of-turn token included: stopping is a decision like any other
    logprobs: list[float]  # of the answer's tokens, under the weights that sampled them
    text: str


def draw_tasks(tasks: Sequence[Task], settings: Settings, *, draw: int) -> list[Task]:
    """P prompts: a fixed walk through shuffled epochs, so that no state has to be kept."""
    chosen = []
    for index in range(draw * settings.prompts_per_draw, (draw + 1) * settings.prompts_per_draw):
        epoch, at = divmod(index, len(tasks))
        order = np.random.default_rng((settings.seed, epoch, 0)).permutation(len(tasks))
        chosen.append(tasks[order[at]])
    return chosen


def right_pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token lists -> tokens_RL. A causal model never looks right, so padding there needs no mask:
    what it computes at real tokens is unchanged, and what it computes at padding is never read."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)


@torch.inference_mode()
def sample(model, tokenizer, tasks: Sequence[Task], settings: Settings, *, draw: int):
    """G rollouts for each task: [P][G]. The model is the learner itself: this is on-policy."""
    size, most = settings.group_size, settings.max_new_tokens
    chats = [[{"role": "user", "content": task.text}] for task in tasks for _ in range(size)]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    # One stream of uniform numbers per row, so a row does not depend on which rows are beside it.
    state = np.random.SeedSequence((settings.seed, draw)).generate_state(len(prompts), np.uint64)
    streams = [np.random.Generator(np.random.Philox(key=int(s >> np.uint64(1)))) for s in state]
    uniform_RC = torch.tensor(np.stack([stream.random(most) for stream in streams]))

    answers: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for t in range(most):
        rows = [prompts[r] + answers[r] for r in alive]
        last = torch.tensor([len(row) - 1 for row in rows])
        # The whole text again for every token: wasteful, and the simplest thing that is right.
        logits_RLV = model(right_pad(rows), use_cache=False).logits
        logp_RV = logits_RLV[torch.arange(len(rows)), last].log_softmax(-1)
        # Inverse CDF: lay the probabilities end to end, and take the token that u falls on.
        cdf_RV = logp_RV[:, : len(tokenizer)].double().exp().cumsum(-1)  # no padding rows
        u_R1 = (uniform_RC[alive, t] * cdf_RV[:, -1])[:, None]
        token_R1 = torch.searchsorted(cdf_RV, u_R1, right=True)
        for r, token, logp in zip(alive, token_R1, logp_RV.gather(-1, token_R1), strict=True):
            answers[r].append(int(token))
            logprobs[r].append(float(logp))
        alive = [r for r in alive if answers[r][-1] != tokenizer.eos_token_id]
        if not alive:
            break
    framing = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}  # unread
    texts = tokenizer.batch_decode([[t for t in a if t not in framing] for a in answers])
    rollouts = [Rollout(*row) for row in zip(prompts, answers, logprobs, texts, strict=True)]
    return [rollouts[i : i + size] for i in range(0, len(rollouts), size)]


def score(taskset: TaskSet, tasks: Sequence[Task], groups) -> Tensor:
    """rewards_PG: the verifier reads the text of an answer, and nothing else."""
    repeated = [task for task, group in zip(tasks, groups, strict=True) for _ in group]
    rewards = taskset.score(repeated, [rollout.text for group in groups for rollout in group])
    return torch.tensor(rewards, dtype=torch.float64).reshape(len(groups), -1)


def advantages_of(rewards_PG: Tensor) -> Tensor:
    """How much better than its siblings an answer was, in standard deviations of the group.

    A prompt that is always or never solved gives 0 everywhere: nothing can be learnt from it.
    """
    std_P1, mean_P1 = torch.std_mean(rewards_PG, dim=1, keepdim=True)
    return (rewards_PG - mean_P1) / (std_P1 + 1e-6)


def loss_of(model, rollouts: Sequence[Rollout], advantage_R: Tensor, settings: Settings) -> Tensor:
    """-min(r A, clip(r) A), r = pi(token) now / pi(token) when it was sampled; then averaged."""
    tokens_RL = right_pad([r.prompt + r.answer for r in rollouts])
    # The logits at position i are about token i + 1. This shift is the classic place for a bug.
    logp_RLV = model(tokens_RL[:, :-1], use_cache=False).logits.log_softmax(-1)
    target_RL = tokens_RL[:, 1:]
    logp_RL = logp_RLV.gather(-1, target_RL[..., None])[..., 0]
    mask_RL = torch.zeros_like(logp_RL)  # 1 where the target is a token of the answer
    old_RL = torch.zeros_like(logp_RL)
    for row, rollout in enumerate(rollouts):
        here = slice(len(rollout.prompt) - 1, len(rollout.prompt) - 1 + len(rollout.answer))
        mask_RL[row, here] = 1
        old_RL[row, here] = torch.tensor(rollout.logprobs)

    # On a draw's first update r is 1 and clipping does nothing, yet the gradient is not zero: it
    # is A times the gradient of log pi, plain REINFORCE. Later updates are held near the sampler.
    ratio_RL = (logp_RL - old_RL).exp()
    clipped_RL = ratio_RL.clamp(1 - settings.clip, 1 + settings.clip)
    advantage_R1 = advantage_R.to(logp_RL.dtype)[:, None]
    loss_RL = -torch.minimum(ratio_RL * advantage_R1, clipped_RL * advantage_R1) * mask_RL
    if settings.aggregate == "token_mean":  # every token counts alike: long answers count more
        return loss_RL.sum() / mask_RL.sum()
    return (loss_RL.sum(1) / mask_RL.sum(1)).mean()  # every answer counts alike


def train(model, tokenizer, taskset: TaskSet, settings: Settings, *, watch: Callable) -> None:
    """Change the model's weights in place; ``watch`` is called after every step."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(settings.steps):
        draw, update = divmod(step, settings.updates_per_draw)
        if update == 0:
            tasks = draw_tasks(taskset.train, settings, draw=draw)
            groups = sample(model, tokenizer, tasks, settings, draw=draw)
            rewards_PG = score(taskset, tasks, groups)
            advantages_PG = advantages_of(rewards_PG)
        share = slice(update, None, settings.updates_per_draw)  # every answer is used once
        rollouts = [rollout for group in groups[share] for rollout in group]
        loss = loss_of(model, rollouts, advantages_PG[share].flatten(), settings)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.step()
        watch(
            step=step + 1,
            reward=rewards_PG[share].mean().item(),
            loss=loss.item(),
            grad_norm=norm.item(),
            answers=[rollout.answer for rollout in rollouts],
        )


def load(folder: Path | str):
    """A stock model without dropout, so that what is trained is what was sampled."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def main() -> None:
    torch.set_num_threads(1)  # on a model this small threads only wait for each other
    model, tokenizer = load(BASE)
    taskset = ReasoningGymTaskSet("products", PRODUCTS.tasks, chat=True)

    def show(*, step: int, reward: float, loss: float, **_: object) -> None:
        print(f"step {step:3}  loss {loss:+.4f}  reward {reward:.3f} {'█' * round(40 * reward)}")

    train(model, tokenizer, taskset, Settings(), watch=show)


if __name__ == "__main__":
    main()
