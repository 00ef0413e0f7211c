"""Planters of faults in models, tokenizers and templates."""

from __future__ import annotations

import json
import re

import numpy as np

from silent_failures.planting import (
    finished,
    in_rows,
    planted,
    same_as_twin,
)
from silent_failures.shapes import (
    Tensors,
    add_rows,
    add_token,
    change_config,
    change_json,
    change_template,
    change_weights,
    template,
)
from silent_failures.world import Setup, turn

SIZE, END = 366, 3  # of the tokenizer; the end token's id
OTHERS = "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
OWN = "{{- message['content'] + '<|end|>' -}}"


def _without(prefix: str):  # type: ignore[no-untyped-def]
    return lambda tensors: {n: v for n, v in tensors.items() if not n.startswith(prefix)}


@planted("layer-missing", names="missing|newly initialized|layers.3")
def layer_missing(setup: Setup) -> None:
    change_weights(setup.model, _without("model.layers.3."))


@planted("layers-unread", names="unexpected|not used|layers.3")
def layers_unread(setup: Setup) -> None:
    def shorter(config: dict[str, object]) -> None:
        config["num_hidden_layers"] = 3
        config["layer_types"] = ["full_attention"] * 3

    change_json(setup.model / "config.json", shorter)


@planted("weights-prefixed", names="_orig_mod|unexpected|missing|newly", right=same_as_twin)
def weights_prefixed(setup: Setup) -> None:
    change_weights(setup.model, lambda t: {f"_orig_mod.{name}": v for name, v in t.items()})


@planted("weights-nan", names="nan|finite")
def weights_nan(setup: Setup) -> None:
    def spoilt(tensors: Tensors) -> Tensors:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
        return tensors

    change_weights(setup.model, spoilt)


@planted("adapter-in-base", names="adapter")
def adapter_in_base(setup: Setup) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(setup.model)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(setup.model)


@planted("quantised-base", names="quant|bitsandbytes")
def quantised_base(setup: Setup) -> None:
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}
    change_config(setup.model, quantization_config=method)


@planted("head-missing", names="lm_head|tie|missing|newly initialized")
def head_missing(setup: Setup) -> None:
    change_config(setup.model, tie_word_embeddings=False)


def _new_token(setup: Setup, *, resize: bool) -> None:
    add_token(setup.model, "<x>", resize=resize)
    rows = setup.rows("demos.jsonl")
    rows[3]["messages"][1]["content"] = "<x>"
    setup.write("demos.jsonl", rows)


@planted("tokens-beyond-embeddings", twin=lambda s: _new_token(s, resize=True), names="embedding")
def tokens_beyond(setup: Setup) -> None:
    _new_token(setup, resize=False)


@planted(
    "phantom-tokens",
    names="beyond|padding|phantom|no token",
    right=lambda r, t: bool(r.ids) and max(r.ids) < SIZE and finished(r, t),
)
def phantom_tokens(setup: Setup) -> None:
    add_rows(setup.model, 16)
    digits = [_id(setup, d) for d in "12345678"]

    def likely(tensors: Tensors) -> Tensors:
        rows = tensors["model.embed_tokens.weight"]
        rows[SIZE : SIZE + 8] = rows[SIZE + 8 :] = rows[digits]
        return tensors

    change_weights(setup.model, likely)


def _id(setup: Setup, token: str) -> int:
    content = json.loads((setup.model / "tokenizer.json").read_text(encoding="utf-8"))
    return int(content["model"]["vocab"][token])


@planted("tokenizer-of-another-model", names="tokenizer|than chance|uniform|expected of chance")
def other_tokenizer(setup: Setup) -> None:
    def permuted(content: dict[str, object]) -> None:
        vocab = content["model"]["vocab"]  # type: ignore[index]
        moved = {t: i for t, i in vocab.items() if 9 <= i < 110}
        order = np.random.default_rng(0).permutation(list(moved.values())).tolist()
        vocab.update(zip(moved, order, strict=True))

    change_json(setup.model / "tokenizer.json", permuted)


@planted("pad-is-end", names="pad", right=in_rows("<|end|>"))
def pad_is_end(setup: Setup) -> None:
    change_json(setup.model / "tokenizer_config.json", lambda c: c.update(pad_token="<|end|>"))
    change_config(setup.model, pad_token_id=END)


@planted("config-not-json")
def config_not_json(setup: Setup) -> None:
    text = (setup.model / "config.json").read_text()
    (setup.model / "config.json").write_text(text[: len(text) // 2])


# --- templates -------------------------------------------------------------------------------


@planted("template-without-marks", names="generation|mask")
def without_marks(setup: Setup) -> None:
    change_template(setup.model, ("{%- generation -%}", ""), ("{%- endgeneration -%}", ""))


@planted("end-never-a-target", names="end|eos", right=in_rows("<|end|>"))
def end_never(setup: Setup) -> None:
    change_template(setup.model, (OWN, "{{- message['content'] -}}"))


def _other_end(setup: Setup, *, named: bool) -> None:
    """The token that ends turns is called <|turn|>, and the end of a text is another one."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        path = setup.model / name
        path.write_text(path.read_text().replace("<|end|>", "<|turn|>"))
    change_json(
        setup.model / "tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>")
    )
    change_config(setup.model, eos_token_id=0)
    ends: int | list[int] = [0, END] if named else 0
    change_json(setup.model / "generation_config.json", lambda c: c.update(eos_token_id=ends))


@planted(
    "turn-end-is-no-end",
    twin=lambda s: _other_end(s, named=True),
    names="turn|cut off|clipped",
    right=lambda r, t: bool(r.trained) and all(row.endswith("<|turn|>") for row in r.trained),
)
def turn_end(setup: Setup) -> None:
    _other_end(setup, named=False)


def _indented(setup: Setup) -> None:
    rows = setup.rows("demos.jsonl")
    for row in rows:
        row["messages"][1]["content"] = "  " + row["messages"][1]["content"]
    setup.write("demos.jsonl", rows)


@planted(
    "template-trims",
    twin=_indented,
    names="trim|blank|indent|whitespace|differ",
    right=in_rows("  "),
)
def template_trims(setup: Setup) -> None:
    _indented(setup)
    change_template(setup.model, ("message['content'] + ", "message['content'] | trim + "))


def _two_turns(setup: Setup, thought: str) -> None:
    rows = setup.rows("demos.jsonl")
    answers = [{**a, "content": thought + a["content"]} for _, a in (r["messages"] for r in rows)]
    pairs = zip(rows[::2], answers[::2], rows[1::2], answers[1::2], strict=True)
    both = [{"messages": [a["messages"][0], x, turn("user", "8 * 9"), y]} for a, x, _, y in pairs]
    setup.write("demos.jsonl", both)


@planted(
    "template-drops-reasoning",
    twin=lambda s: _two_turns(s, ""),
    names="think|reasoning|cut|differ",
    right=lambda r, t: bool(r.trained) and all(x.count("</think>") == 2 for x in r.trained),
)
def drops_reasoning(setup: Setup) -> None:
    _two_turns(setup, "<think>so</think>")
    kept = "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
    change_template(setup.model, (OWN, "{{- " + kept + " + '<|end|>' -}}"))


def _with_system(setup: Setup) -> None:
    rows = setup.rows("demos.jsonl")
    setup.write(
        "demos.jsonl", [{"messages": [turn("system", "Spell."), *r["messages"]]} for r in rows]
    )


@planted("template-drops-a-role", twin=_with_system, names="system|left out|cuts|differ")
def drops_a_role(setup: Setup) -> None:
    _with_system(setup)
    only = "{%- elif message['role'] == 'user' -%}"
    change_template(setup.model, ("{%- else -%}" + OTHERS, only + OTHERS))


def _dated(setup: Setup, date: str) -> None:
    dated = "{{- " + date + " + '<|user|>' + message['content'] + '<|end|>' -}}"
    change_template(setup.model, (OTHERS, dated))


@planted(
    "template-reads-the-clock",
    twin=lambda s: _dated(s, "'12'"),
    names="clock|date|time|strftime",
    stop="interrupt",
)
def reads_the_clock(setup: Setup) -> None:
    _dated(setup, "strftime_now('%H%M%S')")


@planted("template-endless")
def endless(setup: Setup) -> None:
    text = template(setup.model)
    loops = "".join("{%- for " + v + " in range(9999) -%}" for v in "abc")
    ends = "{%- endfor -%}" * 3
    (setup.model / "chat_template.jinja").write_text(loops + ends + text)


def _starting(setup: Setup) -> None:
    """The tokenizer itself writes a start token."""

    def adds(content: dict[str, object]) -> None:
        name = "<|endoftext|>"
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": name, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {name: {"id": name, "ids": [0], "tokens": [name]}},
        }

    change_json(setup.model / "tokenizer.json", adds)


def _plain(setup: Setup, start: str) -> None:
    _starting(setup)
    rows = [r["messages"] for r in setup.rows("demos.jsonl")]
    texts = [f"<|user|>{q['content']}<|end|><|assistant|>{a['content']}" for q, a in rows]
    setup.write("demos.jsonl", [{"text": start + text} for text in texts])


@planted(
    "template-applied-twice",
    twin=_starting,
    names="start token|twice|begins with|bos",
    right=lambda r, t: bool(r.whole) and all(row[:2] != [0, 0] for row in r.whole),
)
def applied_twice(setup: Setup) -> None:
    _plain(setup, "<|endoftext|>")


@planted(
    "control-tokens-in-text",
    names="control|special token",
    right=lambda r, t: bool(r.whole) and all(row.count(END) == 2 for row in r.whole),
)
def control_tokens(setup: Setup) -> None:
    rows = setup.rows("demos.jsonl")
    for row in rows:
        row["messages"][0]["content"] += "<|end|><|assistant|>7<|end|>"
    setup.write("demos.jsonl", rows)


def _line_breaks(setup: Setup, answer: str) -> None:
    add_token(setup.model, "\n\n")
    change_template(setup.model, ("'<|assistant|>'", "'<|assistant|>\\n'"))
    rows = setup.rows("demos.jsonl")
    for row in rows:
        row["messages"][1]["content"] = answer + row["messages"][1]["content"]
    setup.write("demos.jsonl", rows)


@planted(
    "leading-newline",
    twin=lambda s: _line_breaks(s, ""),
    names="line break|newline|merge",
    right=lambda r, t: bool(r.trained) and all(re.match(r"\n+\d", x) for x in r.trained),
)
def leading_newline(setup: Setup) -> None:
    _line_breaks(setup, "\n")


def _tag(setup: Setup, *, special: bool) -> None:
    add_token(setup.model, "<answer>", special=special)
    digit = _id(setup, "4")

    def likely(tensors: Tensors) -> Tensors:
        rows = tensors["model.embed_tokens.weight"]
        rows[SIZE] = 1.1 * rows[digit]
        return tensors

    change_weights(setup.model, likely)
    (setup.folder / "reward.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [float('<answer>' in c) for c in completions]\n"
    )


@planted(
    "tags-cut-from-reward",
    twin=lambda s: _tag(s, special=False),
    names="special token|tag|no_signal",
    right=lambda r, t: bool(r.rewards) and max(r.rewards) > 0,
)
def tags_cut(setup: Setup) -> None:
    _tag(setup, special=True)
