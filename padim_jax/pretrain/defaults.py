"""All settings of a pretraining with default, meaning and range."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe of the bundled weights."""
    config = ml_collections.ConfigDict()

    # Seed of the initial weights, of the textures and of all images. Range: 0 to 2^31 - 1.
    config.seed = 0
    # resnet18 or resnet34, up to layer3.
    config.backbone = "resnet18"
    # random, or weights to start from: bundled, a name or a file as for config.model.weights.
    config.start = "random"
    # Arithmetic of the network: float32, tf32 (float32 on CPUs) or bfloat16. Parameters and
    # distances are always float32.
    config.precision = "tf32"

    config.images = ml_collections.ConfigDict()
    # Side of the images in pixels, a multiple of 16. Range: 32 to 128.
    config.images.size = 64
    # Number of kinds of textures for scenes. Range: 13 to 100000 / instances.
    config.images.classes = 260
    # Number of pictures of each kind. Range: 1 to 100000 / classes.
    config.images.instances = 6
    # Folder of normal images of your own to learn from as well; "" for none.
    config.images.photos = ""
    # Fraction of the scenes that are cut from them. Range: 1e-3 to 1.
    config.images.photo_part = 0.5
    # Side in pixels that they are resized to. Range: images.size to 4096.
    config.images.photo_size = 256

    config.task = ml_collections.ConfigDict()
    # Images of each scene without defects, to which a Gaussian is fitted for each patch.
    # Range: 2 to 256.
    config.task.good = 10
    # Images with and without defects, which should stand out. Range: 1 to 256.
    config.task.inspected = 6
    # Number of channels kept for it, drawn anew in each step.
    # Range: 1 to all channels of layer1 to layer3.
    config.task.channels = 100
    # Weight of the redundancy of channels. Range: 0 to 1e6.
    config.task.redundancy = 0.05
    # Weight of the prediction of each cell's own pixels from its features. Range: 0 to 1e6.
    config.task.pixels = 1.0

    config.optimizer = ml_collections.ConfigDict()
    # Range: warmup + 1 to 10000000.
    config.optimizer.steps = 5600
    # Scenes per step, on all devices together. Range: 1 to 4096.
    config.optimizer.scenes = 4
    # Highest learning rate, which falls to 0 along half a cosine. Range: 1e-9 to 1.
    config.optimizer.learning_rate = 2e-3
    # Number of steps of its rise. Range: 0 to steps - 1.
    config.optimizer.warmup = 100
    # Range: 0 to 1.
    config.optimizer.weight_decay = 0.05
    # Decay of the exponential moving average of the weights, which is the result.
    # Range: 0 to 0.999999.
    config.optimizer.average = 0.999

    # Seconds between two saves, from which an interrupted training resumes.
    # Range: 0 to 1e9.
    config.checkpoint_every = 300.0
    return config
