"""TRL's side: its own trainers on the same folder, configured by a YAML file as `trl sft` is."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from silent_failures.planting import Planter
from silent_failures.processes import in_process
from silent_failures.result import Result, export_digest
from silent_failures.world import HELD_OUT, STEPS, Setup, demonstration, turn

MODULES = ["peft", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.grpo_trainer"]
ROWS = 8
CONTEXT = 128


def run(setup: Setup, name: str, planter: Planter, *, faulty: bool) -> Result:
    """The whole story of one fault, or of its twin."""
    began = time.monotonic()
    result = Result(end="finished")
    (planter.fault if faulty else planter.twin)(setup)
    stages = setup.recipe["stages"]
    parts: list[tuple[int, str, bool]] = [(i, "", False) for i in range(len(stages))]
    if planter.stop and (faulty or planter.twin_stops):
        parts = [(0, planter.stop, False), (0, "", True)]
    for number, (index, stop, again) in enumerate(parts):
        if number and faulty and planter.between:
            planter.between(setup)
        try:
            _write(setup, stages[index], index, again)
        except Exception as error:  # noqa: BLE001  # whatever a user's data does is a result
            result.end, result.words = "error", f"{type(error).__name__}: {error}"
            break
        log = setup.folder / f"log-{number}.txt"
        code = in_process(_work, name if faulty else "", stop, log=log, home=setup.folder)
        result.before = result.steps
        _see(result, setup)
        _end(result, log, code, stopped=bool(stop))
        if result.end != "finished":
            break
    result.seconds = time.monotonic() - began
    return result


def _write(setup: Setup, stage: Mapping[str, Any], index: int, again: bool) -> None:
    """The trainer's configuration, and what is not in it."""
    method = stage["method"]
    kind = method["name"]
    options: dict[str, Any] = {
        "output_dir": "out" if index == 0 else f"out-{index}",
        "max_steps": stage["budget"]["steps"],
        "per_device_train_batch_size": stage["groups_per_step"],
        "learning_rate": stage["optimizer"]["lr"],
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": stage["checkpoint_every"],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "seed": setup.recipe["seed"],
    }
    sampling = method.get("sampling", {})
    if kind == "sft":
        first = (setup.folder / method["data"]["path"]).read_text().split("\n", 1)[0]
        options |= {"max_length": CONTEXT, "assistant_only_loss": '"messages"' in first}
    elif kind == "dpo":
        options |= {"max_length": CONTEXT, "beta": 0.1}
    else:
        options |= {
            "max_completion_length": method["max_new_tokens"],
            "temperature": sampling.get("temperature", 1.0),
            "top_p": sampling.get("top_p", 1.0),
        }
    if kind == "grpo":
        size = method["group_size"]
        options |= {
            "num_generations": size,
            "per_device_train_batch_size": size * stage["groups_per_step"],
            "beta": method.get("kl_weight", 0.001),
        }
    elif kind == "opd":
        options |= {
            "beta": 1.0,
            "per_device_train_batch_size": method["group_size"] * stage["groups_per_step"],
        }
    job = {
        "kind": kind,
        "data": method.get("data"),
        "tasks": [setup.recipe["tasks"][name] for name in method.get("tasks", ())],
        "held_out": setup.recipe["tasks"]["products"],
        "lora": stage.get("lora"),
        "model": "model" if index == 0 else ("out" if index == 1 else f"out-{index - 1}"),
        "again": again,
    }
    (setup.folder / "theirs.yaml").write_text(setup.edited(yaml.safe_dump(options)))
    (setup.folder / "job.json").write_text(json.dumps(job))
    (setup.folder / "seen.jsonl").touch()


def _see(result: Result, setup: Setup) -> None:
    for folder in sorted(setup.folder.glob("out*")):
        weights, more = export_digest(folder)
        result.weights = weights or result.weights
        result.first |= more
    lines = [json.loads(x) for x in (setup.folder / "seen.jsonl").read_text().splitlines()]
    result.steps = sum("step" in x for x in lines)
    result.rewards = [x["log"]["reward"] for x in lines if "reward" in x.get("log", {})]
    result.first |= next((x["log"] for x in reversed(lines) if x.get("first")), {})
    for line in lines:
        if "texts" in line:
            result.trained, result.whole, result.ids = line["texts"], line["whole"], line["ids"]


def _end(result: Result, log: Path, code: int | None, *, stopped: bool) -> None:
    text = log.read_text(encoding="utf-8", errors="replace")
    result.said += [line.strip() for line in text.splitlines() if line.strip()]
    if code is None:
        result.end = "hung"
    elif code and not stopped:
        result.end, result.traceback = "error", True
        result.words = "\n".join(text.strip().splitlines()[-3:])[-600:]


# --- in the process of the run ---------------------------------------------------------------


def _work(name: str, stop: str) -> None:
    import logging

    from transformers import TrainerCallback

    logging.basicConfig(level=logging.WARNING)
    from silent_failures.planters import ALL

    if name and (patch := ALL[name].patch):
        patch("trl")
    sys.path.insert(0, os.getcwd())
    job = json.loads(Path("job.json").read_text())
    trainer = TRAINERS[job["kind"]](job)
    note = _Notes()

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            note(step=state.global_step)
            if stop and state.global_step == STEPS // 2 + 1:
                os.kill(os.getpid(), signal.SIGINT if stop == "interrupt" else signal.SIGTERM)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any
        ) -> None:
            numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, float | int)}
            note(log=numbers, first=state.global_step == 1)

    trainer.add_callback(Watch())
    _watch_rows(trainer, note)
    trainer.train(resume_from_checkpoint=True if job["again"] else None)
    trainer.save_model()


class _Notes:
    """Lines of seen.jsonl."""

    def __call__(self, **entries: Any) -> None:
        with Path("seen.jsonl").open("a") as file:
            file.write(json.dumps(entries, default=float) + "\n")


def _watch_rows(trainer: Any, note: _Notes) -> None:
    """Keep the rows of the first loss."""
    plain = trainer.compute_loss
    done: list[bool] = []

    def watched(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        if not done:
            done.append(True)
            _keep(inputs, trainer.processing_class, note)
        return plain(model, inputs, *rest, **options)

    trainer.compute_loss = watched


def _keep(inputs: Mapping[str, Any], tokenizer: Any, note: _Notes) -> None:
    if "completion_ids" in inputs:
        ids, seen = inputs["completion_ids"], inputs["completion_mask"].bool()
        trained = seen
    elif "labels" in inputs:
        ids, trained = inputs["input_ids"], inputs["labels"] != -100
        seen = inputs["attention_mask"].bool()
    elif "completion_mask" in inputs and "input_ids" in inputs:
        ids, trained = inputs["input_ids"], inputs["completion_mask"].bool()
        seen = inputs["attention_mask"].bool()
    else:
        return
    note(
        texts=[tokenizer.decode(r[t]) for r, t in zip(ids[:ROWS], trained, strict=False)],
        whole=[r[s].tolist() for r, s in zip(ids[:ROWS], seen, strict=False)],
        ids=sorted(set(ids[trained].tolist())),
    )


def _config(kind: type) -> Any:
    from trl import TrlParser

    parser = TrlParser((kind,))
    (config,) = parser.parse_args_and_config(["--config", "theirs.yaml"])
    return config


def _model(job: Mapping[str, Any]) -> Any:
    """A folder's name; of a folder with an adapter, the model with it."""
    if not (Path(job["model"]) / "adapter_config.json").is_file() or job["model"] == "model":
        return job["model"], _lora(job)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("model")
    return PeftModel.from_pretrained(base, job["model"], is_trainable=True), None


def _lora(job: Mapping[str, Any]) -> Any:
    if not job["lora"]:
        return None
    from peft import LoraConfig

    lora = job["lora"]
    return LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=lora["target_modules"],
        task_type="CAUSAL_LM",
    )


def _file(path: str) -> Any:
    from datasets import load_dataset

    return load_dataset("json", data_files=path, split="train", cache_dir=".cache")


def _tasks(task: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    rows = [json.loads(x) for x in Path(task["path"]).read_text().splitlines()]
    from datasets import Dataset

    cut = len(rows) - task["held_out"]
    shown = [{**r, "prompt": [turn("user", r["prompt"])]} for r in rows[:cut]]
    return Dataset.from_list(shown), rows[cut:]


def sft(job: Mapping[str, Any]) -> Any:
    """Demonstrations, with the held-out tasks as evaluation set."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, lora = _model(job)
    data = _file(job["data"]["path"])
    held = _tasks(job["held_out"])[1] if "messages" in data.column_names else []
    return SFTTrainer(
        model=model,
        args=_config(SFTConfig),
        train_dataset=data,
        eval_dataset=Dataset.from_list([demonstration(t) for t in held]) if held else None,
        peft_config=lora,
    )


def dpo(job: Mapping[str, Any]) -> Any:
    """Pairs."""
    from trl import DPOConfig, DPOTrainer

    model, lora = _model(job)
    return DPOTrainer(
        model=model,
        args=_config(DPOConfig),
        train_dataset=_file(job["data"]["path"]),
        peft_config=lora,
    )


def grpo(job: Mapping[str, Any]) -> Any:
    """Tasks with a reward function, and the held-out tasks as evaluation set."""
    from trl import GRPOConfig, GRPOTrainer

    model, lora = _model(job)
    data, held = _tasks(job["tasks"][0])
    from datasets import Dataset

    shown = [{**r, "prompt": [turn("user", r["prompt"])]} for r in held[:HELD_OUT]]
    return GRPOTrainer(
        model=model,
        reward_funcs=_reward(job["tasks"][0]["reward"]),
        args=_config(GRPOConfig),
        train_dataset=data,
        eval_dataset=Dataset.from_list(shown),
        peft_config=lora,
    )


def opd(job: Mapping[str, Any]) -> Any:
    """A teacher on the learner's own rollouts."""
    from trl import DistillationConfig, DistillationTrainer

    data = _tasks(job["tasks"][0])[0]
    return DistillationTrainer(
        model=job["model"],
        teacher_model="teacher",
        args=_config(DistillationConfig),
        train_dataset=data.select_columns(["prompt"]),
    )


def _reward(name: str) -> Callable[..., list[float]]:
    """The same function, called with texts."""
    if name == "exact":

        def exact(completions: list[str], answer: list[Any], **rest: Any) -> list[float]:
            return [float(c.strip() == str(a)) for c, a in zip(completions, answer, strict=True)]

        function: Any = exact
    else:
        path, _, wanted = name.partition(":")
        spec = importlib.util.spec_from_file_location("reward", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = vars(module)[wanted]

    def score(completions: list[Any], **columns: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        found: list[float] = function(completions=texts, **columns)
        return found

    return score


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo, "opd": opd}
