"""Files of the callbacks, read back with the libraries that they are written for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.callbacks.log_values import flatten
from app.data.mnist import mnist
from app.models.mlp import MLP
from tests.support.runs import RunResult, run_app
from tests.support.wandb_records import read_wandb_records, wandb_rows

EVENT_LOG_MODULE = """
import json

def log_event(*arguments, event):
    with open("events.jsonl", "a") as file:
        types = [type(argument).__name__ for argument in arguments]
        file.write(json.dumps([event, *types]) + chr(10))
"""
EVENTS = ("on_stage_start", "on_step_end", "on_stage_end", "on_epoch_end", "on_run_end")


@pytest.fixture(scope="session")
def observed_run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A short run with all callbacks."""
    cwd = tmp_path_factory.mktemp("callbacks")
    (cwd / "event_log.py").write_text(EVENT_LOG_MODULE)
    nodes = (f"{e}:{{_target_:event_log.log_event,_partial_:true,event:{e}}}" for e in EVENTS)
    function = f"{{_target_:app.callbacks.lambda_callback.LambdaCallback,{','.join(nodes)}}}"
    result = run_app(
        cwd,
        "model=mlp",
        "debug=fast",
        "tags=[a,b]",
        "notes=a note",
        "trusted_targets=[event_log]",
        "callbacks/single@callbacks=[tensorboard,mlflow,wandb,predictions,samples]",
        "callbacks.predictions.stages=[valid,test]",
        "callbacks.tensorboard.histograms_every_n_epochs=1",
        "callbacks.tensorboard.images=3",
        "callbacks.tensorboard.graph=true",
        "callbacks.tables.throughput=true",
        "callbacks.tables.memory=true",
        f"+callbacks.event_log={function}",
    )
    assert result.code == 0, result.err + result.out
    return result


# TensorBoard


@pytest.fixture(scope="session")
def events(observed_run: RunResult) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(observed_run.folder / "tensorboard"), sizes).Reload()


def test_tensorboard_scalars_match_the_summary_table(observed_run: RunResult, events: Any) -> None:
    for _, row in observed_run.csv("summary_table.csv").iterrows():
        for name, value in row.drop(["epoch", "stage"]).dropna().items():
            (scalar,) = events.Scalars(f"{row['stage']}/{name}")
            assert scalar.step == row["epoch"]
            assert np.float32(value) == np.float32(scalar.value)


def test_tensorboard_step_scalars_match_the_iterations(
    observed_run: RunResult, events: Any
) -> None:
    details = observed_run.csv("epoch_details/epoch001_train.csv")
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("train_step/")}
    assert tags == {f"train_step/{name}" for name in ("loss", "accuracy", "total_correct", "lr")}
    for tag in tags:
        found = [(scalar.step, np.float32(scalar.value)) for scalar in events.Scalars(tag)]
        values = details[tag.removeprefix("train_step/")]
        assert found == [(1, np.float32(values[0])), (2, np.float32(values[1]))]


def test_tensorboard_has_images_histograms_graph_and_hparams(events: Any) -> None:
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


def test_mlflow_run_has_params_metrics_tags_and_artifacts(
    observed_run: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((observed_run.cwd / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("app")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "mlp_mnist"
    assert set(run.data.params) == set(flatten(observed_run.config))
    assert run.data.params["data.batch_size"] == "128"
    assert run.data.params["optimizer._target_"] == "torch.optim.AdamW"
    assert run.data.tags["mlflow.note.content"] == "a note"
    assert run.data.tags["tags"] == "a, b"
    for _, row in observed_run.csv("summary_table.csv").iterrows():
        for name, value in row.drop(["epoch", "stage"]).dropna().items():
            (metric,) = client.get_metric_history(run.info.run_id, f"{row['stage']}/{name}")
            assert (metric.step, metric.value) == (row["epoch"], pytest.approx(value))
    assert run.data.metrics["best/epoch"] == 1
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"config.yaml", "summary_table.csv", "plots"}
    plots = {file.path for file in client.list_artifacts(run.info.run_id, "plots")}
    assert "plots/loss.png" in plots


def test_wandb_run_has_config_metrics_and_summary(observed_run: RunResult) -> None:
    records = list(read_wandb_records(observed_run.folder))
    rows = wandb_rows(records)
    for (_, row), found in zip(observed_run.csv("summary_table.csv").iterrows(), rows, strict=True):
        assert found["epoch"] == row["epoch"]
        for name, value in row.drop(["epoch", "stage"]).dropna().items():
            assert found[f"{row['stage']}/{name}"] == pytest.approx(value)
    (run,) = [record.run for record in records if record.run.run_id]
    assert (run.display_name, run.notes, list(run.tags)) == ("mlp_mnist", "a note", ["a", "b"])
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["data"]["batch_size"] == 128
    summary = {
        item.key or "/".join(item.nested_key)
        for record in records
        for item in record.summary.update
    }
    assert any("best/accuracy" in name for name in summary)


def test_trackers_print_no_output_or_warnings(observed_run: RunResult) -> None:
    output = (observed_run.out + observed_run.err).lower()
    assert not [word for word in ("wandb", "mlflow", "warning", "deprecat") if word in output]


# Predictions and samples


def test_predictions_are_the_softmax_of_the_best_model(observed_run: RunResult) -> None:
    model = MLP(10, [1, 28, 28])
    model.load_state_dict(torch.load(observed_run.folder / "model.pt"))
    images, labels = mnist(train=False)[:256]
    with torch.no_grad():
        logits = model.eval()((images / 255 - 0.1307) / 0.3081)
    table = observed_run.csv("predictions/epoch001_test/predictions.csv")
    assert table["sample"].tolist() == list(range(256))
    assert table["target"].tolist() == labels.tolist()
    probabilities = torch.from_numpy(table.filter(like="probability_").to_numpy())
    # The data pipeline normalizes in another order of operations.
    torch.testing.assert_close(probabilities.float(), logits.softmax(1), atol=1e-5, rtol=1e-4)
    assert (table["label"] == table.filter(like="probability_").to_numpy().argmax(1)).all()
    accuracy = observed_run.csv("test_summary_table.csv")["accuracy"].item()
    assert (table["label"] == table["target"]).mean() == pytest.approx(accuracy)
    assert len(observed_run.csv("predictions/epoch001_valid/predictions.csv")) == 256


def test_samples_of_classification_have_label_titles(observed_run: RunResult) -> None:
    with Image.open(observed_run.folder / "samples" / "epoch001_valid.png") as image:
        assert image.size == (1440, 216)  # eight images in a row, at 120 dpi
    assert not (observed_run.folder / "samples" / "epoch001_test.png").exists()


# Tables and LambdaCallback


def test_tables_have_throughput_and_memory_columns(observed_run: RunResult) -> None:
    for stage in ("train", "valid", "test"):
        details = observed_run.csv(f"epoch_details/epoch001_{stage}.csv")
        expected = details["num_samples"] / details["iter_time"]
        np.testing.assert_allclose(details["samples/s"], expected)
        assert details["memory_mb"].between(10, 100_000).all()


def test_lambda_callback_functions_are_called_in_order(observed_run: RunResult) -> None:
    lines = (observed_run.cwd / "events.jsonl").read_text().splitlines()
    stage = [
        ["on_stage_start", "StageStart"],
        ["on_step_end", "StepEnd"],
        ["on_step_end", "StepEnd"],
        ["on_stage_end", "StageResult", "list"],
    ]
    epoch_end, run_end = ["on_epoch_end", "EpochEnd"], ["on_run_end", "list"]
    assert [json.loads(line) for line in lines] == [*stage, *stage, epoch_end, *stage, run_end]
