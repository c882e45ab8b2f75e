"""Train a small NAT on handwritten digits in PyTorch.

    python examples/train_torch.py --out runs/digits

Stop it at any moment, even by kill -9: the same command goes on where it was, and ends with the same
weights, bit for bit (on the same machine with the same number of threads).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import digits
import torch
from torch.nn import functional
from tqdm import tqdm

import torch_nat
from natcore.checkpoints import replacing


class Trainer:
    """A model, all that its training needs, and where it stands. ``save`` and ``resume`` carry everything."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.train_digits, self.validation_digits = digits.load(options.train, options.validation)
        self.steps_per_epoch = digits.steps_per_epoch(self.train_digits, options.batch)
        self.steps = options.epochs * self.steps_per_epoch
        torch.manual_seed(options.seed)
        self.model = self.build().to(self.device)
        for module in self.model.modules():  # the published std of 0.02 is meant for layers many times wider
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._warmup_then_cosine)
        self.step = 0
        self.accuracies: list[float] = []  # one per epoch

    def build(self) -> torch.nn.Module:
        """The model, on the CPU."""
        return torch_nat.NAT(digits.CONFIG)

    @property
    def checkpoint(self) -> Path:
        return self.options.out / "checkpoint.pt"

    def _warmup_then_cosine(self, step: int) -> float:
        warmup = max(1, self.steps // 20)
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))

    def run(self) -> None:
        """From wherever the training stands to its end."""
        for epoch in range(self.step // self.steps_per_epoch, self.options.epochs):
            end = (epoch + 1) * self.steps_per_epoch
            title = f"epoch {epoch + 1}/{self.options.epochs}"
            with tqdm(total=self.steps_per_epoch, initial=self.step % self.steps_per_epoch, desc=title) as bar:
                while self.step < end:
                    bar.set_postfix(loss=f"{self.train_step():.3f}", refresh=False)
                    bar.update()
                    if self.step < end and self.step % self.options.save_every == 0:
                        self.save()
            self.accuracies.append(self.accuracy())
            print(f"{title}: validation accuracy {self.accuracies[-1]:.2%}", flush=True)
            self.save()

    def train_step(self) -> float:
        images, labels = digits.batch(self.train_digits, self.options.batch, self.step, self.options.seed)
        self.model.train()
        logits = self.model(self._images(images))
        loss = functional.cross_entropy(logits, torch.from_numpy(labels).to(self.device), label_smoothing=0.1)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.item()

    def accuracy(self) -> float:
        """The share of the validation digits that the model names right."""
        named = self.logits(self.validation_digits).argmax(dim=1).cpu()
        return (named == torch.from_numpy(self.validation_digits.labels)).float().mean().item()

    @torch.no_grad()
    def logits(self, chosen: digits.Digits) -> torch.Tensor:
        self.model.eval()
        images = self._images(digits.model_input(chosen.images))
        return torch.cat([self.model(part) for part in images.split(250)])

    def _images(self, images: Any) -> torch.Tensor:
        return torch.from_numpy(images)[:, None].to(self.device)  # [count, 1, 56, 56]

    def save(self) -> None:
        """Written beside the old checkpoint, which is replaced only when the new one is on the disk."""
        state = {
            "options": self._identity(),
            "step": self.step,
            "accuracies": self.accuracies,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        with replacing(self.checkpoint) as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        """Take up the checkpoint. Raises ValueError where it belongs to a run with other options."""
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if state["options"] != self._identity():
            raise ValueError(
                f"{self.checkpoint} belongs to a run with the options {state['options']}, not {self._identity()}: "
                "give those, choose another --out, or delete the file."
            )
        self.step, self.accuracies = state["step"], state["accuracies"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def _identity(self) -> dict[str, Any]:
        """The options that change the result (the number of threads changes the last bits)."""
        names = ("device", "threads", "epochs", "batch", "lr", "seed", "train", "validation")
        return {name: getattr(self.options, name) for name in names}


def train(options: argparse.Namespace) -> Trainer:
    """Train, or go on with what an earlier run left in ``options.out``; writes model.safetensors there."""
    options.out.mkdir(parents=True, exist_ok=True)
    for leftover in options.out.glob("*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    trainer = Trainer(options)
    if trainer.checkpoint.exists():
        trainer.resume()
        print(f"{trainer.checkpoint}: going on from step {trainer.step} of {trainer.steps}")
    trainer.run()
    torch_nat.save(trainer.model, options.out / "model.safetensors")
    return trainer


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="the folder for what is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's; more of them stand in the way of natcore's")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=4000, help="how many digits to train on")
    parser.add_argument("--validation", type=int, default=1000, help="how many other digits to validate on")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS", help="and after every epoch")
    return parser


if __name__ == "__main__":
    finished = train(parser().parse_args())
    print(f"{finished.options.out / 'model.safetensors'}: validation accuracy {finished.accuracies[-1]:.2%}")
