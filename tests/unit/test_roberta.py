"""A transformers encoder as an estimator: it trains, goes on where it was killed, and reads whatever it is given."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import make_encoder

from block.lengths import training
from block.lengths.encoder import Regressor
from block.lengths.estimation import EstimationConfig, train
from block.lengths.roberta import RoBERTa
from block.workload.prompts import Pairs, counter

torch.set_num_threads(1)  # the models are tiny, and the other tests run beside

ODD = ["", " ", "x" * 100_000, "你好,世界。" * 50, "\x00\xff\x07\ud800" * 9, "Write a poem.", "🙂" * 300]
SETTINGS = training.Settings(epochs=3, batch_size=4, learning_rate=1e-3, patience=5, checkpoint_every=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def some_pairs(count: int, first: int = 0) -> Pairs:
    """Prompts that tell the length of their responses."""
    prompts = [f"Count to {'ten' if i % 2 else 'a hundred'}, question {i}." for i in range(first, first + count)]
    tokens = np.array([20 if i % 2 else 300 for i in range(first, first + count)], dtype=np.int64)
    return Pairs(prompts, tokens, np.zeros(count, dtype=np.int64))


def trained(encoder: Path, folder: Path, stop_after: int | None = None, **changes: Any) -> Regressor:
    """A model after training, or after it was interrupted at a step and gone on with."""
    config = RoBERTa(path=str(folder), encoder=str(encoder), max_prompt_tokens=64, device="cpu")
    settings = training.Settings(**{**vars(SETTINGS), **changes})
    pairs, tune = some_pairs(18), some_pairs(8, first=100)
    if stop_after is not None:

        def interrupt(step: int, values: dict[str, float]) -> None:
            if step == stop_after and "loss" in values:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.train(config, settings, pairs, tune, 7, interrupt)
    return training.train(config, settings, pairs, tune, 7)


def weights(model: Regressor) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.slow
def test_training_learns_what_prompts_tell(encoder: Path, tmp_path: Path) -> None:
    model = trained(encoder, tmp_path, epochs=30, patience=30, learning_rate=1e-2)
    said = model.predict(some_pairs(6, first=200).prompts, 4).tokens
    assert said[1::2].max() < said[::2].min()


@pytest.fixture(scope="module")
def straight(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights after a training that nothing interrupts."""
    return weights(trained(encoder, tmp_path_factory.mktemp("straight")))


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 4, 5, 7, 14])  # before, at and behind checkpoints and ends of epochs
def test_interrupted_training_ends_with_the_same_weights(
    encoder: Path, straight: dict[str, Any], tmp_path: Path, stop_after: int
) -> None:
    gone_on = weights(trained(encoder, tmp_path, stop_after))
    assert straight.keys() == gone_on.keys()
    assert all(torch.equal(straight[name], gone_on[name]) for name in straight)


def test_training_moves_the_weights_and_depends_on_the_settings(
    encoder: Path, straight: dict[str, Any], tmp_path: Path
) -> None:
    start = weights(Regressor.start(str(encoder), 64, "cpu"))
    other = weights(trained(encoder, tmp_path, learning_rate=1e-4))
    name = "encoder.encoder.layer.0.output.dense.weight"
    assert not torch.equal(start[name], straight[name])
    assert not torch.equal(straight[name], other[name])


@pytest.mark.slow
def test_training_stops_early_and_keeps_the_best(encoder: Path, tmp_path: Path) -> None:
    told: list[float] = []
    config = RoBERTa(path=str(tmp_path), encoder=str(encoder), max_prompt_tokens=64, device="cpu")
    settings = training.Settings(**{**vars(SETTINGS), "epochs": 40, "patience": 2, "learning_rate": 0.05})
    tune = some_pairs(8, first=100)

    def log(step: int, values: dict[str, float]) -> None:
        told.extend(value for name, value in values.items() if name == "tune_error_tokens")

    model = training.train(config, settings, some_pairs(18), tune, 0, log)
    assert len(told) < 40
    assert told[-2:] > [min(told)] * 2
    assert np.abs(model.predict(tune.prompts, 32).tokens - tune.tokens).mean() == pytest.approx(min(told))


def test_a_checkpoint_of_other_settings_is_refused(encoder: Path, tmp_path: Path) -> None:
    trained(encoder, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint.pt: was made with other settings or data"):
        trained(encoder, tmp_path, learning_rate=1e-4)
    (tmp_path / "checkpoint.pt").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"checkpoint.pt: is not a sound checkpoint"):
        trained(encoder, tmp_path)


def test_whatever_is_read_gets_an_estimate_of_its_own(encoder: Path, tmp_path: Path) -> None:
    model = trained(encoder, tmp_path / "a")
    model.save(tmp_path / "saved")
    config = RoBERTa(path=str(tmp_path / "saved"), max_prompt_tokens=64, batch_size=3, device="cpu")
    said = config.predict(ODD)
    assert (said.tokens >= 1).all()
    assert np.isfinite(said.spread).all()
    assert (said.spread > 0).all()
    assert said.tokens.tolist() == config.predict(ODD).tokens.tolist()
    alone = np.concatenate([config.predict([prompt]).tokens for prompt in ODD])
    assert np.abs(alone - said.tokens).max() <= 1  # padding moves the last bits
    assert config.predict([]).tokens.shape == (0,)


@pytest.mark.slow
def test_the_command_s_part_trains_measures_and_simulates(encoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    pairs = some_pairs(300)
    data.write_text(
        "\n".join(
            json.dumps({"prompt": prompt, "response": "word " * tokens})
            for prompt, tokens in zip(pairs.prompts, pairs.tokens.tolist(), strict=True)
        )
    )
    lengths = RoBERTa(path=str(tmp_path / "model"), encoder=str(encoder), max_prompt_tokens=64, device="cpu")
    config = EstimationConfig(data=str(data), tokenizer=str(encoder), epochs=1, learning_rate=1e-3)
    found = train(lengths, config, seed=0)
    assert 0 < found.error_rate < 5
    origin = json.loads((tmp_path / "model" / "origin.json").read_text())
    assert origin["counted"] == f"tokenizer {encoder}"
    estimates = lengths.estimate(np.array([100, 500, 1500] * 20), np.random.default_rng(0))
    assert (estimates >= 1).all()


def test_tokens_are_counted_by_a_tokenizer_that_is_given(encoder: Path) -> None:
    count, how = counter(str(encoder))
    assert count(["abc", "é", ""]).tolist() == [3, 2, 0]  # a token a byte, none added
    assert how == f"tokenizer {encoder}"
    with pytest.raises(ValueError, match=r"estimation.tokenizer=/nowhere: neither a folder .* or null"):
        counter("/nowhere")


def test_the_hub_s_attempts_are_not_told() -> None:
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


def test_an_encoder_that_is_not_to_be_had_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"lengths.encoder=\S+: neither a folder .* lengths=compact") as told:
        Regressor.start(str(tmp_path), 64, "cpu")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_model_that_is_not_there_or_not_sound_is_told_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "head.pt").write_bytes(content)
        (tmp_path / "errors.json").write_bytes(content)
    config = RoBERTa(path=str(tmp_path))
    for ask in (lambda: config.predict(["hello"]), lambda: config.estimate(np.array([5]), np.random.default_rng(0))):
        with pytest.raises(
            (FileNotFoundError, ValueError), match=r"lengths.path=.*lengths=roberta|train it again"
        ) as told:
            ask()
        assert "\n" not in str(told.value)


def test_neither_torch_nor_transformers_is_imported_by_what_does_not_need_them() -> None:
    code = """
import sys
from block.run.hydra_schema import CHOICES
from block.lengths.compact import Compact
Compact().predict(["hello"])
assert CHOICES["lengths"]["roberta"]
sys.exit(any(name.split(".")[0] in ("torch", "transformers") for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_is_an_os_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which the scripts tell in one line; torch's own writer raises RuntimeError."""
    from block.lengths.encoder import write

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "head.pt", {"a": 1})
    assert not (tmp_path / "head.pt").exists()
