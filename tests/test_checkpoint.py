import os
from datetime import datetime
from pathlib import Path

import pytest
import torch
from torch import nn

from util.checkpoint import io, run_dir
from util.checkpoint.io import CHECKPOINT_FILES, RecognitionState
from util.checkpoint.run_dir import Run
from util.errors import DataError, RunError

NOW = datetime(2022, 7, 28, 19, 15, 42)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def state(epoch: int, step: int) -> RecognitionState:
    return RecognitionState(
        optimizer={"state": {}, "param_groups": []},
        epoch=epoch,
        step=step,
        best=0.5,
        best_epoch=epoch,
        rng_state=io.get_rng_state(),
        classes=["Ann", "김연아"],
        settings={"backbone": "IR_50", "stages": (15, 23)},
    )


@pytest.fixture
def run(tmp_path) -> Run:
    return run_dir.new_run(*folders(tmp_path), prefix="HRTRAIN", now=NOW)


def folders(root: Path) -> tuple[str, str, str]:
    return str(root / "checkpoints"), str(root / "best"), str(root / "log")


def save(run: Run, epoch: int, step: int, seed: int = 0) -> Path:
    networks = {"Backbone": network(seed), "Head": nn.Linear(4, 2, bias=False)}
    return io.save_checkpoint(run.checkpoints, networks, state(epoch, step))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_run_is_named_by_minute_and_number(tmp_path):
    for expected in ("", "_2", "_3"):
        run = run_dir.new_run(*folders(tmp_path), prefix="LRTRAIN_LRx4", now=NOW)
        assert run.name == f"LRTRAIN_LRx4_2022-07-28-19-15{expected}"
        assert run.checkpoints == tmp_path / "checkpoints" / run.name and run.checkpoints.is_dir()
        assert (run.best, run.log) == (tmp_path / "best" / run.name, tmp_path / "log" / run.name)


@pytest.mark.parametrize("taken", ["best", "log"])
def test_a_name_taken_in_another_folder_is_not_used_again(tmp_path, taken):
    (tmp_path / taken / "HRTRAIN_2022-07-28-19-15").mkdir(parents=True)
    assert run_dir.new_run(*folders(tmp_path), prefix="HRTRAIN", now=NOW).name == "HRTRAIN_2022-07-28-19-15_2"


def test_newest_run_has_the_latest_date_in_its_name(tmp_path):
    in_order = [
        "ZTRAIN_2021-12-31-23-59",
        "LRTRAIN_LRx4_2022-01-01-00-00",
        "HRTRAIN_2022-01-01-00-01",
        "HRTRAIN_2022-01-01-00-01_2",
        "HRTRAIN_2022-01-01-00-01_10",
        "AAA_2022-01-01-00-02",
    ]
    for name in in_order:
        touch(tmp_path / name / "Backbone_Best.pth")
        assert run_dir.newest_run(tmp_path).name == name


def test_folders_without_a_backbone_or_a_date_are_no_runs(tmp_path):
    touch(tmp_path / "HRTRAIN_2021-01-01-00-00" / "Backbone_1_17.pth")
    touch(tmp_path / "HRTRAIN_2022-01-01-00-00" / "Head_Best.pth", tmp_path / "LATEST" / "Backbone_Best.pth")
    touch(tmp_path / "HRTRAIN_2023-01-01-00-00")
    assert run_dir.newest_run(tmp_path).name == "HRTRAIN_2021-01-01-00-00"


@pytest.mark.parametrize("exists", [True, False])
def test_no_run_at_all_is_an_error(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "none"
    with pytest.raises(DataError, match=r"no run with a Backbone file in it.*--resume_dir"):
        run_dir.newest_run(folder)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["Backbone_9_900.pth", "Backbone_10_1000.pth", "Backbone_2_200.pth"], "Backbone_10_1000.pth"),
        (["Backbone_10_1000.pth", "Backbone_Best.pth"], "Backbone_Best.pth"),
        (["Backbone_Epoch_1_Batch_17.pth", "Backbone_Epoch_12_Batch_204.pth"], "Backbone_Epoch_12_Batch_204.pth"),
        (["Backbone_1_9.pth", "Backbone_1_10.pth", "Head_2_20.pth", "Backbone_x.pth"], "Backbone_1_10.pth"),
        (
            [f"Backbone_IR_50_Epoch_{n}_Batch_{9 * n}_Time_2019-07-28-19-15_checkpoint.pth" for n in (9, 11)],
            "Backbone_IR_50_Epoch_11_Batch_99_Time_2019-07-28-19-15_checkpoint.pth",
        ),
    ],
)
def test_find_backbone_prefers_best_then_newest_epoch(tmp_path, files, found):
    touch(*(tmp_path / file for file in files))
    assert run_dir.find_backbone(tmp_path) == tmp_path / found
    for file in files:
        assert run_dir.find_backbone(tmp_path / file) == tmp_path / file


def test_find_backbone_rejects_missing_files(tmp_path):
    touch(tmp_path / "Head_1_17.pth", tmp_path / "Backbone_old.pth")
    with pytest.raises(DataError, match=r"no Backbone_Best\.pth or Backbone_EPOCH_BATCH\.pth"):
        run_dir.find_backbone(tmp_path)
    with pytest.raises(DataError, match="gone: no such file or folder"):
        run_dir.find_backbone(tmp_path / "gone")


def test_save_checkpoint_writes_three_loadable_files(run):
    file = save(run, 3, 51)
    assert file == run.checkpoints / "Backbone_3_51.pth"
    assert names(run.checkpoints) == ["Backbone_3_51.pth", "Head_3_51.pth", "Optimizer_3_51.pth"]
    backbone, head, rest = (
        torch.load(run.checkpoints / f"{part}_3_51.pth", weights_only=True) for part in CHECKPOINT_FILES
    )
    assert backbone.keys() == network().state_dict().keys()
    assert all(torch.equal(value, network().state_dict()[key]) for key, value in backbone.items())
    assert list(head) == ["weight"]
    assert (rest["epoch"], rest["step"], rest["classes"]) == (3, 51, ["Ann", "김연아"])
    assert rest["settings"] == {"backbone": "IR_50", "stages": (15, 23)}


def test_wrapped_networks_leave_no_trace_in_the_files(run):
    backbone = network()
    nn.DataParallel(backbone)  # what a run puts around it
    content = io.load(io.save_checkpoint(run.checkpoints, {"Backbone": backbone, "Head": nn.Linear(4, 2)}, state(1, 2)))
    assert not any(key.startswith("module.") for key in content)


@pytest.mark.parametrize("kind", CHECKPOINT_FILES)
def test_a_full_disk_keeps_earlier_checkpoints(run, kind):
    save(run, 1, 10, seed=1)
    before = {path.name: path.read_bytes() for path in run.checkpoints.iterdir()}
    for epoch in (1, 2):  # over the same names, and beside them
        full = run.checkpoints / f".{kind}_{epoch}_{epoch}0.{os.getpid()}.partial.pth"
        full.symlink_to("/dev/full")
        with pytest.raises(RunError) as caught:
            save(run, epoch, epoch * 10, seed=2)
        assert str(caught.value) == (
            f"{run.checkpoints / f'Backbone_{epoch}_{epoch}0.pth'}: no space left on the disk (No space left on "
            f"device). Free some space, and continue with --resume_dir={run.checkpoints}."
        )
        assert {path.name: path.read_bytes() for path in run.checkpoints.iterdir()} == before


@pytest.mark.parametrize("links", [True, False])
def test_the_best_files_are_those_of_one_epoch(run, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError("no links here")))
    for epoch in (1, 2):
        run_dir.save_best(run, save(run, epoch, epoch * 10, seed=epoch))
        assert names(run.best) == ["Backbone_Best.pth", "Head_Best.pth", "Optimizer_Best.pth"]
        for part in CHECKPOINT_FILES:
            source = run.checkpoints / f"{part}_{epoch}_{epoch * 10}.pth"
            assert (run.best / f"{part}_Best.pth").read_bytes() == source.read_bytes()
    (run.checkpoints / "Backbone_2_20.pth").unlink()
    resumable = run_dir.load_resumable(run.best)
    assert resumable.state.epoch == 2
    assert torch.equal(resumable.networks["Backbone"]["0.weight"], network(2).state_dict()["0.weight"])


def test_what_a_killed_run_left_of_the_best_files_does_no_harm(run):
    first, second = save(run, 1, 10), save(run, 2, 20, seed=2)
    before = first.read_bytes()
    run.best.mkdir(parents=True)
    os.link(first, run.best / f".Backbone_Best.{os.getpid()}.partial.pth")
    run_dir.save_best(run, second)
    assert first.read_bytes() == before
    assert (run.best / "Backbone_Best.pth").read_bytes() == second.read_bytes()
    assert names(run.best) == ["Backbone_Best.pth", "Head_Best.pth", "Optimizer_Best.pth"]


def test_best_files_stay_if_an_epoch_cannot_replace_them(run):
    run_dir.save_best(run, save(run, 1, 10))
    second = save(run, 2, 20)
    (run.checkpoints / "Head_2_20.pth").unlink()
    with pytest.raises(FileNotFoundError):
        run_dir.save_best(run, second)
    assert run_dir.load_resumable(run.best).state.epoch == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_would_run_code_are_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Evil()}, "Backbone_1_2.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=r"Backbone_1_2\.pth: not a checkpoint that can be loaded safely") as caught:
        io.load(Path("Backbone_1_2.pth"))
    assert "\n" not in str(caught.value)
    assert not Path("evil").exists()


def test_files_in_torchs_older_form_are_read_and_lists_refused(tmp_path):
    torch.save(network().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(io.load(tmp_path / "old.pth")["0.weight"], network().state_dict()["0.weight"])
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match=r"list\.pth: holds a list"):
        io.load(tmp_path / "list.pth")


def test_a_run_is_resumed_from_three_files(run):
    file = save(run, 1, 10)
    resumable = run_dir.load_resumable(run.checkpoints)
    assert resumable.files == {part: run.checkpoints / f"{part}_1_10.pth" for part in CHECKPOINT_FILES}
    assert resumable.networks["Backbone"].keys() == network().state_dict().keys() and list(
        resumable.networks["Head"]
    ) == ["weight"]
    assert resumable.state.step == 10
    with pytest.raises(DataError, match=r"resuming needs a Backbone file of a run of this toolkit.* is not to resume"):
        run_dir.load_resumable(file.with_name("Head_1_10.pth"))
    file.with_name("Head_1_10.pth").unlink()
    with pytest.raises(DataError, match=r"Head_1_10\.pth: missing"):
        run_dir.load_resumable(file)


def test_another_projects_optimizer_file_is_told_apart(run):
    file = save(run, 1, 10)
    torch.save({"state": {}, "param_groups": [], "epoch": 1}, run.checkpoints / "Optimizer_1_10.pth")
    with pytest.raises(DataError, match=r"Optimizer_1_10\.pth: lacks best_accuracy, best_epoch, .*Start a new run"):
        run_dir.load_resumable(file)


def test_states_of_earlier_versions_are_read(tmp_path):
    content = state(1, 10).to_dict()
    assert {"best_accuracy", "random_states", "ranks", "scaler"} <= content.keys()
    for name in ("ranks", "scaler", "epoch_step", "progress", "rank_states"):
        del content[name]
    read = RecognitionState.from_dict(content, tmp_path)
    assert (read.world_size, read.scaler, read.best, read.step) == (1, {}, 0.5, 10)
    assert (read.epoch_step, read.progress, read.rank_states) == (0, {}, [])


def test_resumed_run_keeps_its_folder_and_moves_later_epochs(run, tmp_path):
    for epoch in (1, 2, 10):
        save(run, epoch, epoch * 10)
    touch(run.checkpoints / "Evaluation.txt")
    resumed = run_dir.resumed_run(run_dir.load_resumable(run.checkpoints / "Backbone_2_20.pth"), *folders(tmp_path))
    assert resumed == run
    kept = [f"{part}_{epoch}_{epoch}0.pth" for part in CHECKPOINT_FILES for epoch in (1, 2)]
    assert names(run.checkpoints) == sorted([*kept, "Evaluation.txt", "superseded"])
    assert names(run.checkpoints / "superseded") == [f"{part}_10_100.pth" for part in CHECKPOINT_FILES]


def test_a_state_that_does_not_fit_names_a_key_and_the_remedy():
    good, file = network().state_dict(), Path("Backbone_1_2.pth")
    other = network(1)
    io.load_state_dict_strict(other, good, file)
    assert all(torch.equal(value, good[key]) for key, value in other.state_dict().items())
    for wrong, message in (
        ({**good, "0.weight": torch.zeros(4, 5)}, r"0\.weight is \(4, 5\) in the file and \(4, 3\) in the network"),
        ({**good, "extra": torch.zeros(1)}, r"extra is \(1,\) in the file and absent in the network"),
        ({key: value for key, value in good.items() if key != "0.bias"}, r"0\.bias is absent in the file and \(4,\)"),
    ):
        with pytest.raises(DataError, match=rf"Backbone_1_2\.pth: {message}.*start a new run"):
            io.load_state_dict_strict(other, wrong, file)


@pytest.mark.parametrize("key", ["0.weight", "1.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(key, value):
    module = network()
    io.check_finite(module, "backbone")
    module.state_dict()[key].view(-1)[2] = value
    with pytest.raises(RunError, match=rf"the backbone's {key} is no longer finite.*--lr"):
        io.check_finite(module, "backbone")


def test_random_states_make_the_same_numbers_again(run):
    torch.manual_seed(3)
    torch.rand(5)
    file = save(run, 1, 2)  # draws numbers of its own, before the state is taken
    saved = run_dir.load_resumable(file).state.rng_state
    expected = None
    for _ in range(2):
        io.set_rng_state(saved)
        drawn = nn.functional.dropout(torch.ones(100))
        assert expected is None or torch.equal(drawn, expected)
        expected = drawn
        torch.manual_seed(4)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (["Ann"], "trained on 2 identities, but imgs has 1"),
        (["Ann", "Bob"], "trained on '김연아', but imgs has 'Bob' in its place"),
    ],
)
def test_other_people_than_a_run_was_trained_on_are_an_error(run, found, message):
    resumable = run_dir.load_resumable(save(run, 1, 2))
    run_dir.check_classes(resumable, ["Ann", "김연아"], Path("imgs"))
    with pytest.raises(DataError, match=rf"Optimizer_1_2\.pth: {message}. Resume with the same data"):
        run_dir.check_classes(resumable, found, Path("imgs"))
