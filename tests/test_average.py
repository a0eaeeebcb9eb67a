"""--ema: a moving average of the weights, which is evaluated and saved beside the weights that are trained."""

from pathlib import Path

import pytest
import torch

from tests.test_train import SMALL, assert_equal_states, run_training, states, tiny_networks  # noqa: F401
from util.checkpoint import io, run_dir
from util.errors import DataError
from util.training import engine, trainer

pytestmark = pytest.mark.usefixtures("no_plots")

DECAY = 0.75


@pytest.fixture
def weights(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """Record the weights of the backbone before and after each step."""
    recorded: list[dict[str, torch.Tensor]] = []
    step = engine.TrainingStep.__call__

    def copies(self: engine.TrainingStep) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in self.backbone.state_dict().items()}

    def recording(self, *batch, **named):
        if not recorded:
            recorded.append(copies(self))
        result = step(self, *batch, **named)
        recorded.append(copies(self))
        return result

    monkeypatch.setattr(engine.TrainingStep, "__call__", recording)
    return recorded


def kinds(run: Path, tag: str) -> set[str]:
    return {path.name.partition("_")[0] for path in run.glob(f"*_{tag}.pth")}


def test_average_equals_a_slow_average(run_training, weights):  # noqa: F811
    run = run_training("--epochs=2", f"--ema={DECAY}", *SMALL)
    assert len(weights) == 7
    saved = io.load(run / "EMA_2_6.pth")
    for key, first in weights[0].items():
        if first.is_floating_point():
            expected = first.double()
            for each in weights[1:]:
                expected = DECAY * expected + (1 - DECAY) * each[key].double()
            torch.testing.assert_close(saved[key], expected.float(), rtol=1e-5, atol=1e-7)
    assert_equal_states([io.load(run / "Backbone_2_6.pth")], weights[-1:])


def test_average_changes_no_trained_weight(run_training):  # noqa: F811
    plain = run_training("--epochs=2", *SMALL)
    averaged = run_training("--epochs=2", f"--ema={DECAY}", *SMALL, name="b")
    assert_equal_states(states(plain, "2_6"), states(averaged, "2_6"))
    assert not list(plain.glob("EMA*")) and len(list(averaged.glob("EMA*"))) == 2


def test_average_is_evaluated(run_training, monkeypatch):  # noqa: F811
    evaluated = []

    def spy(network):
        evaluated.append({key: value.clone() for key, value in network.state_dict().items()})
        return fold(network)

    fold = trainer.fold_batch_norm
    monkeypatch.setattr(trainer, "fold_batch_norm", spy)
    run = run_training("--epochs=2", f"--ema={DECAY}", *SMALL)
    assert_equal_states(evaluated, [io.load(run / f"EMA_{tag}.pth") for tag in ("1_3", "2_6")])


def test_average_skips_steps_without_a_finite_loss(run_training, weights, monkeypatch):  # noqa: F811
    update = trainer.AveragedModel.update_parameters
    updates = []
    monkeypatch.setattr(
        trainer.AveragedModel,
        "update_parameters",
        lambda self, model: updates.append(len(weights)) or update(self, model),
    )
    backward = engine.TrainingStep.backward

    def poisoned(self, *batch):
        values = backward(self, *batch)
        return values * (torch.nan if len(weights) == 2 else 1)

    monkeypatch.setattr(engine.TrainingStep, "backward", poisoned)
    run_training("--epochs=1", f"--ema={DECAY}", *SMALL)
    assert updates == [2, 4]  # not after the second of three steps


def test_average_can_begin_and_end_at_a_resume(run_training, tmp_path):  # noqa: F811
    run = run_training("--epochs=1", *SMALL)
    best = tmp_path / "a_best" / run.name
    run_training("--epochs=2", "--ema=0.5", f"--resume_dir={run}", backbone="")
    assert kinds(run, "1_3") == {"Backbone", "Head", "Optimizer"}
    assert kinds(run, "2_6") == {"Backbone", "Head", "Optimizer", "EMA"}
    run_dir.save_best(run_dir.Run(run, best, tmp_path), run / "Backbone_2_6.pth")
    assert kinds(best, "Best") == kinds(run, "2_6")
    run_training("--epochs=3", "--ema=0", f"--resume_dir={run}", backbone="")
    assert kinds(run, "3_9") == {"Backbone", "Head", "Optimizer"}
    run_dir.save_best(run_dir.Run(run, best, tmp_path), run / "Backbone_3_9.pth")
    assert kinds(best, "Best") == kinds(run, "3_9")


def test_checkpoint_without_its_average_is_passed_over(run_training, capsys):  # noqa: F811
    run = run_training("--epochs=2", "--ema=0.5", *SMALL)
    with pytest.raises(DataError, match=r"EMA_2_6.pth: was not saved together with Optimizer_2_6.pth"):
        io.load(run / "EMA_1_3.pth")
        (run / "EMA_2_6.pth").write_bytes((run / "EMA_1_3.pth").read_bytes())
        run_dir.load_resumable(run / "Backbone_2_6.pth")
    (run / "EMA_2_6.pth").unlink()
    assert run_dir.load_resumable(run).files["EMA"] == run / "EMA_1_3.pth"
    assert "EMA_2_6.pth: cannot be read (No such file or directory)" in capsys.readouterr().out


def test_old_averages_are_deleted_with_their_epochs(run_training):  # noqa: F811
    run = run_training("--epochs=4", "--ema=0.5", "--keep_last=1", *SMALL)
    best = io.load(run / "Optimizer_4_12.pth")["best_epoch"]
    assert {int(path.name.split("_")[1]) for path in run.glob("EMA_*.pth")} == {best, 4}
