"""An exported model needs nothing of ours: plain transformers gives the same text."""

import json
import os
import subprocess
import sys

import torch
from world import dpo, grpo, make_world, opd, recipe, run_recipe, sft, stage_folder, write_recipe

from posttrain.run.audit import audit
from posttrain.run.folder import RunFolder

PLAIN = """
import json, sys, warnings

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "posttrain":
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocker())
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
try:
    import posttrain
    raise SystemExit("the blocker does not block")
except ImportError:
    pass
found = {}
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    unwritten = list(range(len(tokenizer), model.config.vocab_size))  # padding rows of the head
    texts = []
    for letter in "abcm":
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"say {letter}"}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )
        out = model.generate(**ids, do_sample=False, max_new_tokens=12, suppress_tokens=unwritten)
        texts.append(out[0, ids["input_ids"].shape[1]:].tolist())
    found[folder] = texts
print(json.dumps(found))
"""


def ours(folder):
    """Greedy tokens by our own sampler."""
    from posttrain.core.provenance import Role, Sampling
    from posttrain.core.task import Message, Task
    from posttrain.engines.local.engine import LocalEngine
    from posttrain.protocols import Request

    policy = LocalEngine(device=torch.device("cpu")).policy(str(folder))
    prompts = [
        policy.renderer.prompt(
            Task(taskset="say", prompt=(Message(Role.USER, f"say {letter}"),), answer=None)
        )
        for letter in "abcm"
    ]
    greedy = Sampling(temperature=0, seed=0)
    requests = [Request(prompt=p.tokens, sampling=greedy, max_new_tokens=12) for p in prompts]
    return [c.tokens.tolist() for c in policy.generate(requests)]


def test_every_stage_in_plain_transformers(shared, tmp_path):
    names = ["sft", "adapt", "grpo", "dpo", "opd"]
    stages = [sft(), sft("adapt", lora={"rank": 2, "alpha": 4}), grpo(), dpo(), opd()]
    path = write_recipe(shared, recipe(*stages), "export.yaml")
    code, words = run_recipe(path, tmp_path / "out")
    assert code == 0, words
    folders = [str(stage_folder(tmp_path / "out", n) / "model") for n in names]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    plain = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(shared / "model"), *folders],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert plain.returncode == 0, plain.stderr
    theirs = json.loads(plain.stdout)
    for folder in (str(shared / "model"), *folders):
        assert theirs[folder] == ours(folder), folder
    # Else equal text would say nothing about the weights.
    assert len({json.dumps(theirs[f]) for f in folders}) == len(folders)


def test_adapters_are_saved_without_local_paths(shared, tmp_path):
    path = write_recipe(shared, recipe(sft(lora={"rank": 2}), tasks={}), "adapter.yaml")
    code, words = run_recipe(path, tmp_path / "out")
    assert code == 0, words
    adapter = stage_folder(tmp_path / "out", "sft") / "model" / "adapter"
    assert sorted(p.name for p in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert str(tmp_path) not in (adapter / "adapter_config.json").read_text()
    assert str(shared) not in (adapter / "adapter_config.json").read_text()


OWN_CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM


class OwnConfig(Qwen3Config):
    model_type = "own"


class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_trained_on_and_measured(tmp_path):
    """The code that the recipe allows runs in the run's own exports too."""
    folder = make_world(tmp_path / "own")
    (folder / "model" / "modeling_own.py").write_text(OWN_CODE)
    settings = json.loads((folder / "model" / "config.json").read_text())
    settings |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "model" / "config.json").write_text(json.dumps(settings))
    stages = [sft(), grpo()]
    refused = write_recipe(folder, recipe(*stages), "refused.yaml")
    code, words = run_recipe(refused, tmp_path / "refused")
    assert code != 0
    assert "remote_code" in words
    path = write_recipe(folder, recipe(*stages, remote_code="model"))
    out = tmp_path / "out"
    code, words = run_recipe(path, out)
    assert code == 0, words
    for name in ("sft", "grpo"):
        exported = stage_folder(out, name) / "model" / "modeling_own.py"
        assert exported.read_text() == OWN_CODE
    code, words = run_recipe(path, out)  # what was measured is known by its digest
    assert code == 0, words
    assert audit(RunFolder(out)) == []
