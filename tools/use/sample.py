"""Text that an artifact writes, by the forward pass that scores it.

    ./run.sh sample ARTIFACT [prompt="..."] [tokens=200] [temperature=0.8] [top_k=40] [seed=1337]
    ./run.sh sample ARTIFACT held_out=3    goes on with held-out texts, and shows how they really go on

temperature=0 takes the likeliest token each time; top_k=0 leaves every token a chance. The tokenizer is the
one that the manifest in data_path= names, or tokenizer_path=FILE.

The text goes to stdout as it is made, a character when it is whole, and its speed to stderr. It ends after so
many tokens, or where the model begins another document. The model sees the last eval_seq_len tokens, as in a
score window, and each token costs a forward pass over all of them: nothing is cached between tokens.

The exit status is 0, or 2 for bad input, which one line names.
"""

from __future__ import annotations

from script import explain_imports

if __name__ == "__main__":
    explain_imports("sample.py")

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from script import BadInput
from use.artifact import Stored, log_of, model_on_device, read_artifact, run_tool
from use.settings import Settings, read_settings
from use.text import TextStream, Tokenizer, find_tokenizer

USAGE = "usage: sample.py ARTIFACT [key=value ...]"
PROMPT_TOKENS = 32  # how much of a held-out text the model is given


# ---- sampling ------------------------------------------------------------------------------------


def probabilities(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """Return the probabilities by which a token is drawn, of logits (V,) -> (V,) float64 on the host.

    The top_k largest logits, divided by the temperature, go through a softmax; the other tokens get 0.
    """
    logits = logits.double().cpu()
    if temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    if 0 < top_k < len(logits):
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).index_copy(0, kept.indices, kept.values)
    return (logits / temperature).softmax(0)


@torch.no_grad()
def next_logits(model: Any, tokens: list[int], whole_window: bool = False) -> Tensor:
    """Return the logits of the token after `tokens`, of which the model sees the last eval_seq_len. (V,).

    whole_window: fill a score window up, which changes no logit before. A GPU's kernels then get the shape
    that they have when they score.
    """
    length = model.h.eval_seq_len
    seen = tokens[-length:]
    filling = [model.h.bos_id] * (length - len(seen)) if whole_window else []
    logits = model.logits(torch.tensor([[*seen, *filling]], device=model.tok_emb.device))
    return logits[0, len(seen) - 1]


def continue_tokens(model: Any, tokens: list[int], settings: Settings) -> Iterator[int]:
    """Yield drawn tokens, settings.tokens of them or as many as precede another document."""
    generator = torch.Generator().manual_seed(settings.seed)
    context = list(tokens)
    for _ in range(settings.tokens):
        logits = next_logits(model, context, whole_window=model.tok_emb.is_cuda)
        drawn_from = probabilities(logits, settings.temperature, settings.top_k)
        token = int(torch.multinomial(drawn_from, 1, generator=generator))
        if token == model.h.bos_id:
            return
        context.append(token)
        yield token


class Written(NamedTuple):
    """What a text has cost."""

    tokens: int
    seconds: float


def write_text(model: Any, tokenizer: Tokenizer, tokens: list[int], settings: Settings) -> Written:
    """Print what follows `tokens`, each character as soon as it is whole."""
    started = time.perf_counter()
    stream = TextStream(tokenizer, at_start=len(tokens) == 1)
    count = 0
    for token in continue_tokens(model, tokens, settings):
        count += 1
        print(stream.feed(token), end="", flush=True)
    print(stream.end(), flush=True)
    return Written(count, time.perf_counter() - started)


# ---- held-out text -------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """A held-out document, cut in two."""

    prompt: list[int]  # begins with BOS
    rest: list[int]


def held_out_texts(t: ModuleType, h: Any, settings: Settings) -> list[HeldOut]:
    """Return this many documents of the first shard of val, evenly spread over those that are long enough."""
    if not settings.data_path:
        raise BadInput("held_out needs the held-out text; give data_path=DIR")
    shard = t.load_shard(t.split_files(settings.data_path, "val")[0], h.vocab_size)
    starts = (shard == h.bos_id).nonzero()[0].tolist()
    length = 1 + PROMPT_TOKENS + settings.tokens
    long_enough = [a for a, b in zip(starts, [*starts[1:], len(shard)]) if b - a >= length]
    if len(long_enough) < settings.held_out:
        raise BadInput(
            f"{settings.data_path}: {len(long_enough)} texts of the first val shard have {length} tokens, "
            f"not held_out={settings.held_out}; ask for fewer, or for fewer tokens"
        )
    chosen = [long_enough[i * len(long_enough) // settings.held_out] for i in range(settings.held_out)]
    middle = 1 + PROMPT_TOKENS
    return [HeldOut(shard[a : a + middle].tolist(), shard[a + middle : a + length].tolist()) for a in chosen]


def one_line(text: str) -> str:
    """Return a text with every run of white space as one space."""
    return " ".join(text.split())


def show_held_out(t: ModuleType, model: Any, tokenizer: Tokenizer, settings: Settings) -> None:
    """Print the beginnings of held-out texts, each with what the model writes and what is written there."""
    for number, text in enumerate(held_out_texts(t, model.h, settings)):
        draws = replace(settings, seed=settings.seed + number)  # else the same draws make texts alike
        written = continue_tokens(model, text.prompt, draws)
        prompt = tokenizer.decode(text.prompt)
        print(f"  text:   {one_line(prompt)} ...")
        print(f"  model:  ... {one_line(continued(tokenizer, written))}")
        print(f"  really: ... {one_line(continued(tokenizer, iter(text.rest)))}\n", flush=True)


def continued(tokenizer: Tokenizer, tokens: Iterator[int]) -> str:
    """Return the text of tokens that go on after others."""
    stream = TextStream(tokenizer, at_start=False)
    return "".join(map(stream.feed, tokens)) + stream.end()


def why_nonsense(stored: Stored) -> str:
    """Return why the text of so small a model makes no sense, in one line."""
    parameters = sum(tensor.numel() for tensor in stored.tensors.values())
    return (
        f"why it makes little sense: {parameters / 1e6:.3g} million parameters hold spelling, "
        "frequent words and some grammar, but little of what words mean; the smallest GPT-2 has 124 million"
    )


# ---- the command ---------------------------------------------------------------------------------


def sample(t: ModuleType, argv: list[str]) -> int:
    """Print the text that an artifact writes. Returns the exit status. Raises BadInput."""
    if not argv or "=" in argv[0]:
        raise BadInput(USAGE)
    settings = read_settings(argv[1:])
    if not settings.data_path and not settings.tokenizer_path:
        raise BadInput("which tokenizer? give data_path=DIR, or tokenizer_path=FILE")
    stored = read_artifact(t, argv[0])
    log = log_of(argv[0])
    wanted = log.facts.get("data", {}).get("tokenizer_sha256", "") if log else ""
    tokenizer = find_tokenizer(t, stored.h, settings.data_path, settings.tokenizer_path, wanted)

    with model_on_device(t, stored, os.environ) as model:
        if settings.held_out:
            show_held_out(t, model, tokenizer, settings)
            print(why_nonsense(stored), flush=True)
            return 0
        print(settings.prompt, end="", flush=True)
        tokens = [stored.h.bos_id, *tokenizer.encode(settings.prompt)]
        written = write_text(model, tokenizer, tokens, settings)
    ended = "" if written.tokens == settings.tokens else ", where the model began another document"
    speed = written.tokens / max(written.seconds, 1e-9)
    print(f"{written.tokens} tokens in {written.seconds:.1f} s, {speed:.1f} tokens/s{ended}", file=sys.stderr)
    return 0


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    return run_tool("sample", sample, argv, usage=__doc__ or USAGE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
