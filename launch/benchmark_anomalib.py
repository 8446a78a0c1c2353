"""A peer of the benchmark: anomalib's PaDiM, used as its documentation says.

Everything is anomalib's default, except the weights: none are downloaded.
"""

import time
from typing import Any

import benchmark_peer
import torch
from benchmark_peer import Task

benchmark_peer.import_torchvision()

from anomalib.data import MVTecAD  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from anomalib.models import Padim  # noqa: E402


def peer(task: Task) -> dict[str, Any]:
    """Does one of the tasks."""
    checkpoint = task.workdir / "model"
    measured: dict[str, Any] = {}
    torch.manual_seed(42)  # draws the channels
    model = Padim(
        backbone=task.backbone,
        n_features=task.channels,
        pre_trained=False,
        pre_processor=Padim.configure_pre_processor((task.size, task.size)),
    )
    benchmark_peer.load_weights(model.model.feature_extractor.feature_extractor, task.weights)
    data = MVTecAD(
        root=task.data.parent,
        category=task.data.name,
        train_batch_size=task.batch_size,
        eval_batch_size=task.batch_size,
    )
    engine = Engine(default_root_dir=task.workdir, accelerator="cpu")
    before = time.perf_counter()
    if task.name == "fit":
        engine.fit(model, datamodule=data)
        measured["fit"] = time.perf_counter() - before
        saved = engine.best_model_path
        assert saved
        checkpoint.unlink(missing_ok=True)
        checkpoint.symlink_to(saved)
    elif task.name == "test":
        measured["metrics"] = engine.test(model, datamodule=data, ckpt_path=checkpoint)
        measured["test"] = time.perf_counter() - before
    else:
        state = torch.load(checkpoint, map_location="cpu", weights_only=False)
        model.load_state_dict(state["state_dict"])
        model.eval()
        measured |= benchmark_peer.time_scoring(model.model, task.size, task.seconds)
    return measured


if __name__ == "__main__":
    benchmark_peer.main(peer)
