"""Files that servers read, made by this project where they are read: nothing is downloaded.

`tiny_model` is a whole model with random weights for a CPU; `emulated_model` is the config of a real one without its
weights, for engines whose GPU is emulated by what `latency_file` holds. Both carry a small BPE tokenizer trained on
this project's own text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from block.cluster.instance import LaunchFailed
from block.core.paths import PACKAGE, cache_folder
from block.engine.latency import LatencyModel
from block.hardware.catalogue import Model

VOCABULARY = 2048
SPECIAL = ("<unk>", "<s>", "</s>")


def tiny_model(model: Model, max_model_len: int) -> Path:
    """The folder of `model` with random weights of a fixed seed; made on first use."""
    return _made(model, max_model_len, weights=True)


def emulated_model(model: Model, max_model_len: int) -> Path:
    """The folder of `model` without weights; made on first use."""
    return _made(model, max_model_len, weights=False)


def latency_file(latency: LatencyModel) -> Path:
    """A file of the step times of an emulated GPU; made on first use."""
    folder = cache_folder() / "latency"
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".making-", dir=folder))
    try:
        latency.save(made := unfinished / "latency.json")
        key = hashlib.sha256(made.read_bytes()).hexdigest()[:12]
        return made.replace(folder / f"{key}.json")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _made(model: Model, max_model_len: int, *, weights: bool) -> Path:
    if model.kv_lora_rank or (weights and model.experts):
        what = "latent attention" if model.kv_lora_rank else "experts"
        raise LaunchFailed(f"model={model.name}: has {what}, of which no model files are made; choose a dense model")
    config = _config(model, max_model_len)
    key = hashlib.sha256(json.dumps([config, weights, VOCABULARY], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{model.name}-{key}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2))
        (unfinished / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
        _tokenizer(unfinished)
        if weights:
            _weights(model, unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _config(model: Model, max_model_len: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": max(model.vocab_size, VOCABULARY),
        "max_position_embeddings": max_model_len,
        "tie_word_embeddings": model.tied_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32" if model.dtype_bytes == 4 else "bfloat16",
    }


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [*sorted(PACKAGE.glob("**/*.py")), *sorted(PACKAGE.parent.glob("docs/*.md"))]
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text(errors="ignore") for path in texts), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    unknown, begin, end = SPECIAL
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": begin,
        "eos_token": end,
    }
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))


def _weights(model: Model, folder: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    hidden, inner = model.hidden_size, model.intermediate_size
    query, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim

    def random(rows: int, columns: int) -> Any:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    vocabulary = max(model.vocab_size, VOCABULARY)
    tensors = {
        "model.embed_tokens.weight": random(vocabulary, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    if not model.tied_embeddings:
        tensors["lm_head.weight"] = random(vocabulary, hidden)
    for layer in range(model.layers):
        name = f"model.layers.{layer}."
        tensors |= {
            f"{name}self_attn.q_proj.weight": random(query, hidden),
            f"{name}self_attn.k_proj.weight": random(kv, hidden),
            f"{name}self_attn.v_proj.weight": random(kv, hidden),
            f"{name}self_attn.o_proj.weight": random(hidden, query),
            f"{name}mlp.gate_proj.weight": random(inner, hidden),
            f"{name}mlp.up_proj.weight": random(inner, hidden),
            f"{name}mlp.down_proj.weight": random(hidden, inner),
            f"{name}input_layernorm.weight": np.ones(hidden, np.float32),
            f"{name}post_attention_layernorm.weight": np.ones(hidden, np.float32),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
