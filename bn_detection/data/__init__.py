"""Datasets: the generator of LeakyShapes, COCO-format files from a config, and loaders."""

from ..dials import LeakyShapesConfig, honest_accuracy_limit
from .builtin import LEAKY_SHAPES, BuiltinDataset, find_builtin, register_builtin
from .coco_json import (
    check_dataset_files,
    check_datasets,
    check_num_classes,
    check_trained_classes,
    near_names,
    read_coco_json,
    register_coco_json,
)
from .corruptions import (
    CORRUPTIONS,
    Corruption,
    read_corrupted_name,
    register_corrupted,
    register_corruption,
)
from .image_folder import IMAGE_SUFFIXES, register_image_folder
from .leaky_drawing import draw_image, draw_shape
from .leaky_shapes import make_leaky_shapes
from .loaders import build_test_loader, build_train_loader, load_test_dicts
from .pascal_voc import VOCSummary, voc_to_coco
from .registration import register_datasets
from .single_pass import SinglePassLoader
from .unreadable import ReadableLoader, SkipUnreadable, read_unreadable, report_unreadable

__all__ = [
    "CORRUPTIONS",
    "IMAGE_SUFFIXES",
    "LEAKY_SHAPES",
    "BuiltinDataset",
    "Corruption",
    "LeakyShapesConfig",
    "ReadableLoader",
    "SinglePassLoader",
    "SkipUnreadable",
    "VOCSummary",
    "build_test_loader",
    "build_train_loader",
    "check_dataset_files",
    "check_datasets",
    "check_num_classes",
    "check_trained_classes",
    "draw_image",
    "draw_shape",
    "find_builtin",
    "honest_accuracy_limit",
    "load_test_dicts",
    "make_leaky_shapes",
    "near_names",
    "read_coco_json",
    "read_corrupted_name",
    "read_unreadable",
    "register_builtin",
    "register_coco_json",
    "register_corrupted",
    "register_corruption",
    "register_datasets",
    "register_image_folder",
    "report_unreadable",
    "voc_to_coco",
]
