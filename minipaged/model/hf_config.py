"""Reading ``config.json``: typed values, and no key that matters left unread.

A field of ``config.json`` has been spelled in two ways: transformers 4's (``rope_theta``,
``rope_scaling``, ``torch_dtype``, ``sliding_window_pattern``) and 5's (``rope_parameters``,
``dtype``, ``layer_types``). Both are read; where a file has both and they disagree, it is refused.
"""

from __future__ import annotations

import math

from minipaged.errors import ModelFormatError, UnsupportedModelError

REQUIRED = object()  # default of a key that must be there
MAX_SIZE = 2**20  # of one dimension; keeps the bytes of three of them inside 64 bits
MAX_NUMBER = 1e18

# Keys that change what a model computes, with the values that mean "does not". An architecture
# that has the feature reads its key; where nobody read it and it is switched on, running the model
# would silently compute something else. ``null`` is always neutral.
FEATURES: dict[str, tuple] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (0,),
    "attention_multiplier": (1,),
    "attn_logit_softcapping": (),
    "bias": (False,),
    "clip_qkv": (),
    "compression_config": (),
    "cross_attention_hidden_size": (),
    "decoder_sparse_step": (0, 1),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "mlp_only_layers": ([],),
    "moe_intermediate_size": (0,),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "no_rope_layer_interval": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "num_nextn_predict_layers": (0,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "quantization": (),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "rotary_pct": (1,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "shared_expert_intermediate_size": (0,),
    "sliding_window": (),
    "text_config": (),
    "use_bias": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
    "vision_config": (),
}


class ConfigReader:
    """The keys of one JSON object, each read with its type and limits, and remembered as read."""

    def __init__(self, values: dict, where: str = "config.json"):
        self.values = values
        self.where = where
        self.seen: set[str] = set()

    @property
    def architecture(self) -> str:
        return self.values["architectures"][0]

    def get(self, key: str, default=None):
        """The raw value; ``default`` where the key is missing (not where it is ``null``)."""
        self.seen.add(key)
        return self.values.get(key, default)

    def error(self, key: str, wanted: str) -> ModelFormatError:
        return ModelFormatError(f"{self.where}: {key} is {_brief(self.values.get(key))}; it must be {wanted}.")

    def _value(self, key: str, default, optional: bool, wanted: str):
        value = self.get(key, default)
        if value is REQUIRED:
            raise ModelFormatError(f"{self.where}: {key} is missing; it must be {wanted}.")
        if value is None and not optional:
            raise self.error(key, wanted)
        return value

    def integer(self, key: str, default=REQUIRED, *, low: int = 1, high: int = MAX_SIZE, optional=False) -> int | None:
        """An integer from ``low`` to ``high``; with ``optional``, ``null`` gives ``None``."""
        wanted = f"an integer from {low} to {high}"
        value = self._value(key, default, optional, wanted)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, wanted)
        return value

    def number(
        self, key: str, default=REQUIRED, *, above: float = 0.0, high: float = MAX_NUMBER, optional=False
    ) -> float | None:
        """A number larger than ``above``, at most ``high``; with ``optional``, ``null`` gives ``None``."""
        wanted = f"a number above {above:g}, at most {high:g}"
        value = self._value(key, default, optional, wanted)
        if value is None:
            return None
        if not is_number(value) or not above < value <= high:
            raise self.error(key, wanted)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """``true`` or ``false``; ``null`` is the default."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, default, meanings: dict):
        """``meanings[value]`` of a string, refused by name where it is not among them."""
        value = self._value(key, default, False, "a string")
        if not isinstance(value, str):
            raise self.error(key, "a string")
        if value not in meanings:
            raise UnsupportedModelError(
                f"{self.where}: {key} {_brief(value)} is not implemented; known: {', '.join(meanings)}."
            )
        return meanings[value]

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31 for i in ids):
            raise self.error(key, "a token id or a list of token ids")
        return tuple(ids)

    def section(self, key: str) -> ConfigReader | None:
        """A nested object, ``None`` where it is missing, ``null`` or empty."""
        value = self.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return ConfigReader(value, f"{self.where}: {key}")

    def agree(self, first: str, second: str) -> None:
        """Refuse a file that has two spellings of one thing, with different values."""
        a, b = self.values.get(first), self.values.get(second)
        if a is not None and b is not None and a != b:
            raise ModelFormatError(
                f"{self.where}: {first} is {_brief(a)} but {second} is {_brief(b)}; they are two spellings of the "
                "same setting. Remove the wrong one."
            )

    def finish(self) -> None:
        """Refuse features that are switched on but were not read by the architecture."""
        for key, neutral in FEATURES.items():
            value = self.values.get(key)
            if key not in self.seen and value is not None and value not in neutral:
                raise UnsupportedModelError(
                    f"{self.where}: {key} is {_brief(value)}, which this architecture does not implement here; "
                    "running without it would give other results."
                )


def is_number(value) -> bool:
    """Whether a JSON value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
