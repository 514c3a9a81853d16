"""Load images and labels: by the name of a dataset, from files and folders, from a user's function, from torch datasets.

All come as ``(images, labels)``: float32 (N, C, H, W) in [0, 1] and int64 (N,). Normalisation belongs to the models.
"""

from ensemble_attacks.data.load import OFFERED, load_dataset, numbers_of, open_dataset, state_of
from ensemble_attacks.data.opened import Opened, as_tensors, from_python
from ensemble_attacks.data.records import DATASETS, Dataset

__all__ = [
    "DATASETS",
    "Dataset",
    "Opened",
    "OFFERED",
    "as_tensors",
    "from_python",
    "load_dataset",
    "numbers_of",
    "open_dataset",
    "state_of",
]
