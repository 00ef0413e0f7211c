"""Planters of faults in engines, disks, and what is edited between two runs."""

from __future__ import annotations

import base64
import errno
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from silent_failures.planting import (
    PLANTERS,
    Planter,
    Side,
    planted,
    same_as_twin,
)
from silent_failures.shapes import Tensors, change_json, change_template, change_weights
from silent_failures.world import Setup

NOISE = 0.5  # nats


# --- engines ---------------------------------------------------------------------------------


def _sampler_logits(change: Callable[[Any], Any]) -> Callable[[Side], None]:
    """Change the logits that the sampler reads, and nothing else."""

    def patch(side: Side) -> None:
        if side == "posttrain":
            from posttrain.engines.local import sampler

            plain = sampler.sample
            sampler.sample = lambda z, *rest, **options: plain(change(z), *rest, **options)  # type: ignore[assignment]
        else:
            _while_trl_generates(lambda model: _hooked(model, change))

    return patch


@contextmanager
def _hooked(model: Any, change: Callable[[Any], Any]) -> Iterator[Any]:
    hook = model.get_output_embeddings().register_forward_hook(lambda m, i, out: change(out))
    yield model
    hook.remove()


def _while_trl_generates(around: Callable[[Any], Any]) -> None:
    from trl.trainer import grpo_trainer

    plain = grpo_trainer.unwrap_model_for_generation

    @contextmanager
    def changed(*args: Any, **options: Any) -> Iterator[Any]:
        with plain(*args, **options) as model, around(model) as other:
            yield other

    grpo_trainer.unwrap_model_for_generation = changed


def _stale(side: Side) -> None:
    """The sampler reads the weights of before the first step."""
    kept: list[Any] = []

    @contextmanager
    def old_weights(model: Any) -> Iterator[Any]:
        now = {name: w.detach().clone() for name, w in model.state_dict().items()}
        kept[:] = kept or [now]
        model.load_state_dict(kept[0])
        yield model
        model.load_state_dict(now)

    if side == "trl":
        _while_trl_generates(old_weights)
        return
    from posttrain.engines.local import policy

    plain = policy.generate

    def generate(model: Any, *rest: Any, **options: Any) -> Any:
        with old_weights(model.causal):
            return plain(model, *rest, **options)

    policy.generate = generate


def _noisy(logits: Any) -> Any:
    import torch

    return logits + NOISE * torch.randn_like(logits)


SAMPLER = "ratio|sampler|log.prob|mismatch"
PLANTERS["sampler-keeps-old-weights"] = Planter(patch=_stale, names=SAMPLER)
PLANTERS["sampler-other-temperature"] = Planter(
    patch=_sampler_logits(lambda z: z * 0.5), names=SAMPLER
)
PLANTERS["sampler-low-precision"] = Planter(patch=_sampler_logits(_noisy), names=SAMPLER)


def _infinite_gradient(side: Side) -> None:
    import torch

    calls = [0]
    plain = torch.nn.utils.clip_grad_norm_

    def spoilt(parameters: Any, *rest: Any, **options: Any) -> Any:
        params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        calls[0] += 1
        if calls[0] == 3:
            next(p for p in params if p.grad is not None).grad.fill_(float("inf"))
        return plain(params, *rest, **options)

    torch.nn.utils.clip_grad_norm_ = spoilt


def _no_step(side: Side) -> None:
    import torch

    torch.optim.AdamW.step = lambda self, closure=None: None  # type: ignore[method-assign]
    torch.optim.Adam.step = lambda self, closure=None: None  # type: ignore[method-assign]


PLANTERS["gradient-not-finite"] = Planter(patch=_infinite_gradient, names="finite|inf|nan")
PLANTERS["weights-not-updated"] = Planter(
    patch=_no_step, names="weights|not changed|unchanged|moved"
)


# --- disks -----------------------------------------------------------------------------------


def _while_saving(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Side], None]:
    def patch(side: Side) -> None:
        from transformers import modeling_utils

        plain = modeling_utils.safe_save_file

        def other(tensors: dict[str, Any], *rest: Any, **options: Any) -> Any:
            return plain(change(dict(tensors)), *rest, **options)

        modeling_utils.safe_save_file = other

    return patch


def _rolled(tensors: dict[str, Any]) -> dict[str, Any]:
    name = next(n for n in sorted(tensors) if n.endswith("up_proj.weight"))
    return {**tensors, name: tensors[name].roll(1, 0).contiguous()}


def _one_less(tensors: dict[str, Any]) -> dict[str, Any]:
    name = next(n for n in sorted(tensors) if n.endswith("up_proj.weight"))
    return {n: v for n, v in tensors.items() if n != name}


def _no_template(side: Side) -> None:
    from transformers import PreTrainedTokenizerBase

    plain = PreTrainedTokenizerBase.save_pretrained

    def other(self: Any, folder: Any, *rest: Any, **options: Any) -> Any:
        found = plain(self, folder, *rest, **options)
        (Path(folder) / "chat_template.jinja").unlink(missing_ok=True)
        return found

    PreTrainedTokenizerBase.save_pretrained = other  # type: ignore[method-assign]


def _double_merge(side: Side) -> None:
    from peft.tuners.lora.layer import Linear

    plain = Linear.get_delta_weight
    Linear.get_delta_weight = lambda self, adapter: 2 * plain(self, adapter)


def _with_adapters(setup: Setup) -> None:
    setup.stage["lora"] = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    setup.stage["optimizer"]["lr"] = 1e-2


PLANTERS["export-is-another-model"] = Planter(patch=_while_saving(_rolled), names="export")
PLANTERS["export-lacks-a-tensor"] = Planter(patch=_while_saving(_one_less), names="export|missing")
PLANTERS["export-loses-template"] = Planter(
    patch=_no_template, names="template", right=same_as_twin
)
PLANTERS["adapter-merged-at-wrong-scale"] = Planter(
    fault=_with_adapters, twin=_with_adapters, patch=_double_merge, names="export|merge"
)


def _full(side: Side) -> None:
    import torch

    plain = torch.save

    def other(what: Any, path: Any, *rest: Any, **options: Any) -> Any:
        if str(path).endswith(".pt"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return plain(what, path, *rest, **options)

    torch.save = other


PLANTERS["disk-full"] = Planter(patch=_full, names="space|disk")


def checkpoints(setup: Setup) -> list[Path]:
    """Folders of checkpoints that either side left."""
    ours = setup.folder.glob("out/stages/*/checkpoint")
    return [*ours, *setup.folder.glob("out/checkpoint-*")]


def _cut_checkpoint(setup: Setup) -> None:
    for folder in checkpoints(setup):
        path = max((p for p in folder.iterdir() if p.is_file()), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


PLANTERS["checkpoint-cut"] = Planter(
    stop="interrupt", between=_cut_checkpoint, names="checkpoint|cut|corrupt"
)


# --- edits -----------------------------------------------------------------------------------


def _shift(tensors: Tensors) -> Tensors:
    name = next(n for n in sorted(tensors) if n.endswith("up_proj.weight"))
    return {**tensors, name: tensors[name] + np.float32(0.01)}


def _two_stages(setup: Setup) -> None:
    setup.recipe["stages"].append({**setup.stage, "name": "more"})


def _edit_stage(setup: Setup) -> None:
    for folder in [*setup.folder.glob("out/stages/train-*/model"), setup.folder / "out"]:
        if (folder / "model.safetensors").is_file():
            change_weights(folder, _shift)


planted("stage-model-edited", twin=_two_stages, between=_edit_stage, names="digest|changed|ledger")(
    _two_stages
)


def _edit_checkpoint(setup: Setup) -> None:
    import torch

    for folder in checkpoints(setup):
        if (folder / "learner.pt").is_file():
            state = torch.load(folder / "learner.pt", weights_only=True)
            for weight in state["weights"].values():
                weight += 0.01
            torch.save(state, folder / "learner.pt")
        else:
            change_weights(folder, _shift)


PLANTERS["checkpoint-of-another-run"] = Planter(
    stop="interrupt", between=_edit_checkpoint, names="digest|checkpoint|changed"
)


def _edit_data(setup: Setup) -> None:
    rows = setup.rows("demos.jsonl")
    setup.write("demos.jsonl", [*rows[::-1], *rows[:3]])


PLANTERS["data-edited-before-resume"] = Planter(
    stop="interrupt", between=_edit_data, names="data|demos|changed"
)


def _reward_with_helper(setup: Setup) -> None:
    (setup.folder / "helper.py").write_text("def right(c, a):\n    return float(c == str(a))\n")
    (setup.folder / "reward.py").write_text(
        "import helper\n"
        "def score(prompts, completions, answer, **columns):\n"
        "    return [helper.right(c, a) for c, a in zip(completions, answer)]\n"
    )


def _edit_helper(setup: Setup) -> None:
    (setup.folder / "helper.py").write_text("def right(c, a):\n    return float(len(c))\n")


planted(
    "reward-edited-before-resume",
    twin=_reward_with_helper,
    stop="interrupt",
    between=_edit_helper,
    names="helper|reward|changed",
)(_reward_with_helper)

PLANTERS["base-edited-before-resume"] = Planter(
    stop="interrupt",
    between=lambda setup: change_weights(setup.model, _shift),
    names="base|model|changed",
)


def _edit_template(setup: Setup) -> None:
    change_template(setup.model, ("'<|assistant|>'", "'<|assistant|> '"))


PLANTERS["template-edited-before-resume"] = Planter(
    stop="interrupt", between=_edit_template, names="template|changed|model"
)


def _stray(setup: Setup) -> None:
    (setup.model / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")


PLANTERS["stray-file-in-model"] = Planter(
    stop="interrupt", between=_stray, right=same_as_twin, must_work=True
)


def _edit_measurement(setup: Setup) -> None:
    """All scores of the last measurement are 1."""

    def better(content: dict[str, Any]) -> None:
        scores = content["tasks"][0]["scores"]
        ones = np.ones(scores["shape"], scores["dtype"])
        scores["zlib64"] = base64.b64encode(zlib.compress(ones.tobytes())).decode()

    change_json(setup.folder / "out/measurements/train.json", better)


READ_AGAIN = ("ledger verify out", "report out", "compare out")

PLANTERS["measurement-edited"] = Planter(
    between=_edit_measurement, then=READ_AGAIN, names="digest|measurement"
)
PLANTERS["ledger-deleted"] = Planter(
    between=lambda setup: (setup.folder / "out/ledger.jsonl").unlink(), names="ledger"
)


def _edit_row(setup: Setup) -> None:
    path = setup.folder / "out/ledger.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[-1])
    lines[-1] = re.sub(r'"seconds":\s*\d', '"seconds":7', lines[-1])
    if json.loads(lines[-1]) == row:
        lines[-1] = lines[-1].replace("1", "2", 1)
    path.write_text("\n".join(lines) + "\n")


PLANTERS["ledger-row-edited"] = Planter(
    between=_edit_row, then=("ledger verify out",), names="ledger|row|hash"
)


@planted("out-is-a-device", names="out|folder|link|not a")
def out_is_a_link(setup: Setup) -> None:
    (setup.folder / "precious.txt").write_text("keep me")
    (setup.folder / "out").symlink_to(setup.folder / "precious.txt")


@planted("name-leaves-the-folder", names="name|outside")
def leaves(setup: Setup) -> None:
    setup.recipe["name"] = "../../elsewhere"
    setup.edits.append(lambda text: text + "# --out is not given\n")


PLANTERS["stopped-and-resumed"] = Planter(
    stop="interrupt", twin_stops=False, right=same_as_twin, must_work=True
)
PLANTERS["terminated"] = Planter(
    stop="terminate", twin_stops=False, right=same_as_twin, must_work=True
)
