"""Scores that learn, for the tests of test-time training: settings, one rank, several ranks."""

import hashlib
import os
from contextlib import contextmanager
from functools import partial

import train_gpt as t
from tests.helpers import all_equal, noisy_model, random_tokens, tiny
from tests.trainer.test_windows import ONE_BYTE, SILENT

LEARNS = dict(ttt_lr=0.3, ttt_chunk_tokens=64, ttt_passes=2)
LORA = dict(ttt_form="lora", ttt_lr=0.02, ttt_chunk_tokens=6, ttt_passes=2, ttt_rank=3)


def learning_run(h, model, m, **changes):
    """Return a ScoreSettings that learns, as Run.score makes it."""
    learner = partial(t.learning, model, model.nats, h, m)
    run = t.ScoreSettings(
        h.eval_seq_len, h.eval_stride, 4, "x", SILENT, chunk=h.ttt_chunk_tokens, learner=learner
    )
    if h.ttt_form == "lora":
        run = run._replace(groups=t.document_groups, bos_id=h.bos_id)
    return run._replace(**changes)


def weights_of(model):
    """Copy a model's weights."""
    return [p.detach().clone() for p in model.parameters()]


def ranks_score(rank, knobs):
    """Score on one rank.

    Returns the loss, a digest of the weights after each step, and whether the weights were restored.
    """
    h = tiny(**knobs)
    model = noisy_model(h, scale=0.01)  # so that some steps are not clipped
    tokens = random_tokens(h, (230,), 6).numpy()
    before = weights_of(model)
    digests = []
    env = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE") if key in os.environ}
    m = t.init_machine(h, env, trains=False)

    @contextmanager
    def watched():
        with t.learning(model, model.nats, h, m) as learn:

            def learn_and_digest(*args):
                changed_nats_fn = learn(*args)
                weights = b"".join(p.numpy().tobytes() for p in weights_of(model))
                digests.append(hashlib.sha256(weights).hexdigest())
                return changed_nats_fn

            yield learn_and_digest

    run = learning_run(h, model, m, learner=watched)
    score = t.evaluate(model.nats, tokens, ONE_BYTE, run, m)
    return score.loss, digests, all_equal(weights_of(model), before)
