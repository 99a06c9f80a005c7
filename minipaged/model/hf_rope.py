"""Reading rope settings from ``config.json``, in either spelling, into :class:`RopeConfig`.

transformers 4 writes ``rope_theta`` and ``rope_scaling`` (``type`` or ``rope_type``) at the top
level; transformers 5 one ``rope_parameters``, nested by layer type where layers differ.
"""

from __future__ import annotations

from minipaged.errors import ModelFormatError, UnsupportedModelError
from minipaged.model.config import RopeConfig
from minipaged.model.hf_config import ConfigReader, is_number

SCALINGS = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",  # Phi-3's first name for it
}
MAX_POSITIONS = 2**22  # tables of rope are computed for all of them
_TRAINED_LENGTH = "original_max_position_embeddings"
_COMMON_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_NOTES = {"finetuned"}  # written by some authors, read by nobody


def read_rope(config: ConfigReader, head_dim: int, max_positions: int, theta: float = 10000.0) -> RopeConfig:
    """The rope of a model whose layers all share one.

    ``max_positions`` is the file's ``max_position_embeddings``, ``theta`` the architecture's default.
    """
    config.agree("rope_scaling", "rope_parameters")
    section = config.section("rope_parameters") or config.section("rope_scaling")
    return read_rope_section(config, section, head_dim, max_positions, "rope_theta", theta)


def read_rope_section(
    config: ConfigReader, section: ConfigReader | None, head_dim: int, max_positions: int, theta_key: str, theta: float
) -> RopeConfig:
    """The rope that ``section`` describes (``None``: unscaled).

    Its base is the section's ``rope_theta``, else ``theta_key`` beside the section, else ``theta``.
    """
    if section is None:
        section = ConfigReader({}, config.where)
    section.agree("type", "rope_type")
    _same(config, theta_key, section, "rope_theta")
    outer_theta = config.number(theta_key, None, above=1.0, optional=True)
    theta = section.number("rope_theta", outer_theta or theta, above=1.0)
    kind = section.choice("rope_type" if section.values.get("rope_type") else "type", "default", SCALINGS)
    section.seen.update(_COMMON_KEYS)
    parameters = _PARAMETERS[kind](config, section, max_positions)
    _refuse_unread(section, kind)

    rotary_dim = int(head_dim * _partial_rotary_factor(config, section))
    if rotary_dim < 2 or rotary_dim % 2:
        raise ModelFormatError(
            f"{config.where}: {rotary_dim} values of a head ({head_dim}) are to be rotated; it must be an even number."
        )
    if kind == "dynamic" and rotary_dim == 2:
        raise ModelFormatError(f"{section.where}: dynamic rope needs more than 2 rotated values a head.")
    for name in ("short_factor", "long_factor"):
        if name in parameters and len(parameters[name]) != rotary_dim // 2:
            raise ModelFormatError(
                f"{section.where}: {name} has {len(parameters[name])} numbers; it must have {rotary_dim // 2}, "
                f"one for each rotated pair of a head."
            )
    return RopeConfig(theta=theta, rotary_dim=rotary_dim, scaling=kind, parameters=parameters)


def longest_sequence(rope: RopeConfig, max_positions: int) -> int:
    """Tokens that a model with this rope takes, where ``max_position_embeddings`` is ``max_positions``.

    ``linear`` and ``dynamic`` configurations keep the original length in that field ("don't update
    max_position_embeddings to the expected new maximum", says Hugging Face); ``yarn`` names it
    apart; the others have the final length already.
    """
    length = max_positions
    if rope.scaling in ("linear", "dynamic"):
        length = int(max_positions * rope.parameters["factor"])
    elif rope.scaling == "yarn":
        length = max(max_positions, int(rope.parameters[_TRAINED_LENGTH] * rope.parameters["factor"]))
    if length > MAX_POSITIONS:
        raise ModelFormatError(
            f"config.json: {rope.scaling} rope by a factor of {rope.parameters['factor']:g} gives sequences of "
            f"{length} tokens; the limit is {MAX_POSITIONS}."
        )
    return length


def _same(config: ConfigReader, outer_key: str, section: ConfigReader, key: str) -> None:
    outer, inner = config.values.get(outer_key), section.values.get(key)
    if outer is not None and inner is not None and outer != inner:
        raise ModelFormatError(
            f"{config.where}: {outer_key} is {outer!r}, but {section.where}: {key} is {inner!r}. Remove the wrong one."
        )


def _partial_rotary_factor(config: ConfigReader, section: ConfigReader) -> float:
    _same(config, "partial_rotary_factor", section, "partial_rotary_factor")
    holder = section if section.values.get("partial_rotary_factor") is not None else config
    factor = holder.number("partial_rotary_factor", 1.0, optional=True)
    if factor is not None and factor > 1:
        raise holder.error("partial_rotary_factor", "a number above 0, at most 1")
    return 1.0 if factor is None else factor


def _refuse_unread(section: ConfigReader, kind: str) -> None:
    for key, value in section.values.items():
        if key not in section.seen and key not in _NOTES and value is not None:
            raise UnsupportedModelError(f"{section.where}: {key} is not implemented for rope type {kind!r}.")


def _factor(config, section, max_positions) -> dict:
    value = section.number("factor", high=1e6)
    if value < 1:
        raise section.error("factor", "at least 1")
    return {"factor": value}


def _trained_length(config: ConfigReader, section: ConfigReader, max_positions: int) -> int:
    """``original_max_position_embeddings``, inside the section or (Phi-3) beside it."""
    _same(config, _TRAINED_LENGTH, section, _TRAINED_LENGTH)
    holder = section if section.values.get(_TRAINED_LENGTH) is not None else config
    length = holder.integer(_TRAINED_LENGTH, None, low=2, high=2**31, optional=True)
    return max_positions if length is None else length


def _dynamic(config, section, max_positions) -> dict:
    return {**_factor(config, section, max_positions), _TRAINED_LENGTH: max_positions}


def _llama3(config, section, max_positions) -> dict:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.error("high_freq_factor", f"above low_freq_factor ({low:g})")
    return {
        **_factor(config, section, max_positions),
        "low_freq_factor": low,
        "high_freq_factor": high,
        _TRAINED_LENGTH: _trained_length(config, section, max_positions),
    }


def _yarn(config, section, max_positions) -> dict:
    parameters = {
        **_factor(config, section, max_positions),
        _TRAINED_LENGTH: _trained_length(config, section, max_positions),
        "truncate": section.boolean("truncate", True),
    }
    for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if section.get(key) is not None:
            parameters[key] = section.number(key)
    return parameters


def _longrope(config, section, max_positions) -> dict:
    if config.values.get(_TRAINED_LENGTH) is None and section.values.get(_TRAINED_LENGTH) is None:
        raise ModelFormatError(f"{section.where}: {_TRAINED_LENGTH} is missing; longrope needs it.")
    original = _trained_length(config, section, max_positions)
    ratio = max_positions / original
    factor = section.number("factor", None, optional=True)
    if factor is not None and abs(factor - ratio) > 1e-6 * ratio:
        # transformers 4 uses the ratio, 5 the factor.
        raise ModelFormatError(
            f"{section.where}: factor is {factor:g}, but max_position_embeddings / {_TRAINED_LENGTH} = "
            f"{max_positions} / {original} = {ratio:g}. Remove the wrong one."
        )
    parameters = {"factor": ratio, _TRAINED_LENGTH: original}
    for key in ("short_factor", "long_factor"):
        divisors = section.get(key)
        if not isinstance(divisors, list) or not all(is_number(d) and d > 0 for d in divisors):
            raise section.error(key, "a list of positive numbers")
        parameters[key] = tuple(float(d) for d in divisors)
    if section.get("attention_factor") is not None:
        parameters["attention_factor"] = section.number("attention_factor")
    return parameters


_PARAMETERS = {
    "none": lambda config, section, max_positions: {},
    "linear": _factor,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
