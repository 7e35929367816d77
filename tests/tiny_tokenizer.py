"""A small tokenizer with a chat template, as a model's folder has it."""

from __future__ import annotations

from pathlib import Path

SAID = [
    "You are a careful assistant that answers in one sentence.",
    "Which of my servers should take this request, and when would it finish there?",
    "The one whose queue is shortest is not always the one that is done first.",
]
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>"
    "{{ message.name }}{{ message.odd }}{{ message.reasoning_content }}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}"
    "</{{ message.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if mood %}({{ mood }}){% endif %}"
    "{{ reasoning_effort }}{{ enable_thinking }}{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """Write it to a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=letters)
    made.train_from_iterator(SAID, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
