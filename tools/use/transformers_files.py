"""The Python files of an export: the trainer's own blocks, inside the classes that transformers loads."""

from __future__ import annotations

import ast

MODEL_FILE = "modeling_bankshot.py"
TOKENIZER_FILE = "tokenization_bankshot.py"
LEFT_OUT = ("__init__", "without_loop", "nats", "loss")  # methods of GPT that logits does not need

MODEL_HEAD = '''"""A bankshot model for transformers, written by `./run.sh export` from train_gpt.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BankshotConfig(PretrainedConfig):
    """The knobs of train_gpt.py that fix the model, and the shapes of its tensors."""

    model_type = "bankshot"


Config = BankshotConfig  # as the blocks call it


# ---- from train_gpt.py, as it stands -------------------------------------------------------------


'''

MODEL_INIT = """
    def __init__(self, h: BankshotConfig) -> None:
        super().__init__()
        self.h = h
        self.ops = Ops()
        self.dtype = torch.float32
        self.layers = layer_table(h)
        for name, shape in h.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
"""

MODEL_TAIL = '''

# ---- for transformers ----------------------------------------------------------------------------


class BankshotForCausalLM(PreTrainedModel, GenerationMixin):
    """GPT behind the interface of transformers. Nothing is cached between tokens."""

    config_class = BankshotConfig
    base_model_prefix = "gpt"

    def __init__(self, config: BankshotConfig) -> None:
        super().__init__(config)
        self.gpt = GPT(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the zeros: every tensor is in model.safetensors."""

    def get_input_embeddings(self) -> None:
        """Return None: the table is a parameter of GPT, also its output layer, and cannot be resized."""
        return None

    def get_output_embeddings(self) -> None:
        """Return None, as get_input_embeddings does."""
        return None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: object,
    ) -> CausalLMOutput:
        """Return the logits of every next token, and the mean nats of labels. All (B, T), logits (B, T, V).

        Raises ValueError if the padding is not at the end, where it changes no logit before it.
        """
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("bankshot reads texts from their first token: pad on the right")
        logits = self.gpt.logits(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> dict[str, Tensor | None]:
        """Keep as many of the last tokens as the model was scored with."""
        seen = slice(-self.config.eval_seq_len, None)
        mask = None if attention_mask is None else attention_mask[:, seen]
        return {"input_ids": input_ids[:, seen], "attention_mask": mask}
'''

TOKENIZER_SOURCE = '''"""The SentencePiece tokenizer of a bankshot model, for transformers."""

from __future__ import annotations

import os
import shutil

import sentencepiece
from transformers import PreTrainedTokenizer


class BankshotTokenizer(PreTrainedTokenizer):
    """tokenizer.model as SentencePiece reads it. Every text begins with the token of a document's start."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs) -> None:
        self.vocab_file = vocab_file
        self.sp = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        kwargs.setdefault("padding_side", "right")
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.sp.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.sp.id_to_piece(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp.decode([self.sp.piece_to_id(token) for token in tokens])

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1=None) -> list[int]:
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = os.path.join(save_directory, f"{filename_prefix or ''}tokenizer.model")
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)
'''


def source_lines(lines: list[str], node: ast.stmt) -> list[str]:
    """Return the lines of a statement, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return lines[first - 1 : node.end_lineno]


def names_of(node: ast.stmt) -> list[str]:
    """Return the names that a statement at the top of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def inference_class(lines: list[str], node: ast.ClassDef) -> str:
    """Return the class GPT with the methods that logits needs, and a constructor that reads config.json."""
    kept = [
        "\n" + "\n".join(source_lines(lines, method))
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name not in LEFT_OUT
    ]
    head = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno])
    return "\n".join([head, MODEL_INIT.rstrip("\n"), *kept])


def model_source(trainer_source: str) -> str:
    """Return modeling_bankshot.py: GPT.logits of a trainer's source, and all of it that this calls."""
    lines = trainer_source.splitlines()
    defined = {name: node for node in ast.parse(trainer_source).body for name in names_of(node)}
    texts = {name: "\n".join(source_lines(lines, node)) for name, node in defined.items()}
    texts["GPT"] = inference_class(lines, defined["GPT"])

    needed: set[str] = set()
    waiting = ["GPT"]
    while waiting:
        name = waiting.pop()
        if name not in needed and name in texts and name != "Config":
            needed.add(name)
            waiting += [node.id for node in ast.walk(ast.parse(texts[name])) if isinstance(node, ast.Name)]
    parts = [texts[name] for name in texts if name in needed]
    return MODEL_HEAD + "\n\n\n".join(parts) + "\n" + MODEL_TAIL
