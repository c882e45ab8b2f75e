"""NAT for Hugging Face: importing this registers model type "nat" with transformers' Auto classes.

    import torch_nat.hf
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained("shi-labs/nat-mini-in1k-224")
    nat = torch_nat.hf.from_huggingface(model)   # the same weights in torch_nat's own NAT

Dinat is transformers' own, repaired by `torch_nat.compat.natten.install`.
"""

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError("torch_nat.hf needs transformers 5: pip install 'transformers>=5'") from error

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from torch_nat.hf.configuration import NatConfig
from torch_nat.hf.conversion import (
    config_from_huggingface,
    config_to_huggingface,
    from_huggingface,
    parameters_from_huggingface,
    parameters_to_huggingface,
    to_huggingface,
)
from torch_nat.hf.modeling import NatBackbone, NatForImageClassification, NatModel, NatPreTrainedModel

__all__ = [
    "NatBackbone",
    "NatConfig",
    "NatForImageClassification",
    "NatModel",
    "NatPreTrainedModel",
    "config_from_huggingface",
    "config_to_huggingface",
    "from_huggingface",
    "parameters_from_huggingface",
    "parameters_to_huggingface",
    "to_huggingface",
]

if int(_transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"torch_nat.hf needs transformers 5, and {_transformers.__version__} is installed.")

AutoConfig.register("nat", NatConfig)
AutoModel.register(NatConfig, NatModel)
AutoModelForImageClassification.register(NatConfig, NatForImageClassification)
AutoBackbone.register(NatConfig, NatBackbone)
