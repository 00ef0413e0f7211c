"""Model folders with one seeded change each: refused by name, or loaded and proved."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fuzz.frame import Trial

DEEP = 100_000
VALUES: tuple[object, ...] = (
    *(0, -1, 1, 7, 2**31, 2**63, 10**400, -(10**30), 1e-300, 1e300, 0.5, True, False, None),
    *("", "four", "../x", "\x00", "a" * 5000, [], {}, [1, "a"], {"a": {}}, float("inf")),
    *(float("nan"), [[]] * 50, [10**9], {"type": "yarn"}, {"rope_type": "x", "factor": "y"}),
)
STRAY = (
    *("adapter_config.json", "pytorch_model.bin", "README.md", "vocab.json", "merges.txt"),
    *("shard-00001-model-00001-of-00001.safetensors", "modeling_x.py", "tokenizer.model"),
    *("scalar_head.safetensors", "added_tokens.json", "chat_template.json"),
)
KEYS = (
    *(
        "quantization_config",
        "auto_map",
        "configuration_files",
        "transformers_weights",
        "rope_scaling",
    ),
    *("rope_parameters", "text_config", "layer_types", "architectures", "torch_dtype", "dtype"),
    *("model_type", "num_nextn_predict_layers", "sliding_window", "tie_word_embeddings"),
    *("eos_token_id", "pad_token_id", "attn_implementation", "id2label", "num_labels", "head_dim"),
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("max_position_embeddings", "_attn_implementation", "is_encoder_decoder", "chunk_size"),
    *("chat_template", "added_tokens_decoder", "extra_special_tokens", "tokenizer_class"),
    *("eos_token", "model_max_length", "bos_token", "use_cache", "experts_implementation"),
)


def trials(folder: Path, *, num: int, seed: int) -> Iterator[Trial]:
    """Changed copies of the folder ``clean``."""
    for number in range(num):
        copy = folder / f"model-{number}"
        shutil.copytree(folder / "clean", copy)
        words = mutate(copy, random.Random(f"folder/{seed}/{number}"))
        tasks = ("--tasks", "probe.yaml", "--samples", "2")
        yield Trial(number, words, _Load(copy), ("probe", copy.name, *tasks))
        shutil.rmtree(copy, ignore_errors=True)


class _Load:
    """Read the folder as a plan does, and load it as a run does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self) -> bool:
        from posttrain.chat.renderer import ChatRenderer
        from posttrain.engines.local.engine import LocalEngine
        from posttrain.models.files import model_digest
        from posttrain.models.folder import read_folder
        from posttrain.models.readers import read_ends, read_shape, read_tokenizer

        found = read_folder(self._folder)
        model_digest(self._folder)
        read_shape(found)
        ChatRenderer(read_tokenizer(found), end_tokens=read_ends(found))
        policy = LocalEngine(device="cpu", dtype="float32").policy(str(self._folder))
        return bool(policy.proofs)


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one thing in a model folder. Returns what was done."""
    kind: Callable[[Path, random.Random], str] = draw.choice(
        [_json, _json, _json, _bytes, _header, _tensors, _files, _index]
    )
    return kind(folder, draw)


def _json(folder: Path, draw: random.Random) -> str:
    """A value of a JSON file replaced, added or removed."""
    path = folder / draw.choice(
        ["config.json"] * 4 + ["generation_config.json", "tokenizer_config.json", "tokenizer.json"]
    )
    content = json.loads(path.read_text())
    if draw.random() < 0.05:
        path.write_text('{"a":' * DEEP + "1" + "}" * DEEP)
        return f"{path.name} nested {DEEP} deep"
    at = content
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        known = draw.choice(KEYS) if at is content and draw.random() < 0.5 else None
        key = known or (draw.choice(keys) if keys else "x")
        inner = at.get(key) if isinstance(at, dict) else at[key]
        if known is None and isinstance(inner, dict | list) and inner and draw.random() < 0.7:
            at = inner
            continue
        break
    if draw.random() < 0.15 and keys and key in keys:
        del at[key]
        value: object = "gone"
    else:
        value = draw.choice(VALUES)
        at[key] = value
    path.write_text(json.dumps(content))
    return f"{path.name} {key} = {value!r:.30}"


def _bytes(folder: Path, draw: random.Random) -> str:
    """Bytes of any file cut, changed or added."""
    path = draw.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    raw = bytearray(path.read_bytes())
    how = draw.choice(["cut", "empty", "flip", "noise", "more"])
    if how == "cut":
        raw = raw[: draw.randrange(len(raw))]
    elif how == "empty":
        raw = bytearray()
    elif how == "flip":
        for _ in range(draw.randint(1, 20)):
            raw[draw.randrange(min(len(raw), 4000))] = draw.randrange(256)
    elif how == "noise":
        raw = bytearray(draw.randbytes(draw.randrange(1, 5000)))
    else:
        raw += draw.randbytes(100)
    path.write_bytes(raw)
    return f"{path.name} {how}"


def _header(folder: Path, draw: random.Random) -> str:
    """An entry of a safetensors header."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = draw.choice([n for n in header if n != "__metadata__"])
    field = draw.choice(["dtype", "shape", "data_offsets", "name", "length", "metadata", "entry"])
    value = draw.choice([*VALUES, "F8_E4M3", "I32", "F16", [2**40, 2**40], [0, 0], [-1, 4]])
    if field == "name":
        new = draw.choice(
            [f"module.{name}", f"_orig_mod.{name}", "x", "", "model..weight", "\u0000"]
        )
        header[new] = header.pop(name)
    elif field == "metadata":
        header["__metadata__"] = value
    elif field == "entry":
        header[name] = value
    elif field != "length":
        header[name][field] = value
    text = json.dumps(header).encode()
    size = draw.choice([0, 1, 2**40, 2**64 - 1, length - 1]) if field == "length" else len(text)
    path.write_bytes(size.to_bytes(8, "little") + text + raw[8 + length :])
    return f"header {field} {value!r:.30}"


def _tensors(folder: Path, draw: random.Random) -> str:
    """Tensors removed, added, renamed, reshaped, not finite, or of another number type."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    held = load_file(path)
    name = draw.choice(sorted(held))
    how = draw.choice(["drop", "drop layer", "add", "wrap", "reshape", "nan", "inf", "type", "cut"])
    weight = held[name]
    if how == "drop":
        del held[name]
    elif how == "drop layer":
        held = {n: w for n, w in held.items() if ".0." not in n}
    elif how == "add":
        held[draw.choice(["extra", "model.layers.9.x", "lm_head.weight", "v_head.weight"])] = (
            weight.clone()
        )
    elif how == "wrap":
        mark = draw.choice(["module.", "_orig_mod.", "base_model.model.", "transformer."])
        held = {f"{mark}{n}": w for n, w in held.items()}
    elif how == "reshape":
        held[name] = weight.reshape(-1).clone()
    elif how in ("nan", "inf"):
        weight.view(-1)[draw.randrange(weight.numel())] = float(how)
    elif how == "type":
        to = draw.choice([torch.int8, torch.float16, torch.bfloat16, torch.float64, torch.bool])
        held[name] = weight.to(to)
    else:
        held[name] = weight[:1].clone()
    save_file(held, path, metadata={"format": "pt"})
    return f"tensor {how} {name}"


def _files(folder: Path, draw: random.Random) -> str:
    """A file missing, replaced by something else, or added."""
    path = draw.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    how = draw.choice(["gone", "pipe", "folder", "device", "dangling", "outside", "add", "loop"])
    if how == "add":
        name = draw.choice(STRAY)
        (folder / name).write_text(draw.choice(["", "{}", "[]", "x", '{"a": 1}']))
        return f"added {name}"
    if how == "outside":
        target = folder.parent / f"outside-{path.name}"
        shutil.copy(path, target)
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "gone":
        targets = {"device": "/dev/zero", "dangling": "nowhere", "loop": path.name}
        path.symlink_to(targets.get(how) or target)
    return f"{path.name} {how}"


def _index(folder: Path, draw: random.Random) -> str:
    """An index in place of the single file, with something wrong in it, or nothing."""
    from safetensors import safe_open

    (folder / "model.safetensors").rename(folder / "one.safetensors")
    with safe_open(folder / "one.safetensors", framework="pt") as content:
        names: dict[str, object] = dict.fromkeys(content.keys(), "one.safetensors")
    name = draw.choice(sorted(names))
    how = draw.choice(
        ["right", "outside", "absolute", "missing", "number", "extra", "list", "none"]
    )
    wrong: dict[str, object] = {
        "outside": "../one.safetensors",
        "absolute": str(folder / "one.safetensors"),
        "missing": "two.safetensors",
        "number": 3,
    }
    if how in wrong:
        names[name] = wrong[how]
    elif how == "extra":
        names["model.more.weight"] = "one.safetensors"
    whole: object = {"metadata": {}, "weight_map": names}
    if how in ("list", "none"):
        whole = [names] if how == "list" else {"metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    return f"index {how}"
