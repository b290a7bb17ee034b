"""Held-out text measured: by the compressors, and by a model."""

from pathlib import Path

import numpy as np

from weft.data.shards import open_shards
from weft.device import pick_device, pick_dtype
from weft.quickstart.baselines import ByteNgram, gzip_bits, xz_bits, xz_bits_given
from weft.quickstart.options import Options
from weft.quickstart.preparing import Material
from weft.quickstart.reporter import Reporter
from weft.quickstart.scoring import Score, score_stream
from weft.quickstart.settings import Settings
from weft.weights.load import load_model

NGRAM = 5
LABELS = {"gzip": "gzip -9", "byte_5gram": "byte 5-gram", "xz": "xz -9", "xz_given_training": "xz -9, given the\ntraining text"}


def measure_baselines(material: Material, reporter: Reporter) -> dict[str, float]:
    """Bits a byte of the held-out files, one after another, under the keys of `LABELS`."""
    training, heldout = material.training_text, material.heldout_text
    measures = {
        "gzip": lambda: gzip_bits(heldout),
        "byte_5gram": lambda: ByteNgram(training, NGRAM).bits(heldout),
        "xz": lambda: xz_bits(heldout),
        "xz_given_training": lambda: xz_bits_given(training, heldout),
    }
    bits = {}
    for done, (name, measure) in enumerate(measures.items()):
        reporter.advance(done, len(measures), LABELS[name].replace("\n", " "))
        bits[name] = round(measure(), 5)
    return bits


def measure_model(model_folder: Path, shards: Path, options: Options, settings: Settings, reporter: Reporter, note: str) -> Score:
    """Score the same files, as the model was trained to read them: one after another, each ended by a mark that is paid for too."""
    device = pick_device(options.device)
    store = open_shards(shards, "valid")
    assert store.marks.eos is not None
    tokens = store.tokens_at(np.arange(store.num_tokens))
    stream = np.concatenate(([store.marks.eos], tokens)).astype(np.int64)
    model = load_model(model_folder, device).model
    length = settings.pretraining.length
    dtype = pick_dtype(options.dtype, device)
    return score_stream(
        model, stream, store.text_bytes, length, length // 2, dtype, lambda done, total: reporter.advance(done, total, note)
    )
