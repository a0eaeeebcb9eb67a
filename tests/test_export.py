"""Exported networks give the embeddings of the network that they were made from, and say what they take."""

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from applications.export import graph
from applications.export.__main__ import Flags, main, sample_faces
from applications.export.graph import Deployed, check_program, run_program, write_onnx, write_torch_export
from applications.export.quantize import quantize
from model.backbone import build_backbone
from util.calibration import Calibration, calibrate
from util.errors import DataError, RunError, UsageError
from util.evaluate import embed, evaluate
from util.files import sha256
from util.pairs import load_pairs
from util.public_networks import read_public_network
from util.transform import EVAL_CROPS, eval_crop, normalize

ROOT = Path(__file__).parents[1]


class Tiny(nn.Module):
    """A network that is exported in a second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4), nn.PReLU(8), nn.Conv2d(8, 8, 3, stride=4, groups=8), nn.Flatten()
        )
        self.features = nn.Linear(8 * 7 * 7, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(self.layers(images))


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    """Return smooth noise, (40, 112, 112, 3) uint8."""
    rng = np.random.default_rng(2)
    coarse = rng.integers(0, 256, (40, 9, 9, 3), dtype=np.uint8)
    return np.stack([cv2.resize(image, (112, 112), interpolation=cv2.INTER_CUBIC) for image in coarse])


@pytest.fixture(scope="module")
def place(tmp_path_factory, made_pairs):
    """Return a folder with a Backbone file, its ONNX file with a calibration, and what the program printed."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(1)
    network = build_backbone("MobileFaceNet_025", embedding_size=16)
    torch.save(network.state_dict(), root / "Backbone_Best.pth")
    vectors = F.normalize(torch.randn(200, 8)).numpy()
    made, _ = calibrate(vectors, np.arange(200), source="noise", network=sha256(root / "Backbone_Best.pth"))
    made.write(root / "calibration.json")
    main(
        [f"--network={root}/Backbone_Best.pth", f"--out={root}/net.onnx", f"--calibration={root}/calibration.json"]
        + ["--gpu_num=cpu", "--val_data", f"made={made_pairs[0]}"]
    )
    return root


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory) -> Path:
    """Return Tiny as ONNX with preprocessing, flip and the crop inside."""
    path = tmp_path_factory.mktemp("tiny") / "bytes.onnx"
    module = Deployed(Tiny(), "128", preprocessing=True, flip=True)
    write_onnx(module, {"crop": "whole", "channel_order": "RGB", "input_scale": "0..255"}, path)
    return path


@pytest.fixture(scope="module")
def tiny_floats(tmp_path_factory) -> Path:
    """Return Tiny as ONNX."""
    path = tmp_path_factory.mktemp("tiny") / "floats.onnx"
    write_onnx(Deployed(Tiny(), "whole", preprocessing=False, flip=False), {"crop": "128"}, path)
    return path


def test_exported_network_evaluates_like_its_file(place, made_pairs):
    pairs = load_pairs(made_pairs[0])
    results = []
    for file in ("Backbone_Best.pth", "net.onnx"):
        network = read_public_network(place / file)
        assert (network.crop, network.channel_order, network.embedding_size) == ("128", "RGB", 16)
        results.append(evaluate(network.network, [pairs], crop=network.crop)["HR"][pairs.name])
    np.testing.assert_allclose(results[0].distances, results[1].distances, atol=1e-4)
    assert results[0].accuracy == results[1].accuracy


def test_metadata_tells_what_the_network_takes(place):
    model = onnx.load(place / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    expected = {"input_size": "112", "channel_order": "RGB", "input_scale": "-1..1", "crop": "128", "flip": "false"}
    expected |= {"embedding_size": "16", "normalized": "false", "network": "MobileFaceNet_025"}
    assert expected.items() <= metadata.items()
    assert metadata["source_sha256"] == sha256(place / "Backbone_Best.pth")
    made = Calibration(**json.loads(metadata["calibration"]))
    assert float(metadata["threshold_at_far_1e-3"]) == pytest.approx(made.threshold(1e-3), abs=1e-4)
    assert float(metadata["threshold_at_far_1e-3"]) < float(metadata["threshold_at_far_1e-4"])
    assert model.opset_import[0].version >= 18


def test_batch_of_an_exported_network_is_dynamic(place, tiny_bytes):
    for file in (place / "net.onnx", tiny_bytes):
        graph_ = onnx.load(file).graph
        for value in (graph_.input[0], graph_.output[0]):
            assert value.type.tensor_type.shape.dim[0].dim_param == "N"
    images = torch.zeros(3, 112, 112, 3, dtype=torch.uint8)
    assert run_program(tiny_bytes, images).shape == (3, 16)  # batches of one and two


def test_exported_file_holds_no_path_of_this_machine(place, tiny_bytes):
    for file in (place / "net.onnx", tiny_bytes):
        content = file.read_bytes()
        assert str(ROOT).encode() not in content and b"site-packages" not in content


def test_crop_inside_has_the_bits_of_the_evaluation(faces):
    inside = graph._center_of_128(torch.from_numpy(faces)).numpy()
    np.testing.assert_array_equal(inside, eval_crop(faces))


def test_bytes_in_give_the_embeddings_of_the_evaluation(tiny_bytes, faces):
    exported = run_program(tiny_bytes, torch.from_numpy(faces))
    expected = embed(Tiny().eval(), eval_crop(faces))
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(exported.norm(dim=1), torch.ones(len(faces)))


def test_network_that_takes_bytes_is_read_and_evaluated(tiny_bytes, faces):
    network = read_public_network(tiny_bytes)
    assert (network.crop, network.input_scale, network.takes_bytes) == ("whole", "0..255", True)
    evaluated = embed(network.network, EVAL_CROPS[network.crop](faces))
    expected = embed(Tiny().eval(), eval_crop(faces))
    torch.testing.assert_close(evaluated, expected, rtol=0, atol=1e-5)


def test_torch_export_gives_the_same_embeddings(tmp_path, faces):
    module = Deployed(Tiny(), "128", preprocessing=True, flip=True)
    write_torch_export(module, {"crop": "whole"}, tmp_path / "net.pt2")
    check_program(module, tmp_path / "net.pt2", torch.from_numpy(faces))
    extra = {graph.METADATA_FILE: ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra[graph.METADATA_FILE]) == {"crop": "whole"}


def test_program_that_differs_from_torch_is_refused(tiny_floats, faces):
    images = normalize(torch.from_numpy(faces)).contiguous()
    module = Deployed(Tiny(), "whole", preprocessing=False, flip=False)
    assert check_program(module, tiny_floats, images) < 1e-5
    module.network.features.weight.data[0] *= 1.1
    with pytest.raises(RunError, match=r"floats.onnx: its embeddings differ from torch's by .*, more than 0.0001"):
        check_program(module, tiny_floats, images)


def test_int8_network_is_close_and_smaller(tiny_floats, tmp_path, faces):
    images = normalize(torch.from_numpy(faces)).contiguous()
    cosine = quantize(tiny_floats, images[:32], images[32:], {"crop": "128"}, tmp_path / "int8.onnx")
    before, after = (F.normalize(run_program(file, images[32:])) for file in (tiny_floats, tmp_path / "int8.onnx"))
    assert cosine == pytest.approx(float((before * after).sum(1).mean()))
    assert 0.99 < cosine < 0.999999
    operations = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert operations.count("QuantizeLinear") >= 2
    assert read_public_network(tmp_path / "int8.onnx").crop == "128"


def test_onnx_network_is_quantized_as_it_is(tiny_floats, write_image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("applications.export.quantize.CALIBRATION_FACES", 16)
    monkeypatch.setattr("applications.export.__main__.CHECKED_FACES", 4)
    people = write_image_folder(Ann=10, Bob=10)
    model = onnx.load(tiny_floats)  # as other projects write it: another name, and a fixed batch
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    for node in model.graph.node:
        node.input[:] = ["data" if name == graph.INPUT else name for name in node.input]
    model.graph.input[0].name = "data"
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    main(
        [
            f"--network={tmp_path}/foreign.onnx",
            f"--out={tmp_path}/int8.onnx",
            "--int8",
            f"--data={people}",
            "--gpu_num=cpu",
        ]
    )
    assert "int8: the mean cosine with the float32 embeddings of 4 other faces is 0.99" in capsys.readouterr().out
    network = read_public_network(tmp_path / "int8.onnx")
    assert network.metadata["quantized_from_sha256"] == sha256(tmp_path / "foreign.onnx")
    assert "source_sha256" not in network.metadata  # a calibration of the float network is not taken for it


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"out": "net.pth"}, r"--out=net.pth: must end in .onnx, or in .pt2"),
        ({"out": "net.pt2", "int8": True}, r"--out=net.pt2: --int8 and --val_data are for .onnx"),
        ({"out": "net.onnx", "int8": True}, r"--int8: needs faces .* Give --data"),
        ({"out": "net.onnx", "int8": True, "data": "d", "calibration": "c"}, r"--calibration: belongs to the float32"),
        ({"out": "net.onnx", "network": ""}, r"--network: '' is not a path"),
    ],
)
def test_mistakes_are_reported_before_the_work(given, message):
    with pytest.raises(UsageError, match=message):
        Flags(**{"network": "x.pth", **given})


def test_files_that_cannot_be_used_end_in_one_line(place, tiny_floats, tmp_path, end_of, people_folder):
    base = [f"--out={tmp_path}/o.onnx", "--gpu_num=cpu"]
    assert end_of(main, [*base, f"--network={tmp_path}/gone"])[0] == 3
    code, text = end_of(main, [*base, f"--network={tiny_floats}", "--flip"])
    assert code == 2 and "an ONNX network can be quantized" in text
    (tmp_path / "cut.onnx").write_bytes((place / "net.onnx").read_bytes()[:5000])
    code, text = end_of(main, [*base, f"--network={tmp_path}/cut.onnx"])
    assert code == 3 and text.count("\n") == 1 and "cut.onnx: not an ONNX network that can be run" in text
    code, text = end_of(main, [*base, f"--network={place}/Backbone_Best.pth", "--int8", f"--data={people_folder}"])
    assert code == 3 and "has 7 images, and --int8 needs 160" in text
    assert not (tmp_path / "o.onnx").exists()


def test_sampled_faces_are_those_of_the_set(people_folder):
    faces = sample_faces(people_folder, 20)
    assert len(faces) == 7 and len(sample_faces(people_folder, 3)) == 3
    files = sorted(people_folder.glob("*/*.jpg"))
    stored = {cv2.imread(str(file))[:, :, ::-1].tobytes() for file in files}
    assert {face.tobytes() for face in faces} == stored


def test_metadata_with_unknown_values_is_refused(tiny_floats, tmp_path):
    model = onnx.load(tiny_floats)
    onnx.helper.set_model_props(model, {"crop": "half"})
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(DataError, match=r"its metadata has crop 'half', and not 128 or whole. Export"):
        read_public_network(tmp_path / "odd.onnx")


@pytest.mark.slow
def test_public_network_is_exported_from_real_faces(shared, tmp_path, capsys):
    file = shared / "models/mobilefacenet_s1_ms1m.pth"
    if not file.is_file():
        pytest.skip("needs the public network of ../shared/models, absent here")
    main([f"--network={file}", f"--out={tmp_path}/net.onnx", f"--data={shared}/lfw/aligned_112", "--gpu_num=cpu"])
    text = capsys.readouterr().out
    difference = float(text.partition("32 faces: the largest difference of an embedding is ")[2].split()[0])
    assert difference < 1e-4


def test_export_that_differs_leaves_the_earlier_file(place, tmp_path, monkeypatch, end_of):
    (tmp_path / "net.onnx").write_text("earlier")
    monkeypatch.setattr(graph, "write_onnx", lambda module, metadata, path: path.write_bytes(b""))
    monkeypatch.setattr(graph, "run_program", lambda path, images: torch.ones(len(images), 16))
    code, text = end_of(main, [f"--network={place}/Backbone_Best.pth", f"--out={tmp_path}/net.onnx", "--gpu_num=cpu"])
    assert code == 1 and "its embeddings differ from torch's" in text and text.count("\n") == 1
    assert (tmp_path / "net.onnx").read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1
