"""All settings with default, meaning and range; configs/*.py start from here.

It is part of the package so that a config file works from any folder and installation:

    from padim_jax.config import defaults

    def get_config(preset="anomalib"):
        config = defaults.get_config(preset)
        config.dataset.root = "/path/to/parts"
        return config
"""

import ml_collections
from ml_collections import config_dict

from padim_jax.errors import UserError

PRESETS = ("anomalib", "seed", "paper", "rd")


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    """Return the default configuration in one of four published variants.

    Args:
      preset: "anomalib" (bilinear 256, no crop), "seed" (nearest 256, crop 224: the PyTorch
        project Lornatang/PaDiM), "paper" (bicubic 256, crop 224, bicubic map upsampling) or
        "rd" (the same with the paper's random rotations and crops: Rd-MVTec AD).

    Raises:
      UserError: the preset is unknown.
    """
    if preset not in PRESETS:
        raise UserError(
            f"--config=...:{preset}: expected one of {', '.join(PRESETS)} behind the colon"
        )
    config = ml_collections.ConfigDict()

    # Folder below dataset.root: one of the dataset's, or your own; "" if there is none.
    # all, or names separated by commas: one run after the other, with a table of all.
    config.category = "bottle"
    # Runs of each category; model.seed, and image.seed for random crops and rotations, increase
    # by 1 from run to run. The table then has means and standard deviations.
    # Range: 1 to 1000.
    config.repeats = 1

    config.dataset = ml_collections.ConfigDict()
    # Folder layout: mvtec_ad, mvtec_loco, mvtec_3d_ad, mvtec_ad_2, visa, btad, mpdd, ksdd2,
    # stc, magnetic_tile, folder or synthetic (docs/datasets.md).
    config.dataset.name = "mvtec_ad"
    # Folder that holds the category folders.
    config.dataset.root = "data/mvtec_ad"
    # folder: read the files in place. tfds: pack them once into array_record files below
    # tfds_dir and read those; results are identical.
    config.dataset.source = "folder"
    # Folder of packed datasets; "" is TensorFlow Datasets' default, $TFDS_DATA_DIR or
    # ~/tensorflow_datasets.
    config.dataset.tfds_dir = ""
    # Maximum number of training images, drawn with dataset.seed; 0 uses all.
    # Range: 0 to 2^63 - 1.
    config.dataset.train_images = 0
    # Training images that are not fitted, by their paths relative to the category's or root
    # folder as in suspects.csv: ("train/good/007.png",). A fit names images that look odd.
    config.dataset.exclude = ()
    # Seed of draws from a dataset: train_images, threshold.held_out, and the split of datasets
    # published without one. Range: 0 to 2^63 - 1.
    config.dataset.seed = 0
    # Whether unreadable images are left out and listed in the results, instead of ending the
    # run (docs/bad_inputs.md). A separate pass looks for them.
    config.dataset.skip_bad = False
    # Defect pixels of a mask: those that are not 0 (no), those that are 0 (yes), or those that
    # are not 0, with an error if they cover more than half of the image in more than a tenth of
    # the masks, as in inverted masks (check). "no" is for data with defects that large.
    config.dataset.inverted_masks = "check"

    config.image = ml_collections.ConfigDict()
    # Height and width that all images are resized to, whatever their aspect.
    # Range: 32 to 16384 pixels each.
    config.image.resize = (256, 256)
    # Pillow's filter: nearest, bilinear, bicubic or lanczos.
    config.image.method = "bilinear"
    # Height and width of the crop after resizing, or None. Range: 32 to image.resize each.
    config.image.crop = config_dict.placeholder(tuple)
    # Position of the crop: centre, or random (the paper's Rd-MVTec AD; drawn for each image of
    # training and evaluation with image.seed).
    config.image.crop_at = "centre"
    # Largest angle in degrees, in either direction, of the random rotation of each of these
    # images before cropping; 0 for none. Range: 0 to 180.
    config.image.rotation = 0.0
    # Seed of random angles and crops. Range: 0 to 2^63 - 1.
    config.image.seed = 0
    # Values of an image file that become 0 and 255. full: the limits of 8 or 16 bits. (low,
    # high): these two, in the file's own counts; values outside are clipped. train: the 0.1 and
    # 99.9 percentiles of all training pixels, determined by the fit and kept with the model.
    # For 16 bits that are used in part (thermal images, 12-bit cameras); not for colours of 16
    # bits.
    config.image.range = config_dict.FieldReference("full", field_type=object)
    # Per-channel mean and standard deviation (RGB, of values in 0..1) that the backbone was
    # trained with: ImageNet's. Divide values of 0..255 by 255.
    # Range: 0 to 1 each.
    config.image.mean = (0.485, 0.456, 0.406)
    # Range: 1e-6 to 1 each.
    config.image.std = (0.229, 0.224, 0.225)

    config.model = ml_collections.ConfigDict()
    # resnet18/34/50/101/152, wide_resnet50_2, wide_resnet101_2 or efficientnet_b5.
    config.model.backbone = "resnet18"
    # Stages whose feature maps form the embedding, shallowest first: of layer1 to layer4; for
    # efficientnet_b5 of block7, block20 and block26.
    config.model.layers = ("layer1", "layer2", "layer3")
    # A name (<backbone>.tv_in1k or <backbone>.tv2_in1k: torchvision's first and second ImageNet
    # weights, downloaded once from the Hugging Face hub; for efficientnet_b5
    # <backbone>.sw_in12k_ft_in1k; a suffix @REVISION selects another commit than the pinned
    # one), a .safetensors, .npz or .pth file, bundled (for resnet18 up to layer3: comes with
    # this package, trained on procedural images; lower results, but no download and none of
    # ImageNet's terms), or random. The default follows the backbone.
    config.model.weights = config.model.get_ref("backbone") + ".tv_in1k"
    # Number of the stages' channels that are kept, drawn at random: the paper uses 100 for
    # resnet18 and 550 for wide_resnet50_2. All of them: 448, 1792.
    # Range: 1 to all channels of model.layers.
    config.model.channels = 100
    # Seed of that draw: random.Random(seed).sample, as in the PyTorch projects.
    # Range: 0 to 2^63 - 1.
    config.model.seed = 42
    # Reduction of channels. random: that draw. none: all are kept, whatever `channels` says.
    # semi_orthogonal: `channels` random orthonormal mixtures of all (Kim et al. 2021). pca: the
    # `channels` principal components of the normal patches.
    config.model.reduction = "random"
    # Side of the square of cells that each stage's features are averaged over, an odd number.
    # Range: 1 to 63.
    config.model.pooling = 1
    # Upsampling of deeper stages to the first one's grid: nearest (as published) or bilinear.
    config.model.upsample = "nearest"
    # Arithmetic of the backbone: float32, tf32 (float32 on CPUs; PyTorch's default on NVIDIA
    # GPUs) or bfloat16. Statistics and distances are always float32.
    config.model.precision = "tf32"
    # Added to the covariance's diagonal (the paper's epsilon).
    # Range: 1e-4 to 1e6.
    config.model.regularization = 0.01
    # Statistics kept of the normal images: moments (mean and covariance), samples (the
    # embeddings themselves, smaller for few images), or auto for the smaller. Results agree up
    # to rounding.
    config.model.statistics = "auto"

    # Tolerance to displaced parts, in patches: each patch is compared with the Gaussians of all
    # patches this near, and takes the smallest distance. 1 multiplies the work of the distances
    # by about 9. Range: 0 to 8.
    config.model.shift = 0

    config.map = ml_collections.ConfigDict()
    # Interpolation from patch distances to the input's size: bilinear or bicubic.
    config.map.upsample = "bilinear"
    # Standard deviation of the Gaussian blur, in pixels of the input; 0 for none.
    # Range: 0 to 16384.
    config.map.sigma = 4.0

    config.score = ml_collections.ConfigDict()
    # Summary of an anomaly map that scores the image: max (its maximum, as published), top
    # (mean of its highest 1 %), band (standard deviation of the distances between blurs of 1
    # and 10 patches) or combined (top, band, deviation and total variation, measured by normal
    # images; needs thresholds).
    config.score.image = "max"

    # Thresholds from normal images alone, and calibrated scores.
    config.threshold = ml_collections.ConfigDict()
    # Normal images to use: leave_one_out (each training image as scored by the model without
    # it), held_out (images that are not fitted: the dataset's validation images, or if there
    # are none a part of the training images), auto (validation images if there are any, else
    # leave_one_out) or none.
    config.threshold.normal = "auto"
    # Groups of images that belong together, such as frames of one part: a regular expression
    # that is found in each image's relative path; its match, or the match of its parentheses,
    # names the group. Groups are left out and held out whole, and promises count them instead
    # of images. "" if all images are independent.
    config.threshold.groups = ""
    # Fraction of the training images that held_out keeps back, if it has to.
    # Range: above 0, below 1.
    config.threshold.held_out = 0.2
    # Fraction of normal images that may be called anomalous. 0, automatic: 1 %, or 1 / (n + 1)
    # if n images (or groups) promise no less. Explicit rates that cannot be promised are
    # extrapolated. Range: 0 to 0.9999.
    config.threshold.image_rate = 0.0
    # Fraction of their pixels that may be outlined. 0, by images: the pixel threshold is such
    # that at most image_rate of normal images have any outline. Range: 0 to 0.9999.
    config.threshold.pixel_rate = 0.0

    # Images per step, on all devices together; bounds memory, does not change results.
    # Range: 1 to 65536.
    config.batch_size = 32

    config.train = ml_collections.ConfigDict()
    # Seconds between saves of an unfinished fit, which resumes from the last one after an
    # interruption; 0 saves after each batch. Range: 0 to 1e9.
    config.train.checkpoint_every = 300.0

    config.metrics = ml_collections.ConfigDict()
    # Size at which anomaly maps are compared with masks. model: masks are resized (nearest) and
    # cropped like the images, as for published numbers; a small defect may vanish, with a
    # warning. full: maps are resized to each mask (bilinear), so that all defects count; pixels
    # outside the crop are excluded.
    config.metrics.resolution = "model"

    config.outputs = ml_collections.ConfigDict()
    # Five-panel pictures of test images: none, some (the best and worst scored of each defect
    # type) or all.
    config.outputs.figures = "some"
    # Raw anomaly maps, one file per image, float32: none, npy or tiff. --mode=predict always
    # writes them; as tiff for none.
    config.outputs.maps = "none"
    # report.html: all results of an evaluation on one page.
    config.outputs.report = True

    # Caches between runs, for speed alone; results do not depend on them, and they may be
    # deleted at any time.
    config.cache = ml_collections.ConfigDict()
    # Folder of the caches; "" is $XDG_CACHE_HOME/padim_jax or ~/.cache/padim_jax.
    config.cache.dir = ""
    # Maximum size in gigabytes (10^9 bytes) of decoded and resized images; the least recently
    # used are removed first; 0 keeps none. Range: 0 to 1e6.
    config.cache.images_gb = 4.0
    # Whether programs compiled by XLA are kept.
    config.cache.compilation = True

    if preset == "seed":
        config.image.method = "nearest"
        config.image.crop = (224, 224)
    elif preset in ("paper", "rd"):
        config.image.method = "bicubic"
        config.image.crop = (224, 224)
        config.map.upsample = "bicubic"
    if preset == "rd":
        config.image.rotation = 10.0
        config.image.crop_at = "random"
    return config
