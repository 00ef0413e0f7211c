"""Do both libraries compute the same thing? One batch of token ids, both losses and gradients.

``python -m against_trl.equivalence JOB.json`` prints a list of results as JSON. Ours is a step of
the real learner with a learning rate of 0 and no clipping, after which its gradients are read.
TRL's is the loss of its trainer on the same token ids, with the same advantages: the two divide by
the standard deviation of a group plus another constant (1e-6, and 1e-4), which is no matter here.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from against_trl import ours, theirs
from against_trl.plan import Job
from posttrain.core.trajectory import Column, Group


def compare(job: Job, *, stale: bool = False) -> dict[str, object]:
    """Loss and gradients of both sides on one draw."""
    groups, loss, mine = ours.one_step(job, stale=stale)
    their_loss, yours = _theirs(job, groups, stale=stale)
    if mine.keys() != yours.keys():
        raise ValueError(f"gradients of {sorted(mine.keys() ^ yours.keys())} on one side only")
    difference = math.sqrt(sum(float((mine[n] - yours[n]).square().sum()) for n in mine))
    norm = math.sqrt(sum(float(g.square().sum()) for g in yours.values()))
    return {
        "case": job.work + (" with old log-probs" if stale else ""),
        "loss_ours": loss,
        "loss_trl": their_loss,
        # GRPO on fresh rollouts has a loss of 0, and no relative gap: then it is absolute.
        "loss_gap": abs(loss - their_loss) / (abs(their_loss) if abs(their_loss) > 1e-3 else 1.0),
        "gradient_gap": difference / norm,
    }


def _theirs(
    job: Job, groups: Sequence[Group], *, stale: bool
) -> tuple[float, Mapping[str, Tensor]]:
    trainer = theirs.TRAINERS[job.work](job)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    if job.work in ("sft", "dpo"):
        rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        inputs = trainer.data_collator(rows)
    else:
        inputs = _rollouts(trainer, groups, stale=stale)
    items = (inputs["labels"] != -100).sum() if job.work == "sft" else None
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items)
    loss.backward()
    return float(loss.detach()), ours.gradients(trainer.model)


def _rollouts(trainer: object, groups: Sequence[Group], *, stale: bool) -> dict[str, Tensor]:
    """Our rollouts in the form in which TRL's trainers keep theirs."""
    members = [m for g in groups for m in g.members]
    cuts = [m.trajectory.prompt_length for m in members]
    widest = max(cuts)
    prompts = torch.zeros(len(members), widest, dtype=torch.int64)
    mask = torch.zeros_like(prompts)
    for row, (member, cut) in enumerate(zip(members, cuts, strict=True)):
        prompts[row, widest - cut :] = torch.from_numpy(member.trajectory.tokens[:cut].astype(int))
        mask[row, widest - cut :] = 1
    tails = zip(members, cuts, strict=True)
    completions = torch.from_numpy(
        np.stack([m.trajectory.tokens[c:].astype(int) for m, c in tails])
    )
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": mask,
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "num_items_in_batch": torch.tensor(completions.numel()),
    }
    if all(Column.ADVANTAGE in m.columns for m in members):
        last = [float(m.columns[Column.ADVANTAGE][-1]) for m in members]
        inputs["advantages"] = torch.tensor(last)
    if stale:
        old = [m.columns[Column.BEHAVIOUR_LOGPROB] for m in members]
        kept = [o[c:] for o, c in zip(old, cuts, strict=True)]
        inputs["old_per_token_logps"] = torch.from_numpy(np.stack(kept))
    return inputs


def main() -> None:
    """Command line."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)
    torch.set_num_threads(job.threads)
    cases = [compare(job)]
    if job.work == "grpo":
        cases.append(compare(job, stale=True))
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
