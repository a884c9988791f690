"""transformers' Trainer with the alignment terms: what it adds is the loss, what it logs, and when it stops."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import visual_token_ids
from lmms_keyspace.malora.losses import warmup
from lmms_keyspace.malora.taps import key_taps, tapped
from lmms_keyspace.stats import hash_ranks
from lmms_keyspace.training.alignment import (
    CALIBRATION_TOKENS,
    Batch,
    Terms,
    TokenChooser,
    alignment_terms,
    calibrate,
    mean_over_layers,
    summed_gates,
)
from lmms_keyspace.training.checkpoints import saving
from lmms_keyspace.training.config import LossConfig
from lmms_keyspace.training.encoding import EXAMPLE_ID, Collator

LAST_GOOD = "last_good"
_GATES = ("gate_visual", "gate_text")


class AlignmentTrainer(Trainer):
    """Trains the active adapter of a PEFT model with cross-entropy, MMD^2 and Gram.

    The cross-entropy is the mean over the answer tokens of all ranks and accumulated batches; the terms compare tokens
    of all ranks of one batch and are averaged over accumulated batches. Without weights the terms are measured where a
    batch has both modalities.

    Args:
        model: with an adapter on key projections.
        args: of transformers.
        loss: weights and tokens of the terms.
        processor: the model's own.
        examples: items as `encoding.EncodedExamples` gives them.
        held_out: called with model and processor when `args` say that it is time to evaluate.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        loss: LossConfig,
        processor: Any,
        examples: Dataset[dict[str, Tensor]] | Sequence[dict[str, Tensor]],
        held_out: Callable[[Any, Any], Mapping[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        tokenizer = processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(pad),
            train_dataset=examples,
            eval_dataset=[] if held_out is not None else None,  # `evaluate` brings its own
            callbacks=[*(callbacks or ()), _StopAtNaN(self)],
        )
        self.loss = loss
        self.bandwidth2: dict[int, Tensor] = {}
        self._processor = processor
        self._held_out = held_out
        self._taps = key_taps(model, loss.space)
        chooser = partial(TokenChooser, visual_token_ids(model.config), tokenizer.all_special_ids, seed=args.seed)
        self._chooser = chooser(max_tokens=loss.max_tokens)
        self._calibration_chooser = chooser(max_tokens=CALIBRATION_TOKENS)
        self._sums: dict[str, Tensor | float] = defaultdict(float)  # since the last log, over steps

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers; first takes the bandwidths from the base model's keys."""
        self.bandwidth2 = calibrate(self.model, self._taps, self._calibration_batches(), self._calibration_chooser)  # type: ignore[arg-type]
        return super().train(*args, **kwargs)

    def _calibration_batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """The same examples whatever the number of ranks, so that ranks and resumed runs agree on the bandwidths."""
        examples: Any = self.train_dataset
        model: Any = self.model
        visual_ids = torch.tensor(visual_token_ids(model.config))
        ranks = hash_ranks([str(i) for i in range(len(examples))], self.args.seed, "calibration")
        by_rank = sorted(range(len(ranks)), key=ranks.__getitem__)
        pictured = (i for i in by_rank if torch.isin(examples[i]["input_ids"], visual_ids).any())
        chosen = sorted(islice(pictured, self.loss.calibration_examples))
        size = self.args.per_device_train_batch_size
        for start in range(0, len(chosen), size):
            batch = self.data_collator([examples[i] for i in chosen[start : start + size]])
            ids = batch.pop(EXAMPLE_ID)
            yield {name: self._placed(value) for name, value in batch.items()}, ids

    def _placed(self, value: Tensor) -> Tensor:
        model: Any = self.model
        return value.to(model.device, model.dtype if value.is_floating_point() else None)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy as transformers computes it, plus the terms of this batch."""
        inputs = dict(inputs)
        example_ids = inputs.pop(EXAMPLE_ID)
        inputs = {name: self._placed(value) for name, value in inputs.items()}
        with tapped(self._taps):
            ce, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # transformers has divided the cross-entropy by the tokens of all accumulated batches, or will divide the sum.
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        self._note_ce(ce.detach() if scaled else ce.detach() / self.current_gradient_accumulation_steps)
        loss = ce
        sides = self._chooser.choose(inputs, example_ids, self.state.global_step)
        if sides[0].n >= 2 or self.loss.lambda_mmd or self.loss.lambda_gram:
            terms = alignment_terms(self._taps, sides, self.loss, self.bandwidth2)
            share = 1 / self.current_gradient_accumulation_steps if scaled else 1.0
            if self.loss.lambda_mmd:
                loss = loss + share * self.loss.lambda_mmd * self._rise() * mean_over_layers(terms.mmd2)
            if self.loss.lambda_gram:
                loss = loss + share * self.loss.lambda_gram * mean_over_layers(terms.gram)
            self._note_terms(terms, summed_gates(self._taps, sides))
        for tap in self._taps:
            tap.clear()
        if self.accelerator.reduce(torch.isfinite(loss.detach()).float(), reduction="mean") < 1:
            self.stop_before_step("loss")
        return (loss, outputs) if return_outputs else loss

    def _rise(self) -> float:
        """The share of lambda_mmd that acts at this step."""
        return warmup(self.state.global_step, self.state.max_steps, self.loss.warmup)

    def _note_ce(self, ce: Tensor) -> None:
        self._sums["ce"] += ce
        self._sums["steps"] += 1 / self.current_gradient_accumulation_steps
        self._sums["lambda_mmd"] += self.loss.lambda_mmd * self._rise() / self.current_gradient_accumulation_steps

    def _note_terms(self, terms: Terms, gates: Tensor | None) -> None:
        self._add(
            {
                "mmd2": mean_over_layers(terms.mmd2),
                "gram": mean_over_layers(terms.gram),
                "key_norm_ratio_visual": terms.key_norm_ratio[0],
                "key_norm_ratio_text": terms.key_norm_ratio[1],
            }
            | {f"mmd2_layer_{layer}": value for layer, value in terms.mmd2.items()}
        )
        self._sums["measured"] += 1 / self.current_gradient_accumulation_steps
        if gates is not None:
            for name, (total, count) in zip(_GATES, gates, strict=True):
                self._add({name: total, f"{name}_tokens": count})

    def _add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] += value.detach() / self.current_gradient_accumulation_steps

    def stop_before_step(self, what: str) -> NoReturn:
        """Save the adapter, which the step at hand has not changed, in `LAST_GOOD` and end the run.

        Raises:
            InputError: always; `what` is not finite.
        """
        folder = Path(str(self.args.output_dir)) / LAST_GOOD
        with saving(folder):
            self._save(str(folder))
        raise InputError(
            what,
            f"not finite at step {self.state.global_step + 1}",
            f"the adapter as it was before this step is in {folder}; lower learning_rate or the lambdas, or look at "
            "this step's data.",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the log of a step the means since the last one: cross-entropy, terms, gates and key norms."""
        if "loss" in logs and self._sums:
            counts = {name: float(self._sums.pop(name, 0.0)) for name in ("steps", "measured")}
            names = sorted(self._sums)
            sums = torch.stack([torch.as_tensor(self._sums[name], dtype=torch.float32).cpu() for name in names])
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="mean")
            found = dict(zip(names, sums.tolist(), strict=True))
            per = dict.fromkeys(("ce", "lambda_mmd"), counts["steps"])
            per |= {name: found.pop(f"{name}_tokens") for name in _GATES if name in found}
            logs |= {name: value / per.get(name, counts["measured"]) for name, value in found.items()}
            self._sums.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Accuracy and text bias on the held-out scenes; there is no data set. Every rank answers all of them."""
        assert self._held_out is not None
        model: Any = self.model
        was_training = model.training
        model.eval()
        figures = self._held_out(model, self._processor)
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not where all steps are taken: a run that was stopped after its last one would take another on resuming."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with saving(str(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter alone; transformers would add a pickle of the arguments, which `training.json` records."""
        if self.args.should_save:
            model: Any = self.model
            folder = str(output_dir or self.args.output_dir)
            model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
            Path(folder, "README.md").unlink(missing_ok=True)  # PEFT's empty card; it names the base model's folder


class _StopAtNaN(TrainerCallback):
    """Ends a run whose gradients are not finite before they reach the weights, and keeps the weights."""

    def __init__(self, trainer: AlignmentTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]  # type: ignore[union-attr]
        # Half precision with a gradient scaler meets infinities in the normal course and skips such steps itself.
        if not args.fp16 and not all(torch.isfinite(gradient).all() for gradient in gradients):
            self._trainer.stop_before_step("gradient")
