"""`record codecs`: the codes that it measures are those of the artifact, and what it prints is measured."""

import numpy as np
import pytest
import torch

import train_gpt as t
from lab import codecs
from tests.helpers import noisy_model, tiny

UNEVEN = 4.0  # the ratio of the largest to the smallest diagonal element of a Gram matrix

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture(scope="module")
def artifact():
    """Return a raw artifact whose first banks, by name, have column steps."""
    h = tiny(column_steps=1)
    tensors = {name: p.detach() for name, p in noisy_model(h).named_parameters()}
    grams = {
        spec.name: torch.linspace(1, UNEVEN, W.size(-1)).diag().expand(len(W), -1, -1)
        for spec in t.MATRICES
        for W in [tensors[spec.name]]
    }
    return t.raw_artifact(tensors, h, t.rounding_guide(tensors, h, t.Calibration(grams)))


def slices(raw):
    """Return the codes of every tensor that has them, by the offsets of the artifact's index."""
    header, end = t.read_header(raw)
    payload = raw[end:]
    found = {}
    for name, encoding, shape, offset in header["tensors"]:
        if encoding in ("int6", "int7", "int8", "columns"):
            found[name] = np.frombuffer(payload, np.int8, np.prod(shape), offset).reshape(shape)
    return found


def test_codes_after_a_bank_with_column_steps_are_read_from_their_place(artifact):
    wanted = slices(artifact)
    found = codecs.codes_of(t, artifact)
    assert "columns" in [codes.encoding for codes in found[:-1]]
    assert [codes.name for codes in found] == list(wanted)
    for codes in found:
        assert np.array_equal(codes.values.ravel(), wanted[codes.name].ravel()), codes.name


def test_the_table_holds_entropy_and_size_of_every_tensor(artifact, tmp_path, capsys):
    path = tmp_path / "x.int6.rans"
    path.write_bytes(t.CODECS["rans"].pack(artifact))
    assert codecs.main([str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {words[0]: words[1:] for words in lines if words}

    for name, values in slices(artifact).items():
        counts = np.unique(values, return_counts=True)[1]
        num_bytes = -(counts * np.log2(counts / values.size)).sum() / 8
        encoding, codes, rms, entropy = table[name][:4]
        assert int(codes.replace(",", "")) == values.size
        # Measured: 0.004.
        assert float(rms) == pytest.approx(np.sqrt((values.astype(float) ** 2).mean()), abs=0.006)
        assert float(entropy.replace(",", "")) == pytest.approx(num_bytes, abs=0.51)  # measured: 0.42
        assert encoding in t.ENCODINGS
    for codec, row in t.CODECS.items():
        assert table[codec][0] == f"{len(row.pack(artifact)):,}"
