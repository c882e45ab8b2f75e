"""The two ablations of the NAT paper at the size of the digits: kinds of attention, and kernel sizes.

    python examples/ablations.py             # a training per setting and seed: see --epochs, --train
    python examples/ablations.py --quick     # seconds; the figures then mean nothing

The first compares neighborhood attention with SASA (zero padding) and with Swin's windows (W-MSA and SW-MSA in
turns), at a kernel of 7, the second NA's kernels of 3, 5, 7 and 9; the model, its parameters' number (but for the
bias table's) and its training are otherwise the same. Writes results.json, ablations.png and saliency.png to --out.
Interrupted, it goes on where it was. What came out is in benchmarks/results/ablations.md. Hassani et al.,
"Neighborhood Attention Transformer" (CVPR 2023).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import digits
import draw_saliency
import matplotlib
import torch
import train_torch

import torch_nat
from natcore.checkpoints import replacing
from torch_nat.models import NATBlock
from torch_nat.patterns import StandAloneAttention2D, WindowAttention2D

matplotlib.use("agg")
import matplotlib.pyplot as plt

ATTENTIONS = {"na": "NA", "sasa": "SASA", "swsa": "W-MSA + SW-MSA"}
KERNELS = (3, 5, 7, 9)
PAPERS_KERNEL = 7


@dataclass(frozen=True)
class Setting:
    attention: str  # a key of ATTENTIONS
    kernel: int

    @property
    def name(self) -> str:
        return f"{self.attention}-{self.kernel}"


SETTINGS = tuple(
    dict.fromkeys([Setting(kind, PAPERS_KERNEL) for kind in ATTENTIONS] + [Setting("na", k) for k in KERNELS])
)


def model_of(setting: Setting) -> torch_nat.NAT:
    """The digits' NAT without dilation, its attention replaced. A window larger than a map meets zeros, as in NAT."""
    model = torch_nat.NAT(replace(digits.CONFIG, kernel_size=setting.kernel, dilations=None))
    blocks = [module for module in model.modules() if isinstance(module, NATBlock)]
    for index, block in enumerate(blocks):
        old = block.attn
        if setting.attention == "sasa":
            block.attn = StandAloneAttention2D(old.embed_dim, old.num_heads, setting.kernel, rel_pos_bias=True)
        elif setting.attention == "swsa":  # both stages have an even number of blocks: they take turns
            shift = setting.kernel // 2 if index % 2 else 0
            block.attn = WindowAttention2D(old.embed_dim, old.num_heads, setting.kernel, shift, rel_pos_bias=True)
        block.attn.load_state_dict(old.state_dict())
    return model


class Trial(train_torch.Trainer):
    """The example's training, of another model."""

    def __init__(self, options: argparse.Namespace, setting: Setting) -> None:
        self.setting = setting
        super().__init__(options)

    def build(self) -> torch.nn.Module:
        model = model_of(self.setting)
        torch.manual_seed(self.options.seed)  # its linear layers start alike in every setting
        return model


def trial(options: argparse.Namespace, setting: Setting, seed: int) -> Trial:
    """One training, or what is left of it; its checkpoint lies in a folder of its own."""
    own = argparse.Namespace(**vars(options))
    own.seed, own.out = seed, options.out / f"{setting.name}-seed{seed}"
    own.out.mkdir(parents=True, exist_ok=True)
    made = Trial(own, setting)
    if made.checkpoint.exists():
        made.resume()
    started = time.perf_counter()
    made.run()
    print(f"{setting.name}, seed {seed}: {made.accuracies[-1]:.2%}, {time.perf_counter() - started:.0f} s", flush=True)
    return made


def table(results: dict[str, list[float]]) -> str:
    """Both ablations: accuracy on the validation digits, mean and spread over the seeds."""
    lines = []
    for title, settings in ablations().items():
        lines += ["", title, f"{'':24s} {'mean':>8s} {'std':>8s}   each seed"]
        for label, setting in settings.items():
            found = results[setting.name]
            spread = f"{stdev(found):8.2%}" if len(found) > 1 else f"{'-':>8s}"
            lines.append(f"{label:24s} {mean(found):8.2%} {spread}   {', '.join(f'{x:.2%}' for x in found)}")
        lines.append(verdict({label: results[setting.name] for label, setting in settings.items()}))
    return "\n".join(lines)


def ablations() -> dict[str, dict[str, Setting]]:
    kinds = {name: Setting(kind, PAPERS_KERNEL) for kind, name in ATTENTIONS.items()}
    kernels = {f"{k} x {k}": Setting("na", k) for k in KERNELS}
    return {f"Attention, kernel {PAPERS_KERNEL} x {PAPERS_KERNEL}": kinds, "Kernel size, NA": kernels}


def verdict(found: dict[str, list[float]]) -> str:
    """What the figures show, and no more: whether the best mean leads by more than the spread over seeds."""
    ranked = sorted(found, key=lambda label: mean(found[label]), reverse=True)
    best, second = found[ranked[0]], found[ranked[1]]
    lead = mean(best) - mean(second)
    if min(len(best), len(second)) < 2:
        return f"{ranked[0]} leads {ranked[1]} by {lead:.2%}; one seed tells no spread."
    error = ((stdev(best) ** 2 + stdev(second) ** 2) / len(best)) ** 0.5
    if lead <= 2 * error:
        return f"{ranked[0]} leads {ranked[1]} by {lead:.2%}, within two standard errors ({2 * error:.2%}): no winner."
    return f"{ranked[0]} leads {ranked[1]} by {lead:.2%}, more than two standard errors ({2 * error:.2%})."


def plot(results: dict[str, list[float]]) -> plt.Figure:  # type: ignore[name-defined]
    """A point per seed, a line per mean."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (title, settings) in zip(axes, ablations().items(), strict=True):
        for place, setting in enumerate(settings.values()):
            found = [100 * accuracy for accuracy in results[setting.name]]
            axis.plot([place] * len(found), found, "o", color="tab:blue", alpha=0.6)
            axis.hlines(mean(found), place - 0.25, place + 0.25, color="tab:red")
        axis.set_xticks(range(len(settings)), list(settings))
        axis.set_title(title)
    axes[0].set_ylabel("validation accuracy, %")
    return figure


def saliencies(trials: dict[str, Trial], count: int = 8, samples: int = 32) -> plt.Figure:  # type: ignore[name-defined]
    """Smoothed gradients of the same digits, a row per kind of attention."""
    images = next(iter(trials.values())).validation_digits.images[:count]
    rows = {name: draw_saliency.maps(made.model.cpu(), images, samples) for name, made in trials.items()}
    return draw_saliency.draw(images, rows)


def run(options: argparse.Namespace) -> dict[str, list[float]]:
    """Every setting with every seed. A result that is there already, for the same options, is kept."""
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    results: dict[str, list[float]] = {setting.name: [] for setting in SETTINGS}
    shown: dict[str, Trial] = {}
    for seed in range(options.seeds):  # seeds outermost: an interrupted run has compared all settings
        for setting in SETTINGS:
            made = trial(options, setting, seed)
            results[setting.name].append(made.accuracies[-1])
            if seed == 0 and setting.kernel == PAPERS_KERNEL:
                shown[ATTENTIONS[setting.attention]] = made
    training = {name: getattr(options, name) for name in ("epochs", "train", "validation", "batch", "lr", "seeds")}
    with replacing(options.out / "results.json") as temporary:
        Path(temporary).write_text(json.dumps({"training": training, "accuracies": results}, indent=1))
    plot(results).savefig(options.out / "ablations.png", dpi=120)
    saliencies(shown, samples=4 if options.quick else 32).savefig(options.out / "saliency.png", dpi=120)
    return results


def parser() -> argparse.ArgumentParser:
    parser = train_torch.parser()
    parser.description = __doc__
    parser.set_defaults(out=None, epochs=4)
    parser.add_argument("--seeds", type=int, default=3, help="trainings per setting, with seeds 0, 1, ...")
    parser.add_argument("--quick", action="store_true", help="60 digits, one epoch, two seeds")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    options.out = options.out or Path("runs/ablations-quick" if options.quick else "runs/ablations")
    if options.quick:
        options.train, options.validation, options.epochs, options.batch, options.seeds = 60, 40, 1, 20, 2
    started = time.perf_counter()
    print(table(run(options)))
    seconds = time.perf_counter() - started
    print(f"\nSee ablations.png and saliency.png in {options.out}. That took {seconds:.0f} s.")


if __name__ == "__main__":
    main()
