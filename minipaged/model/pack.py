"""Making packed models (see :mod:`~minipaged.model.packed_model`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minipaged.errors import ConfigError, ModelFormatError
from minipaged.model import catalog, packed_file
from minipaged.model.architectures import load_weights
from minipaged.model.loader import LoadedModel, load_model
from minipaged.model.packed_model import TOKENIZER, place, sources_digest, stamps
from minipaged.model.packed_weights import empty_weights, layout_digest, named_arrays
from minipaged.model.weight_packer import WeightPacker

MAX_ARRAYS = 1 << 20


def pack_model(name: str, weight_format: str, output: Path | None = None, progress: bool | None = None) -> Path:
    """Pack a model into one file and return where it is.

    Args:
        name: as for :func:`~minipaged.model.loader.load_model`.
        weight_format: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``.
        output: the file; ``None`` puts it where later starts find it by themselves.
        progress: show a progress bar; ``None``: if standard error is a terminal.

    The weights are in memory once, packed.

    Raises:
        ModelError: as :func:`~minipaged.model.loader.load_model`, or the model changed meanwhile.
        ConfigError: the model is packed already, or the file cannot be written.
    """
    from tqdm import tqdm

    source = catalog.resolve(name)
    before = stamps(source)
    model = load_model(name)
    if model.packed_as:
        raise ConfigError(f"{source} is a packed model ({model.packed_as}) already; pack what it was made from.")
    output = place(source, weight_format) if output is None else output
    expected = named_arrays(empty_weights(model.config, weight_format, MAX_ARRAYS))
    num_bytes = sum(array.nbytes for array in expected.values())
    with tqdm(
        total=2 * num_bytes,  # packed, then written
        desc=f"packing {model.name} as {weight_format}",
        unit="B",
        unit_scale=True,
        disable=None if progress is None else not progress,
    ) as bar:
        weights = load_weights(model.config, model.source, _ReportingPacker(weight_format, bar.update))
        if stamps(source) != before:
            raise ModelFormatError(f"{source} was changed while it was read; pack it again.")
        tokenizer_json = np.frombuffer(model.tokenizer.backend.to_str().encode(), np.uint8)
        arrays = {TOKENIZER: tokenizer_json, **named_arrays(weights)}
        packed_file.write(output, _header(model, weight_format, before), arrays, bar.update)
        bar.update(bar.total - bar.n)
    return output


class _ReportingPacker(WeightPacker):
    """Tells the size of each matrix that it packs, or starts to."""

    def __init__(self, weight_format: str, report: packed_file.Report):
        super().__init__(weight_format)
        self._report = report

    def __call__(self, matrix: np.ndarray, role: str):
        packed = super().__call__(matrix, role)
        self._report(packed.nbytes)
        return packed

    def start(self, num_rows: int, num_columns: int, role: str):
        target = super().start(num_rows, num_columns, role)
        if target is not None:
            self._report(target.packed.nbytes)
        return target


def _header(model: LoadedModel, weight_format: str, source_stamps: dict) -> dict:
    """What stands beside the arrays; the keys are those that :class:`PackedModel` reads."""
    tokenizer, template = model.tokenizer, model.chat_template
    return {
        "weight_format": weight_format,
        "sources": sources_digest(),
        "layout": layout_digest(weight_format),
        "stamps": source_stamps,
        "config": model.hf_config,
        "generation_config": model.generation_config,
        "tokenizer": {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_ids": list(tokenizer.eos_token_ids),
            "prepend_bos": tokenizer.prepend_bos,
        },
        "chat_template": template
        and {"templates": template.templates, "special_tokens": dict(template.special_tokens)},
    }
