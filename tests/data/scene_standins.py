"""Generated stand-ins: scenes without the carrier, and small annotated folders in every format."""

import json

import numpy as np
import torch
from PIL import Image

from data.scenes import ScenesData


def small_scenes(**options):
    """Scenes of generated blobs instead of MNIST digits; no network."""

    class Generated(ScenesData):
        def fetch(self):
            pass

        def read_objects(self):
            random = torch.Generator().manual_seed(3)
            out = {}
            for split, count in (("train", 40), ("val", 20), ("test", 20)):
                images = torch.zeros(count, 28, 28)
                labels = torch.randint(10, (count,), generator=random)
                for image, label in zip(images, labels.tolist(), strict=True):
                    image[4 + label // 2 : 24, 8 : 14 + label // 2] = 1.0
                out[split] = (images, labels)
            return out, [str(d) for d in range(10)]

    defaults = dict(train_scenes=12, val_scenes=6, test_scenes=6, batch_size=4, eval_batch_size=3)
    data = Generated(**{**defaults, **options})
    data.setup()
    return data


def write_image(path, height=40, width=60, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def coco_folder(root, images=4, **changes):
    """A COCO file with ids that have gaps, a polygon, run lengths, a crowd, and an image without objects."""
    for i in range(images):
        write_image(root / f"{i}.png", seed=i)
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(images)],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 3, "name": "apple"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 3, "bbox": [5, 5, 10, 20], "area": 200, "iscrowd": 0,
             "segmentation": [[5, 5, 15, 5, 15, 25, 5, 25]]},
            {"id": 2, "image_id": 11, "category_id": 90, "bbox": [0, 0, 30, 40], "area": 1200, "iscrowd": 1,
             "segmentation": {"size": [40, 60], "counts": [0, 1200, 1200]}},
            {"id": 3, "image_id": 12, "category_id": 90, "bbox": [20, 10, 0, 5], "area": 0, "iscrowd": 0,
             "segmentation": [[20, 10, 20, 15, 20, 12]]},
            {"id": 4, "image_id": 12, "category_id": 90, "bbox": [50, 30, 30, 30], "area": 100, "iscrowd": 0,
             "segmentation": [[50, 30, 60, 30, 60, 40, 50, 40]]},
        ],
    }  # fmt: skip
    content.update(changes)
    (root / "annotations.json").write_text(json.dumps(content))
    return root
