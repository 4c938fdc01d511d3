"""The five metrics against counting, and checkpoints that cannot be used."""

import math

import pytest
import torch

from evaluate import group_means, load_model, metrics, report
from test_data import table_of


def reference_metrics(predicted, labels):
    """Sec. 4.1 by Python sets, per attribute and per image."""
    N, L = labels.shape
    label_mA = []
    for j in range(L):
        positives = {i for i in range(N) if labels[i, j]}
        found = {i for i in range(N) if predicted[i, j]}
        negatives = set(range(N)) - positives
        if positives and negatives:
            label_mA.append((len(found & positives) / len(positives) + len(negatives - found) / len(negatives)) / 2)
    accu = prec = rec = 0.0
    for i in range(N):
        true = {j for j in range(L) if labels[i, j]}
        found = {j for j in range(L) if predicted[i, j]}
        accu += len(true & found) / len(true | found) if true | found else 0
        prec += len(true & found) / len(found) if found else 0
        rec += len(true & found) / len(true) if true else 0
    prec, rec = prec / N, rec / N
    return {"mA": sum(label_mA) / len(label_mA), "Accu": accu / N, "Prec": prec, "Rec": rec, "F1": 2 * prec * rec / (prec + rec)}


def field_mA(predicted, labels):
    """mA as the field's usual tool writes it, with its epsilon."""
    gt, pred, eps = labels.numpy().astype(float), predicted.numpy().astype(float), 1e-20
    tpr = (gt * pred).sum(0) / ((gt == 1).sum(0) + eps)
    tnr = ((1 - gt) * (1 - pred)).sum(0) / ((gt == 0).sum(0) + eps)
    return ((tpr + tnr) / 2).mean()


@pytest.mark.parametrize("seed", range(3))
def test_metrics_match_counting(seed):
    torch.manual_seed(seed)
    logits, labels = torch.randn(50, 6), (torch.rand(50, 6) < 0.3).float()
    labels[0], logits[1], labels[2], logits[2] = 0, -1, 0, -1  # no true one, no predicted one, neither
    result = metrics(logits, labels)
    for name, value in reference_metrics(logits > 0, labels).items():
        assert result[name] == pytest.approx(100 * value)
    assert result["mA"] == pytest.approx(100 * field_mA(logits > 0, labels), abs=1e-6)
    assert result["undefined"] == 0


def test_undefined_attributes_are_left_out_and_counted():
    torch.manual_seed(3)
    logits, labels = torch.randn(20, 4), (torch.rand(20, 4) < 0.5).float()
    labels[:, 1], labels[:, 3] = 0, 1
    result = metrics(logits, labels)
    assert result["undefined"] == 2 and math.isnan(result["label_mA"][1]) and math.isnan(result["label_mA"][3])
    assert result["mA"] == pytest.approx(100 * reference_metrics(logits > 0, labels)["mA"])
    text = "\n".join(report(table_of(labels.numpy()), logits, labels)[1])
    assert text.count("undefined") == 3 and "2 attributes have no positives or no negatives" in text


def test_a_logit_of_zero_is_a_negative():
    assert metrics(torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]))["mA"] == 50


def test_group_means_skip_undefined_attributes():
    means = group_means([1.0, math.nan, 3.0, 5.0], ["head", "head", "all", "all"])
    assert means == {"head": 1.0, "all": 4.0}


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content, message", [
    (None, "no such checkpoint"),
    (b"not a checkpoint", "not a readable checkpoint"),
    ({"weights": 1}, "not a checkpoint of train.py"),
    ({"config": Malicious(), "ema": {}}, "not a readable checkpoint"),
    ({"config": {"ple": "S"}, "ema": {}}, "its config has no 'groups'"),
    ({"config": {"ple": "none", "groups": ["head"], "backbone": "resnet18"}, "ema": {}}, "Missing key"),
])
def test_unusable_checkpoints_are_named_and_nothing_is_executed(tmp_path, capsys, content, message):
    file = tmp_path / "c.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_model(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out
