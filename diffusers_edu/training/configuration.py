"""What a training run is: one dataclass, whose fields are the flags, saved beside the result before the first step."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ..errors import UsageError

CONFIG_NAME = "training_config.json"

# What may change between a run and its continuation, because it does not change what is learned.
OPERATIONAL = {
    "output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "dataloader_num_workers",
    "logging_steps",
    "validation_steps",
    "validation_samples",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "dry_run",
    # Their product with the number of processes must stay: checkpoints know it.
    "train_batch_size",
    "gradient_accumulation_steps",
}


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece: what is cut off leaves the old one."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingConfig:
    """One training run. The flags are those of diffusers' own training examples; the rung sets some defaults."""

    rung: str = flag("ddpm", "Which rung of the ladder to train.")
    output_dir: str = flag("runs/train", "Where the pipeline, its checkpoints, configuration and log go.")

    dataset_name: str | None = flag(None, "'digits' (bundled with scikit-learn), or any dataset for `datasets.load_dataset`.")
    dataset_config_name: str | None = flag(None, "The configuration of that dataset.")
    train_data_dir: str | None = flag(None, "A folder of images (with a folder per class, if any) or of parquet files.")
    image_column: str | None = flag(None, "The column of the images; by default the first one that holds images.")
    caption_column: str | None = flag(None, "The column of the captions, if any, for objectives that take them.")
    resolution: int | None = flag(
        None, "Height and width; by default the images' own where all share one of at most 64, else 64."
    )
    center_crop: bool = flag(True, "Crop to a square at the centre; without it, anywhere along the longer side.")
    random_flip: bool = flag(False, "Flip half of the images from left to right.")
    on_bad_image: Literal["error", "skip"] = flag(
        "error", "What to do about an image that cannot be read; skipped ones are counted."
    )
    streaming: bool = flag(
        False, "Read and decode images as they are needed, rather than keep all in memory; wants --resolution."
    )
    shuffle_buffer: int = flag(1000, "streaming: images among which each one is drawn.")

    vae_path: str | None = flag(
        None, "latent_diffusion: a saved vae run, or a VAE with AutoencoderKL's interface; by default one is trained."
    )
    posterior: Literal["diagonal", "full"] = flag("diagonal", "vae: the covariance of q(z | x).")
    kl_weight: float = flag(1.0, "vae: the weight of the KL term; 1 is the evidence lower bound.")
    num_stages: int = flag(10, "stacked rungs: the number of denoising autoencoders.")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = flag(
        "v_prediction", "diffusion: what the network predicts."
    )
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = flag(
        "squaredcos_cap_v2", "diffusion: the noise schedule."
    )
    num_train_timesteps: int = flag(1000, "diffusion: T, the number of noise levels.")
    # Of the two fixed variances the default is the one that loses less of the data's on a coarse grid.
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = flag(
        "fixed_large", "diffusion: the variance of a reverse step; a learned one is the network's, trained by the hybrid loss."
    )
    snr_gamma: float | None = flag(None, "diffusion: weight the loss by min(SNR, gamma), in units of x_0; 5 is usual.")
    dropout: float = flag(0.0, "diffusion: the dropout of the network.")
    class_conditional: bool = flag(False, "latent_diffusion: condition on the data's class labels.")
    conditioning_dropout_prob: float = flag(
        0.1, "The share of labels and captions dropped in training, for classifier-free guidance."
    )

    train_batch_size: int = flag(128, "Batch size of each process.")
    max_train_steps: int = flag(1000, "Optimiser steps.")
    gradient_accumulation_steps: int = flag(1, "Batches of each optimiser step.")
    learning_rate: float = flag(1e-3, "Peak learning rate.")
    lr_scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = flag(
        "cosine", "The course of the learning rate."
    )
    lr_warmup_steps: int = flag(50, "Steps over which the learning rate rises from 0.")
    adam_beta1: float = flag(0.9, "AdamW: decay of the mean.")
    adam_beta2: float = flag(0.999, "AdamW: decay of the square.")
    adam_weight_decay: float = flag(0.01, "AdamW: weight decay.")
    adam_epsilon: float = flag(1e-8, "AdamW: epsilon.")
    max_grad_norm: float = flag(1.0, "The norm at which gradients are clipped.")
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("no", "The dtype of the network's forward pass.")
    use_ema: bool = flag(True, "Keep an exponential moving average of the weights, and save that.")
    ema_max_decay: float = flag(0.995, "The largest decay of the average.")
    ema_inv_gamma: float = flag(1.0, "The decay at step n is 1 - (1 + n / inv_gamma)^-power, up to the largest.")
    ema_power: float = flag(0.75, "See ema_inv_gamma.")
    ema_sigma_rel: float | None = flag(
        None, "Average by power-function profiles instead, and save that of this length (a share of the run, such as 0.1); "
        "`diffusers-edu ema` makes others afterwards."
    )  # fmt: skip
    ema_snapshots: int = flag(16, "ema_sigma_rel: how often in the run the averages are kept.")

    seed: int = flag(0, "Of the weights, the order of the data and the noise.")
    dataloader_num_workers: int = flag(0, "Processes that load data; 0 loads in the training process.")
    checkpointing_steps: int = flag(500, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = flag(None, "Checkpoints to keep; the oldest go first. By default all are kept.")
    resume_from_checkpoint: str | None = flag(
        None, "'latest', or a checkpoint of this run, to which it goes back once: the same command given again goes on from the newest "
        "made since. By default, too, a run goes on from its newest; 'latest' also lets it be made longer."
    )  # fmt: skip
    validation_steps: int = flag(500, "Steps between held-out losses and grids of samples; 0 for none.")
    validation_samples: int = flag(16, "Samples of each grid; 0 for none.")
    logging_steps: int = flag(1, "Steps between lines of log.jsonl.")
    report_to: str | None = flag(None, "A tracker of Accelerate's besides: tensorboard, wandb, ...")
    dry_run: bool = flag(False, "Print the configuration, the size, the steps and the memory it will need, and train nothing.")
    push_to_hub: bool = flag(False, "Upload the pipeline at the end.")
    hub_model_id: str | None = flag(None, "The repository to upload to; by default the name of the output folder.")

    @property
    def learns_variance(self) -> bool:
        return self.variance_type in ("learned", "learned_range")

    def as_hyperparameters(self) -> dict[str, int | float | str | bool]:
        """The configuration as trackers take it."""
        return {k: v if isinstance(v, int | float | str) else str(v) for k, v in dataclasses.asdict(self).items()}

    def validate(self) -> None:
        """Raise a `UsageError` that names the flag for a value out of its range."""
        hints = get_type_hints(type(self))
        for name, hint in hints.items():
            choices, value = get_args(hint), getattr(self, name)
            if choices and isinstance(choices[0], str) and value not in choices:
                raise UsageError(f"--{name} {value}: choose from {', '.join(choices)}")
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise UsageError("give one of --dataset_name and --train_data_dir")
        positive = ("train_batch_size", "max_train_steps", "gradient_accumulation_steps", "num_stages", "num_train_timesteps",
                    "checkpointing_steps", "logging_steps", "learning_rate", "max_grad_norm", "kl_weight", "checkpoints_total_limit",
                    "resolution", "snr_gamma", "ema_snapshots", "shuffle_buffer",
                    "ema_inv_gamma", "ema_power")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name} {value}: it must be greater than 0")
        for name in ("lr_warmup_steps", "dataloader_num_workers", "seed", "adam_weight_decay", "adam_epsilon", "validation_steps",
                     "validation_samples"):  # fmt: skip
            if getattr(self, name) < 0:
                raise UsageError(f"--{name} {getattr(self, name)}: it must be 0 or more")
        if self.seed >= 2**32:
            raise UsageError(f"--seed {self.seed}: it must be less than 2^32")
        for name in ("conditioning_dropout_prob", "dropout", "ema_max_decay", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (value == 1 and name.startswith(("adam", "dropout"))):
                raise UsageError(f"--{name} {value}: it must lie between 0 and 1")
        if self.ema_sigma_rel is not None and not 0.01 <= self.ema_sigma_rel <= 0.25:
            raise UsageError(f"--ema_sigma_rel {self.ema_sigma_rel}: it must lie between 0.01 and 0.25")
        if self.streaming and (self.resolution is None or self.dataset_name == "digits"):
            raise UsageError("--streaming: give the --resolution of the images; the digits are in memory already")

    def save(self) -> None:
        """Write the configuration into the output folder.

        Raises:
            UsageError: the folder holds the configuration of another run. Nothing is changed then.
        """
        self.check_folder()
        self.write()

    def write(self) -> None:
        """As `save`, over whatever is there."""
        path = Path(self.output_dir) / CONFIG_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"--output_dir {self.output_dir}: cannot be written ({error.strerror})") from error

    def saved(self) -> dict[str, Any]:
        """The configuration that the output folder holds; {} where there is none.

        Raises:
            UsageError: it cannot be read.
        """
        path = Path(self.output_dir) / CONFIG_NAME
        if not path.exists():
            return {}
        try:
            return json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"{path} cannot be read; move the folder away or choose another --output_dir") from error

    def check_folder(self) -> None:
        """Raise a `UsageError` where the output folder holds the configuration of another run."""
        saved = self.saved()
        if not saved:
            return
        mine = dataclasses.asdict(self)
        # Asked for, a run may be made longer as it goes on, though its learning rate then ends elsewhere.
        free = OPERATIONAL | ({"max_train_steps"} if self.resume_from_checkpoint else set())
        changed = [name for name in mine if name not in free and saved.get(name) != mine[name]]
        if changed:
            differences = ", ".join(f"{name} {saved.get(name)} -> {mine[name]}" for name in changed)
            longer = ", or make it longer by --resume_from_checkpoint latest" if changed == ["max_train_steps"] else ""
            raise UsageError(
                f"{self.output_dir} holds another run ({differences}); choose another --output_dir, or move it away{longer}"
            )
