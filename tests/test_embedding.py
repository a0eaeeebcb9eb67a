"""Embedding many images: the same numbers as one image at a time, and nothing left out without a word."""

import numpy as np
import pytest
import torch
from torch import nn

from util.data.image_folder import ImageFolder
from util.embedding import embed_files, embed_images
from util.errors import DataError
from util.evaluate import embed
from util.image_io import read_photo
from util.public_networks import PublicNetwork
from util.transform import eval_crop

CPU = [torch.device("cpu")]


class Pixels(nn.Module):
    """A backbone that returns a 7x7 grid of the green channel, weighted so that the mirror image differs."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        grid = nn.functional.avg_pool2d(images[:, 1:2], 16).flatten(1)
        return grid * torch.linspace(0.5, 2, 49)


def network_of(module: nn.Module, crop: str = "128", embedding_size: int = 49) -> PublicNetwork:
    return PublicNetwork(
        name="Pixels",
        family="test",
        embedding_size=embedding_size,
        network=module,
        channel_order="RGB",
        input_scale="-1..1",
        crop=crop,
    )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_embed_images_equals_one_image_at_a_time(people_folder, batch_size):
    images = ImageFolder(people_folder)
    found = embed_images(network_of(Pixels()), images, CPU, batch_size)
    np.testing.assert_array_equal(found.indices, np.arange(7))
    for index in range(7):
        expected = embed(Pixels(), eval_crop(images.image(index))[None])[0].numpy()
        np.testing.assert_allclose(found.embeddings[index], expected, atol=1e-6)


def test_embed_files_gives_norms_of_the_mean_with_the_flip(people_folder):
    paths = sorted(people_folder.rglob("*.jpg"))
    found = embed_files(network_of(Pixels(), crop="whole"), paths, CPU)
    for path, norm in zip(paths, found.norms, strict=True):
        pixels = torch.from_numpy(read_photo(path)).permute(2, 0, 1)[None].float() / 127.5 - 1
        mean = (Pixels()(pixels) + Pixels()(pixels.flip(3))) / 2
        assert float(mean.norm()) == pytest.approx(float(norm), rel=1e-3)


def test_embed_files_names_and_counts_unreadable_images(people_folder, capsys):
    paths = sorted(people_folder.rglob("*.jpg"))
    paths[1].write_bytes(paths[1].read_bytes()[:50])
    paths[4].write_bytes(b"")
    paths.append(people_folder / "missing.jpg")
    found = embed_files(network_of(Pixels()), paths, CPU, batch_size=2)
    assert found.indices.tolist() == [0, 2, 3, 5, 6] and list(found.unreadable) == [1, 4, 7]
    assert len(found.embeddings) == len(found.norms) == 5
    printed = capsys.readouterr().out
    assert "3 of 8 images cannot be used" in printed and all(str(paths[i]) in printed for i in (1, 4, 7))


def test_embed_files_without_a_readable_image_raises(tmp_path):
    with pytest.raises(DataError, match=r"none of 1 images can be read, first: .*none.jpg"):
        embed_files(network_of(Pixels()), [tmp_path / "none.jpg"], CPU)
    with pytest.raises(DataError, match="none of 0 images"):
        embed_files(network_of(Pixels()), [], CPU)


def test_embed_files_names_the_image_without_an_embedding(people_folder):
    class Zero(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 4)

    with pytest.raises(DataError, match=r"7 of 7 images are zero or not finite, beginning with image 0"):
        embed_files(network_of(Zero(), embedding_size=4), sorted(people_folder.rglob("*.jpg")), CPU)
