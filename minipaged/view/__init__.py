"""Pictures of what the engine does: drawn from its live state, or from a trace that it recorded.

    scheduler, Engine, LLM ──snapshot──▶ Snapshot ──▶ draw_blocks      block tables and pool, as SVG
    engine.start_trace() ──▶ Trace ──▶ Step (a Snapshot) ┘
                               ├─▶ draw_timeline                       who got how many tokens, as SVG
                               ├─▶ Trace.to_html                       a page with a slider over the steps
                               └─▶ Trace.to_chrome                     a file for Perfetto
    a kernel's accesses ──▶ draw_threads                               threads, addresses, sectors, as SVG

Everything here is plain Python and reads only; nothing of the engine depends on it.
"""

from importlib import import_module

_EXPORTS = {
    "Trace": "minipaged.view.trace",
    "Recorder": "minipaged.view.recorder",
    "Snapshot": "minipaged.view.state",
    "snapshot": "minipaged.view.state",
    "draw_blocks": "minipaged.view.blocks",
    "draw_timeline": "minipaged.view.timeline",
    "draw_threads": "minipaged.view.threads",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    try:
        module = _EXPORTS[name]
    except KeyError:
        raise AttributeError(f"module 'minipaged.view' has no attribute {name!r}") from None
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
