"""The parameters of the `train` stage: everything that decides the result of a training."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from polytrope.models import make_config
from polytrope.models.configurations import FIXED, MODEL_KINDS, NO_ACTIVATION, activation_configs, all_parts
from polytrope.pipeline.data.registered import RegisteredAlias, RegisteredName
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.activation_parameters import (
    Activation,
    AnyStart,
    Interval,
    spelled_out,
)
from polytrope.pipeline.stages.train.default_start import with_start
from polytrope.pipeline.stages.train.linearize_options import refuse_with_linearize
from polytrope.pipeline.stages.train.part_parameters import Attention, FeedForward, Mixer, Norm
from polytrope.pipeline.stages.train.trainable import (
    ADAPTERS,
    COEFFICIENTS,
    GROUPS,
    MULTIPLICATIVE,
    MULTIPLICATIVE_PARTS,
    RATES,
    check_entry,
)

if TYPE_CHECKING:
    ArchitectureName = str
else:
    ArchitectureName = Literal[tuple(MODEL_KINDS)]

Decay = Annotated[float, Field(ge=0, lt=1)]


class ActivationOptions(BaseModel):
    """Options for the learnable activations of a model; each goes to the families that have it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    init: AnyStart | None = Field(
        None,
        description="variance_preserving, stable (polynomials: nets without normalisation stay there), torchortho (as "
        "published, where there is one), or a function to imitate: gelu, relu, silu, …",
    )
    interval: Interval | None = Field(
        None,
        description="beyond it the function goes on along its tangents; default: as each activation says, [-2, 2] for "
        "a polynomial that starts as a function",
    )
    per_channel: bool = Field(False, description="coefficients of their own for every channel, not one set per block")


SHARDED = "zero_stage 3 leaves no worker the factors to multiply; use a lower one"
_DENOMINATORS = "only attention: power and norm: rms have denominators"


class ModelParameters(BaseModel):
    """The model to train from scratch. Fields that belong to another architecture are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    architecture: ArchitectureName = Field("gpt2", description="gpt2 (text), convnext (images) or mlp (numbers)")
    preset: str | None = Field(
        None, description="published size: gpt2, gpt2-medium, gpt2-large, gpt2-xl; convnext-atto … convnext-large"
    )
    activation: Activation | None = Field(
        None,
        description="one activation (gelu, hermite3, or {name, degree, …}), a list with one per block, "
        "or a list of {layers: 0-5, name: …}",
    )
    activation_options: ActivationOptions | None = Field(
        None,
        description="init, interval, per_channel of the learnable activations that have such an option; the log says "
        "which have none",
    )
    attention: Attention | None = Field(
        None,
        description="gpt2: softmax (the default), power or polynomial_mixer, or {name, options}; a list as for "
        "activation",
    )
    norm: Norm | None = Field(
        None,
        description="layer_norm (the default) or batch; of an mlp: none (the default), layer_norm or batch; of a gpt2 "
        "also rms; of a convnext also evonorm, {name: evonorm, groups}, which has the place of the activation too",
    )
    feedforward: FeedForward | None = Field(
        None,
        description="the layers around each activation: mlp (the default), gated, quadratic, pade or mu; of an mlp: "
        "dense (the default), quadratic, pade, kan or pi; or {name, options}; a list as for activation",
    )
    mixer: Mixer | None = Field(
        None,
        description="convnext: depthwise (the default), max_plus or padre, or {name, options}; a list as for "
        "activation",
    )
    n_layer: int | None = Field(None, ge=1, description="gpt2: number of blocks")
    n_head: int | None = Field(None, ge=1, description="gpt2: attention heads")
    n_embd: int | None = Field(None, ge=1, description="gpt2: width of the residual stream")
    vocab_size: int | None = Field(
        None, ge=1, description="gpt2: rows of the embedding; default: the tokenizer's size, rounded up to 64"
    )
    sequence_length: int | None = Field(None, ge=1, description="gpt2: longest context; default: the dataset's")
    dropout: float | None = Field(None, ge=0, lt=1, description="gpt2: dropout probability")
    bias: bool | None = Field(None, description="gpt2: biases in linear layers and layer norms")
    depths: list[int] | None = Field(None, description="convnext: blocks per stage")
    dims: list[int] | None = Field(None, description="convnext: channels per stage")
    num_classes: int | None = Field(None, ge=1, description="convnext: classes; default: the dataset's")
    in_channels: int | None = Field(None, ge=1, description="convnext: image channels; default: the dataset's")
    patch_size: int | None = Field(None, ge=1, description="convnext: stride of the stem")
    drop_path: float | None = Field(None, ge=0, lt=1, description="convnext: stochastic depth of the last block")
    layer_scale: float | None = Field(None, ge=0, description="convnext: initial layer scale, 0 for none")

    widths: list[int] | None = Field(None, description="mlp: outputs of each layer before the last")
    residual: bool | None = Field(None, description="mlp: every layer but the first adds to what it is given")
    inputs: int | None = Field(None, ge=1, description="mlp: numbers in a row; default: the dataset's")
    outputs: int | None = Field(None, ge=1, description="mlp: numbers it predicts, or classes; default: the dataset's")
    loss: Literal["mse", "cross_entropy"] | None = Field(
        None, description="mlp: mse of numbers or cross_entropy of classes; default: what the dataset has"
    )
    output_scale: float | None = Field(
        None,
        gt=0,
        description="mlp: multiplies its outputs, and the training loss is divided by its square; default: 1. The "
        "larger, the nearer the weights stay to their start",
    )

    def settings(self) -> dict[str, Any]:
        """Fields of the architecture's configuration that are given, those of the preset below them. How a polynomial
        starts stands there, also where it is not given."""
        given = self.model_dump(exclude_none=True, exclude={"architecture", "preset", "activation_options"})
        if self.activation is not None:
            options = {} if self.activation_options is None else self.activation_options.model_dump()
            given["activation"] = (
                [with_start(entry, options) for entry in self.activation]
                if isinstance(self.activation, list)
                else with_start(self.activation, options)
            )
        return {**MODEL_KINDS[self.architecture].presets.get(self.preset or "", {}), **given}

    def activations(self) -> list[dict[str, Any]]:
        """The activation of each block, with its `name`."""
        config = make_config(MODEL_KINDS[self.architecture].config, self.settings())
        return [spelled_out(entry) for entry in activation_configs(config.activation, len(config.activation_widths()))]

    @model_validator(mode="after")
    def buildable(self) -> ModelParameters:
        kind = MODEL_KINDS[self.architecture]
        if self.preset is not None and self.preset not in kind.presets:
            raise ValueError(
                f"preset: {self.architecture} has no `{self.preset}`: expected one of {', '.join(kind.presets)}"
            )
        known = kind.config.__dataclass_fields__
        for name in self.model_fields_set - {"architecture", "preset", "activation_options"}:
            if name not in known and getattr(self, name) is not None:
                settable = ", ".join(field for field in known if field in type(self).model_fields)
                raise ValueError(f"{name}: a {self.architecture} has no such setting; there are {settable}")
        config = make_config(kind.config, self.settings())
        self._refuse_unused_activations(config)
        self._refuse_unused_heads(config)
        widths = config.activation_widths()
        for entry, width in zip(self.activations(), widths, strict=True):
            groups = entry.get("num_parameters", 1)
            if entry.get("dim", -1) == -1 and width % groups:
                raise ValueError(
                    f"activation: num_parameters ({groups}) does not divide the {width} channels of a block"
                )
        return self

    def _refuse_unused_activations(self, config: Any) -> None:
        """Raise ValueError for what is said of activations where no block has one."""
        if any(
            entry != NO_ACTIVATION for entry in activation_configs(config.activation, len(config.activation_widths()))
        ):
            return  # what is said of all, or in a list, of a block without one is for the others
        part, norm = config.feedforward_settings()[0], config.norm_settings()
        why = f"feedforward: {part.name}, and no activation" if not part.activated else f"norm: {norm.name} alone"
        for name in ("activation", "activation_options"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: it has no effect: every block has {why}; leave it out (null in a matrix)")

    def _refuse_unused_heads(self, config: Any) -> None:
        """Raise ValueError for a number of heads where no block has any."""
        parts = config.attention_settings() if self.n_head is not None else []
        if parts and not any(part.heads for part in parts):
            raise ValueError(
                f"n_head: it has no effect: every block has attention: {parts[0].name}, and no heads; leave it out "
                "(null in a matrix)"
            )


class AugmentationParameters(BaseModel):
    """Image augmentation during training (images only)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    crop_padding: int = Field(0, ge=0, description="random crop after padding by this many pixels on each side")
    horizontal_flip: bool = Field(False, description="mirror half of the images")
    operations: int = Field(0, ge=0, description="random operations per image (as in RandAugment)")
    magnitude: float = Field(0.5, ge=0, le=1, description="strength of the random operations")
    mixup: float = Field(0.0, ge=0, description="parameter of mixup's beta distribution, 0: off")
    cutmix: float = Field(0.0, ge=0, description="parameter of cutmix's beta distribution, 0: off")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="probability mass moved to the uniform distribution")


class CrossEntropyLoss(BaseModel):
    """Cross entropy."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["cross_entropy"]


class PolyLoss(BaseModel):
    """Poly-1: cross entropy + epsilon · (1 - probability of the target)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Literal["poly"]
    epsilon: float = Field(1.0, ge=-1, description="added to the first coefficient of cross entropy's series in 1 - p")


TrainingLoss = CrossEntropyLoss | PolyLoss


class RangePenaltyParameters(BaseModel):
    """What is added to the loss so that ranges stay where polynomials will be good."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    activation: float = Field(
        1.0, ge=0, description="weight of the mean of max(|x| - beyond, 0)², over inputs x of activations"
    )
    beyond: float | None = Field(None, gt=0, description="where inputs of activations begin to cost; default: 4")
    denominator: float | None = Field(
        None,
        ge=0,
        description="weight of the mean of (ln d)², over the denominators d of attention: power, and of the variance "
        "of ln m over a sample, of the mean squares m of norm: rms; default: 0.1 where the model has one of these",
    )

    @model_validator(mode="after")
    def penalises(self) -> RangePenaltyParameters:
        if self.activation == self.denominator == 0:
            raise ValueError("activation and denominator are both 0: leave range_penalty out")
        if self.activation == 0 and self.beyond is not None:
            raise ValueError("beyond: activation is 0, so that no input costs anything: leave it out")
        return self

    def numbers(self) -> dict[str, float]:
        """All of them, with the defaults of those that are not given."""
        return {
            "activation": self.activation,
            "beyond": 4.0 if self.beyond is None else self.beyond,
            "denominator": 0.1 if self.denominator is None else self.denominator,
        }


class AdaptersParameters(BaseModel):
    """What learns beside frozen linear layers, and becomes part of their weights at the end."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Literal["householder", "spectral", "lora"] = Field(
        description="householder: reflections of the inputs, which keep sizes; spectral: changes of the largest "
        "singular vectors; lora: a product of two narrow matrices"
    )
    rank: int = Field(ge=1, description="reflections (an even number), singular vectors, or columns, of each layer")
    relaxed: bool = Field(False, description="householder: pairs I - uuᵀ + vvᵀ, which need not keep sizes")
    layers: list[str] | None = Field(
        None,
        min_length=1,
        description="patterns of names of linear layers, such as transformer.h.*.mlp.*; default: all",
    )

    @model_validator(mode="after")
    def possible(self) -> AdaptersParameters:
        if self.name == "householder" and self.rank % 2:
            raise ValueError(f"rank: householder vectors come in pairs that start as nothing, got {self.rank}")
        if self.name != "householder" and self.relaxed:
            raise ValueError(f"relaxed: only householder has it, this is {self.name}")
        return self


class DistillationParameters(BaseModel):
    """How a model becomes like its teacher: terms beside the loss of the data's own targets."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    outputs: float = Field(
        1.0,
        ge=0,
        description="weight of the divergence of the teacher's probabilities from the model's, in nats; of predicted "
        "numbers: of the squared error relative to their variance",
    )
    features: float = Field(
        0.0,
        ge=0,
        description="weight of the squared error of the states behind the blocks, relative to the variance of the "
        "teacher's; mean over the blocks",
    )
    blocks: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="features: which block of the teacher each block is to be like, from 0; default: as many as there "
        "are, or those that the record of drop_blocks says are left",
    )

    perturbation: float = Field(
        0.0,
        ge=0,
        description="weight of what the products of factored layers differ from the teacher's matrices by, beyond "
        "perturbation_bound",
    )
    perturbation_bound: float = Field(
        1e-3, ge=0, description="perturbation: by how much every number of such a product may differ for nothing"
    )

    @model_validator(mode="after")
    def teaches(self) -> DistillationParameters:
        if self.outputs == self.features == self.perturbation == 0:
            raise ValueError("all weights are 0, so that nothing is learned from the teacher: leave it out")
        if self.blocks is not None and self.features == 0:
            raise ValueError("blocks: features is 0, so that no block is compared: leave it out")
        if "perturbation_bound" in self.model_fields_set and self.perturbation == 0:
            raise ValueError("perturbation_bound: perturbation is 0, so that nothing is bounded: leave it out")
        if self.blocks is not None and any(a >= b for a, b in pairwise(self.blocks)):
            raise ValueError(f"blocks: expected numbers that rise, got {self.blocks}")
        return self

    def weights(self) -> dict[str, float]:
        """Term of the loss, by its name in `DISTILLATION_TERMS` → weight; those that are 0 are left out."""
        given = {"targets": 1.0, "outputs": self.outputs, "features": self.features, "perturbation": self.perturbation}
        return {f"distillation/{name}": weight for name, weight in given.items() if weight}


class TrainParameters(BaseModel):
    """Everything that decides the result of a training."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: ModelParameters | None = Field(None, description="the model; not with an `initial` input (fine-tuning)")
    loss: Annotated[TrainingLoss, Field(discriminator="name")] | None = Field(
        None,
        description="what is minimised: {name: poly, epsilon: 1.0} (at least -1), or {name: cross_entropy}, as is the "
        "default; validation always measures cross entropy",
    )
    range_penalty: RangePenaltyParameters | None = Field(
        None,
        description="added to the training loss, summed over the blocks: keeps inputs of activations and denominators "
        "of attention in a range; validation has none",
    )
    adapters: AdaptersParameters | None = Field(
        None,
        description="with an `initial` input: few numbers learn for its frozen linear layers, {name: lora, rank: 4}",
    )
    distillation: DistillationParameters | None = Field(
        None,
        description="with a `teacher` input: its outputs, and the states behind its blocks, are learned too, "
        "{outputs: 1.0, features: 1.0}",
    )
    activation_basis: Literal["measured"] | None = Field(
        None,
        description="measured, with an `initial` input: its polynomials (hermite, chebyshev, legendre) are written in "
        "the basis that is orthonormal on the inputs they get from training samples; the same functions, whose "
        "recurrence learns as well",
    )
    linearize: bool = Field(
        False,
        description="with an `initial` input: its tangent model learns, f(x; w) + J(x; w) v with fixed w, whose loss "
        "is convex in v; the result is a tangent model, for evaluate, measure_speed and report",
    )
    trainable: list[Annotated[str, AfterValidator(check_entry)]] | None = Field(
        None,
        min_length=1,
        description="which parameters learn: coefficients, multiplicative, norms, head, or patterns of their names "
        "(transformer.h.*.mlp.*); the others stay as they are. Default: all",
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps; give steps or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the training samples; give steps or epochs")
    global_batch_size: int = Field(32, ge=1, description="samples per optimizer step, over all workers")
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples per forward pass of one worker; default: global_batch_size / workers"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    coefficient_learning_rate: float | None = Field(
        None,
        ge=0,
        description="peak learning rate of activation coefficients; default: a multiple of learning_rate that moves "
        "every activation equally fast (10 for Hermite polynomials on [-2, 2]; a tenth of that in fine-tuning, and a "
        "tenth without an interval). Without effect, which is logged, where no coefficient learns",
    )
    multiplicative_learning_rate: float | None = Field(
        None,
        ge=0,
        description="peak learning rate of what multiplies inputs by inputs (`trainable: [multiplicative]`); default: "
        "a tenth of learning_rate. Without effect, which is logged, where none of it learns",
    )
    minimum_learning_rate: float = Field(0.1, ge=0, le=1, description="final learning rate, as a fraction of the peak")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up before the cosine")
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="AdamW's decay of matrices (never norms, biases, coefficients, multiplicative parameters)",
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's moment decays")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm, 0: no clipping")
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        None, description="DeepSpeed ZeRO stage: what is sharded over the workers; default: that of `deepspeed`, or 1"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="arithmetic of forward and backward; fp16 scales the loss and needs zero_stage 1 or more"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of initialisation, data order and dropout")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads per worker; part of the result's identity")
    data_threads: int = Field(1, ge=1, description="threads per worker that read and augment batches ahead")
    log_every: int = Field(10, ge=1, description="steps between logged training metrics")
    validation_every: int = Field(100, ge=0, description="steps between validations, 0: only at the end")
    validation_samples: int = Field(128, ge=1, description="validation samples per validation (the first ones)")
    fit_samples: int = Field(
        0,
        ge=0,
        description="training samples (the first ones) that every validation measures too, as fit/loss and "
        "fit/accuracy; 0: none",
    )
    checkpoint_every: int = Field(100, ge=0, description="steps between checkpoints, 0: none")
    keep_checkpoints: int = Field(2, ge=1, description="newest valid checkpoints to keep")
    asynchronous_checkpoints: bool = Field(
        False, description="training goes on while a copy of its state in memory is written, hashed and committed"
    )
    result: Literal["last", "best"] = Field(
        "last", description="the weights that become the model: the last, or those of the lowest validation loss"
    )
    keep_initial: bool = Field(
        False,
        description="the model before the first step is kept beside the result, in `initial/`: what `analyze` measures "
        "the drift of the tangent kernel from",
    )
    deepspeed: dict[str, Any] | str | None = Field(
        None,
        description="a configuration of infra/deepspeed (zero-2-offload, …), the path of a JSON file, or settings over "
        "the default, which is zero-0 … zero-3 by zero_stage; contradictions are refused",
    )
    compile: bool = Field(False, description="compile the model with torch.compile")
    deterministic: bool = Field(
        True,
        description="on a GPU: of each operation the implementation that gives the same bits every time, so that an "
        "interrupted training ends as it would have; false: the fastest. On a CPU all of them do",
    )
    activation_checkpointing: Literal["none", "mlp", "block"] = Field(
        "none",
        description="what backward computes again to save memory: nothing, outputs of the activations, whole blocks",
    )
    worker_restarts: int = Field(2, ge=0, description="restarts from the newest checkpoint when a worker is lost")
    collective_timeout: float = Field(600.0, gt=0, description="seconds a collective may take before it fails")
    on_divergence: Literal["stop", "rollback", "record"] = Field(
        "stop",
        description="on NaN, infinity or a gradient spike: fail, go back to a checkpoint and skip the batch, or end "
        "with the failure as the result, which `evaluate` and `report` show (for sweeps)",
    )
    maximum_rollbacks: int = Field(3, ge=0, description="batches that `on_divergence: rollback` may skip")
    gradient_spike: float | None = Field(
        None, gt=1, description="a gradient norm above this multiple of the recent median counts as divergence"
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="validate and save an exponential moving average of the weights with this decay"
    )
    peak_flops: float | None = Field(
        None, gt=0, description="floating-point operations per second of one worker's device, to report MFU"
    )
    statistics_every: int = Field(
        0,
        ge=0,
        description="steps between moments of the activations' inputs and outputs and coefficient norms per layer, "
        "also at the first step; 0: never",
    )
    augmentation: AugmentationParameters | None = Field(None, description="images only")
    register_as: RegisteredName | None = Field(None, description="name in MLflow's model registry")
    register_alias: RegisteredAlias = Field("newest", description="alias of the registered version")

    @model_validator(mode="after")
    def consistent(self) -> TrainParameters:
        if self.steps is None and self.epochs is None:
            raise ValueError("give either `steps` or `epochs`")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give either `steps` ({self.steps}) or `epochs` ({self.epochs:g})")
        if self.micro_batch_size is not None and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is more than steps ({self.steps})")
        if self.activation_basis is not None and self.model is not None:
            raise ValueError(
                "activation_basis: measured is for an `initial` input: weights that begin from nothing give their "
                "activations inputs that are others soon"
            )
        if self.activation_basis is not None and (why := self.still_coefficients()) is not None:
            raise ValueError(f"activation_basis: measured: {why}; otherwise leave it out: nothing learns in that basis")
        if self.trainable is not None and set(self.trainable) <= self.rates_of_zero().keys():
            fields = " and ".join(f"{self.rates_of_zero()[name]} is 0" for name in dict.fromkeys(self.trainable))
            raise ValueError(f"trainable: nothing learns: {fields}; name what learns, or give a rate above 0")
        refuse_with_linearize(self)
        if self.adapters is not None and self.model is not None:
            raise ValueError("adapters: they fine-tune an `initial` input, and this model begins from nothing")
        if self.adapters is not None and ADAPTERS not in (self.trainable or [ADAPTERS]):
            raise ValueError(f"trainable: with adapters name {ADAPTERS} too, or leave it out: then they alone learn")
        if self.adapters is not None and self.peak_flops is not None:
            raise ValueError("peak_flops: MFU counts the gradients of all weights; leave it out with `adapters`")
        if self.distillation is not None and self.peak_flops is not None:
            raise ValueError("peak_flops: MFU does not count the teacher; leave it out with `distillation`")
        if self.distillation is not None and self.distillation.features and self.compile:
            raise ValueError(
                "compile: compiled code does not show the states behind blocks; leave it out with `features`"
            )
        if self.distillation is not None and self.distillation.perturbation:
            if self.model is not None:
                raise ValueError("distillation: perturbation: a model that begins from nothing has no factored layers")
            if self.zero_stage == 3:
                raise ValueError(f"distillation: perturbation: {SHARDED}")
        if self.adapters is None and ADAPTERS in (self.trainable or []):
            raise ValueError(f"trainable: {ADAPTERS}: there are none; say which under `adapters:`")
        if self.trainable is not None and self.peak_flops is not None:
            raise ValueError("peak_flops: MFU counts the gradients of all weights; leave it out with `trainable`")
        if self.model is not None:
            self.refuse_unheeded(self.model.architecture, self.model.settings())
        if self.model is not None and COEFFICIENTS in (self.trainable or ()):
            names = {entry["name"] for entry in self.model.activations()}
            if names <= {*FIXED, NO_ACTIVATION}:
                raise ValueError(
                    f"trainable: {COEFFICIENTS}: {', '.join(sorted(names))} has none; choose a learnable activation"
                )
        return self

    def rates_of_zero(self) -> dict[str, str]:
        """Group of `trainable` that does not learn → the rate that says so."""
        return {group: field for group, field in RATES.items() if getattr(self, field) == 0}

    def still_coefficients(self) -> str | None:
        """Why no coefficient of an activation learns, and what to do if they are to; None where some may."""
        if COEFFICIENTS in self.rates_of_zero():
            return "coefficient_learning_rate is 0: give a rate above 0"
        learning = [ADAPTERS] if self.trainable is None and self.adapters is not None else self.trainable
        if learning is None or any(entry == COEFFICIENTS or entry not in GROUPS for entry in learning):
            return None
        given = "adapters alone learn" if self.trainable is None else f"trainable is {learning}"
        return f"{given}, and no coefficient: name {COEFFICIENTS} under `trainable` too"

    def refuse_unheeded(self, architecture: str, settings: Mapping[str, Any]) -> None:
        """Refuse what nothing in this model would heed.

        Args:
            architecture, settings: of the model, from scratch or the initial one, as far as they are known.

        Raises:
            ValueError: naming the parameter.
        """
        config, trainable = make_config(MODEL_KINDS[architecture].config, settings), self.trainable or []
        if not any(part.multiplicative for part in all_parts(config)):
            if self.multiplicative_learning_rate is not None:
                raise ValueError(f"multiplicative_learning_rate: only for a model with {MULTIPLICATIVE_PARTS}")
            if MULTIPLICATIVE in trainable:
                raise ValueError(f"trainable: {MULTIPLICATIVE}: only a model with {MULTIPLICATIVE_PARTS} has them")
        if "norms" in trainable and config.norm_settings().name == "none":
            raise ValueError("trainable: norms: the model has none (norm: none)")
        activated = config.activation != NO_ACTIVATION or config.norm_settings().activates
        if self.activation_checkpointing == "mlp" and not activated:
            raise ValueError("activation_checkpointing: mlp computes activations again, and the model has none")
        attentions = config.attention_settings() if architecture == "gpt2" else []
        divides = config.norm_settings().divides or any(part.divides for part in attentions)
        if self.range_penalty is not None and set(trainable) == {"head"} and architecture != "gpt2":
            raise ValueError(
                "range_penalty: trainable is ['head'], which comes after all activations and denominators: it has no "
                "effect; leave it out"
            )
        if self.range_penalty is not None and not divides:
            if self.range_penalty.denominator:
                raise ValueError(f"range_penalty.denominator: {_DENOMINATORS}; leave it out")
            if not self.range_penalty.activation:
                raise ValueError(f"range_penalty: activation is 0, and {_DENOMINATORS}")
            if config.activation == NO_ACTIVATION:
                raise ValueError(
                    f"range_penalty: the model has no activations outside of its norms, and {_DENOMINATORS}"
                )


def check_heeded(architecture: str, settings: Mapping[str, Any], parameters: TrainParameters) -> None:
    """`TrainParameters.refuse_unheeded` of an initial model: what it is, the parameters alone do not tell.

    Raises:
        UserError: naming the parameter.
    """
    try:
        parameters.refuse_unheeded(architecture, settings)
    except ValueError as error:
        raise UserError(str(error), "leave it out, or train another `initial`") from error


def split_batch(parameters: TrainParameters, workers: int) -> tuple[int, int]:
    """Samples per forward pass of a worker, and passes per step.

    Raises:
        UserError: sizes that do not divide, or nothing to mix.
    """
    if parameters.global_batch_size % workers:
        raise UserError(
            f"global_batch_size ({parameters.global_batch_size}) must be a multiple of resources.workers ({workers})",
            f"for example global_batch_size: {workers * max(1, round(parameters.global_batch_size / workers))}",
        )
    per_worker = parameters.global_batch_size // workers
    micro = parameters.micro_batch_size or per_worker
    if per_worker % micro:
        raise UserError(
            f"global_batch_size ({parameters.global_batch_size}) must be a multiple of micro_batch_size ({micro}) × "
            f"resources.workers ({workers})",
            f"one worker sees {per_worker} samples per step: choose a micro_batch_size that divides this",
        )
    augmentation = parameters.augmentation
    if augmentation is not None and micro == 1 and (augmentation.mixup > 0 or augmentation.cutmix > 0):
        raise UserError(
            f"augmentation: mixup ({augmentation.mixup:g}) and cutmix ({augmentation.cutmix:g}) mix the samples of a "
            "micro-batch, and each worker's has only one",
            f"set global_batch_size to at least {2 * workers}, or leave micro_batch_size out",
        )
    return micro, per_worker // micro
