"""The error of what needs torchvision, where torchvision does not import."""

import torch


def torchvision_missing(error: Exception) -> ImportError:
    """What to raise from an ImportError, or from the RuntimeError of a torchvision that another torch was built for."""
    return ImportError(
        "Mask R-CNN and Cascade Mask R-CNN need torchvision, in the build that belongs to torch "
        f"{torch.__version__} (pip install torchvision, from where torch came): {error}"
    )
