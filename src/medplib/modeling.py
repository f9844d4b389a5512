"""MedPLIB: the parts put together into one model that answers in words and draws what its words point at.

Letters: B rows, L tokens, D language width, N images, R regions, S `<SEG>` tokens, C vision channels.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from medplib.answering import AnsweringMixin
from medplib.configuration import MedPLIBConfig
from medplib.decoders.two_way import TwoWayTransformer
from medplib.errors import InputError
from medplib.experts.context import named_routers
from medplib.experts.losses import collect_aux_losses
from medplib.experts.router import routing_mask
from medplib.language import decoder_layers, install_mixtures
from medplib.loading import LoadingMixin
from medplib.losses import all_mask_losses
from medplib.parts import keep_frozen_in_eval
from medplib.placeholders import check_images, scatter
from medplib.prompts.combined import PromptEncoder
from medplib.registry import LANGUAGE_MODELS, MASK_DECODERS, PROJECTORS, PROMPT_ENCODERS, VISION_TOWERS
from medplib.vision.features import VisionFeatures


@dataclass
class MedPLIBOutput(CausalLMOutputWithPast):
    """What `MedPLIB.forward` returns.

    loss: weighted sum, scalar. logits: (B, L, vocabulary). losses: each unweighted term by name.
    mask_logits: (S, h, w) on the mask side's square, S in row-major order of the `<SEG>` tokens.
    iou_scores: (S,) predicted IoU. seg_rows: (S,) the row each mask belongs to.
    """

    losses: dict[str, Tensor] | None = None
    mask_logits: Tensor | None = None
    iou_scores: Tensor | None = None
    seg_rows: Tensor | None = None


# What transformers calls the keys and values of earlier tokens: "cache" from 5.24 on.
CACHE = next(f.name for f in dataclasses.fields(MedPLIBOutput) if f.name in ("cache", "past_key_values"))


class MedPLIB(LoadingMixin, AnsweringMixin, PreTrainedModel, GenerationMixin):
    """A vision tower, a language model with mixtures of experts, and a promptable mask decoder.

    Build it from a configuration (random weights) or with `MedPLIB.from_pretrained(name_or_folder)`; talk to
    it with `ask` and `segment`; train it with `forward(..., labels=..., masks=...)`.

        model = MedPLIB.from_pretrained("medplib-tiny")
        answer = model.ask("chest_ct.png", "What is in <region>?", prompts=[Box(40, 60, 120, 150)])
    """

    config_class = MedPLIBConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = (CACHE,)
    _can_set_experts_implementation_cached_value = True
    # Parts that stay on one device with device_map; the language model adds its decoder layers by itself.
    _no_split_modules = (
        *("CLIPTower", "TimmTower", "TimmPyramid", "SamImageEncoder", "PromptEncoder", "MaskDecoder"),
        *("MLPProjector", "PooledMLPProjector", "GeometryRegionPooler"),
    )
    accepts_loss_kwargs = (
        False  # the loss is a mean over this batch; a Trainer divides by its accumulation steps
    )

    def __init__(self, config: MedPLIBConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.language_model = LANGUAGE_MODELS.build("auto", config.text_config)
        if config.moe is not None:
            m = config.moe
            install_mixtures(
                self.language_model, config.moe_layers, m.experts, top_k=m.top_k, score=m.score,
                renormalize=m.renormalize, gate=m.gate, gate_args=m.gate_args, parity=m.parity,
                capacity_factor=m.capacity_factor, eval_capacity_factor=m.eval_capacity_factor,
                min_capacity=m.min_capacity, drop=m.drop, seed=m.seed,
            )  # fmt: skip
        vision, mask = config.vision, config.mask
        self.vision_tower = VISION_TOWERS.build(vision.tower.name, **vision.tower.args)
        channels = self.vision_tower.channels
        self.projector = PROJECTORS.build(vision.projector.name, channels, width, **vision.projector.args)
        self.region_adapter = nn.Linear(channels, width)
        self.region_pooler = PROMPT_ENCODERS.build(config.region.pooler.name, **config.region.pooler.args)
        self.mask_encoder = VISION_TOWERS.build(mask.encoder.name, **mask.encoder.args)
        if self.mask_encoder.channels != mask.dim:
            raise InputError(
                f"mask.dim is {mask.dim}, but the mask encoder {mask.encoder.name!r} gives "
                f"{self.mask_encoder.channels} channels; make them equal."
            )
        side = mask.image_size // self.mask_encoder.stride
        self.prompt_encoder = PromptEncoder(
            mask.dim, (side, side), (mask.image_size, mask.image_size), mask_channels=mask.mask_channels
        )
        transformer = TwoWayTransformer(mask.dim, mask.depth, mask.num_heads, mask.mlp_dim)
        self.mask_decoder = MASK_DECODERS.build(
            mask.decoder.name, mask.dim, transformer, skip_channels=self.mask_encoder.skip_channels,
            **mask.decoder.args,
        )  # fmt: skip
        self.seg_projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, mask.dim))
        self._check_sizes()
        _keep_buffers(self)
        self.processor = None
        self.post_init()

    def _check_sizes(self) -> None:
        config = self.config
        for name, tower in (("vision", self.vision_tower), ("mask", self.mask_encoder)):
            side = getattr(config, name).image_size
            if side % tower.stride:
                raise InputError(
                    f"{name}.image_size must be a multiple of its tower's stride {tower.stride}, got {side}."
                )
            fixed = getattr(tower, "image_size", side)
            if fixed != side:
                raise InputError(
                    f"{name}.image_size is {side}, but its tower takes {fixed}; make them equal."
                )
        words = self.get_input_embeddings().num_embeddings
        if config.tokens.seg >= words:
            raise InputError(
                f"tokens.seg is {config.tokens.seg}, but the language model knows ids below {words}; "
                "raise text_config.vocab_size."
            )

    def _init_weights(self, module: nn.Module) -> None:
        """The parts initialise themselves when built; the language model keeps its own rule."""

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """The named parts that stages train or freeze; gates and experts are found by the stages."""
        decoder = self.language_model.get_decoder()
        norms = [m for m in decoder.modules() if "norm" in type(m).__name__.lower()]
        return {
            "vision_tower": [self.vision_tower],
            "projector": [self.projector],
            "region_adapter": [self.region_adapter, self.region_pooler],
            "language_model": [self.language_model],
            "embeddings": [self.language_model.get_input_embeddings()],
            "lm_head": [self.language_model.get_output_embeddings()],
            "norms": norms,
            "feed_forward": [layer.mlp for layer in decoder_layers(self.language_model)],
            "mask_encoder": [self.mask_encoder],
            "prompt_encoder": [self.prompt_encoder],
            "mask_decoder": [self.mask_decoder],
            "seg_projector": [self.seg_projector],
        }

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    @property
    def num_image_tokens(self) -> int:
        """How many tokens one image takes in the prompt."""
        side = self.config.vision.image_size // self.vision_tower.stride
        return self.projector.num_tokens(side, side)

    def embed(
        self,
        input_ids: Tensor,
        features: VisionFeatures | None = None,
        image_index: Tensor | None = None,
        region_masks: Tensor | None = None,
        region_images: Tensor | None = None,
        only_words: bool = False,
    ) -> Tensor:
        """Words, image and region placeholders -> (B, L, D).

        features: of N images. image_index: (I,) the image of each run of image placeholders, in row-major
        order (default: the images in order). region_masks: (R, h, w) on the vision grid, in order of the
        region placeholders; region_images: (R,) their images. only_words: no id is a placeholder, which then
        need not be read from the device. Raises InputError where the counts do not match.
        """
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
            raise InputError("input_ids must be a tensor (B, L) of token ids, as MedPLIBProcessor makes it.")
        if only_words:
            return self.get_input_embeddings()(input_ids)
        tokens = self.config.tokens
        is_image, is_region = input_ids == tokens.image, input_ids == tokens.region
        words = self.get_input_embeddings()(input_ids.masked_fill(is_image | is_region, 0))  # (B, L, D)
        num_regions = 0 if region_masks is None else len(region_masks)
        for mask, what, none in (
            (is_image, "image", features is None),
            (is_region, "region", not num_regions),
        ):
            if none and not torch.compiler.is_compiling() and bool(mask.any()):
                raise InputError(f"The prompt has {what} placeholders, but no {what} was given.")
        if features is None:
            if num_regions:
                raise InputError(f"{num_regions} regions were given, but no image that they lie in.")
            return words
        images = self.projector(features.grid)  # (N, tokens, D)
        if image_index is not None:
            check_images("image_index", image_index, len(images))
            images = images[image_index.to(images.device)]  # (I, tokens, D)
        words = scatter(words, is_image, rearrange(images, "i t d -> (i t) d"), "image")
        if num_regions:
            grid = self.region_adapter(rearrange(features.grid, "n c h w -> n h w c"))
            grid = rearrange(grid, "n h w d -> n d h w")
            pooled = self.region_pooler(grid, region_masks.to(grid.device), region_images)  # (R, D)
            words = scatter(words, is_region, pooled, "region")
        return words

    def decode_masks(self, states: Tensor, features: VisionFeatures, images: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states that predict `<SEG>` (S, D), mask features of N images, the image of each state (S,)
        -> mask logits (S, h, w), predicted IoU (S,)."""
        images = images.to(features.grid.device)  # with device_map the parts may lie on several devices
        text = self.seg_projector(states).unsqueeze(1)  # (S, 1, dim)
        sparse, dense = self.prompt_encoder(text=text)
        masks, iou = self.mask_decoder(
            features.grid[images], self.prompt_encoder.dense_position(), sparse, dense,
            skips=tuple(s[images] for s in features.skips),
        )  # fmt: skip
        return masks[:, 0], iou[:, 0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_index: Tensor | None = None,
        region_masks: Tensor | None = None,
        region_images: Tensor | None = None,
        mask_pixel_values: Tensor | None = None,
        seg_images: Tensor | None = None,
        labels: Tensor | None = None,
        masks: Tensor | None = None,
        features: VisionFeatures | None = None,
        mask_features: VisionFeatures | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        last_hidden_only: bool = False,
        only_words: bool = False,
        **kwargs,
    ) -> MedPLIBOutput:
        """One pass: logits, and a mask for every `<SEG>` in `input_ids` when the mask side has an image.

        input_ids (B, L) with placeholders already expanded by the processor; pixel_values (N, 3, H, W) for
        the vision tower and mask_pixel_values (N, 3, H', W') for the mask side (or their `features`, computed
        before); image_index, region_masks, region_images, only_words as in `embed`; seg_images (S,) the image
        that each `<SEG>` draws on. labels (B, L), -100 where nothing is learned; masks (S, H', W') in {0, 1}
        on the mask side's square. kwargs, such as the keys and values of earlier tokens, go to the decoder.
        Raises InputError where counts do not match.
        """
        if features is None and pixel_values is not None:
            features = self.vision_tower(pixel_values)
        if last_hidden_only:
            kwargs["output_hidden_states"] = False  # the last one is at hand; keep none of the others
        if use_cache is None and labels is not None:
            use_cache = False
        embeds = self.embed(input_ids, features, image_index, region_masks, region_images, only_words)
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if kwargs.get(CACHE) is not None and input_ids.shape[1] == 1:
            mask = None  # what is generated is never padding
        moe = self.config.moe if labels is not None else None
        coefs = {name: getattr(moe, f"{name}_loss_coef", 0.0) for name in ("balance", "sequence", "z")}
        coefs = {name: coef for name, coef in coefs.items() if coef}
        listening = collect_aux_losses(self) if coefs else nullcontext()
        with routing_mask(None if mask is None else mask[:, -input_ids.shape[1] :]), listening as aux:
            out = self.get_decoder()(
                inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids,
                use_cache=use_cache, **kwargs,
            )  # fmt: skip
        hidden = out.last_hidden_state  # (B, L, D)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(hidden[:, keep])
        result = MedPLIBOutput(logits=logits, attentions=out.attentions, **{CACHE: getattr(out, CACHE)})
        result.hidden_states = (hidden[:, -1:],) if last_hidden_only else out.hidden_states

        if mask_pixel_values is not None or mask_features is not None:
            self._draw(result, input_ids, hidden, mask_pixel_values, mask_features, seg_images)
        if labels is not None:
            result.losses = self._losses(result, labels, masks)
            weights = dataclasses.asdict(self.config.losses)
            for name, coef in coefs.items():
                result.losses[name], weights[name] = getattr(aux, name)(), coef
            result.loss = sum(weights[name] * value for name, value in result.losses.items())
        return result

    def _draw(self, result, input_ids, hidden, pixels, features, seg_images) -> None:
        """Fill in the masks: the state at position t draws the mask of a `<SEG>` at t + 1."""
        at = input_ids[:, 1:] == self.config.tokens.seg  # (B, L - 1)
        rows = at.nonzero()[:, 0]  # (S,)
        if not len(rows):
            return
        count = len(pixels) if pixels is not None else len(features.grid)
        if seg_images is None:
            if count != len(input_ids):
                raise InputError(
                    f"{count} mask images for {len(input_ids)} rows: say with seg_images which image each "
                    "<SEG> draws on."
                )
            seg_images = rows
        if len(seg_images) != len(rows):
            raise InputError(
                f"seg_images names {len(seg_images)} images, but the tokens hold {len(rows)} <SEG>."
            )
        check_images("seg_images", seg_images, count)
        if features is None:
            used, seg_images = torch.unique(seg_images, return_inverse=True)
            features = self.mask_encoder(pixels[used])
        result.seg_rows = rows
        result.mask_logits, result.iou_scores = self.decode_masks(
            hidden[:, :-1][at.to(hidden.device)], features, seg_images
        )

    def _losses(self, result, labels, masks) -> dict[str, Tensor]:
        out = {}
        if result.logits.shape[1] != labels.shape[1]:
            raise InputError("labels need the logits of every position: leave logits_to_keep at 0.")
        logits = result.logits[:, :-1].float().flatten(0, 1)  # (B * (L - 1), vocabulary)
        target = labels[:, 1:].flatten().to(logits.device)
        if bool((target != -100).any()):
            out["ce"] = nn.functional.cross_entropy(logits, target, ignore_index=-100)
        else:
            out["ce"] = logits.sum() * 0.0
        if masks is not None and len(masks):
            drawn = 0 if result.mask_logits is None else len(result.mask_logits)
            if drawn != len(masks):
                raise InputError(f"{len(masks)} target masks, but {drawn} <SEG> with an image to draw on.")
            terms = all_mask_losses(
                result.mask_logits,
                masks.to(result.mask_logits.device),
                result.iou_scores,
                weights=self.config.losses,
            )
            out |= {name: term.to(logits.device) for name, term in terms.items()}
        return out

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            for name in ("pixel_values", "image_index", "region_masks", "region_images", "features"):
                inputs.pop(name, None)
            generated = not kwargs.get("is_first_iteration") and inputs["input_ids"].shape[1] == 1
            tokens = self.config.tokens  # the published placeholders are negative and cannot be generated
            inputs["only_words"] = generated and max(tokens.image, tokens.region) < 0
        return inputs

    def train(self, mode: bool = True) -> MedPLIB:
        """Like `nn.Module.train`, but a part without trainable parameters stays in evaluation mode: frozen
        means bit-identical, running statistics and dropout included."""
        super().train(mode)
        if mode:
            keep_frozen_in_eval(self)
        return self


def _keep_buffers(model: nn.Module) -> None:
    """Make the buffers of our own and of foreign parts persistent, so that they are saved with the weights:
    transformers fills non-persistent ones with noise on loading, except those of its own models, left alone
    here.
    """
    outside = [model]
    while outside:
        module = outside.pop()
        module._non_persistent_buffers_set.clear()
        outside += [child for child in module.children() if not isinstance(child, PreTrainedModel)]
    for router in named_routers(model).values():  # ours, within the language model
        for module in router.gate.modules():
            module._non_persistent_buffers_set.clear()


AutoModel.register(MedPLIBConfig, MedPLIB, exist_ok=True)
AutoModelForImageTextToText.register(MedPLIBConfig, MedPLIB, exist_ok=True)
