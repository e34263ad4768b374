from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.workers.engine_rig import SHAPE, model_folder, runner
from workers.attention.step import Span
from workers.model_folder import ModelFolderError, open_model_folder
from workers.models import ATTENTION, ModelNotSupported, ModelRunner
from workers.positions import changing_positions

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}


def _save(folder: Path, architecture: str, **options: object) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**TINY, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(model_folder() / "tokenizer.json", folder)
    return folder


def _copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder(), tmp_path / "copy"))


def test_a_probe_forward_learns_the_layout():
    layout = runner().layout
    assert (layout.layers, layout.kv_heads, layout.k_dim, layout.v_dim) == (SHAPE.layers, SHAPE.kv_heads, 16, 16)
    assert layout.dtype == "float32"
    assert runner().vocab_size == SHAPE.vocab
    assert runner().context_length == SHAPE.context_length
    assert runner().folder.eos_token_ids == (2, 0)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("mistral", {"sliding_window": 20}),
        ("phi3", {"pad_token_id": 0}),
        ("gemma", {"head_dim": 32}),
        ("gemma2", {"head_dim": 32, "sliding_window": 20}),
        ("gemma3_text", {"head_dim": 32, "sliding_window": 20}),
        ("gpt_oss", {"head_dim": 32, "sliding_window": 20, "num_local_experts": 4}),
        ("qwen3_moe", {"head_dim": 32, **EXPERTS}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("opt", {"ffn_dim": 128}),
    ],
)
def test_architectures_that_are_served_agree_with_themselves(tmp_path: Path, architecture: str, options: dict):
    # `load` compares the paged logits with the model's own, over a window shorter than the prompt where there is one.
    served = ModelRunner.load(_save(tmp_path, architecture, **options))
    assert served.layout.layers == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_the_self_check(dtype: str):
    assert ModelRunner.load(model_folder(), dtype=dtype).layout.dtype == dtype


@pytest.mark.parametrize(
    ("architecture", "options", "why"),
    [
        ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, "attention function"),
        ("falcon", {}, "attention function"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "attention function"),
        ("stablelm", {}, "attention function"),
        ("jamba", {"mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2, "use_mamba_kernels": False}, "."),
        ("qwen3_next", {**EXPERTS, "shared_expert_intermediate_size": 32}, "attention function"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    ],
)
def test_models_that_would_run_and_lie_are_refused(tmp_path: Path, architecture: str, options: dict, why: str):
    with pytest.raises(ModelNotSupported, match=why) as refused:
        ModelRunner.load(_save(tmp_path, architecture, **options))
    assert architecture in str(refused.value)
    assert "choose" in str(refused.value)


LONGROPE = {
    "pad_token_id": 0,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [8.0] * 8,
        "original_max_position_embeddings": 64,
    },
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}


def _stored(model: ModelRunner, short: int, companion: int) -> torch.Tensor:
    """K of a short prompt that is computed beside another one; 0: alone."""
    shape = model.layout
    kv = [
        (torch.zeros(40, 16, shape.kv_heads, shape.k_dim), torch.zeros(40, 16, shape.kv_heads, shape.v_dim))
        for _ in range(shape.layers)
    ]
    spans, positions = [Span(0, short, short, [1, 2, 3])], [*range(short)]
    if companion:
        spans.append(Span(short, companion, companion, list(range(10, 30))))
        positions += range(companion)
    model.forward(kv, spans, [5 + n % 7 for n in range(short + companion)], positions, [short - 1])
    return kv[1][0][[1, 2, 3]].clone()


def test_positions_that_are_scaled_by_a_steps_longest_sequence_are_refused_beyond_their_bound(tmp_path: Path):
    folder = _save(tmp_path, "phi3", **LONGROPE)
    for asked in (None, 65, 256):
        with pytest.raises(ModelNotSupported, match=r"set model\.context_length to at most 64") as refused:
            ModelRunner.load(folder, context_length=asked)
        assert "longrope" in str(refused.value)
        assert "Phi" not in str(refused.value)


@pytest.mark.parametrize(
    ("architecture", "options", "length"),
    [("phi3", LONGROPE, 64), ("llama", DYNAMIC, 256), ("gemma3_text", {"head_dim": 32}, 256)],
)
def test_what_is_stored_does_not_depend_on_companions_up_to_the_length_that_is_served(
    tmp_path: Path, architecture: str, options: dict, length: int
):
    served = ModelRunner.load(_save(tmp_path, architecture, **options), context_length=length)
    alone = _stored(served, 40, 0)
    assert torch.allclose(alone, _stored(served, 40, length), atol=1e-5)
    assert torch.allclose(alone, _stored(served, 40, 0), atol=1e-5)


def test_the_frequencies_of_a_model_that_is_served_never_change(tmp_path: Path):
    """Asking the positions would make the host wait for the device, and no graph could be captured of it."""
    served = ModelRunner.load(_save(tmp_path, "phi3", **LONGROPE), context_length=64)
    assert {module.rope_type for module in served.model.modules() if hasattr(module, "rope_type")} == {"default"}
    beyond = _stored(served, 40, 200)
    assert torch.allclose(beyond, _stored(served, 40, 0), atol=1e-5)


def test_positions_of_one_kind_of_layer_are_looked_at_too():
    layers = {"full_attention": dict(LONGROPE["rope_parameters"]), "sliding_attention": {"rope_type": "default"}}
    config = SimpleNamespace(model_type="odd", max_position_embeddings=256, rope_parameters=layers)
    assert changing_positions(config, 64) is None
    assert "at most 64" in str(changing_positions(config, 65))
    del layers["full_attention"]["original_max_position_embeddings"]
    assert "does not say" in str(changing_positions(config, 16))


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path: Path):
    folder = _copy(tmp_path)
    _edit(folder, model_type="nobody_knows_this")
    with pytest.raises(ModelNotSupported, match="nobody_knows_this"):
        ModelRunner.load(folder)


def _unequal(model: torch.nn.Module) -> None:
    attention = model.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = (torch.nn.Linear(SHAPE.hidden, 16) for _ in range(2))


class _NoAttention(torch.nn.Module):
    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states), None


def _silent(model: torch.nn.Module) -> None:
    model.model.layers[1].self_attn = _NoAttention()


def _biased(model: torch.nn.Module) -> None:
    inner = model.model.layers[0].self_attn

    class Biased(torch.nn.Module):
        def forward(self, **arguments):
            return inner(**{**arguments, "attention_mask": torch.zeros(1, 1, 2, 2)})

    model.model.layers[0].self_attn = Biased()


def _different(model: torch.nn.Module) -> None:
    inner = model.model.layers[0].self_attn
    forward = inner.forward

    def other(**arguments):
        out, weights = forward(**arguments)
        return (out if inner.config._attn_implementation == ATTENTION else out * 0.5), weights

    inner.forward = other


@pytest.mark.parametrize(
    ("doctor", "why"),
    [
        (_unequal, "different shapes"),
        (_silent, r"layers \[1\] never called"),
        (_biased, "masks its attention scores itself"),
        (_different, "differ from its own"),
    ],
)
def test_the_gate_sees_each_defect_in_a_doctored_model(doctor: Callable[[torch.nn.Module], None], why: str):
    model = AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation=ATTENTION).eval()
    doctor(model)
    with pytest.raises(ModelNotSupported, match=why):
        ModelRunner(model, open_model_folder(model_folder()), b"")


def test_only_the_wanted_rows_have_logits():
    model = runner()
    shape = model.layout
    kv = [(torch.zeros(4, 16, shape.kv_heads, 16), torch.zeros(4, 16, shape.kv_heads, 16)) for _ in range(shape.layers)]
    spans = [Span(0, 10, 10, [2]), Span(10, 20, 20, [0, 3])]
    ids, positions = list(range(5, 35)), [*range(10), *range(20)]
    both = model.forward(kv, spans, ids, positions, [9, 29])
    assert both.shape == (2, SHAPE.vocab)
    assert both.dtype == torch.float32
    assert torch.allclose(model.forward(kv, spans, ids, positions, [29]), both[1:], atol=1e-5)
    assert model.forward(kv, spans, ids, positions, []).shape == (0, SHAPE.vocab)


def _edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds neither"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged or cut short"),
        (_cut, "damaged or cut short"),
        (_lose_a_tensor, "k_proj"),
        (_lose_a_shard, r"model-00002-of-00002\.safetensors is missing"),
        (_only_pickles, "pickled"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda folder: _edit(folder, hidden_size=128), "mismatched"),
        (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "x"}'), "eos_token_id"),
    ],
)
def test_a_broken_folder_is_named_with_its_remedy(tmp_path: Path, damage: Callable[[Path], object], says: str):
    folder = _copy(tmp_path)
    damage(folder)
    with pytest.raises(ModelFolderError, match=says) as broken:
        ModelRunner.load(folder)
    assert str(tmp_path) in str(broken.value)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(ModelFolderError, match="is not a folder"):
        ModelRunner.load("/nowhere/at/all")


def test_the_fingerprint_goes_by_content_and_not_by_place(tmp_path: Path):
    here, there = open_model_folder(model_folder()), open_model_folder(_copy(tmp_path))
    assert here.fingerprint() == there.fingerprint() == runner().fingerprint
    command = (
        "import sys; from workers.model_folder import *; print(open_model_folder(sys.argv[1]).fingerprint().hex())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", command, str(there.path)], capture_output=True, text=True, check=True
    )
    assert elsewhere.stdout.strip() == here.fingerprint().hex()


def test_one_bit_of_the_weights_or_a_word_of_the_config_changes_the_fingerprint(tmp_path: Path):
    folder = _copy(tmp_path)
    seen = {open_model_folder(folder).fingerprint()}
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    seen.add(open_model_folder(folder).fingerprint())
    _edit(folder, rms_norm_eps=2e-6)
    seen.add(open_model_folder(folder).fingerprint())
    assert len(seen) == 3


def test_end_tokens_may_be_one_number_or_a_list_or_in_the_config(tmp_path: Path):
    folder = _copy(tmp_path)
    generation = folder / "generation_config.json"
    generation.write_text('{"eos_token_id": 7}')
    assert open_model_folder(folder).eos_token_ids == (7,)
    generation.write_text('{"eos_token_id": [7, 9]}')
    assert open_model_folder(folder).eos_token_ids == (7, 9)
    generation.unlink()
    assert open_model_folder(folder).eos_token_ids == (2,)
