"""Those who watch: the files they leave are read back with the libraries that they are for."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.callbacks.log_values import flatten
from app.data.mnist import mnist
from app.models.mlp import MLP
from tests.support.runs import Ran, run_app

HEARD = """
import json

def note(*told, event):
    with open("heard.jsonl", "a") as file:
        file.write(json.dumps([event, *(type(one).__name__ for one in told)]) + chr(10))
"""
EVENTS = ("on_stage_start", "on_step_end", "on_stage_end", "on_epoch_end", "on_run_end")


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A short run that all of them watch."""
    cwd = tmp_path_factory.mktemp("watched")
    (cwd / "heard.py").write_text(HEARD)
    nodes = (f"{e}:{{_target_:heard.note,_partial_:true,event:{e}}}" for e in EVENTS)
    function = f"{{_target_:app.callbacks.lambda_callback.LambdaCallback,{','.join(nodes)}}}"
    ran = run_app(
        cwd,
        "model=mlp",
        "debug=fast",
        "tags=[a,b]",
        "notes=a note",
        "trusted_targets=[heard]",
        "callbacks/single@callbacks=[tensorboard,mlflow,wandb,predictions,samples]",
        "callbacks.predictions.stages=[valid,test]",
        "callbacks.tensorboard.histograms_every_n_epochs=1",
        "callbacks.tensorboard.images=3",
        "callbacks.tensorboard.graph=true",
        "callbacks.tables.throughput=true",
        "callbacks.tables.memory=true",
        f"+callbacks.heard={function}",
    )
    assert ran.code == 0, ran.err + ran.out
    return ran


# TensorBoard


@pytest.fixture(scope="session")
def events(watched: Ran) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(watched.folder / "tensorboard"), sizes).Reload()


def test_tensorboard_has_the_numbers_of_the_summary(watched: Ran, events: Any) -> None:
    for _, row in watched.csv("summary_table.csv").iterrows():
        for name, value in row.drop(["epoch", "stage"]).dropna().items():
            (scalar,) = events.Scalars(f"{row['stage']}/{name}")
            assert scalar.step == row["epoch"]
            assert np.float32(value) == np.float32(scalar.value)


def test_tensorboard_has_the_numbers_of_each_iteration(watched: Ran, events: Any) -> None:
    details = watched.csv("epoch_details/epoch001_train.csv")
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("train_step/")}
    assert tags == {f"train_step/{name}" for name in ("loss", "accuracy", "total_correct", "lr")}
    for tag in tags:
        found = [(scalar.step, np.float32(scalar.value)) for scalar in events.Scalars(tag)]
        values = details[tag.removeprefix("train_step/")]
        assert found == [(1, np.float32(values[0])), (2, np.float32(values[1]))]


def test_tensorboard_has_pictures_weights_graph_and_settings(events: Any) -> None:
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    tags = events.Tags()
    images = {tag.partition("/")[0]: events.Images(tag)[0] for tag in tags["images"]}
    assert set(images) == {"valid_images", "test_images", "test"}
    assert (images["valid_images"].width, images["valid_images"].height) == (3 * 28, 28)
    assert len(tags["histograms"]) == 4
    assert all(tag.startswith("weights/") for tag in tags["histograms"])
    assert tags["graph"] is True
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["data.batch_size"].number_value == 128
    assert settings["optimizer._target_"].string_value == "torch.optim.AdamW"
    assert "hparam/best/accuracy" in tags["scalars"]


# MLflow and Weights & Biases


def test_mlflow_has_settings_numbers_tags_and_files(
    watched: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((watched.cwd / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("app")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "mlp_mnist"
    assert set(run.data.params) == set(flatten(watched.config))
    assert run.data.params["data.batch_size"] == "128"
    assert run.data.params["optimizer._target_"] == "torch.optim.AdamW"
    assert run.data.tags["mlflow.note.content"] == "a note"
    assert run.data.tags["tags"] == "a, b"
    for _, row in watched.csv("summary_table.csv").iterrows():
        for name, value in row.drop(["epoch", "stage"]).dropna().items():
            (metric,) = client.get_metric_history(run.info.run_id, f"{row['stage']}/{name}")
            assert (metric.step, metric.value) == (row["epoch"], pytest.approx(value))
    assert run.data.metrics["best/epoch"] == 1
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"config.yaml", "summary_table.csv", "plots"}
    plots = {file.path for file in client.list_artifacts(run.info.run_id, "plots")}
    assert "plots/loss.png" in plots


def logged(folder: Path) -> Iterator[Any]:
    """The records of an offline run, in the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, place, record = path.read_bytes(), 7, b""
    while place < len(content):
        if 2**15 - place % 2**15 < 7:  # what is left of a block is too short for a header
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_wandb_has_the_numbers_of_the_summary(watched: Ran) -> None:
    records = list(logged(watched.folder))
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in one.history.item}
        for one in records
        if one.history.item
    ]
    for (_, row), found in zip(watched.csv("summary_table.csv").iterrows(), rows, strict=True):
        assert found["epoch"] == row["epoch"]
        for name, value in row.drop(["epoch", "stage"]).dropna().items():
            assert found[f"{row['stage']}/{name}"] == pytest.approx(value)
    (begun,) = [one.run for one in records if one.run.run_id]
    assert (begun.display_name, begun.notes, list(begun.tags)) == (
        "mlp_mnist",
        "a note",
        ["a", "b"],
    )
    settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert settings["data"]["batch_size"] == 128
    summary = {
        item.key or "/".join(item.nested_key) for one in records for item in one.summary.update
    }
    assert any("best/accuracy" in name for name in summary)


def test_nobody_is_noisy(watched: Ran) -> None:
    everything = (watched.out + watched.err).lower()
    assert not [word for word in ("wandb", "mlflow", "warning", "deprecat") if word in everything]


# Predictions


def test_predictions_are_the_softmax_of_the_best_weights(watched: Ran) -> None:
    model = MLP(10, [1, 28, 28])
    model.load_state_dict(torch.load(watched.folder / "model.pt"))
    images, labels = mnist(train=False)[:256]
    with torch.no_grad():
        logits = model.eval()((images / 255 - 0.1307) / 0.3081)
    found = watched.csv("predictions/epoch001_test/predictions.csv")
    assert found["sample"].tolist() == list(range(256))
    assert found["target"].tolist() == labels.tolist()
    shares = torch.from_numpy(found.filter(like="probability_").to_numpy())
    # The program normalises in another order of operations.
    torch.testing.assert_close(shares.float(), logits.softmax(1), atol=1e-5, rtol=1e-4)
    assert (found["label"] == found.filter(like="probability_").to_numpy().argmax(1)).all()
    accuracy = watched.csv("test_summary_table.csv")["accuracy"].item()
    assert (found["label"] == found["target"]).mean() == pytest.approx(accuracy)
    assert len(watched.csv("predictions/epoch001_valid/predictions.csv")) == 256


def test_labels_are_titles(watched: Ran) -> None:
    with Image.open(watched.folder / "samples" / "epoch001_valid.png") as found:
        assert found.size == (1440, 216)  # eight pictures in a line, at 120 dots per inch
    assert not (watched.folder / "samples" / "epoch001_test.png").exists()


# Tables and functions


def test_tables_have_throughput_and_memory(watched: Ran) -> None:
    for stage in ("train", "valid", "test"):
        details = watched.csv(f"epoch_details/epoch001_{stage}.csv")
        expected = details["num_samples"] / details["iter_time"]
        np.testing.assert_allclose(details["samples/s"], expected)
        assert details["memory_mb"].between(10, 100_000).all()


def test_functions_are_called_at_their_events_in_order(watched: Ran) -> None:
    lines = (watched.cwd / "heard.jsonl").read_text().splitlines()
    stage = [
        ["on_stage_start", "StageStart"],
        ["on_step_end", "StepEnd"],
        ["on_step_end", "StepEnd"],
        ["on_stage_end", "StageResult", "list"],
    ]
    epoch_end, run_end = ["on_epoch_end", "EpochEnd"], ["on_run_end", "list"]
    assert [json.loads(line) for line in lines] == [*stage, *stage, epoch_end, *stage, run_end]
