import contextlib
import copy
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator as StockCOCOEvaluator
from detectron2.evaluation import print_csv_format
from detectron2.structures import Boxes, Instances
from distributed import run_workers
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bn_detection.config import ConfigError, add_bn_detection_config
from bn_detection.data import LeakyShapesConfig, make_leaky_shapes, register_coco_json
from bn_detection.engine import evaluation
from bn_detection.engine.evaluation import COCOEvaluator, build_evaluator

faster_coco_eval = pytest.importorskip("faster_coco_eval")

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A registered dataset (name, ground truth, imperfect model outputs by image id)."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    made = make_leaky_shapes(
        root, 24, 0, LeakyShapesConfig(object_size=(22, 40), objects_per_image=(3, 6)), split="val"
    )
    name = "evaluation_shapes"
    register_coco_json([[name, str(made.annotations), str(made.images)]])
    DatasetCatalog.get(name)  # fills in the metadata
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(made.annotations)
    yield name, ground_truth, predict(ground_truth)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def predict(ground_truth):
    """Shifted, missed, doubled, misclassified and made-up objects; some scores tie."""
    rng = np.random.default_rng(0)
    outputs = {}
    for image_id in ground_truth.getImgIds():
        boxes, masks, classes, scores = [], [], [], []
        for annotation in ground_truth.loadAnns(ground_truth.getAnnIds(image_id)):
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                x, y, w, h = annotation["bbox"]
                boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, 2, 4))
                shift = rng.integers(-2, 3, 2)
                masks.append(np.roll(ground_truth.annToMask(annotation), shift, (0, 1)) > 0)
                wrong = rng.random() < 0.2
                classes.append(rng.integers(4) if wrong else annotation["category_id"] - 1)
                scores.append(round(rng.random(), 1))
        boxes.append(np.array([0.0, 0.0, 30.0, 30.0]))
        masks.append(np.pad(np.ones((30, 30), bool), ((0, 98), (0, 98))))
        classes.append(0)
        scores.append(0.5)
        outputs[image_id] = Instances(
            (128, 128),
            pred_boxes=Boxes(torch.tensor(np.array(boxes), dtype=torch.float32)),
            pred_masks=torch.tensor(np.array(masks)),
            pred_classes=torch.tensor(np.array(classes)),
            scores=torch.tensor(scores, dtype=torch.float64),
        )
    return outputs


def coco_results(outputs):
    """COCO-format results written from the instances, not with Detectron2's function."""
    from pycocotools import mask as mask_util

    results = []
    for image_id, instances in outputs.items():
        for i in range(len(instances)):
            x0, y0, x1, y1 = instances.pred_boxes.tensor[i].tolist()
            rle = mask_util.encode(np.asfortranarray(instances.pred_masks[i].numpy(), np.uint8))
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(instances.pred_classes[i]) + 1,
                    "score": float(instances.scores[i]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {**rle, "counts": rle["counts"].decode()},
                }
            )
    return results


def twelve_numbers(ground_truth, results, iou_type, evaluator=COCOeval, image_ids=None):
    results = copy.deepcopy(results)
    if iou_type == "segm":
        for result in results:  # else areas would be those of the boxes
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        computed = evaluator(ground_truth, ground_truth.loadRes(results), iou_type)
        if image_ids is not None:
            computed.params.imgIds = image_ids
        computed.evaluate()
        computed.accumulate()
        computed.summarize()
    return np.array(computed.stats[:12])


def run(evaluator, outputs):
    evaluator.reset()
    for image_id, instances in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_faster_coco_eval_gives_the_twelve_numbers_of_pycocotools(dataset, iou_type):
    _, ground_truth, outputs = dataset
    results = coco_results(outputs)
    slow = twelve_numbers(ground_truth, results, iou_type)
    fast = twelve_numbers(ground_truth, results, iou_type, faster_coco_eval.COCOeval_faster)
    assert 0.05 < slow[0] < 0.9  # imperfect, or the comparison says little
    assert np.isfinite(slow).all()
    np.testing.assert_allclose(fast, slow, atol=1e-9)


@pytest.mark.parametrize("installed", [True, False], ids=["faster-coco-eval", "pycocotools"])
def test_evaluator_gives_the_numbers_of_pycocotools(dataset, installed, monkeypatch, caplog):
    name, ground_truth, outputs = dataset
    if not installed:
        monkeypatch.setattr(evaluation, "COCOeval_faster", None)
    with caplog.at_level(logging.INFO):
        results = run(COCOEvaluator(name), outputs)
    for iou_type in ("bbox", "segm"):
        expected = 100 * twelve_numbers(ground_truth, coco_results(outputs), iou_type)[:6]
        found = [results[iou_type][metric] for metric in METRICS]
        expected[expected < 0] = np.nan
        np.testing.assert_allclose(found, expected, atol=1e-6)
    lines = [r.message for r in caplog.records if r.name == evaluation.__name__]
    tool = "faster-coco-eval" if installed else "pycocotools"
    assert lines == [f"COCO {kind} metrics by {tool}." for kind in ("bbox", "segm")]


def test_evaluator_agrees_with_stock_detectron2(dataset):
    name, _, outputs = dataset
    ours = run(COCOEvaluator(name), outputs)
    stock = run(StockCOCOEvaluator(name, use_fast_impl=False), outputs)
    assert ours.keys() == stock.keys()
    for task in ours:
        assert ours[task] == pytest.approx(stock[task], abs=1e-6, nan_ok=True)
        assert "AP-class_3" in ours[task]


def test_unreadable_images_are_not_counted_as_missed(dataset, tmp_path, caplog):
    name, ground_truth, outputs = dataset
    gone = [2, 5, 7]
    read = {k: v for k, v in outputs.items() if k not in gone}
    root = MetadataCatalog.get(name).image_root
    noted = [f"{root}/{ground_truth.imgs[i]['file_name']}" for i in gone]
    noted += ["/data/another/image.png", f"{root}/{ground_truth.imgs[1]['file_name']}"]  # 1: mended
    (tmp_path / "unreadable_images.txt").write_text("\n".join(noted + noted[:1]) + "\n")
    results = run(COCOEvaluator(name, unreadable_dir=str(tmp_path)), read)
    assert "3 of 24 images could not be read" in caplog.text
    for iou_type in ("bbox", "segm"):
        ids = sorted(read)
        expected = 100 * twelve_numbers(ground_truth, coco_results(read), iou_type, image_ids=ids)
        assert results[iou_type]["AP"] == pytest.approx(expected[0], abs=1e-6)
        all_images = 100 * twelve_numbers(ground_truth, coco_results(read), iou_type)
        assert results[iou_type]["AP"] > all_images[0] + 1


def test_no_readable_image_is_an_error(dataset, tmp_path):
    name, ground_truth, _ = dataset
    root = MetadataCatalog.get(name).image_root
    names = [f"{root}/{image['file_name']}\n" for image in ground_truth.dataset["images"]]
    (tmp_path / "unreadable_images.txt").write_text("".join(names))
    with pytest.raises(ConfigError, match=rf"{name}.*none of its 24 images"):
        run(COCOEvaluator(name, unreadable_dir=str(tmp_path)), {})


def empty_instances():
    return Instances(
        (128, 128),
        pred_boxes=Boxes(torch.zeros(0, 4)),
        pred_masks=torch.zeros(0, 128, 128, dtype=torch.bool),
        pred_classes=torch.zeros(0, dtype=torch.int64),
        scores=torch.zeros(0),
    )


@pytest.mark.parametrize("processed", [True, False], ids=["empty outputs", "no outputs"])
def test_no_predictions_is_an_ap_of_zero_and_a_warning(dataset, tmp_path, processed, caplog):
    name, _, outputs = dataset
    nothing = {image_id: empty_instances() for image_id in outputs} if processed else {}
    evaluator = COCOEvaluator(
        name, output_dir=str(tmp_path / "new"), tasks_without_predictions=["bbox", "segm"]
    )
    results = run(evaluator, nothing)
    assert list(results) == ["bbox", "segm"]
    for metrics in results.values():
        assert all(metrics[m] == 0 for m in ("AP", "AP50", "AP75", "APs", "APm", "AP-class_0"))
        assert np.isnan(metrics["APl"])  # there are no large objects
    assert "predicted nothing" in caplog.text
    print_csv_format(results)
    assert json.loads((tmp_path / "new/coco_instances_results.json").read_text()) == []


def test_evaluator_of_a_config_knows_its_tasks(dataset, tmp_path):
    name, _, outputs = dataset
    cfg = get_cfg()
    add_bn_detection_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    nothing = {image_id: empty_instances() for image_id in outputs}
    cfg.MODEL.MASK_ON = True
    assert list(run(build_evaluator(cfg, name), nothing)) == ["bbox", "segm"]
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"  # has no masks, whatever MASK_ON says
    assert list(run(build_evaluator(cfg, name), nothing)) == ["bbox"]
    assert (tmp_path / "inference/coco_instances_results.json").exists()


def test_a_dataset_without_an_evaluator_is_named(tmp_path):
    cfg = get_cfg()
    MetadataCatalog.get("has_no_evaluator").evaluator_type = "unheard_of"
    with pytest.raises(ConfigError, match=r"has_no_evaluator.*unheard_of.*coco, "):
        build_evaluator(cfg, "has_no_evaluator", str(tmp_path))
    MetadataCatalog.remove("has_no_evaluator")


def evaluate_half(rank, world_size, name, paths, outputs, folder):
    """A worker that sees every second image and could not read its first."""
    register_coco_json([[name, *paths]])
    DatasetCatalog.get(name)
    noted = Path(folder, str(rank))  # as on hosts that share no file system
    noted.mkdir()
    (noted / "unreadable_images.txt").write_text(f"{paths[1]}/{rank:06d}.png\n")
    mine = dict(list(outputs.items())[rank::world_size][1:])
    return run(COCOEvaluator(name, unreadable_dir=str(noted)), mine)


def test_workers_put_together_what_they_could_not_read(dataset, tmp_path):
    name, ground_truth, outputs = dataset
    metadata = MetadataCatalog.get(name)
    paths = [metadata.json_file, metadata.image_root]
    found, nothing = run_workers(evaluate_half, 2, name, paths, outputs, str(tmp_path))
    assert nothing == {}
    read = {k: v for k, v in outputs.items() if k not in (1, 2)}
    for iou_type in ("bbox", "segm"):
        expected = twelve_numbers(
            ground_truth, coco_results(read), iou_type, image_ids=sorted(read)
        )
        assert found[iou_type]["AP"] == pytest.approx(100 * expected[0], abs=1e-6)


def test_image_ids_that_are_text_give_the_same_numbers(dataset, tmp_path, own_catalogs):
    name, _, outputs = dataset
    content = json.loads(Path(MetadataCatalog.get(name).json_file).read_text())
    for image in content["images"]:
        image["id"] = f"image {image['id']:03}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']:03}"
    (tmp_path / "text.json").write_text(json.dumps(content))
    root = MetadataCatalog.get(name).image_root
    register_coco_json([["text_ids", str(tmp_path / "text.json"), root]])
    DatasetCatalog.get("text_ids")
    numbers = evaluated(name, outputs, tmp_path / "numbers")
    text = {f"image {image_id:03}": output for image_id, output in outputs.items()}
    # In the same order, which decides between equal scores.
    found = evaluated("text_ids", text, tmp_path / "text")
    for task, metrics in numbers.items():
        assert found[task] == pytest.approx(metrics, abs=1e-9, nan_ok=True)


def evaluated(name, outputs, folder):
    evaluator = COCOEvaluator(name, output_dir=str(folder), unreadable_dir=str(folder))
    evaluator.reset()
    for image_id, instances in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()
