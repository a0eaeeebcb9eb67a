"""Test that benchmarks run, compare equal work, and write their tables. Times are not tested."""

import json
import math
import os
import random
import signal
import subprocess
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import all as everything
from benchmarks import baseline, soak, timing
from benchmarks import identify as benchmarks_identify
from benchmarks.verification import random_pairs
from model.head import ArcFace
from model.loss import FocalLoss
from util.embedding_table import EmbeddingTable
from util.errors import DataError, RunError, UsageError
from util.transform import eval_crop, normalize
from util.verification import verify


@pytest.mark.parametrize(
    "name",
    ["loader", "evaluation", "verification", "head", "network", pytest.param("export", marks=pytest.mark.slow)],
)
def test_benchmark_prints_and_writes_the_same_figures(name, tmp_path, capsys):
    file = tmp_path / "figures.json"
    import_module(f"benchmarks.{name}").main(["--quick", "--repeats=1", "--threads=1", f"--json={file}"])
    printed = capsys.readouterr().out
    found = timing.read_report(file)
    assert found.subject.startswith(name) and "threads: 1" in str(found)
    assert json.loads(file.read_text())["machine"] == timing.machine()
    for row, line in zip(found.rows, timing.markdown_table(found.rows)[2:], strict=True):
        assert line in printed
        assert all(math.isfinite(value) and value > 0 for value in (row.ours, row.baseline, row.ratio))


def test_calls_alternate_after_a_first_one_of_each():
    calls = []
    ours, theirs = timing.time_alternately(
        lambda: calls.append("a"), lambda: calls.append("b"), 2, lambda: calls.append("-")
    )
    assert "".join(calls) == "ab-" + "a-b-" * 2
    assert len(ours) == len(theirs) == 2


def test_ratio_is_the_median_over_the_turns():
    row = timing.rate_row("x", 10, ([1.0, 2.0, 5.0], [3.0, 4.0, 50.0]))
    assert (row.ours, row.baseline, row.ratio) == (5.0, 2.5, 3.0)
    assert timing.time_row("x", ([1.0], [3.0])).ratio == 3.0


@pytest.mark.parametrize("flags", [["--repeats=0"], ["--threads=0"], ["--threads=100000"], ["--images=0"], ["--no"]])
def test_invalid_flags_are_refused(flags):
    with pytest.raises(UsageError, match=flags[0].split("=")[0]):
        import_module("benchmarks.loader").main(flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_network_benchmark_is_skipped_without_a_gpu(capsys):
    import_module("benchmarks.network").main(["--device=cuda", "--quick"])
    assert capsys.readouterr().out.startswith("skipped: there is no CUDA device")


def test_baseline_loader_returns_training_batches(people_folder):
    for low_size in (None, 28):
        batches = list(baseline.training_loader(str(people_folder), 4, low_size, 10))
        assert len(batches) == 2
        for images, labels in batches:
            assert images.shape == (4, 3, 112, 112) and images.dtype == torch.float32 and labels.shape == (4,)
            assert -1 <= images.min() < images.max() <= 1


def test_baseline_preparation_equals_evaluation():
    coarse = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (112, 112), mode="bilinear").mul(255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    ours = normalize(torch.from_numpy(eval_crop(smooth)))
    crops, mirrored = baseline.evaluation_batch(smooth)
    for theirs, expected in ((crops, ours), (mirrored, ours.flip(3))):
        assert (theirs - expected).abs().max() <= 2 / 127.5  # two grey levels: libraries round differently


def test_baseline_head_and_loss_agree_with_ours():
    torch.manual_seed(0)
    theirs, ours = baseline.OneHotArcFace(8, 6), ArcFace(8, 6)
    ours.load_state_dict(theirs.state_dict())
    embeddings, labels = torch.randn(40, 8), torch.arange(40) % 6
    logits = theirs(embeddings, labels)
    torch.testing.assert_close(logits, ours(embeddings, labels), rtol=1e-4, atol=1e-3)
    # The baseline weights the mean of the batch, ours each sample. They are equal for one sample.
    for row, label in zip(logits[:, None], labels[:, None], strict=True):
        torch.testing.assert_close(baseline.BatchFocalLoss()(row, label), FocalLoss()(row, label))


def test_baseline_verification_agrees_with_ours():
    embeddings, issame = random_pairs(300)
    accuracy = verify(embeddings, issame).accuracy
    assert 0.6 < accuracy < 1  # neither chance nor trivial
    assert baseline.verify(embeddings, issame) == pytest.approx(accuracy, abs=1e-12)


def test_baseline_loop_learns():
    torch.manual_seed(0)
    backbone, head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8)), baseline.OneHotArcFace(8, 3, 8, 0)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.3)
    batches = [(torch.randn(6, 3, 2, 2), torch.arange(6) % 3)]

    def epoch() -> float:
        return baseline.train(backbone, head, baseline.BatchFocalLoss(), optimizer, batches, torch.device("cpu"))[0]

    first = epoch()
    assert [epoch() for _ in range(30)][-1] < 0.5 * first


def test_table_replaces_only_the_text_between_its_marks():
    text = (
        "# R\n\n<!-- benchmark: loader -->\nold\n<!-- end -->\nbetween\n<!-- benchmark: head -->\nkept\n<!-- end -->\n"
    )
    assert everything.insert_table(text, "loader", "new") == text.replace("old", "new")
    assert everything.insert_table(text, "head", "new") == text.replace("kept", "new")


def test_missing_marks_are_added_at_the_end_in_one_section():
    text = everything.insert_table(everything.insert_table("# R\n\nwords\n", "loader", "one"), "head", "two")
    assert text == (
        f"# R\n\nwords\n\n{everything.SECTION}\n\n<!-- benchmark: loader -->\none\n<!-- end -->\n\n"
        "<!-- benchmark: head -->\ntwo\n<!-- end -->\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        b"<!-- benchmark: loader -->\nno end\n",
        b"<!-- benchmark: loader -->\n<!-- benchmark: head -->\n<!-- end -->\n",
        b"<!-- benchmark: loader -->\n<!-- end -->\n<!-- benchmark: loader -->\n<!-- end -->\n",
        b"\xff\xfe",
    ],
)
def test_file_with_broken_marks_is_refused_and_kept(text, tmp_path):
    file = tmp_path / "results.md"
    file.write_bytes(text)
    with pytest.raises(DataError, match=r"results\.md"):
        everything.main(["--only=loader", "--quick", f"--results={file}"])
    assert file.read_bytes() == text


def test_quick_figures_are_refused_in_tables_md():
    with pytest.raises(DataError, match=r"TABLES\.md.*--results"):
        everything.main(["--quick"])


def test_all_writes_the_tables_of_the_chosen_subjects(tmp_path):
    file = tmp_path / "results.md"
    file.write_text("# R\n")
    everything.main(["--only", "verification", "--quick", f"--results={file}"])
    text = file.read_text()
    assert text.startswith(f"# R\n\n{everything.SECTION}\n") and text.count(everything.END) == 1
    assert "| threads: 1 |" in text and "python -m benchmarks.verification" in text and timing.machine() in text


def test_random_pairs_have_unit_length():
    embeddings, issame = random_pairs(50)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)
    assert issame.sum() == 25


# Stands in for train.py: an epoch takes 0.1 s, and the same command continues after the last one.
STUB = """
import os, pathlib, signal, subprocess, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
run = pathlib.Path(flags["checkpoint_dir"], "RUN")
run.mkdir(parents=True, exist_ok=True)
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
for number in CODES:
    signal.signal(number, lambda number, frame: os._exit(CODES[number]))
print("training", flush=True)
for epoch in range(1, int(flags["epochs"]) + 1):
    if not (run / f"Head_{epoch}_1.pth").exists():
        time.sleep(0.1)
        for name in ("Backbone", "Head"):
            partial = run / "partial"
            partial.write_bytes(pathlib.Path(__file__).with_name(f"{name}.pth").read_bytes())
            partial.rename(run / f"{name}_{epoch}_1.pth")
"""


@pytest.fixture
def stub(tmp_path, monkeypatch) -> Path:
    """Write the stub, with the weights that it saves, and return its file."""
    torch.save({"0.weight": torch.zeros(3)}, tmp_path / "Backbone.pth")
    torch.save({"weight": torch.ones(3)}, tmp_path / "Head.pth")
    file = tmp_path / "stub.py"
    file.write_text(STUB)
    limits = {"SCRIPT": file, "SAMPLE_EVERY": 0.1, "RESTART_SECONDS": 0.2, "END_WITHIN": 3, "GONE_WITHIN": 0.3}
    for name, value in limits.items():
        monkeypatch.setattr(soak, name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return file


@pytest.fixture
def soak_run(stub, tmp_path):
    """Start the stub as a run with faults, and kill what is left of it at the end."""
    run = soak.Run(tmp_path, tmp_path / "faults", epochs=1000, rng=random.Random(0))
    run.folder.mkdir()
    run.start()
    yield run
    soak.send(run, signal.SIGKILL, to_all=True)
    run.process.wait()


def test_soak_ends_with_the_weights_of_a_run_without_faults(stub, monkeypatch, capsys):
    monkeypatch.setattr(soak, "make_data", Path.mkdir)
    flags = ["--minutes=0.02", "--fault_every=0.3", "--faults", "sigterm", "sigint", "sigusr1", "sigkill_all"]
    soak.main(flags)
    printed = capsys.readouterr().out
    assert "faults are those without faults" in printed and "| threads | 1 | 1 | flat |" in printed
    assert "| sigterm |" in printed and ": ended after " in printed

    stub.write_text(STUB.replace('f"{name}.pth"', "f\"{'Head' if 'faults' in str(run) else name}.pth\""))
    with pytest.raises(RunError, match=r"^1 promises are broken; the weights after epoch \d+ differ"):
        soak.main(flags)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("143", "1", "exit code 1 instead of 143"),
        ("143", "1", "0 lines of errors instead of one"),
        ("training", "Traceback (most recent", "a traceback"),
        ("time.sleep(0.1)", "subprocess.run(['sleep', '60'])", "1 processes left after 0.3 s"),
        ("os._exit(CODES[number])", "None", "did not end within 3 s"),
    ],
)
def test_soak_notices_a_broken_promise(stub, tmp_path, old, new, problem):
    stub.write_text(STUB.replace(old, new))
    run = soak.Run(tmp_path, tmp_path / "faults", epochs=1000, rng=random.Random(0))
    run.start()
    run.wait(0.2)
    run.check_end("sigterm", soak.FAULTS["sigterm"](run))
    assert f"sigterm: {problem} (" in "".join(run.broken)
    deadline = time.monotonic() + 10  # a killed process ends when it is scheduled
    while soak.processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not soak.processes_of(run)


@pytest.mark.parametrize("name", ["bit_flip", "cut_file"])
def test_soak_damages_a_file_of_the_newest_checkpoint(soak_run, stub, name):
    while (expected := soak.FAULTS[name](soak_run)) is None:  # until there are two checkpoints
        assert soak_run.process.poll() is None
    assert expected == soak_run.process.returncode == -signal.SIGKILL
    damaged = []
    for files in soak_run.files():
        for file in files:
            original = stub.with_name(f"{file.name.split('_')[0]}.pth").read_bytes()
            content = file.read_bytes()
            if content != original:
                damaged.append(file)
                flips = sum((a ^ b).bit_count() for a, b in zip(content, original, strict=False))
                assert (
                    (len(content), flips) == (len(original), 1) if name == "bit_flip" else original.startswith(content)
                )
    assert len(damaged) == 1 and damaged[0] in soak_run.files()[0]


def test_soak_stops_and_kills_workers(stub, tmp_path):
    batch = "print('epoch 1/9  1/9  loss 2.0', flush=True)"
    stub.write_text(STUB.replace("time.sleep(0.1)", f"{batch}; subprocess.run(['sleep', '60'])"))
    run = soak.Run(tmp_path, tmp_path / "faults", epochs=1000, rng=random.Random(0))
    run.start()
    try:
        while soak.FAULTS["stop_worker"](run) is None:
            assert run.process.poll() is None
        (worker,) = [row[0] for row in soak.processes_of(run) if row[0] != run.process.pid]
        assert Path(f"/proc/{worker}/stat").read_text().split()[2] == "T"
        assert soak.FAULTS["kill_worker"](run) == 1
    finally:
        soak.send(run, signal.SIGKILL, to_all=True)
        run.process.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_soak_fills_the_disk(soak_run):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(soak_run.folder)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        assert soak.FAULTS["full_disk"](soak_run) is None  # nothing is saved
        (soak_run.folder / "checkpoint_dir/RUN").mkdir(parents=True)
        (soak_run.folder / "checkpoint_dir/RUN/Head_1_1.pth").touch()
        assert soak.FAULTS["full_disk"](soak_run) == 1
        assert os.statvfs(soak_run.folder).f_bavail == 0
    finally:
        subprocess.run(["umount", str(soak_run.folder)], check=True)


def test_identification_counts_names_and_false_alarms(tmp_path, capsys):
    """Compare with loops over the probes and the strangers."""
    rng = np.random.default_rng(4)
    names, vectors = [], []
    for person in range(300):
        center = rng.normal(size=24)
        for image in range(1 + 2 * (person % 4 < 2)):  # three images or one, among the even and the odd people
            names.append(f"p{person:03d}/{image}.jpg")
            vectors.append(center + 0.9 * rng.normal(size=24))
    embeddings = np.array(vectors, np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    table = EmbeddingTable(names, embeddings, quality=np.ones(len(names), np.float32), metadata={})
    table.write(tmp_path / "e.npz")
    benchmarks_identify.main([f"--embeddings={tmp_path}/e.npz", f"--json={tmp_path}/result.json"])
    result = json.loads((tmp_path / "result.json").read_text())

    people = [name[:4] for name in names]
    odd = [row for row, person in enumerate(people) if int(person[1:]) % 2 == 1]
    gallery = [row for row in odd if people.count(people[row]) == 3 and names[row].endswith("/0.jpg")]
    probes = [row for row in odd if people.count(people[row]) == 3 and row not in gallery]
    strangers = [row for row in odd if people.count(people[row]) == 1]
    assert [result[key] for key in ("gallery", "probes", "strangers")] == [75, 150, 75]
    assert (len(gallery), len(probes), len(strangers)) == (75, 150, 75)
    nearest = {row: max(gallery, key=lambda known: embeddings[known] @ embeddings[row]) for row in probes + strangers}
    best = {row: embeddings[known] @ embeddings[row] for row, known in nearest.items()}
    right = [row for row in probes if people[row] == people[nearest[row]]]
    assert result["rank1"] == pytest.approx(len(right) / len(probes)) and 0.5 < result["rank1"] < 1
    for outcome in result["outcomes"]:
        threshold = outcome["threshold"]
        assert outcome["right_name"] == pytest.approx(sum(best[row] >= threshold for row in right) / len(probes))
        assert outcome["false_alarms"] == pytest.approx(sum(best[row] >= threshold for row in strangers) / 75)
    assert f"rank-1: {result['rank1']:.4f}" in capsys.readouterr().out
