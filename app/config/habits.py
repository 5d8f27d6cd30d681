"""What users of other programs type out of habit, and how it is said here.

The last table of docs/coming-from.md lists the same; a test compares both.
"""

from __future__ import annotations

from typing import Any

# Keys that mean the same, without groups -> the key here, which gets the typed value, or all that
# is typed instead.
KEYS = {
    "epochs, num_epochs, n_epochs, max_epoch": "trainer.max_epochs",
    "steps, num_steps, iterations, max_iters": "trainer.max_steps",
    "batch, bs, batch_size, train_batch_size": "data.batch_size",
    "test_batch_size, val_batch_size, valid_batch_size": "data.eval_batch_size",
    "lr, learning_rate": "optimizer.lr",
    "wd, weight_decay": "optimizer.weight_decay",
    "opt, optim": "optimizer",
    "sched, lr_scheduler": "scheduler",
    "warmup, warmup_steps, warmup_ratio": "scheduler.warmup_steps",
    "warmup_epochs": "scheduler.warmup_epochs",
    "layer_decay": "optimizer.layer_decay",
    "criterion, loss_fn": "loss",
    "arch, net, network, backbone, model_name": "model",
    "dataset, datamodule": "data",
    "root, data_dir, data_path, data_root, dataset_path": "data.path",
    "imgsz, img_size, image_size": "data.resize",
    "workers, num_workers": "data.loader.num_workers",
    "num_classes, nb_classes": "data.num_classes",
    "aug, augment, augmentation": "data/augment",
    "accelerator": "trainer.accelerator",
    "gpus, num_gpus, nproc_per_node": "trainer.devices",
    "precision": "trainer.precision",
    "amp, fp16, use_amp": "trainer.precision=fp16",
    "bf16": "trainer.precision=bf16",
    "grad_clip, clip_grad, gradient_clip_val, max_grad_norm": "trainer.gradient_clip_norm",
    "grad_accum, accum_steps, gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "check_val_every_n_epoch, eval_interval, val_every": "trainer.valid_every_n_epochs",
    "val_check_interval, eval_steps, validate_every": "trainer.valid_every_n_steps",
    "log_interval, logging_steps, print_freq": "trainer.log_every_n_steps",
    "num_sanity_val_steps": "trainer.sanity_valid_batches",
    "early_stopping, early_stop": "goal.patience=10",
    "patience": "goal.patience",
    "monitor, save_metric": "goal.metric",
    "save_every, save_freq, save_interval": "checkpoint.every_n_epochs",
    "resume_from, resume_from_checkpoint, load": "resume",
    "model_path, checkpoint_path, ckpt_path": "mode=test ckpt=RUN",
    "weights, pretrained, finetune, finetune_from, init_from, load_from": "init.weights",
    "teacher, teacher_path, teacher_model, distill, distillation": "task=distill teacher=RUN",
    "output_dir, out_dir, save_dir, log_dir, logdir, exp_dir, work_dir": "output",
    "exp_name, run_name, task_name, experiment_name": "name",
    "random_seed, manual_seed, seed_everything": "seed",
    "ema, use_ema": "average=ema",
    "tensorboard, tb": "logger=tensorboard",
    "wandb, use_wandb": "logger=wandb",
    "mlflow": "logger=mlflow",
    "training, do_train": "mode=train",
    "test, do_test, eval, evaluate, do_eval": "mode=test ckpt=RUN",
    "val, valid, validate": "mode=valid ckpt=RUN",
    "infer, inference": "mode=predict ckpt=RUN",
    "dry_run, smoke_test": "trainer.fast_dev_run=true",
    "hparams_search, hpo, tune": "-m hydra/sweeper=optuna 'optimizer.lr=interval(1e-4,1e-1)'",
    "verbose": "hydra.verbose=true",
    "print_config": "--cfg job --resolve",
}
# Keys for which there is nothing here -> why.
NOT_HERE = {
    "train": "every run trains, unless it has another mode: mode=test ckpt=RUN",
    "extras, ignore_warnings": "warnings are shown once each, and config.yaml is always written",
    "num_nodes": "torchrun or srun starts the ranks; see docs/devices.md",
}
DEVICE_KEYS = ("device", "gpu", "gpu_id", "cuda")  # of a number or a name
WORDS = {  # without `=`
    "help": "--help",
    "version": "--version",
    "sweep": "-m and several values, such as -m optimizer.lr=0.1,0.01",
    "gpu": "trainer=gpu",
    "cpu": "trainer=cpu",
    "resume": "resume=RUN",
    **{mode: f"mode={mode}" for mode in ("train", "check", "find_lr", "find_batch_size")},
    **{mode: f"mode={mode} ckpt=RUN" for mode in ("test", "valid", "predict", "export")},
}


def usage(key: str, value: Any = None) -> str | None:
    """Return what to type here instead of a key of other programs; None if it is not known.

    Args:
        key: The key; its groups and case do not count.
        value: The value that was given to it.
    """
    name = key.rpartition(".")[2].lower().replace("-", "_")
    if name in DEVICE_KEYS:
        return f"use {_device(value)}"
    for names, reason in NOT_HERE.items():
        if name in names.split(", "):
            return f"it is not needed: {reason}"
    here = next((ours for names, ours in KEYS.items() if name in names.split(", ")), None)
    if here is None:
        return None
    return f"use {here}" if "=" in here or here.startswith("-") else f"use {here}={_text(value)}"


def _device(value: Any) -> str:
    name = _text(value).lower().removeprefix("cuda:")
    if name.isdecimal():
        return f"trainer.devices=[{name}]"
    return f"trainer.accelerator={'cuda' if name == 'true' else name}"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
