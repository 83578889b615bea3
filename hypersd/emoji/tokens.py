"""The captions' closed vocabulary: one token a word, in CLIP's layout (start, words, end, padding with end)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hypersd.emoji.atlas import names
from hypersd.emoji.scenes import BACKGROUNDS

LENGTH = 16
START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, as it is saved in the embedded model's folder."""
    words = {"a", "an", "and", "on", "background"} | {
        word for name in (*names(), *BACKGROUNDS) for word in name.replace("-", " ").split()
    }
    # END comes last: CLIPTextModel pools at the highest token id
    vocabulary = {word: index for index, word in enumerate([START, UNKNOWN, *sorted(words), END])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("-", " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=START, eos_token=END, unk_token=UNKNOWN, pad_token=END, model_max_length=LENGTH
    )


def save(folder: Path) -> None:
    """Write the tokenizer's folder, naming the class that every transformers release knows."""
    build().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def encode(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """(N, 16) int64 token ids."""
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return torch.as_tensor(batch.input_ids)
