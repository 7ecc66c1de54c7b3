"""Each of Lightning's options for a trainer: what it does to a run here, or that it is refused."""

import inspect
import json
from pathlib import Path

import conftest
import pytest
import torch
from conftest import assert_one_line_error, run_here
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import TOY

from flowmatch_mnist.training.options import FIXED_OPTIONS


class Probe(Callback):
    """Writes down what a run did."""

    def __init__(self) -> None:
        self.seen = {"batches": [], "validations": [], "anomaly": False, "inference": False, "sanity": 0}
        self.loaders = []

    def on_train_epoch_start(self, trainer, module):
        self.loaders.append(trainer.train_dataloader)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen["batches"].append(batch[1].sum().item())
        self.seen["anomaly"] |= torch.is_anomaly_enabled()
        self.seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
        self.seen["benchmark"] = torch.backends.cudnn.benchmark
        self.seen["precision"] = str(trainer.precision)
        self.seen["clip"] = [trainer.gradient_clip_val, trainer.gradient_clip_algorithm]
        self.seen["device"] = [module.device.type, trainer.num_devices]

    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            self.seen["largest"] = max(gradient.abs().max().item() for gradient in gradients)
            self.seen["norm"] = torch.nn.utils.get_total_norm(gradients).item()

    def on_validation_batch_start(self, trainer, *_):
        self.seen["inference"] |= torch.is_inference_mode_enabled()
        self.seen["sanity"] += trainer.sanity_checking
        self.seen["validations"].append(trainer.global_step)

    def teardown(self, trainer, module, stage):
        if stage in ("fit", "validate"):
            self.seen |= {"steps": trainer.global_step, "epochs": trainer.current_epoch}
            self.seen["loaders"] = len(set(map(id, self.loaders)))
            Path("seen.json").write_text(json.dumps(self.seen))


def run(folder: Path, *options: object) -> dict:
    done = run_here("train.py", *TOY, *options, "--trainer.callbacks+", "test_options.Probe", cwd=folder)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((folder / "seen.json").read_text())
    for path in folder.rglob("events.*"):
        seen["logged"] = [event.step for event in EventAccumulator(str(path)).Reload().Scalars("loss/train")]
    return seen | {"printed": done.stdout + done.stderr, "files": [path.name for path in folder.rglob("*")]}


def halves(seen):
    return len(seen["batches"]) == 2 * seen["steps"] == 60


STOP = ["--trainer.callbacks+", "test_runs.Stop", "--trainer.callbacks.step", 5]
ACTS = {
    "accelerator": (["cpu"], lambda seen: seen["device"][0] == "cpu"),
    "accumulate_grad_batches": ([2], halves),
    "benchmark": (["true"], lambda seen: seen["benchmark"]),
    "check_val_every_n_epoch": ([3], lambda seen: seen["validations"] == [60]),
    "default_root_dir": (["elsewhere"], lambda seen: "elsewhere" in seen["files"] and "runs" not in seen["files"]),
    "detect_anomaly": (["true"], lambda seen: seen["anomaly"]),
    "deterministic": (["true"], lambda seen: seen["deterministic"]),
    "devices": ([1], lambda seen: seen["device"][1] == 1),
    "enable_model_summary": (["true"], lambda seen: "Params" in seen["printed"]),
    "enable_progress_bar": (["true"], lambda seen: "Epoch 2/2" in seen["printed"]),
    "fast_dev_run": (["true"], lambda seen: seen["steps"] == 1 and seen["files"] == ["seen.json"]),
    "gradient_clip_val": ([0.01], lambda seen: seen["norm"] < 0.0101),
    "gradient_clip_algorithm": (
        ["value", "--trainer.gradient_clip_val", 0.01],
        lambda seen: seen["largest"] < 0.0101 < seen["norm"],
    ),
    "limit_train_batches": ([7], lambda seen: seen["steps"] == 21 and seen["epochs"] == 3),
    "limit_val_batches": ([0], lambda seen: not seen["validations"]),
    "log_every_n_steps": ([10], lambda seen: seen["logged"] == [9, 19, 29, 39, 49, 59]),
    "max_epochs": ([2], lambda seen: seen["steps"] == 40),
    "max_steps": ([33], lambda seen: seen["steps"] == 33),
    "min_epochs": (
        [2, *STOP],
        lambda seen: seen["steps"] == 40,
    ),
    "min_steps": (
        [30, *STOP],
        lambda seen: seen["steps"] == 30,
    ),
    "num_sanity_val_steps": ([1], lambda seen: seen["sanity"] == 1),
    "precision": (["bf16-mixed"], lambda seen: seen["precision"] == "bf16-mixed"),
    "reload_dataloaders_every_n_epochs": ([1], lambda seen: seen["loaders"] == seen["epochs"] == 3),
    "sync_batchnorm": (["true"], lambda seen: seen["steps"] == 60),
    "val_check_interval": ([0.5], lambda seen: seen["validations"] == [10, 20, 30, 40, 50, 60]),
}
"""Options, a value, and what shows that it acts."""

ELSEWHERE = {
    "callbacks": "test_runs.test_single_plugins_and_another_bar_are_taken",
    "inference_mode": "test_options.test_only_without_inference_mode_may_validation_take_gradients",
    "limit_predict_batches": "test_options.test_limits_of_the_other_commands",
    "limit_test_batches": "test_options.test_limits_of_the_other_commands",
    "logger": "test_runs.test_a_run_has_its_folder_whatever_the_logger",
    "max_time": "test_runs.test_max_time_says_so_and_when_there_is_nothing_left_of_it",
    "num_nodes": "test_cli.test_two_nodes_share_the_steps_that_one_process_would_take",
    "overfit_batches": "test_runs.test_overfit_batches_sees_the_same_batches_in_each_epoch",
    "plugins": "test_runs.test_single_plugins_and_another_bar_are_taken",
    "profiler": "test_options.test_a_profiler_reports",
    "strategy": "test_cli.test_two_nodes_share_the_steps_that_one_process_would_take",
}
"""Options that other tests show to act."""


def test_every_option_is_in_the_table():
    options = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert options == {*ACTS, *ELSEWHERE, *FIXED_OPTIONS}
    assert len(options) == len(ACTS) + len(ELSEWHERE) + len(FIXED_OPTIONS), "each once"
    for where in ELSEWHERE.values():
        file, _, test = where.partition(".")
        assert f"def {test}(" in Path(__file__).with_name(f"{file}.py").read_text()


@pytest.mark.parametrize("option", ACTS)
def test_an_option_acts(tmp_path, option):
    (value, *more), acts = ACTS[option]
    seen = run(tmp_path, f"--trainer.{option}", value, *more)
    assert acts(seen), seen


def test_without_them_a_run_is_as_the_config_says(tmp_path):
    seen = run(tmp_path)
    others = {name: acts(seen) for name, (_, acts) in ACTS.items()}
    same = {"accelerator", "devices", "sync_batchnorm"}
    assert {name for name, acts in others.items() if acts} == same


def test_reloading_the_batches_changes_none(tmp_path):
    assert run(tmp_path)["batches"] == run(tmp_path, "--trainer.reload_dataloaders_every_n_epochs", 1)["batches"]


def test_only_without_inference_mode_may_validation_take_gradients(tmp_path):
    run(tmp_path)
    few = ["validate", "--ckpt_path", "last", "--evaluation.test_samples", 20, "--evaluation.steps", "[1]"]
    for mode in ("true", "false"):
        asked = ["--trainer.inference_mode", mode, "--trainer.callbacks", "test_options.Probe"]
        done = run_here("train.py", *few, *asked, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "seen.json").read_text())["inference"] == (mode == "true")


def test_a_profiler_reports(tmp_path):
    done = conftest.run("train.py", *TOY, "--trainer.max_steps", 3, "--trainer.profiler", "simple", cwd=tmp_path)
    assert done.returncode == 0 and "run_training_batch" in done.stderr, done.stderr


def test_limits_of_the_other_commands(tmp_path):
    run(tmp_path)
    few = ["--ckpt_path", "last", "--data.predict_per_class", 40, "--data.eval_batch_size", 10]
    for limit, count in ((1, 10), (2, 20)):
        done = run_here("train.py", "predict", *few, "--trainer.limit_predict_batches", limit, cwd=tmp_path)
        assert f"wrote {count} samples" in done.stdout, done.stdout + done.stderr
    few += ["--evaluation.test_samples", 20, "--evaluation.steps", "[1]", "--evaluation.samples", 20]
    found = set()
    for limit in (1, 2):
        done = run_here("train.py", "test", *few, "--trainer.limit_test_batches", limit, cwd=tmp_path)
        found.add(next(line for line in done.stdout.splitlines() if line.startswith("loss/test")))
    assert len(found) == 2


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_other_precisions_are_refused(tmp_path, precision):
    done = run_here("train.py", *TOY, "--trainer.precision", precision, cwd=tmp_path)
    assert_one_line_error(done, precision, "one of 32-true, bf16-mixed, 16-mixed")
