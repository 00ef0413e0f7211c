"""Model folders as their files declare them: whole, or refused by name, and nothing hangs."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from posttrain.core.errors import ModelError
from posttrain.core.files import hash_folder
from posttrain.models.code import check_code, code_digest
from posttrain.models.files import INDEX, model_digest
from posttrain.models.folder import read_folder
from posttrain.models.headers import BITS, read_headers

LAYERS, ROWS, WIDTH = 2, 8, 4
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "vocab_size": ROWS,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
WORDS = ["a", "b", "c", "d"]


def tensors():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(LAYERS)]
    return {
        "model.embed_tokens.weight": ("F32", [ROWS, WIDTH]),
        "model.norm.weight": ("F32", [WIDTH]),
        **{name: ("F32", [WIDTH, WIDTH]) for name in names},
    }


def write_weights(path, declared):
    """A safetensors file of zeros."""
    header, at = {}, 0
    for name, (dtype, shape) in declared.items():
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))


def write_json(path, content):
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    """A small whole model."""
    path = tmp_path / "m"
    path.mkdir()
    write_json(path / "config.json", CONFIG)
    write_json(path / "generation_config.json", {"eos_token_id": [1, 2]})
    write_json(path / "tokenizer.json", {"model": {"vocab": {w: i for i, w in enumerate(WORDS)}}})
    write_json(path / "tokenizer_config.json", {"eos_token": "b"})
    write_weights(path / "model.safetensors", tensors())
    return path


def refused(folder):
    with pytest.raises(ModelError) as error:
        read_folder(folder)
    return str(error.value)


def configured(folder, **changes):
    write_json(folder / "config.json", {**CONFIG, **changes})
    return folder


def test_a_whole_folder(folder):
    found = read_folder(folder)
    assert found.num_weights == ROWS * WIDTH + WIDTH + LAYERS * WIDTH * WIDTH
    assert (found.rows, found.tokens.size, found.tokens.id_of_end) == (ROWS, len(WORDS), 1)
    assert not found.classifies
    assert not found.headless


# --- weights ---------------------------------------------------------------------------------


def sharded(folder, names=("a.safetensors", "b.safetensors")):
    """The same model in two shards; returns the map from tensors to files."""
    (folder / "model.safetensors").unlink()
    held, first = tensors(), ["model.embed_tokens.weight"]
    write_weights(folder / names[0], {n: t for n, t in held.items() if n in first})
    write_weights(folder / names[1], {n: t for n, t in held.items() if n not in first})
    shards = {n: names[n not in first] for n in held}
    write_json(folder / INDEX, {"weight_map": shards})
    return shards


def test_shards_of_an_index(folder):
    whole = read_folder(folder)
    sharded(folder)
    (folder / "stray.safetensors").write_bytes(b"not read")
    assert read_folder(folder).num_weights == whole.num_weights


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "", ".", 3, "s/x.safetensors"]
)
def test_a_shard_outside_of_the_folder(folder, name):
    write_json(folder / INDEX, {"weight_map": {**sharded(folder), "model.norm.weight": name}})
    assert "model.norm.weight is said to be in" in refused(folder)


def test_a_tensor_that_no_shard_holds(folder):
    write_json(folder / INDEX, {"weight_map": {**sharded(folder), "more": "b.safetensors"}})
    assert "names 1 tensors that no shard holds, more among them" in refused(folder)


def test_a_tensor_in_two_shards(folder):
    sharded(folder)
    write_weights(folder / "a.safetensors", tensors())
    assert "is in a.safetensors and in b.safetensors" in refused(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_a_pickle_is_not_read(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    assert "is a pickle" in refused(folder)


def test_weights_under_a_name_that_no_loader_reads(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "the loader would not read it" in refused(folder)


def test_a_checkpoint_of_several_ranks(folder):
    (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    assert "a distributed checkpoint" in refused(folder)


@pytest.mark.parametrize("full", [True, False])
def test_an_adapter(folder, full):
    (folder / "adapter_config.json").write_text("{}")
    if not full:
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "holds an adapter" in refused(folder)


@pytest.mark.parametrize(
    "mark", ["module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module."]
)
def test_names_of_a_wrapped_model(folder, mark):
    write_weights(folder / "model.safetensors", {f"{mark}{n}": t for n, t in tensors().items()})
    text = refused(folder)
    assert mark in text
    assert "expected: model.embed_tokens.weight" in text


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_number_types_of_quantised_weights(folder, dtype):
    held = tensors()
    held["model.layers.0.mlp.up_proj.weight"] = (dtype, [WIDTH, WIDTH])
    write_weights(folder / "model.safetensors", held)
    assert "is quantised" in refused(folder)


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "awq", "gptq", "fp8", "mxfp4", "compressed-tensors"]
)
@pytest.mark.parametrize("nested", [True, False])
def test_quantised_models(folder, method, nested):
    found = {"quantization_config": {"quant_method": method}}
    configured(folder, **({"text_config": found} if nested else found))
    assert f"is quantised ({method}" in refused(folder)


# --- headers ---------------------------------------------------------------------------------


def header_of(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_every_cut_of_a_file_is_seen(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(ModelError, match="damaged or no safetensors file"):
            read_headers(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "F33"),
        ("dtype", 3),
        ("dtype", "F64"),
        ("shape", [-1, -4]),
        ("shape", [2**62, 2**62]),
        ("shape", [4.0, 1]),
        ("shape", [True] * 4),
        ("shape", 4),
        ("data_offsets", [0]),
        ("data_offsets", [0, 10**400]),
        ("data_offsets", [3, 19]),
        (None, []),
        (None, None),
    ],
)
def test_entries_that_do_not_fit(folder, field, value):
    path = folder / "model.safetensors"
    header, rest = header_of(path.read_bytes())
    if field is None:
        header["model.norm.weight"] = value
    else:
        header["model.norm.weight"][field] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    with pytest.raises(ModelError, match="damaged or no safetensors file"):
        read_headers(path)


@pytest.mark.parametrize("header", [b"[]", b"3", b"{", b"\xff", b'{"a":' * 10**5, b'{"a":1,"a":2}'])
def test_headers_that_are_none(folder, header):
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="damaged or no safetensors file"):
        read_headers(path)


def test_a_pointer_to_a_large_file(folder):
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "Git LFS pointer" in refused(folder)


# --- the configuration -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": "four"}, "num_hidden_layers is 'four'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"hidden_size": 2.5}, "hidden_size is 2.5"),
        ({"vocab_size": 10**10}, "vocab_size is 10000000000"),
        ({"rope_theta": 10**400}, "rope_theta has 401 digits"),
        ({"text_config": {"a": [{"b": -(10**40)}]}}, "text_config.a.b has 41 digits"),
        ({"norm": float("nan")}, "norm is not a number"),
        ({"configuration_files": ["config.4.json"]}, "names other files"),
        ({"transformers_weights": "../x.safetensors"}, "names other files"),
        ({"num_hidden_layers": 3}, "asks for 3 layers, and the weights have no layer 2"),
        ({"num_hidden_layers": 1}, "asks for 1 layers, and the weights have a layer 1"),
        ({"vocab_size": 9}, "asks for 9 rows of embeddings, and the weights have 8"),
        ({"tie_word_embeddings": False}, "would make up a random one"),
    ],
)
def test_a_config_that_does_not_belong_to_the_weights(folder, change, words):
    assert words in refused(configured(folder, **change))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"x"', "\xff", '{"a":' * 10**5, "1" * 5000, '{"a": 1, "a": 2}']
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_files_that_are_no_json_object(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    assert name in refused(folder)


def test_settings_of_real_families_pass(folder):
    """Infinity in Mamba's, layers ahead in DeepSeek's, a bare decoder without a head."""
    read_folder(configured(folder, time_step_limit=[0.0, float("inf")], head_dim=None))
    read_folder(configured(folder, num_hidden_layers=1, num_nextn_predict_layers=1))
    read_folder(configured(folder, architectures=["LlamaModel"], tie_word_embeddings=False))
    read_folder(configured(folder, architectures=["XForSequenceClassification"]))
    held = {**tensors(), "lm_head.weight": ("F32", [ROWS, WIDTH])}
    write_weights(folder / "model.safetensors", held)
    read_folder(configured(folder, tie_word_embeddings=False))
    read_folder(configured(folder))


# --- tokens ----------------------------------------------------------------------------------


def with_tokens(folder, *added, template=""):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = list(added)
    write_json(folder / "tokenizer.json", content)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def token(number, text, special):
    return {"id": number, "content": text, "special": special}


def test_tokens_beyond_the_embeddings(folder):
    read_folder(with_tokens(folder, token(ROWS - 1, "<x>", False)))
    assert "1 tokens beyond the 8 rows" in refused(with_tokens(folder, token(ROWS, "<x>", False)))


def test_a_special_token_that_nothing_writes_needs_no_row(folder):
    """Text models of families with images have the image's token and no row for it."""
    image = token(ROWS, "<image>", True)
    read_folder(with_tokens(folder, image, template="{{ messages }}"))
    assert "'<image>'" in refused(with_tokens(folder, image, template="<image>{{ messages }}"))


@pytest.mark.parametrize("ends", [ROWS, -1, "x", [1, ROWS], True, [[1]], 1.0, {"a": 1}])
def test_end_tokens_that_do_not_exist(folder, ends):
    write_json(folder / "generation_config.json", {"eos_token_id": ends})
    assert "eos_token_id is" in refused(folder)


def test_a_tokenizer_without_a_vocabulary(folder):
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(folder)


# --- what is not a file ----------------------------------------------------------------------

COUNTED = ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]


@pytest.mark.parametrize("name", [*COUNTED, "stray"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_nothing_hangs_on_what_is_no_file(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    assert name in refused(folder)


@pytest.mark.parametrize("name", COUNTED)
def test_links_out_of_the_folder(folder, name):
    target = folder.parent / f"outside-{name}"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)
    assert "is a link to" in refused(folder)


def test_links_of_the_hub_cache(folder, tmp_path):
    """A snapshot's files are links to blobs beside it."""
    top = tmp_path / "models--org--name"
    (top / "blobs").mkdir(parents=True)
    snapshot = top / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copy(path, top / "blobs" / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"sha-{path.name}")
    assert read_folder(snapshot).num_weights == read_folder(folder).num_weights
    assert model_digest(snapshot) == model_digest(folder)


def test_a_linked_folder(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert read_folder(tmp_path / "link").num_weights == read_folder(folder).num_weights


# --- identity --------------------------------------------------------------------------------


def test_the_digest_of_a_plain_folder_is_that_of_all_its_files(folder):
    (folder / "chat_template.jinja").write_text("x")
    assert model_digest(folder) == hash_folder(folder)
    sharded(folder)
    assert model_digest(folder) == hash_folder(folder)


@pytest.mark.parametrize(
    "name",
    [
        *(".DS_Store", "Thumbs.db", "desktop.ini", "README.md", "LICENSE", "config.json~"),
        *(".config.json.swp", "train.log", ".git/HEAD", ".cache/huggingface/x.metadata"),
        *("original/consolidated.00.pth", "pytorch_model.bin", "training_args.bin", "onnx/m.onnx"),
        *("runs/events.out", "trainer_state.json", "._model.safetensors", "modeling_x.py"),
    ],
)
def test_what_no_loader_reads_does_not_count(folder, name):
    before = model_digest(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    assert model_digest(folder) == before
    read_folder(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
        *("additional_chat_templates/tool.jinja", "preprocessor_config.json", "merges.txt"),
        *("added_tokens.json", "scalar_head.safetensors", "adapter/adapter_model.safetensors"),
    ],
)
def test_what_a_loader_reads_counts(folder, name):
    before = model_digest(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert model_digest(folder) != before


def test_code_counts_where_the_configuration_names_some(folder):
    before = model_digest(folder)
    (folder / "modeling_x.py").write_text("x")
    assert model_digest(folder) == before
    assert code_digest(folder) is None
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "modeling_x.C"}
    (folder / "config.json").write_text(json.dumps(settings))
    named, code = model_digest(folder), code_digest(folder)
    (folder / "modeling_x.py").write_text("y")
    assert model_digest(folder) != named
    assert code_digest(folder) != code


def test_a_critic_inside_counts(folder):
    before = model_digest(folder)
    shutil.copytree(folder, folder / "critic")
    assert model_digest(folder) != before
    with_critic = model_digest(folder)
    (folder / "critic" / "README.md").write_text("x")
    assert model_digest(folder) == with_critic


@pytest.mark.parametrize(
    "named",
    [
        {"auto_map": {"AutoConfig": "/tmp/elsewhere--modeling_x.C"}},
        {"auto_map": {"AutoTokenizer": [None, "org/repo--tokens.T"]}},
        {"text_config": {"auto_map": {"AutoConfig": "org/repo--modeling_x.C"}}},
    ],
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_from_elsewhere_never_runs(folder, named, file):
    """It is in no digest, and who allowed the folder's code has not seen it."""
    written = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    # The loader reads an escaped key as well.
    text = json.dumps({**written, **named}).replace('"auto_map"', '"auto\\u005fmap"')
    (folder / file).write_text(text)
    with pytest.raises(ModelError, match="runs code from elsewhere"):
        check_code(folder)
    model_digest(folder)  # no code runs unless the recipe allows it: the model itself is whole
