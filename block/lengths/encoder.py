"""The encoder and its head in torch: made from any transformers encoder, saved to a folder and loaded from it."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as chatter

from block.core.arrays import Ints
from block.core.files import write_whole
from block.lengths import Estimates
from block.lengths.compact import LONGEST
from block.lengths.roberta import ADVICE, HEAD

CHARACTERS = 8
"""Of a prompt per token at most that are shown to the tokenizer, half of them from its end."""

chatter.set_verbosity_error()  # it tells of poolers that are not used, and draws bars of its own
chatter.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # and of each time that it knocks at the Hub


class Regressor(torch.nn.Module):  # type: ignore[misc]
    """An encoder, and two numbers linear in the mean of its last states: log length, and the log of its spread."""

    def __init__(self, encoder: Any, tokenizer: Any, max_prompt_tokens: int, device: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.head = torch.nn.Linear(encoder.config.hidden_size, 2)
        # RoBERTa's positions begin behind the padding's number, so that not all of the table can be used.
        room = getattr(encoder.config, "max_position_embeddings", 514) - 2
        self.longest = min(max_prompt_tokens, room)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.to(self.device)

    @classmethod
    def start(cls, encoder: str, max_prompt_tokens: int, device: str) -> Self:
        """From a name on the Hub or a folder, with a new head. ValueError, in one line, if it is not to be had."""
        try:
            model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"lengths.encoder={encoder}: neither a folder with an encoder and its tokenizer, nor to be had from "
                "the Hugging Face Hub; give a folder or another name, or take lengths=compact, which needs none"
            ) from error
        return cls(model, tokenizer, max_prompt_tokens, device)

    @classmethod
    def load(cls, folder: Path, max_prompt_tokens: int, device: str) -> Self:
        """What `save` wrote. ValueError, in one line, if the folder does not hold that."""
        try:
            model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
            one = cls(model, AutoTokenizer.from_pretrained(folder), max_prompt_tokens, device)
            one.load_state_dict(torch.load(folder / HEAD, map_location=one.device, weights_only=True))
        except Exception as error:  # torch, pickle, safetensors and transformers have no common base class
            raise ValueError(f"lengths.path={folder}: is not a trained model of this kind; {ADVICE}") from error
        one.eval()
        return one

    def save(self, folder: Path) -> None:
        """Write all that `load` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write(folder / HEAD, self.state_dict())

    def forward(self, prompts: Sequence[str]) -> torch.Tensor:
        """float[n, 2]: the logarithm of the length, and of its spread."""
        half = CHARACTERS * self.longest // 2
        shown = [one if len(one) <= 2 * half else f"{one[:half]} {one[-half:]}" for one in prompts]
        shown = [one.encode("utf-8", "replace").decode() for one in shown]  # a lone surrogate is no text to a tokenizer
        tokens = self.tokenizer(shown, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        tokens = {key: value.to(self.device) for key, value in tokens.items() if key in ("input_ids", "attention_mask")}
        if tokens["input_ids"].shape[1] == 0:  # nothing but empty prompts, and a tokenizer that adds nothing
            return self.head(torch.zeros(len(prompts), self.head.in_features, device=self.device))
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1).clamp(min=1))

    def predict(self, prompts: Sequence[str], batch_size: int) -> Estimates:
        """The estimates, in batches of prompts of like length."""
        logs = np.empty((len(prompts), 2))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.eval()
        with torch.inference_mode():
            for begin in range(0, len(order), batch_size):
                part = order[begin : begin + batch_size]
                logs[part] = self([prompts[i] for i in part]).float().cpu().numpy()
        tokens = np.clip(np.rint(np.exp(np.clip(logs[:, 0], 0.0, math.log(LONGEST)))), 1, LONGEST).astype(np.int64)
        return Estimates(tokens, np.exp(np.clip(logs[:, 1], -10.0, 10.0)))


def loss(said: torch.Tensor, tokens: Ints) -> torch.Tensor:
    """Negative log-likelihood of a Laplace distribution of log length, whose middle is the median of the length."""
    truth = torch.log(torch.as_tensor(tokens, dtype=said.dtype, device=said.device))
    width = said[:, 1] - math.log(math.sqrt(2))  # standard deviation = √2 × scale
    return ((said[:, 0] - truth).abs() * torch.exp(-width) + width).mean()


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `path` whole or not at all. OSError if the disk is full, where torch's own writer raises RuntimeError."""
    packed = io.BytesIO()
    torch.save(content, packed)
    write_whole(path, lambda part: part.write_bytes(packed.getbuffer()))
