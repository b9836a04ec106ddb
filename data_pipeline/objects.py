"""The objects of detection: boxes with classes, in memory-mapped tables beside a split's index (split.DETECTION).

The numbers are those of the source, to the bit, so an evaluation by these tables is one by the source's annotations.
"""

import numpy as np

from .split import CATEGORY_IDS, IMAGES, OBJECTS, Split


class ObjectTable:
    """The objects of a split's samples. Raises DataError if the split has none.

    category_ids: int64 [classes], the source's number of each class.
    """

    def __init__(self, split: Split):
        self._split = split
        self.objects, self.images = split.annotation(OBJECTS), split.annotation(IMAGES)
        self.category_ids = np.array(split.annotation(CATEGORY_IDS))

    def of(self, sample: int) -> np.ndarray:
        """The OBJECTs of a sample in the order of the source: a view of the memory map."""
        image = self.images[sample]
        first = int(image["first"])
        return self.objects[first : first + int(image["count"])]

    def image_id(self, sample: int) -> int:
        """The id that the source gave the sample's image."""
        return int(self.images["image_id"][sample])


def coco_json(split: Split, classes: tuple[str, ...]) -> dict:
    """The split's annotations as COCO's dict, without what its evaluation of boxes does not use (file names,
    segmentations).

    classes: the names of the classes in the order of the labels.
    """
    table, records = ObjectTable(split), split.records
    image_ids = table.images["image_id"].tolist()
    sizes = zip(records["width"].tolist(), records["height"].tolist(), strict=True)
    categories = table.category_ids.tolist()
    annotations = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": categories[label],
            "bbox": box,
            "area": area,
            "iscrowd": crowd,
        }
        for sample, image_id in enumerate(image_ids)
        for *box, area, label, crowd, number in table.of(sample).tolist()
    ]
    return {
        "images": [
            {"id": image_id, "width": width, "height": height}
            for image_id, (width, height) in zip(image_ids, sizes, strict=True)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in zip(categories, classes, strict=True)],
    }
