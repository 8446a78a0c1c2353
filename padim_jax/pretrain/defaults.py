"""Every setting of a pretraining with its default and its meaning."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe of the bundled weights."""
    config = ml_collections.ConfigDict()

    # Of the first weights, of the textures and of every image.
    config.seed = 0
    # resnet18 or resnet34, up to layer3.
    config.backbone = "resnet18"
    # random, or weights to go on from: bundled, a name or a file as for config.model.weights.
    config.start = "random"
    # Arithmetic of the network: float32, tf32 (float32 on CPUs) or bfloat16. What is trained
    # and the distances are always float32.
    config.precision = "tf32"

    config.images = ml_collections.ConfigDict()
    # Their side in pixels, a multiple of 16.
    config.images.size = 64
    # Kinds of textures, and pictures of each, that scenes are made of.
    config.images.classes = 260
    config.images.instances = 6
    # A folder of normal images of your own, to learn from as well; "" for none.
    config.images.photos = ""
    # This part of the scenes is cut from them.
    config.images.photo_part = 0.5
    # They are resized to so many pixels a side.
    config.images.photo_size = 256

    config.task = ml_collections.ConfigDict()
    # Of every scene so many images without defects, to which a Gaussian is fitted for every
    # patch, and so many with and without, whose defects are to stand out.
    config.task.good = 10
    config.task.inspected = 6
    # Channels that are kept for it, drawn anew in every step.
    config.task.channels = 100
    # Weight of: channels that say different things.
    config.task.redundancy = 0.05
    # Weight of: each cell's own pixels told from its features.
    config.task.pixels = 1.0

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.steps = 5600
    # Scenes a step, of all devices together.
    config.optimizer.scenes = 4
    # Its highest value, which falls to 0 along half a cosine.
    config.optimizer.learning_rate = 2e-3
    # Steps in which it rises.
    config.optimizer.warmup = 100
    config.optimizer.weight_decay = 0.05
    # Of the exponential moving average of the weights, which is the result.
    config.optimizer.average = 0.999

    # Seconds between two saves, from which an interrupted training goes on.
    config.checkpoint_every = 300.0
    return config
