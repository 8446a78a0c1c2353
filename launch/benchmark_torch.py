"""A peer of the benchmark: PaDiM in plain PyTorch, written as the known projects write it.

All embeddings are kept in memory, each patch's covariance is computed in turn and
inverted, distances are one batched product with the inverses. torchvision's ResNet cut
after layer3, DataLoader with a worker per core, channels last (faster than the default).
"""

import os
import pathlib
import random
import time
from typing import Any

import benchmark_peer
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from benchmark_peer import Task
from PIL import Image
from torch.utils.data import DataLoader, Dataset

torchvision = benchmark_peer.import_torchvision()
from torchvision import transforms  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402

LAYERS = ("layer1", "layer2", "layer3")
REGULARIZATION = 0.01


class Images(Dataset):
    """Images of a split with their labels and masks, in MVTec AD's layout."""

    def __init__(self, category: pathlib.Path, split: str, size: int):
        self.paths = sorted((category / split).glob("*/*.png"))
        self.size = size
        self.transform = transforms.Compose(
            [
                transforms.Resize((size, size)),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, np.ndarray]:
        path = self.paths[index]
        image = self.transform(Image.open(path).convert("RGB"))
        defect = path.parent.name
        mask = np.zeros((self.size, self.size), bool)
        if defect != "good":
            place = path.parents[2] / "ground_truth" / defect / f"{path.stem}_mask.png"
            resized = (
                Image.open(place).convert("L").resize(mask.shape, Image.Resampling.NEAREST)
            )
            mask = np.asarray(resized) > 127
        return image, int(defect != "good"), mask


class PaDiM:
    """A backbone and, once fitted, the Gaussians of all patches."""

    def __init__(self, task: Task):
        network = getattr(torchvision.models, task.backbone)(weights=None)
        benchmark_peer.load_weights(network, task.weights)
        extractor = create_feature_extractor(network.eval(), list(LAYERS))
        self.extractor = extractor.to(memory_format=torch.channels_last)
        total = sum(
            features.shape[1] for features in self.extractor(torch.zeros(1, 3, 64, 64)).values()
        )
        self.index = torch.tensor(random.Random(42).sample(range(total), task.channels))
        self.mean = torch.empty(0)
        self.inverse = torch.empty(0)
        weight = torch.exp(-(torch.arange(-16.0, 17.0) ** 2) / (2 * 4.0**2))
        self.blur = weight / weight.sum()

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (b, 3, h, w) to embeddings (b, d, p)."""
        features = list(
            self.extractor(images.contiguous(memory_format=torch.channels_last)).values()
        )
        grid = features[0].shape[-2:]
        upsampled = [F.interpolate(feature, grid, mode="nearest") for feature in features]
        return torch.cat(upsampled, 1).index_select(1, self.index).flatten(2)

    def fit(self, embeddings: torch.Tensor) -> None:
        """Mean and inverse covariance of every patch, from all embeddings (n, d, p)."""
        _, channels, patches = embeddings.shape
        self.mean = embeddings.mean(0)
        covariance = torch.empty(patches, channels, channels)
        for patch in range(patches):
            covariance[patch] = embeddings[:, :, patch].T.cov()
        covariance.diagonal(dim1=1, dim2=2).add_(REGULARIZATION)
        self.inverse = torch.linalg.inv(covariance)

    def score(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images (b, 3, h, w) to maps (b, h, w) and scores (b,)."""
        delta = (self.embed(images) - self.mean).permute(2, 0, 1)
        squared = ((delta @ self.inverse) * delta).sum(2).T
        side = (images.shape[-2] + 3) // 4
        distances = squared.clamp(min=0).sqrt().unflatten(1, (1, side, -1))
        maps = F.interpolate(distances, images.shape[-2:], mode="bilinear", align_corners=False)
        maps = F.pad(maps, (16, 16, 16, 16), mode="reflect")
        maps = F.conv2d(maps, self.blur.view(1, 1, -1, 1))
        maps = F.conv2d(maps, self.blur.view(1, 1, 1, -1))[:, 0]
        return maps, maps.amax((1, 2))


def loader(task: Task, split: str) -> DataLoader:
    """Batches of a split."""
    return DataLoader(
        Images(task.data, split, task.size),
        batch_size=task.batch_size,
        num_workers=os.cpu_count() or 1,
    )


@torch.inference_mode()
def fit(task: Task, model: PaDiM, saved: pathlib.Path) -> dict[str, Any]:
    """Images to a saved model."""
    start = time.perf_counter()
    embeddings = torch.cat([model.embed(images) for images, _, _ in loader(task, "train")])
    extracted = time.perf_counter()
    model.fit(embeddings)
    fitted = time.perf_counter()
    state = {"index": model.index, "mean": model.mean, "inverse": model.inverse}
    torch.save(state, saved)
    return {
        "decode_and_extract": extracted - start,
        "moments_and_inverse": fitted - extracted,
        "save": time.perf_counter() - fitted,
    }


@torch.inference_mode()
def test(task: Task, model: PaDiM) -> dict[str, Any]:
    """Images to AUROCs, as files, and a heat map of each image."""
    # Where scikit-learn and matplotlib are used, as in the known projects.
    import matplotlib.pyplot as plt
    from sklearn.metrics import roc_auc_score

    start = time.perf_counter()
    labels, masks, maps, scores = [], [], [], []
    for images, label, mask in loader(task, "test"):
        found, score = model.score(images)
        maps.append(found)
        scores.append(score)
        labels.append(label)
        masks.append(mask)
    scored = time.perf_counter()
    all_maps = torch.cat(maps).numpy()
    metrics = {
        "image_auroc": roc_auc_score(torch.cat(labels).numpy(), torch.cat(scores).numpy()),
        "pixel_auroc": roc_auc_score(torch.cat(masks).numpy().ravel(), all_maps.ravel()),
    }
    measured = time.perf_counter()
    for number, heat in enumerate(all_maps):
        plt.imsave(task.workdir / f"{number:03}.jpg", heat, cmap="jet", vmax=all_maps.max())
    return {
        "decode_and_score": scored - start,
        "measure": measured - scored,
        "figures": time.perf_counter() - measured,
        "metrics": metrics,
    }


def peer(task: Task) -> dict[str, Any]:
    """Does one of the tasks."""
    model = PaDiM(task)
    saved = task.workdir / "model"
    if task.name == "fit":
        return fit(task, model, saved)
    state = torch.load(saved)
    model.index, model.mean, model.inverse = state["index"], state["mean"], state["inverse"]
    if task.name == "test":
        return test(task, model)
    return benchmark_peer.time_scoring(model.score, task.size, task.seconds)


if __name__ == "__main__":
    benchmark_peer.main(peer)
