"""transformers' Trainer, told what is ours: batches by step, losses by task, and snapshots.

B rows, L tokens, V words. What Trainer does well (accumulation, precision, clipping, schedule, DDP, FSDP2,
DeepSpeed, the loop itself) is left to it.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from medplib.data.record import TASKS
from medplib.errors import InputError, MedPLIBError
from medplib.language import decoder_layers
from medplib.stages import Stage
from medplib.training.batches import Collate, StepBatches
from medplib.training.recipe import Recipe
from medplib.training.snapshots import begin, prune, seal, step_folder, writing
from medplib.training.watch import Watch, save_bad_batch
from medplib.weights import check_fit

TRAINED = "trained.safetensors"  # in a snapshot: the parameters that train, and every buffer
TERMS = ("ce", "dice", "bce", "focal", "iou", "balance")
_ROWS = (*TERMS, *(f"ce_{task}" for task in TASKS), "tokens")
MASK_TERMS = ("dice", "bce", "focal", "iou")


class StageTrainer(Trainer):
    """Trains one stage.

    The loss of a step is that of its whole batch: a mean over all its answer tokens, or all its masks,
    however they are spread over forwards and processes.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, batches: StepBatches, collate: Collate, watch: Watch,
        *, folder: Path, keep: int, facts: dict[str, Any], workers: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(model=model, args=args, data_collator=collate, train_dataset=batches.data)
        self.remove_callback(PrinterCallback)
        self.batches, self.watch, self.folder, self.keep, self.facts = batches, watch, folder, keep, facts
        self.workers = workers
        self._divides = not hasattr(
            self, "loss_is_scaled_for_ga"
        )  # older versions divide by the accumulation
        self.loss_is_scaled_for_ga = True
        self._sums = torch.zeros(len(_ROWS), 2, device=args.device)  # of value x count, and of count
        self._window: list[dict[str, Any]] = []
        self.add_callback(watch)

    def create_accelerator_and_postprocess(self) -> None:
        """Also shard on CPUs: accelerate 1.15 drops the FSDP plugin there without a word and runs DDP."""
        super().create_accelerator_and_postprocess()
        plugin_args = getattr(self.args, "fsdp_plugin_args", None)
        if plugin_args and not self.is_fsdp_enabled and self.args.world_size > 1:
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args)
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:  # autocast, as with DDP: batch norms and losses keep their float32
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """accelerate wraps the forward in autocast, but not that of a model sharded by FSDP2."""
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            # An expert that one process chose and another did not: both must send its gradient.
            reduce_unused(self.model)
            # For sample pictures the mask side is called by itself, outside the forward that gathers it.
            torch.distributed.fsdp.register_fsdp_forward_method(self.model, "_draw_generated")
        return prepared

    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by accelerate: `batches` knows its process, and no global random number is drawn."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.workers,
            generator=torch.Generator(),
            pin_memory=self.args.device.type == "cuda",
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The forwards of one step, each told its part of the step's tokens and masks."""
        try:
            window = [next(epoch_iterator) for _ in range(num_batches)]
        except MedPLIBError as error:  # from a loader process it comes with that one's traceback
            last = str(error).strip().splitlines()[-1]
            raise type(error)(last.partition("Error: ")[2] or last) from error
        counts = torch.tensor([_counts(batch) for batch in window], dtype=torch.float64)  # (forwards, 3)
        total = counts.sum(0)
        if self.args.world_size > 1:
            total = (
                self.accelerator.reduce(total.to(torch.float32).to(self.args.device), "sum").double().cpu()
            )
        shares = counts[:, :2] / total[:2].clamp(min=1) * self.args.world_size
        for batch, share, count in zip(window, shares.tolist(), counts.tolist(), strict=True):
            batch["shares"], batch["counts"] = share, count
        self._window = window
        return window, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """() the weighted sum of the terms. Raises MedPLIBError, the batch saved, if it is not finite."""
        inputs = dict(inputs)
        tasks, (ce, masks), counts = inputs.pop("tasks"), inputs.pop("shares"), inputs.pop("counts")
        inputs.pop("origins")
        outputs = model(**inputs)
        config = self.accelerator.unwrap_model(model).config
        weights = dataclasses.asdict(config.losses)
        if "balance" in outputs.losses:
            weights["balance"] = config.moe.balance_loss_coef
        scale = dict.fromkeys(MASK_TERMS, masks) | {"ce": ce, "balance": 1 / len(self._window)}
        loss = sum(weights[name] * scale[name] * value for name, value in outputs.losses.items())
        if not bool(torch.isfinite(loss)):
            self._not_finite("loss", {k: v.item() for k, v in outputs.losses.items()})
        self._note(outputs, inputs["labels"], tasks, counts)
        if self.is_deepspeed_enabled and self.args.world_size > 1:
            # It reduces the gradients that are there: every process must have the same ones.
            loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        if self._divides:
            loss = loss * self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _note(self, outputs: Any, labels: Tensor, tasks: Tensor, counts: list[float]) -> None:
        """Add this forward to the sums of the next log line."""
        tokens, masks, read = counts
        for name, value in outputs.losses.items():
            count = tokens if name == "ce" else masks if name in MASK_TERMS else 1.0
            self._sums[TERMS.index(name)] += torch.stack((value.detach() * count, value.new_tensor(count)))
        target = labels[:, 1:]  # (B, L - 1)
        learned = target != -100
        each = F.cross_entropy(outputs.logits[:, :-1][learned].float(), target[learned], reduction="none")
        rows = tasks[:, None].expand_as(target)[learned] + len(TERMS)
        self._sums.index_add_(0, rows, torch.stack((each, torch.ones_like(each)), 1))
        self._sums[-1] += read

    def _clip_grad_norm(self, model):
        """The norm before clipping. Raises MedPLIBError, the batch saved, where a gradient is not finite."""
        norm = super()._clip_grad_norm(model)
        if (
            self.accelerator.scaler is None
            and norm is not None
            and not bool(torch.isfinite(torch.as_tensor(norm)))
        ):
            self._not_finite("gradient", {"norm": float(norm)})
        return norm

    def _check_weights(self) -> None:
        """Raise MedPLIBError, the batch saved, where a step left a weight that is not finite."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                values = parameter.detach()
                values = values.to_local() if hasattr(values, "to_local") else values  # FSDP2: this shard
                bad = values[~torch.isfinite(values)]
                if len(bad):
                    self._not_finite("weight", {name: float(bad[0])}, self.state.global_step)

    def _not_finite(self, what: str, values: dict[str, float], step: int | None = None) -> None:
        """step: by default the one that is being done."""
        step = self.state.global_step + 1 if step is None else step
        save_bad_batch(self.folder, step, self._window, what, values, self.args.process_index)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's numbers, with the mean of every term and task since the last line, over all processes."""
        if "loss" in logs:
            sums = (
                self.accelerator.reduce(self._sums, "sum") if self.args.world_size > 1 else self._sums.clone()
            )
            self._sums.zero_()
            names = [f"loss_{name}" for name in TERMS] + list(_ROWS[len(TERMS) : -1])
            means = {n: (s / c).item() for n, (s, c) in zip(names, sums[:-1], strict=True) if c > 0}
            logs = {**logs, **means, **self.watch.pace(self.state, sums[-1, 0].item())}
            logs["routing"] = self.watch.routing_since_last(self.accelerator)
            self.watch.write({"step": self.state.global_step, "epoch": self.epoch, **logs})
            logs.pop("routing")
        super().log(logs, start_time)

    @property
    def epoch(self) -> float:
        """How often the data have been gone through."""
        return self.state.global_step / self.batches.steps_per_epoch

    # -- snapshots -----------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        """One complete folder of finite weights, or none. Raises MedPLIBError; those before it stay."""
        self._check_weights()
        target = step_folder(self.folder, self.state.global_step)
        staging = begin(target) if self.args.should_save else target.with_name(f".incoming-{target.name}")
        self._wait()
        with writing(target, staging):
            if self.args.should_save and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                save_file(trained_state(self.model), staging / TRAINED)
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            if self.args.should_save:
                self.state.save_to_json(str(staging / "trainer_state.json"))
        self._wait()
        if self.args.should_save:
            seal(staging, target, {**self.facts, "step": self.state.global_step})
            prune(self.folder, self.keep)
        self._wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model if model is None else model, Path(resume_from_checkpoint) / TRAINED)

    def _wait(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()


def reduce_unused(model: nn.Module) -> None:
    """Have FSDP2 reduce a zero for what has no gradient on this process, as another process may have one."""
    if hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)
        return
    for module in model.modules():  # torch before 2.14: what that switch does
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
            group.post_backward = partial(_with_zeros, group, group.post_backward)


def _with_zeros(group: Any, post_backward: Callable[..., None], *arguments: Any) -> None:
    """What FSDP2 calls after the backward of a group of parameters, with zeros for gradients not there."""
    for sharded in group.fsdp_params if group.reduce_grads else ():
        whole = getattr(sharded, "_unsharded_param", None)
        if whole is None or not whole.requires_grad or sharded.unsharded_accumulated_grad is not None:
            continue
        if whole.grad is None:
            whole.grad = torch.zeros_like(whole)
    post_backward(*arguments)


def _counts(batch: dict[str, Any]) -> tuple[int, int, int]:
    """Answer tokens, masks, and tokens that are no padding."""
    answer = int((batch["labels"][:, 1:] != -100).sum())
    return answer, len(batch.get("masks", ())), int(batch["attention_mask"].sum())


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a stage changes, on the CPU: parameters that train and all buffers kept with the model."""
    kept = model.state_dict(keep_vars=True)
    trained = {id(p) for p in model.parameters() if p.requires_grad} | {id(b) for b in model.buffers()}
    seen: set[int] = set()
    state = {}
    for name, tensor in kept.items():
        if isinstance(tensor, Tensor) and id(tensor) in trained and id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().cpu().clone()
    return state


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model sharded by FSDP2, made whole on the CPU; every process calls it."""
    state = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        state[name] = whole.detach().cpu()
    return state


@torch.no_grad()
def load_trained(model: nn.Module, path: Path) -> None:
    """Put back what `trained_state` gave. Raises CheckpointError, nothing changed, if it does not fit."""
    own = model.state_dict(keep_vars=True)
    state = load_file(path)
    remedy = "Was the recipe changed? Choose another out folder for it."
    check_fit(state, trained_state(model), f"The weights of {str(path)!r}", remedy)
    for name, value in state.items():
        own[name].data.copy_(value)


def arguments(
    recipe: Recipe, stage: Stage, model: nn.Module, batches: StepBatches, folder: Path
) -> TrainingArguments:
    """The stage as transformers' TrainingArguments: AdamW, warm-up, decay."""
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    checkpointing = (
        "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    )
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": batches.steps,
        "per_device_train_batch_size": batches.micro_batch,
        "gradient_accumulation_steps": batches.accumulation,
        "learning_rate": stage.learning_rate,
        "adam_beta1": stage.betas[0],
        "adam_beta2": stage.betas[1],
        "weight_decay": stage.weight_decay,
        "optim": "adamw_torch",
        "max_grad_norm": stage.clip,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(stage.decay, stage.decay),
        "warmup_steps": round(stage.warmup * batches.steps_per_epoch),
        "seed": stage.seed,
        "bf16": stage.precision == "bf16",
        "fp16": stage.precision == "fp16",
        "use_cpu": recipe.device == "cpu",
        "logging_steps": recipe.log_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "report_to": list(recipe.report_to) or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # StepBatches begins where the snapshot ended
        "ddp_find_unused_parameters": True,  # an expert that nobody chose, a batch without masks
        "ddp_broadcast_buffers": False,
        checkpointing: recipe.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if recipe.gradient_checkpointing else None,
        "deepspeed": recipe.deepspeed and str(Path(recipe.deepspeed).expanduser()),
    }
    if recipe.strategy == "fsdp2" and batches.world > 1 and not recipe.deepspeed:
        layer = type(decoder_layers(model.language_model)[0]).__name__
        settings |= {"fsdp": True, "fsdp_config": {
            "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [layer],
            "cpu_ram_efficient_loading": False, "state_dict_type": "SHARDED_STATE_DICT",
        }}  # fmt: skip
    if (
        recipe.device != "cpu"
        and not torch.cuda.is_available()
        and torch.backends.mps.is_available() is False
    ):
        settings["use_cpu"] = True
    try:
        made = TrainingArguments(**settings)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"Stage '{stage.name}' cannot be trained here: {' '.join(str(error).split())}"
        ) from error
    if made.n_gpu > 1:  # Trainer would cut each tensor in two: images, masks and the indices between them
        warnings.warn(
            f"One process trains on one GPU, and {made.n_gpu} are here; to use them all: "
            f"torchrun --nproc-per-node {made.n_gpu} -m medplib train ...",
            stacklevel=2,
        )
        made._n_gpu = 1
    return made


def check_deepspeed(recipe: Recipe, stage: Stage, processes: int) -> None:
    """Raise InputError for a DeepSpeed file that cannot be read, or one that would spoil the stage.

    ZeRO 2 and 3, and overlap_comm, reduce gradients in the order in which they arrive, and gather weights as
    modules run. Both differ between processes here: an expert that one chose and another did not, a batch
    without masks. In bf16 and fp16 DeepSpeed casts every weight, closed ones, too.
    """
    path = str(recipe.deepspeed)
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        zero = content.get("zero_optimization", {})
        level, overlap = zero.get("stage", 0), zero.get("overlap_comm")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"deepspeed: {path!r} is no DeepSpeed configuration in JSON: {error}") from error
    if processes > 1 and (level not in (0, 1) or overlap not in (None, False)):
        raise InputError(
            f"deepspeed: {path!r} asks for ZeRO stage {level} with overlap_comm {overlap} on {processes} "
            "processes, where experts and masks that one process lacks would mix gradients up; use stage 1 "
            "without overlap_comm, or strategy=fsdp2, which shards weights and gradients, too."
        )
    fits = {"fp32": True, "bf16": recipe.dtype == "bfloat16", "fp16": False}[stage.precision]
    if not fits:
        raise InputError(
            f"deepspeed with stages.{stage.name}.precision={stage.precision} casts all weights, and dtype is "
            f"{recipe.dtype}: set dtype=bfloat16 and precision=bf16, or precision=fp32."
        )
