"""What kind of device, and its compute capability."""

import torch


def is_cuda(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.version.cuda is not None


def is_rocm(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is not None


def is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def get_device_cc(device: torch.device | None = None) -> int:
    """10 * major + minor of the compute capability; 0 where there is no CUDA device."""
    if not torch.cuda.is_available() or torch.version.cuda is None or (device is not None and device.type != "cuda"):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
